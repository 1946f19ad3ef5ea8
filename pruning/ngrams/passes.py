"""Passes over a corpus's text: count n-grams, or score every document by its n-grams.

Both map a function of a shard over local processes. What one pass leaves for the next lies in files
(parts.py), so that a pass that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pyarrow as pa

from pruning import artefact, derived, parallel, progress
from pruning.artefact import Artefact, Build
from pruning.corpus import Corpus, doc_ids, load_corpus
from pruning.ngrams.hashing import Features, NGrams, hashed_ngrams
from pruning.ngrams.pieces import Pieces
from pruning.parts import Parts
from pruning.scorers import EMPTY, Column
from pruning.scoring.batches import STATUSES
from pruning.selection import Selection, load_selection

_READ = 4096  # documents at a time
_TEXT = Features()

Values = Callable[[NGrams], Mapping[str, np.ndarray]]
"""The columns of some documents, float64 [documents] each. Crosses to other processes."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """The documents of a corpus, or those of a selection of it."""

    corpus: Corpus
    within: Selection | None = None

    @classmethod
    def open(cls, corpus: str, within: str | None = None) -> Texts:
        """Raises ArtefactError when they do not belong together."""
        opened = load_corpus(corpus)
        selection = None if within is None else load_selection(within, opened.artefact)
        return cls(opened, selection)

    def inputs(self, name: str) -> dict[str, Artefact]:
        """Both, for a manifest, under `name` and `name_within`."""
        inputs = {name: self.corpus.artefact}
        return inputs if self.within is None else inputs | {f"{name}_within": self.within.artefact}

    @property
    def documents(self) -> int:
        return self.corpus.artefact.manifest.rows if self.within is None else self.within.documents

    def rows(self, shard: int) -> np.ndarray:
        """The shard's documents as row numbers, int64 ascending."""
        if self.within is None:
            return np.arange(self.corpus.documents(shard))
        return self.within.rows(shard)

    def read(
        self, shard: int, rows: np.ndarray, features: Features | Pieces = _TEXT
    ) -> Iterator[pa.Array]:
        """What the features are made of in some rows (ascending) of a shard, a few at a time."""
        first = 0
        for batch in self.corpus.iter_batches(shard, [features.column], _READ):
            begin, end = np.searchsorted(rows, [first, first + batch.num_rows])
            inside = rows[begin:end] - first
            first += batch.num_rows
            if len(inside):
                yield from features.batches(batch.column(0).take(pa.array(inside)))


def count(build: Build, name: str, texts: Texts, features: Features, workers: int) -> np.ndarray:
    """How often each bucket occurs in all documents, int64 [buckets].

    Args:
      build: the artefact that it is for.
      name: of the parts, one per shard, that are left there until it is finished.
      workers: local processes; 0 for one per CPU.
    """
    parts = Parts(build, name, texts.corpus.num_shards)
    with progress.track(f"count {name}", texts.documents, "documents") as task:
        parallel.run_shards(
            functools.partial(_count_shard, parts, texts, features),
            parts.missing(),
            workers,
            lambda documents, _: task.advance(documents),
        )
    counts = (np.frombuffer(parts.read(k), np.int64) for k in range(parts.count))
    return sum(counts, np.zeros(features.buckets, np.int64))


def _count_shard(
    parts: Parts, texts: Texts, features: Features, shard: int, report: parallel.Report
) -> None:
    counts = np.zeros(features.buckets, np.int64)
    for batch in texts.read(shard, texts.rows(shard)):
        counts += hashed_ngrams(batch, features).counts(features.buckets)
        report(len(batch), len(batch))
    parts.write(shard, counts.tobytes())


def score(
    build: Build,
    texts: Texts,
    features: Features | Pieces,
    values: Values,
    columns: Mapping[str, Column],
    workers: int,
) -> None:
    """Writes every shard of a score set. A document without one n-gram has the status "empty"."""
    with progress.track("score", texts.documents, "documents") as task:
        parallel.run_shards(
            functools.partial(_score_shard, build, texts, features, values, columns),
            build.pending(),
            workers,
            lambda documents, _: task.advance(documents),
        )


def _score_shard(
    build: Build,
    texts: Texts,
    features: Features | Pieces,
    values: Values,
    columns: Mapping[str, Column],
    shard: int,
    report: parallel.Report,
) -> None:
    started = time.perf_counter()
    status = derived.status_within(texts.corpus, shard, texts.within)
    rows = texts.rows(shard)
    found: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    lengths: list[np.ndarray] = []
    for batch in texts.read(shard, rows, features):
        grams = features.ngrams(batch)
        for name, column in values(grams).items():
            found[name].append(column)
        lengths.append(grams.lengths)
        report(len(batch), len(batch))
    whole = {name: np.zeros(len(status)) for name in columns}
    for name, parts in found.items():
        whole[name][rows] = np.concatenate([np.zeros(0), *parts])
    status[rows[np.concatenate([np.zeros(0), *lengths]) == 0]] = STATUSES.index(EMPTY)
    seconds = time.perf_counter() - started
    derived.write(build, shard, texts.corpus, columns, status, whole, seconds)


def sample(
    texts: Texts, documents: int, draws: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """The documents with the lowest draws: rows int64 ascending, shard by shard.

    Args:
      documents: how many at most.
      draws: int64 ids [n] -> float64 [n]; infinity leaves a document out.
    """
    found = []
    for shard in range(texts.corpus.num_shards):
        rows = texts.rows(shard)
        draw = draws(doc_ids(shard, rows))
        some = np.isfinite(draw)
        found.append((np.full(some.sum(), shard), rows[some], draw[some]))
    shards, rows, draw = (np.concatenate(column) for column in zip(*found, strict=True))
    lowest = np.argsort(draw, kind="stable")[:documents]
    return [np.sort(rows[lowest][shards[lowest] == k]) for k in range(texts.corpus.num_shards)]


def finished(build: Build) -> Artefact | None:
    """The score set, where it is finished already."""
    return artefact.load(build.path, derived.KIND) if build.finished else None
