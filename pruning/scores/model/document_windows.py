"""Several windows of a document, each judged separately, and their aggregate.

Choices
- Windows follow each other without overlap from the beginning of the document. Each is as long as
  the prompt allows; the last one is the remainder.
- The mean weights windows by their tokens. Log-probabilities are averaged as probabilities.
- Every column is aggregated separately: the minima of two columns may be of different windows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Literal

import numpy as np
import pyarrow as pa

from models.packing import offsets_of
from pruning.scores.model.scorer import ScoreError, Scores
from pruning.scores.model.stored_questions import Spans
from pruning.scores.score_set import Column

Aggregate = Literal["mean", "min", "max"]

TRUNCATED = Column(pa.int32(), "tokens at the document's end that the model was not shown")


def require_windows(windows: int | None, scorer: str) -> None:
    """Raise ScoreError if a number of windows is not positive."""
    if windows is not None and windows < 1:
        raise ScoreError(f"{scorer}.windows is at least 1, or None for all, not {windows}.")


def with_windows(columns: Mapping[str, Column], keep: bool) -> dict[str, Column]:
    """Return the columns and, with `keep`, those with the values of each window."""
    if not keep:
        return dict(columns)
    each = {
        f"{name}_windows": Column(pa.list_(column.type), f"{name} of each window")
        for name, column in columns.items()
        if name != "truncated_tokens"
    }
    tokens = Column(pa.list_(pa.int32()), "tokens of the document in each window")
    return {**columns, **each, "window_tokens": tokens}


def judged(
    spans: Spans,
    values: Mapping[str, np.ndarray],
    logarithms: Container[str],
    how: Aggregate,
    keep: bool,
) -> Scores:
    """Return the columns of documents, aggregated from those of their windows.

    Args:
      spans: the windows.
      values: column -> float [windows].
      logarithms: names of the columns that are log-probabilities.
      how: kind of aggregation.
      keep: return the values of each window as well.
    """
    counts = np.bincount(spans.document, minlength=len(spans.lost))
    single = len(counts) == 0 or counts.max(initial=0) <= 1
    columns: dict[str, np.ndarray | pa.Array] = {}
    for name, of_windows in values.items():
        if single:
            column = np.full(len(counts), np.nan, np.float32)
            column[spans.document] = of_windows
        else:
            logs = name in logarithms
            column = aggregated(of_windows, spans.tokens, counts, how, logarithms=logs)
        columns[name] = column.astype(np.float32)
    columns["truncated_tokens"] = spans.lost.astype(np.int32)
    if keep:
        for name, of_windows in values.items():
            columns[f"{name}_windows"] = lists(of_windows, counts, pa.float32())
        columns["window_tokens"] = lists(spans.tokens, counts, pa.int32())
    return Scores(columns)


def aggregated(
    values: np.ndarray, weights: np.ndarray, counts: np.ndarray, how: Aggregate, *, logarithms: bool
) -> np.ndarray:
    """Return a value per document, float64 [documents]; NaN for documents without windows.

    Args:
      values: [windows], in the order of documents.
      weights: [windows], their tokens.
      counts: int64 [documents], windows of each.
      how: kind of aggregation, see the module's docstring.
      logarithms: the values are log-probabilities.
    """
    found = np.full(len(counts), np.nan)
    some = counts > 0
    starts = offsets_of(counts)[:-1][some]
    if not len(starts):
        return found
    values = values.astype(np.float64)
    if how == "min":
        found[some] = np.minimum.reduceat(values, starts)
    elif how == "max":
        found[some] = np.maximum.reduceat(values, starts)
    else:
        share = weights / np.repeat(np.add.reduceat(weights, starts), counts[some])
        if logarithms:
            found[some] = np.logaddexp.reduceat(values + np.log(share), starts)
        else:
            found[some] = np.add.reduceat(values * share, starts)
    return found


def lists(values: np.ndarray, counts: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return the values of each document's windows as Arrow lists."""
    offsets = pa.array(offsets_of(counts), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values, kind))
