"""Scorers: what a model is asked about every document, and what becomes of its answers.

A scorer is a frozen dataclass of settings with one method,

    prepare(model, vocabulary) -> Prepared

and a `Prepared` is three functions, which the engine (pruning/scoring/engine.py) strings together:

    windows   documents -> windows of tokens                                     host, NumPy
    step      parameters, batch of packed windows -> answers per position        device, pure
    finish    documents, windows, answers -> columns of the score set            host, NumPy

Choices
- `windows` and `finish` see many documents at once as flat arrays, never one at a time: the host
  has to keep an accelerator busy.
- Windows are packed between the two by the engine; a scorer neither knows rows nor batches, so that
  a score cannot depend on them.
- What a document has no score for it gets a status for (`Scores.statuses`), never a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from pruning.scoring.packing import Windows, offsets_of, ranges

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.vocabulary import Vocabulary

OK = "ok"
EMPTY = "empty"  # no tokens
TOO_SHORT = "too_short"  # tokens, but none that this scorer could score
NOT_SELECTED = "not_selected"  # outside of the selection that was to be scored
NOT_FINITE = "not_finite"  # the model answered NaN or infinity, also when asked alone
FAILED = "failed"  # the scorer could not make windows of it, also when given it alone


class ScoreError(ValueError):
    """Scorer, model, vocabulary and settings do not go together."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """The tokens of some documents, one after the other.

    Attributes:
      tokens: integers, flat.
      offsets: int64 [documents + 1]; document d is tokens[offsets[d]:offsets[d + 1]].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]."""
        return np.diff(self.offsets)

    @classmethod
    def of(cls, documents: list[list[int]]) -> Documents:
        """From lists of ids."""
        flat = [token for document in documents for token in document]
        return cls(np.asarray(flat, np.int32), offsets_of(np.array([len(d) for d in documents])))

    def take(self, rows: np.ndarray) -> Documents:
        """Some of the documents, in the order of `rows`."""
        lengths = self.lengths[rows]
        return Documents(self.tokens[ranges(self.offsets[rows], lengths)], offsets_of(lengths))

    def cut(self, limit: int | None) -> tuple[Documents, np.ndarray]:
        """At most `limit` tokens of each, and how many tokens each lost, int64 [documents]."""
        lengths = self.lengths
        lost = np.maximum(lengths - limit, 0) if limit is not None else np.zeros_like(lengths)
        if not lost.any():
            return self, lost
        kept = lengths - lost
        return Documents(self.tokens[ranges(self.offsets[:-1], kept)], offsets_of(kept)), lost


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the score set: its Arrow type and what it means."""

    type: pa.DataType
    meaning: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `Prepared.finish` returns.

    Attributes:
      columns: name -> values, an array [documents] or an Arrow array as long; what stands beside a
        status other than "ok" is not kept.
      statuses: status -> bool [documents], where something other than "ok" is to be said.
      counts: further counts for the manifest.
    """

    columns: Mapping[str, Any]
    statuses: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A scorer made ready for one model and one vocabulary.

    Attributes:
      name: of the scorer, for the manifest.
      columns: name -> column.
      sides: the names of the windows' sides, ("encoder", "decoder") or one of them; the answers
        belong to the positions of the last.
      longest: the most positions that a window takes, per side.
      answer_shape: of the answer at one position; () for a number.
      windows: documents -> windows. A document may give none.
      step: parameters, batch -> float32 [rows, positions of the last side, *answer_shape]. Traced
        by jax.jit.
      finish: documents, windows, answers [positions of the last side, *answer_shape] in the
        windows' order -> Scores.
      summary: further words for the manifest: the estimator, the answers' token ids, ...
    """

    name: str
    columns: Mapping[str, Column]
    sides: tuple[str, ...]
    longest: tuple[int, ...]
    answer_shape: tuple[int, ...]
    windows: Callable[[Documents], Windows]
    step: Callable[[Any, Mapping[str, jax.Array]], jax.Array]
    finish: Callable[[Documents, Windows, np.ndarray], Scores]
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Scorer(Protocol):
    """What the engine asks of a scorer's settings."""

    def prepare(self, model: Model, vocabulary: Vocabulary) -> Prepared:
        """Checks that model and vocabulary suit, and builds the three functions."""
        ...
