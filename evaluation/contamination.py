"""Contamination: documents of a corpus that repeat n-grams of an evaluation set.

    python -m evaluation contamination --gin_file=configs/evaluate/contamination.gin \\
        --gin.CORPUS=runs/c4/corpus --gin.OUTPUT=runs/c4/contamination

writes a score set: for every document the number of its n-grams that occur in an evaluation set,
over all sets and for each. A selection by threshold of that column drops such documents
(configs/select/uncontaminated.gin). The manifest's summary says how much of every set was found.

Choices
- An n-gram is n words in a row, 13 by default (Brown et al., arXiv 2005.14165, appendix C): runs of
  letters and digits in lower case. Punctuation and white space are ignored.
- N-grams are 64-bit hashes of the whole n-gram: none is missed, and a chance match is expected once
  in 2**64 / (n-grams of the corpus x n-grams of the sets) corpora.
- A text with fewer than n words has no n-gram and cannot be found. Such texts are counted.
  Boilerplate that many examples of a set share counts like any other text.
- The sets' n-grams are indexed once; local processes read the index from one file.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import gzip
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard
from etils import epath

from evaluation.tasks import sources
from evaluation.tasks.suite import TASKS
from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.text.hashing import SCHEME, Features, ngram_hashes
from pruning.scores.text.texts import Texts
from pruning.store import late, parallel, progress
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.atomic import entries
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.parallel import require_processes

NAME = "Contamination"
TASK = "task:"

_TABLE_BITS = 24
_MOST_SETS = 63


class ContaminationError(ValueError):
    """The evaluation sets cannot be used; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class ContaminationConfig:
    """Settings of `contamination`.

    Attributes:
      corpus: the corpus.
      output: the score set's directory.
      sets: name -> its examples: JSON lines or JSON (.gz, .zst, or plain; glob patterns are
        allowed), every text of which is indexed; or "task:NAME/SPLIT", a task of evaluation/tasks.
      fields: name -> the only fields of its examples that are indexed, dotted where nested.
      data: directory of the tasks' original files; or "tfds:DIRECTORY".
      within: a selection of the corpus; other documents get the status "not_selected".
      n: words of an n-gram.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    sets: Mapping[str, str]
    fields: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    data: str | None = None
    within: str | None = None
    n: int = 13
    workers: int = 0

    def __post_init__(self) -> None:
        require_processes(self.workers)
        if self.n < 1 or not 0 < len(self.sets) <= _MOST_SETS:
            raise ValueError(f"n must be at least 1; sets are wanted, at most {_MOST_SETS}.")
        if unknown := sorted(set(self.fields) - set(self.sets)):
            raise ValueError(f"Contamination.fields names {unknown[0]!r}, .sets does not.")
        if bad := [name for name in self.sets if not name.isidentifier()]:
            raise ValueError(f"a set's name becomes a column's: {bad[0]!r} is no identifier.")


CONFIGURABLES: dict[str, type] = {NAME: ContaminationConfig}


@late.stage
def run(config: ContaminationConfig) -> list[str]:
    """Make the score set, or finish it, and return a line for every evaluation set."""
    scores = make(config)
    lines = [
        f"{name}: {found['documents']:,} documents of the corpus repeat it; "
        f"{found['contaminated']:,} of {found['examples']:,} examples are found"
        + (f" ({found['too_short']:,} are shorter than {config.n} words)")
        for name, found in scores.manifest.summary["sets"].items()
    ]
    return [*lines, f"{scores.path}: scores {scores.manifest.digest[:12]}"]


def make(config: ContaminationConfig) -> Artifact:
    """Make and return the score set.

    Raises:
      ArtifactError: an input is missing, or inputs do not belong together.
      ContaminationError: an evaluation set cannot be read.
    """
    texts = Texts.open(config.corpus, config.within)
    examples = {name: list(_texts(config, name)) for name in config.sets}
    digests = {
        name: hashlib.sha256(json.dumps(one, ensure_ascii=False).encode()).hexdigest()
        for name, one in examples.items()
    }
    columns = columns_of(list(config.sets), config.n)
    identity = {"n": config.n, "hashes": SCHEME, "sets": digests}
    build = score_set.begin(config.output, identity, texts.inputs("corpus"), texts.corpus, columns)
    if build.finished:
        return load_artifact(build.path, score_set.KIND)
    index = Index.of(examples, config.n)
    stored = Parts(build, "index", 1)
    if stored.missing():
        stored.write(0, index.to_bytes())
    seen = Parts(build, "seen", texts.corpus.num_shards)
    shards = sorted({*build.pending(), *seen.missing()})
    with progress.track("contamination", texts.documents, "documents") as task:
        parallel.run_shards(
            functools.partial(_shard, build, texts, config.n, stored, seen, columns),
            shards,
            config.workers,
            lambda documents, _: task.advance(documents),
        )
    found = np.zeros(len(index.grams), bool)
    documents = np.zeros(len(examples), np.int64)
    for shard in range(seen.count):
        counts, bits = _unpacked(seen.read(shard), len(examples), len(found))
        found |= bits
        documents += counts
    summary = {"n": config.n, "sets": index.summary(found, documents.tolist())}
    scores = score_set.finish(build, "contamination", columns, summary)
    assert scores is not None  # every shard was ours
    return scores


def columns_of(sets: Sequence[str], n: int) -> dict[str, Column]:
    count = "how many of the document's n-grams stand in "
    return {
        "contaminated_ngrams": Column(pa.int32(), f"{count}any of the sets (n = {n})"),
        "ngrams": Column(pa.int32(), "how many n-grams the document has"),
        **{f"contaminated_{name}": Column(pa.int32(), f"{count}{name}") for name in sets},
    }


# --------------------------------------------------------------------------------------------------
# The evaluation sets


def _texts(config: ContaminationConfig, name: str) -> Iterator[list[str]]:
    """Yield the texts of every example of a set."""
    where = config.sets[name]
    if where.startswith(TASK):
        task, _, split = where.removeprefix(TASK).partition("/")
        if task not in TASKS or config.data is None:
            raise ContaminationError(
                f"{name}: {where!r} wants a task of evaluation/tasks/suite.py, and "
                "Contamination.data."
            )
        rows: Any = sources.read(TASKS[task].dataset, split or "validation", config.data)
    else:
        rows = _rows(where)
    fields = config.fields.get(name)
    empty = True
    for row in rows:
        empty = False
        chosen = row if fields is None else [_field(row, field, name) for field in fields]
        yield list(_strings(chosen))
    if empty:
        raise ContaminationError(f"{name}: {where} holds no example.")


def _rows(pattern: str) -> Iterator[Any]:
    path = epath.Path(pattern)
    wild = any(c in path.name for c in "*?[") and not path.exists()
    files = [path]
    if wild:  # only the last part is a pattern, whatever the directory's name
        files = [f for f in entries(path.parent, "") if fnmatch.fnmatchcase(f.name, path.name)]
    for file in files:
        if not file.exists():
            raise ContaminationError(f"the evaluation set {file} does not exist.")
        content = file.read_bytes()
        try:
            if file.suffix == ".gz":
                content = gzip.decompress(content)
            elif file.suffix == ".zst":
                content = zstandard.ZstdDecompressor().stream_reader(content).read()
            text = content.decode("utf-8-sig")
            if ".json" in file.suffixes:
                found = json.loads(text)
                yield from found if isinstance(found, list) else [found]
            else:
                yield from (json.loads(line) for line in text.split("\n") if line.strip())
        except (OSError, EOFError, ValueError, RecursionError, zstandard.ZstdError) as error:
            raise ContaminationError(f"{file} cannot be read as JSON ({error}).") from error


def _field(row: Any, field: str, name: str) -> Any:
    for part in field.split("."):
        if not isinstance(row, dict) or part not in row:
            raise ContaminationError(f"{name}: an example has no field {field!r}: {str(row)[:80]}.")
        row = row[part]
    return row


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


@dataclasses.dataclass(frozen=True)
class Index:
    """The n-grams of the evaluation sets.

    Attributes:
      grams: uint64 [m], ascending, each once.
      sets: int64 [m]: bit s says that the n-gram is in set s.
      names: of the sets.
      occurrences: per set (example, gram) pairs, int64 [pairs, 2], gram as its place in `grams`.
      examples: per set, how many examples it has.
    """

    grams: np.ndarray
    sets: np.ndarray
    names: tuple[str, ...] = ()
    occurrences: tuple[np.ndarray, ...] = ()
    examples: tuple[int, ...] = ()

    @classmethod
    def of(cls, examples: Mapping[str, Sequence[Sequence[str]]], n: int) -> Index:
        """Index n-grams. Args: examples: set -> example -> its texts."""
        hashes, owners = [], []
        for texts in examples.values():
            owner = np.repeat(np.arange(len(texts)), [len(one) for one in texts])
            flat = pa.array([text for one in texts for text in one], pa.large_string())
            found, offsets = ngram_hashes(flat, n, punctuation=False)
            hashes.append(found)
            owners.append(np.repeat(owner, np.diff(offsets)))
        grams = np.unique(np.concatenate(hashes))
        sets = np.zeros(len(grams), np.int64)
        occurrences = []
        for s, (found, owner) in enumerate(zip(hashes, owners, strict=True)):
            place = np.searchsorted(grams, found)
            sets[place] |= np.int64(1) << np.int64(s)
            occurrences.append(np.stack([owner, place], axis=1).astype(np.int64))
        sizes = tuple(len(texts) for texts in examples.values())
        return cls(grams, sets, tuple(examples), tuple(occurrences), sizes)

    def to_bytes(self) -> bytes:
        return np.stack([self.grams, self.sets.view(np.uint64)]).tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> Index:
        """Return an index with `grams` and `sets` only, which is what `find` needs."""
        grams, sets = np.frombuffer(content, np.uint64).reshape(2, -1)
        return cls(grams, sets.view(np.int64))

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """By the low bits of a hash, whether there can be such an n-gram: most are ruled out."""
        table = np.zeros(1 << _TABLE_BITS, bool)
        table[(self.grams & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)] = True
        return table

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return the place of every hash in `grams`, int64, -1 where it is absent."""
        place = np.full(len(hashes), -1)
        low = (hashes & np.uint64((1 << _TABLE_BITS) - 1)).astype(np.int64)
        some = np.flatnonzero(self._table[low])
        if len(some):
            near = np.minimum(np.searchsorted(self.grams, hashes[some]), len(self.grams) - 1)
            same = self.grams[near] == hashes[some]
            place[some[same]] = near[same]
        return place

    def summary(self, seen: np.ndarray, documents: Sequence[int]) -> dict[str, dict[str, int]]:
        """Return counts of what was found of every set.

        Args:
          seen: bool [m], which n-grams the corpus has.
          documents: per set, how many documents have one of its n-grams.
        """
        found = {}
        for s, name in enumerate(self.names):
            owner, place = self.occurrences[s].T
            found[name] = {
                "examples": self.examples[s],
                "too_short": self.examples[s] - len(np.unique(owner)),
                "contaminated": len(np.unique(owner[seen[place]])),
                "ngrams": len(np.unique(place)),
                "ngrams_found": len(np.unique(place[seen[place]])),
                "documents": documents[s],
            }
        return found


# --------------------------------------------------------------------------------------------------
# The corpus


def _shard(
    build: Build,
    texts: Texts,
    n: int,
    stored: Parts,
    seen: Parts,
    columns: Mapping[str, Column],
    shard: int,
    report: parallel.Report,
) -> None:
    started = time.perf_counter()
    index = Index.from_bytes(stored.read(0))
    names = list(columns)[2:]
    status = score_set.status_within(texts.corpus, shard, texts.within)
    values = {name: np.zeros(len(status), np.int64) for name in columns}
    found = np.zeros(len(index.grams), bool)
    rows = texts.rows(shard)
    first = 0
    for batch in texts.read(shard, rows, Features()):
        some = rows[first : first + len(batch)]
        first += len(batch)
        hashes, offsets = ngram_hashes(batch, n, punctuation=False)
        place = index.find(hashes)
        hit = np.flatnonzero(place >= 0)
        document = np.repeat(np.arange(len(batch)), np.diff(offsets))[hit]
        values["ngrams"][some] = np.diff(offsets)
        values["contaminated_ngrams"][some] = np.bincount(document, minlength=len(batch))
        for s, name in enumerate(names):
            of_set = (index.sets[place[hit]] >> np.int64(s)) & 1
            values[name][some] = np.bincount(document, of_set, minlength=len(batch))
        found[place[hit]] = True
        report(len(batch), len(batch))
    counts = np.asarray([np.count_nonzero(values[name]) for name in names], np.int64)
    seen.write(shard, counts.tobytes() + np.packbits(found).tobytes())
    if shard in build.pending():
        seconds = time.perf_counter() - started
        score_set.write(build, shard, texts.corpus, columns, status, values, seconds)


def _unpacked(content: bytes, sets: int, grams: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.frombuffer(content, np.int64, sets)
    bits = np.frombuffer(content, np.uint8, offset=8 * sets)
    return counts, np.unpackbits(bits, count=grams).astype(bool)
