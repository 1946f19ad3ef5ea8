"""Import of scores from files, joined to the documents of a corpus, as a score set.

    python -m pruning import --gin_file=configs/score/import.gin --gin.CORPUS=... --gin.FILES=...

The files (Parquet, JSON lines, CSV, TSV) hold a key in every row: the document's id, the hash of
its text or the text itself, or any metadata column of the corpus, such as its url.

    files  --by hash of the key-->  partitions  <--by hash of the key--  corpus
                                        | join
                                        v
                           scores by corpus shard  -->  score set

Choices
- Both sides are divided by a hash of the key, and one partition is joined at a time. Memory is that
  of a few million rows, whatever the size of either side.
- Keys are compared by 128 bits of their hash (integers by value), not by their bytes.
- A key that occurs twice in the files is an error, because its score is ambiguous. So is a key that
  several documents share, except for texts: copies of a text share its score. `shared_keys` allows
  it for other keys.
- Documents without a row have the status "not_found", those whose row holds no number "no_value".
  Rows without a document are counted in the summary. It is an error if no row matches.
- Each pass writes its parts to the unfinished work, from which an interrupted import resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pruning.corpus.layout import column_of, doc_ids, rows_of, shards_of
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.sources.identity import identify
from pruning.scores import score_set
from pruning.scores.imported.tables import Tables, key_hashes, text_hashes
from pruning.scores.score_set import ALL_STATUSES, EMPTY, NO_VALUE, NOT_FOUND, OK, Column
from pruning.store import late, parallel, progress, shuffle
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.manifest import ArtifactError
from pruning.store.parallel import require_processes

NAME = "Import"

_PARTITION = 1 << 21  # target number of rows of a partition
_MOST_PARTITIONS = 4096
_ROW_BYTES = 32  # lower estimate of a row's size in a file
_SHOWN = 60  # largest number of characters of a key in a message

TEXT = "text"
_INTEGERS = ("doc_id", "text_hash", TEXT)

_OK, _EMPTY, _NOT_FOUND, _NO_VALUE = map(ALL_STATUSES.index, (OK, EMPTY, NOT_FOUND, NO_VALUE))
_DOCUMENT = np.dtype([("key", "<u8", (2,)), ("doc_id", "<i8")])


class JoinError(ValueError):
    """Error for rows and documents that cannot be joined."""


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Settings of `import`.

    Attributes:
      corpus: directory of the corpus whose documents are scored.
      output: directory of the score set.
      files: Parquet, JSON lines (.jsonl, .json.gz, ...), CSV or TSV; files, directories or
        patterns. The first row of a CSV file names its columns.
      columns: names of the numeric columns in the files; dotted where they are nested. The score
        set has them under the last part of their names.
      by: kind of key: "doc_id", "text_hash", "text" (which is hashed), or a metadata column of the
        corpus, such as "url".
      key: name of the key's column in the files; None for the name in `by`.
      shared_keys: "error", or "share" if several documents may have one key and its scores.
      workers: number of local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    by: str = "url"
    key: str | None = None
    shared_keys: Literal["error", "share"] = "error"
    workers: int = 0

    def __post_init__(self) -> None:
        require_processes(self.workers)
        names = [column_of(name) for name in self.columns]
        if not names or len(set(names)) < len(names) or {"doc_id", "status"} & set(names):
            raise ValueError(
                f"columns: {', '.join(self.columns) or 'none'}. Name at least one column of the "
                'files, each once, and none "doc_id" or "status".'
            )

    @property
    def tables(self) -> Tables:
        return Tables(self.files, self.key or self.by, self.columns)

    @property
    def shares(self) -> bool:
        """True if documents may share a key."""
        return self.shared_keys == "share" or self.by in ("text_hash", TEXT)


CONFIGURABLES: dict[str, type] = {NAME: ImportConfig}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All inputs of a worker for any part of any pass.

    Attributes:
      files: files of the tables.
      partitions: number of partitions of the keys.
      columns: columns of the score set.
    """

    config: ImportConfig
    build: Build
    corpus: Corpus
    files: Sequence[str]
    partitions: int
    columns: dict[str, Column]

    @property
    def row(self) -> np.dtype:
        """dtype of a row of a file."""
        width = (len(self.columns),)
        places = [("file", "<i4"), ("row", "<i8")]
        return np.dtype([("key", "<u8", (2,)), *places, ("values", "<f8", width)])

    @property
    def scored(self) -> np.dtype:
        """dtype of a document that has a row."""
        return np.dtype([("doc_id", "<i8"), ("values", "<f8", (len(self.columns),))])

    @property
    def rows(self) -> Parts:
        return Parts(self.build, "rows", len(self.files))

    @property
    def documents(self) -> Parts:
        return Parts(self.build, "documents", self.corpus.num_shards)

    @property
    def joined(self) -> Parts:
        return Parts(self.build, "joined", self.partitions)

    @property
    def counted(self) -> Parts:
        return Parts(self.build, "counted", self.partitions, beside=(self.joined,))


@late.stage
def run(config: ImportConfig) -> Artifact:
    """Make the score set, or resume an interrupted run.

    Raises:
      SourceError: a file cannot be read.
      JoinError: a key occurs twice, or no row matches a document.
      ArtifactError: the corpus has no such column.
      ConfigurationChanged: the output holds work of other settings or files.
    """
    plan = prepare(config)
    if plan.build.finished:
        return load_artifact(plan.build.path, score_set.KIND)
    for name, total, work, parts, unit in (
        ("read files", None, _read_file, plan.rows, "rows"),
        ("read corpus", plan.corpus.artifact.manifest.rows, _read_shard, plan.documents, "rows"),
        ("join", plan.partitions, _join, plan.counted, "partitions"),
    ):
        _pass(name, total, unit, functools.partial(work, plan), parts.missing(), config.workers)
    summary = _summary(plan)
    write = functools.partial(_write_shard, plan)
    _pass("write", plan.corpus.num_shards, "shards", write, plan.build.pending(), config.workers)
    scores = score_set.finish(plan.build, "imported", plan.columns, summary)
    assert scores is not None  # this process had every shard
    return scores


def _pass(
    name: str,
    total: int | None,
    unit: str,
    work: Callable[[int, parallel.Report], None],
    missing: Sequence[int],
    workers: int,
) -> None:
    with progress.track(name, total, unit) as task:
        parallel.run_shards(work, missing, workers, lambda done, _: task.advance(done))


def prepare(config: ImportConfig) -> Plan:
    """Open the inputs and claim the output directory."""
    corpus = load_corpus(config.corpus)
    if config.by not in (*_INTEGERS, *corpus.metadata):
        raise ArtifactError(
            f"{config.corpus} has no column {config.by!r} to join by; it has doc_id, text_hash, "
            f"text{''.join(', ' + name for name in corpus.metadata)}. Ingest keeps the fields that "
            "Ingest.metadata names."
        )
    tables = config.tables
    found = tables.files()
    described, sizes = identify(tables, [(file,) for file in found])  # type: ignore[arg-type]
    columns = {
        column_of(name): Column(pa.float64(), f"{name}, imported by {config.by}")
        for name in config.columns
    }
    settings = {"by": config.by, "shared_keys": config.shared_keys}
    build = score_set.begin(config.output, described | settings, {}, corpus, columns)
    likely = max(corpus.artifact.manifest.rows, sum(sizes) // _ROW_BYTES)
    partitions = min(-(-likely // _PARTITION) or 1, _MOST_PARTITIONS)
    return Plan(config, build, corpus, found, partitions, columns)


# --------------------------------------------------------------------------------------------------
# Both sides, divided by their keys


def _read_file(plan: Plan, number: int, report: parallel.Report) -> None:
    config, file = plan.config, plan.files[number]
    with plan.rows.opened(number) as sink:
        grouped = shuffle.Grouped(sink, plan.row, plan.partitions)
        for batch in config.tables.read(file, lambda _: None):
            keys = batch.keys
            if config.by == TEXT:
                keys = text_hashes(keys, file)
            records = np.zeros(len(keys), plan.row)
            records["key"] = key_hashes(keys, config.by in _INTEGERS, file, batch.first)
            records["file"], records["values"] = number, batch.values
            records["row"] = batch.first + np.arange(len(keys))
            known = pc.is_valid(keys).to_numpy(zero_copy_only=False)
            # Rows without a key have row number -1 and are in the first partition.
            records["row"][~known] = -1
            grouped.add(records, np.where(known, _partition(plan, records["key"]), 0))
            report(len(keys), 0)
        grouped.finish()


def _read_shard(plan: Plan, shard: int, report: parallel.Report) -> None:
    by = plan.config.by
    column = "text_hash" if by == TEXT else by
    keys = plan.corpus.columns(shard, [column])[column].combine_chunks()
    if isinstance(keys, pa.ChunkedArray):  # of an empty shard
        keys = pa.concat_arrays(keys.chunks) if keys.num_chunks else pa.array([], keys.type)
    known = np.flatnonzero(pc.is_valid(keys).to_numpy(zero_copy_only=False))
    where = f"{plan.corpus.artifact.path}, column {column}"
    records = np.zeros(len(keys), _DOCUMENT)
    records["key"] = key_hashes(keys, by in _INTEGERS, where, 0)
    records["doc_id"] = doc_ids(shard, np.arange(len(keys)))
    records = records[known]
    with plan.documents.opened(shard) as sink:
        grouped = shuffle.Grouped(sink, _DOCUMENT, plan.partitions)
        grouped.add(records, _partition(plan, records["key"]))
        grouped.finish()
    report(len(keys), 0)


def _partition(plan: Plan, keys: np.ndarray) -> np.ndarray:
    return (keys[:, 0] % np.uint64(plan.partitions)).astype(np.int64)


# --------------------------------------------------------------------------------------------------
# One partition


def _join(plan: Plan, partition: int, report: parallel.Report) -> None:
    rows = _gathered(plan.rows, plan.row, partition)
    documents = _gathered(plan.documents, _DOCUMENT, partition)
    keyed = rows["row"] >= 0
    counts = Counter(rows=len(rows), rows_without_key=int((~keyed).sum()))
    rows = rows[keyed]
    row_code, document_code = _codes(rows["key"], documents["key"])
    size = len(rows) + len(documents)
    if (twice := _twice(row_code, size)) is not None:
        raise JoinError(_rows_twice(plan, rows[twice]))
    if not plan.config.shares and (twice := _twice(document_code, size)) is not None:
        raise JoinError(_documents_twice(plan, documents[twice]))
    row_of = np.full(size, -1)
    row_of[row_code] = np.arange(len(rows))
    found = row_of[document_code]
    matched = documents[found >= 0]
    scored = np.zeros(len(matched), plan.scored)
    scored["doc_id"] = matched["doc_id"]
    scored["values"] = rows["values"][found[found >= 0]]
    with plan.joined.opened(partition) as sink:
        grouped = shuffle.Grouped(sink, plan.scored, plan.corpus.num_shards)
        grouped.add(scored, shards_of(scored["doc_id"]))
        grouped.finish()
    counts["rows_matched"] = len(np.unique(found[found >= 0]))
    counts["rows_without_document"] = len(rows) - counts["rows_matched"]
    counts["documents_with_key"] = len(documents)
    counts["documents_matched"] = len(matched)
    plan.counted.write(partition, json.dumps(counts).encode())
    report(1, 0)


def _gathered(parts: Parts, dtype: np.dtype, bucket: int) -> np.ndarray:
    found = [parts.read_bucket(part, dtype, bucket) for part in range(parts.count)]
    return np.concatenate([np.zeros(0, dtype), *found])


def _codes(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a code for each key of two sides, uint64 [n, 2]; equal keys have equal codes."""
    keys = np.concatenate([a, b])
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    codes = np.empty(len(keys), np.int64)
    codes[order] = np.cumsum(new) - 1
    return codes[: len(a)], codes[len(a) :]


def _twice(codes: np.ndarray, size: int) -> np.ndarray | None:
    """Return the positions of two equal codes; None if all are distinct."""
    counts = np.bincount(codes, minlength=size)
    if counts.max(initial=0) < 2:
        return None
    return np.flatnonzero(codes == int(np.argmax(counts > 1)))[:2]


def _rows_twice(plan: Plan, rows: np.ndarray) -> str:
    places = [f"{plan.files[r['file']]}, row {r['row'] + 1}" for r in rows]
    key = _key_at(plan, int(rows[0]["file"]), int(rows[0]["row"]))
    return (
        f"the key {key!r} stands twice: {places[0]}, and {places[1]}. Leave one of them, or join "
        "by something that tells the rows apart."
    )


def _key_at(plan: Plan, number: int, row: int) -> str:
    for batch in plan.config.tables.read(plan.files[number], lambda _: None):
        if row < batch.first + len(batch.keys):
            return str(batch.keys[row - batch.first].as_py())[:_SHOWN]
    return "?"


def _documents_twice(plan: Plan, documents: np.ndarray) -> str:
    ids = documents["doc_id"]
    first, second = ids.tolist()
    by = plan.config.by
    column = plan.corpus.columns(int(shards_of(ids)[0]), [by])[by]
    key = str(column[int(rows_of(ids)[0])].as_py())[:_SHOWN]
    return (
        f"the documents {first} and {second} both have the {by} {key!r}: join by text_hash or "
        "doc_id, or set Import.shared_keys=share to give both the same scores."
    )


# --------------------------------------------------------------------------------------------------
# The score set


def _summary(plan: Plan) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for partition in range(plan.partitions):
        counts.update(json.loads(plan.counted.read(partition)))
    if not counts["documents_matched"]:
        raise JoinError(
            f"none of {counts['rows']:,} rows belongs to a document of "
            f"{plan.corpus.artifact.path}: {_examples(plan)}. Look at Import.by and Import.key, "
            f"then delete {plan.build.path}."
        )
    total = plan.corpus.artifact.manifest.rows
    return {
        "joined_by": plan.config.by,
        "rows": {
            "read": counts["rows"],
            "matched": counts["rows_matched"],
            "without_document": counts["rows_without_document"],
            "without_key": counts["rows_without_key"],
        },
        "documents": {
            "matched": counts["documents_matched"],
            "without_row": counts["documents_with_key"] - counts["documents_matched"],
            "without_key": total - counts["documents_with_key"],
        },
    }


def _examples(plan: Plan) -> str:
    by = "text_hash" if plan.config.by == TEXT else plan.config.by
    theirs = _key_at(plan, 0, 0)
    ours = "?"
    for shard in range(plan.corpus.num_shards):
        if plan.corpus.documents(shard):
            ours = str(plan.corpus.columns(shard, [by])[by][0].as_py())[:_SHOWN]
            break
    return f"the first {plan.config.tables.key} there is {theirs!r}, the first {by} here {ours!r}"


def _write_shard(plan: Plan, shard: int, report: parallel.Report) -> None:
    started = time.perf_counter()
    n_tokens = plan.corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()
    scored = _gathered(plan.joined, plan.scored, shard)
    rows = rows_of(scored["doc_id"])
    values = np.full((len(n_tokens), len(plan.columns)), np.nan)
    values[rows] = scored["values"]
    status = np.where(n_tokens > 0, _NOT_FOUND, _EMPTY).astype(np.int8)
    some = np.isfinite(scored["values"]).any(axis=1)
    status[rows] = np.where(some, _OK, _NO_VALUE)
    whole = dict(zip(plan.columns, values.T, strict=True))
    seconds = time.perf_counter() - started
    score_set.write(plan.build, shard, plan.corpus, plan.columns, status, whole, seconds)
    report(1, 0)
