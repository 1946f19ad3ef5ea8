"""Passes over a corpus's text: count n-grams, or map a function over every document.

Both map a function of a shard over local processes or Beam. The counts of a shard are an
intermediate file, so that an interrupted pass resumes where it stopped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

from pruning.scores import score_set
from pruning.scores.score_set import NOT_FINITE, STATUSES, TOO_SHORT, Column
from pruning.scores.text.hashing import NGrams
from pruning.scores.text.texts import Reads, Texts
from pruning.store import parallel, progress
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build
from pruning.store.intermediate import Parts


class Counted(Reads, Protocol):
    """Features whose n-grams are counted: `hashing.Features`, `pieces.Tokens`."""

    @property
    def buckets(self) -> int: ...

    def ngrams(self, documents: pa.Array) -> NGrams: ...


class DocumentFunction(Reads, Protocol):
    """A function of a batch of documents. It is pickled to other processes."""

    def __call__(self, documents: pa.Array) -> Mapping[str, np.ndarray]:
        """Return the columns, [documents] each; NaN for a document that has no value."""
        ...


def count(build: Build, name: str, texts: Texts, features: Counted, workers: int) -> np.ndarray:
    """Count how often each bucket occurs in all documents, int64 [buckets].

    Args:
      build: the artifact that needs the counts.
      name: of the intermediate files, one per shard, kept until the artifact is finished.
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
    parts: Parts, texts: Texts, features: Counted, shard: int, report: parallel.Report
) -> None:
    counts = np.zeros(features.buckets, np.int64)
    for batch in texts.all(shard, features):
        counts += features.ngrams(batch).counts(features.buckets)
        report(len(batch), len(batch))
    parts.write(shard, counts.tobytes())


def score(
    build: Build,
    texts: Texts,
    function: DocumentFunction,
    columns: Mapping[str, Column],
    workers: int,
) -> None:
    """Write every shard of a score set.

    A document with a NaN among its values gets the status "too_short" ("empty" where it has no
    tokens), one with an infinite value "not_finite".
    """
    with progress.track("score", texts.documents, "documents") as task:
        parallel.run_shards(
            functools.partial(_score_shard, build, texts, function, columns),
            build.pending(),
            workers,
            lambda documents, _: task.advance(documents),
        )


def _score_shard(
    build: Build,
    texts: Texts,
    function: DocumentFunction,
    columns: Mapping[str, Column],
    shard: int,
    report: parallel.Report,
) -> None:
    started = time.perf_counter()
    status = score_set.status_within(texts.corpus, shard, texts.within)
    rows = texts.rows(shard)
    found: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    for batch in texts.all(shard, function):
        values = function(batch)
        for name in columns:
            found[name].append(checked(values, name, len(batch)))
        report(len(batch), len(batch))
    whole = placed(columns, found, rows, status)
    seconds = time.perf_counter() - started
    score_set.write(build, shard, texts.corpus, columns, status, whole, seconds)


def placed(
    columns: Mapping[str, Column],
    found: Mapping[str, Sequence[np.ndarray]],
    rows: np.ndarray,
    status: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return every column for all documents, [n], from the batches of those that were read.

    Args:
      found: column -> batches, in the order of `rows`.
      rows: int [m], the documents that were read.
      status: int8 [n]; set here for documents whose value is not a number, or infinite.
    """
    whole = {}
    for name, parts in found.items():
        if pa.types.is_string(columns[name].type):
            whole[name] = np.full(len(status), None, object)
            whole[name][rows] = np.concatenate([np.zeros(0, object), *parts])
            continue
        values_of = np.concatenate([np.zeros(0), *parts])
        whole[name] = np.zeros(len(status))
        # NOTE: integer columns take no NaN; the status makes these rows null.
        whole[name][rows] = np.where(np.isfinite(values_of), values_of, 0.0)
        scored = score_set.ok(status[rows])
        status[rows[scored & np.isnan(values_of)]] = STATUSES.index(TOO_SHORT)
        status[rows[scored & np.isinf(values_of)]] = STATUSES.index(NOT_FINITE)
    return whole


def checked(values: Mapping[str, np.ndarray], name: str, documents: int) -> np.ndarray:
    """Return a column; raise ValueError unless it has one value for each document."""
    column = np.asarray(values[name]) if name in values else np.zeros(0)
    if column.shape != (documents,):
        raise ValueError(
            f"the score gave the column {name!r} for {documents} documents the "
            f"shape {column.shape}: it has to be ({documents},)."
        )
    return column


def finished(build: Build) -> Artifact | None:
    """Return the score set if it is finished already."""
    return load_artifact(build.path, score_set.KIND) if build.finished else None
