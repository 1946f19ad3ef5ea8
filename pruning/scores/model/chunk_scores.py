"""Conversion of the answers for a chunk of packed rows to rows of a score set.

Choice
- One document's NaN can affect its neighbors in a row (0 x NaN is NaN). Windows without a finite
  answer are computed again, each alone in its row. Documents that are still not finite have the
  status "not_finite"; their neighbors have their scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from models import packing
from models.packing import Windows
from pruning.scores.model.batches import Chunk, Reader, Rows
from pruning.scores.model.scorer import Documents
from pruning.scores.score_set import (
    ALL_STATUSES,
    EMPTY,
    FAILED,
    NOT_FINITE,
    NOT_SELECTED,
    OK,
    STATUSES,
    UNKNOWN,
    schema_of,
    spread,
    status_array,
)
from pruning.store.manifest import Counts

Ask = Callable[[Rows], Any]  # packed rows [batch rows, ...] -> answers [batch rows, positions, ...]

_DOUBTFUL = 64  # at least this many windows, all not finite, are not recomputed


def scores_of(chunk: Chunk, reader: Reader, ask: Ask) -> tuple[pa.Table, Counts]:
    """Return the rows of the score set for a complete chunk, and its counts.

    Args:
      chunk: all answers for its rows are there.
      reader: the reader that made it.
      ask: recomputes windows whose answers were not finite.

    Raises:
      FloatingPointError: none of many answers is finite.
    """
    windows = chunk.windows
    if chunk.answers:
        answers = chunk.packing.gather(windows, np.concatenate(chunk.answers))
    else:
        answers = np.zeros((0, *reader.prepared.answer_shape), np.float32)
    bad = _not_finite(windows, answers)
    if len(bad) == len(windows) >= _DOUBTFUL:
        raise FloatingPointError(
            f"not one of {len(windows):,} answers of shard {chunk.shard} is finite: the "
            "weights are damaged, or the model overflows in this dtype. Try "
            "--gin.Score.dtype=float32."
        )
    if len(bad):
        answers, bad = _ask_alone(reader, windows, answers, bad, ask)
    scores = reader.prepared.finish(chunk.documents, windows, answers)

    status = np.full(len(chunk.doc_ids), STATUSES.index(NOT_SELECTED), np.int8)
    of_taken = np.full(len(chunk.documents), STATUSES.index(OK), np.int8)
    for name, where in scores.statuses.items():
        of_taken[where] = STATUSES.index(name)
    of_taken[windows.document[bad]] = STATUSES.index(NOT_FINITE)
    of_taken[chunk.documents.lengths == 0] = STATUSES.index(EMPTY)
    of_taken[chunk.failed] = STATUSES.index(FAILED)
    ok = STATUSES.index(OK)
    of_taken[(of_taken == ok) & _unknown(reader, chunk.documents)] = ALL_STATUSES.index(UNKNOWN)
    status[chunk.taken] = of_taken

    # Row of `documents` for every document of the chunk; -1 for those without scores.
    row = np.full(len(chunk.doc_ids), -1)
    row[chunk.taken] = np.where(of_taken == STATUSES.index(OK), np.arange(len(of_taken)), -1)
    columns = {
        name: spread(scores.columns[name], row, column.type)
        for name, column in reader.prepared.columns.items()
    }
    table = pa.table(
        {
            "doc_id": chunk.doc_ids,
            "status": status_array(status),
            **columns,
        },
        schema=schema_of(reader.prepared.columns),
    )
    counts: Counts = {
        "documents": {
            name: int(np.sum(status == code))
            for code, name in enumerate(ALL_STATUSES)
            if np.any(status == code)
        },
        **scores.counts,
    }
    counts["tokens"] = int(chunk.documents.lengths[of_taken == STATUSES.index(OK)].sum())
    if "truncated_tokens" in scores.columns:
        cut = np.asarray(scores.columns["truncated_tokens"])[of_taken == STATUSES.index(OK)]
        counts["truncated"] = {"documents": int(np.sum(cut > 0)), "tokens": int(cut.sum())}
    return table, counts


def _unknown(reader: Reader, documents: Documents) -> np.ndarray:
    """Return a mask of documents with too large a share of unknown tokens, bool [documents]."""
    unknown = reader.corpus.vocabulary.unknown_id
    if unknown is None or reader.max_unknown >= 1:
        return np.zeros(len(documents), bool)
    before = np.concatenate([[0], np.cumsum(documents.tokens == unknown)])
    counts = np.diff(before[documents.offsets])
    return counts > reader.max_unknown * documents.lengths


def _ask_alone(
    reader: Reader, windows: Windows, answers: np.ndarray, bad: np.ndarray, ask: Ask
) -> tuple[np.ndarray, np.ndarray]:
    """Return answers with those of the windows `bad` recomputed, and those still not finite."""
    answers = answers.copy()
    for begin in range(0, len(bad), reader.batch_rows):
        some = bad[begin : begin + reader.batch_rows]
        few = windows.take(some)
        alone = packing.one_per_row(few.lengths, reader.row_lengths)
        rows = reader.empty_rows()
        for name, values in alone.fill(few).items():
            rows[name][: len(some)] = values
        side = windows.sides[-1]
        at = packing.ranges(side.offsets[some], side.lengths[some])
        answers[at] = alone.gather(few, np.asarray(ask(rows)))
    return answers, _not_finite(windows, answers)


def _not_finite(windows: Windows, answers: np.ndarray) -> np.ndarray:
    """Return the windows with an answer that is NaN or infinite, int64."""
    finite = np.isfinite(answers).all(axis=tuple(range(1, answers.ndim)))
    if windows.source is not None:
        finite |= windows.source < 0  # positions without a source are not read
    if finite.all():
        return np.zeros(0, np.int64)
    window = np.repeat(np.arange(len(windows)), windows.sides[-1].lengths)
    return np.unique(window[~finite])
