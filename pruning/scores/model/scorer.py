"""Scorers: a model's inputs for a document, and the columns computed from its outputs.

A scorer is a frozen dataclass of settings with one method,

    prepare(model, tokenizer) -> Prepared

and a `Prepared` is three functions, which the engine (engine.py) connects:

    windows   documents -> windows of tokens                                     host, NumPy
    step      parameters, batch of packed windows -> answers per position        device, pure
    finish    documents, windows, answers -> columns of the score set            host, NumPy

Choices
- `windows` and `finish` process many documents at once as flat arrays, so that the host can keep an
  accelerator busy.
- The engine packs windows into rows and batches. They are hidden from the scorer, so that a score
  cannot depend on them.
- A document without a score has a status (`Scores.statuses`), never a value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from models.packing import Windows, offsets_of, ranges
from pruning.scores.score_set import Column

if TYPE_CHECKING:
    import jax

    from models.config import ModelConfig
    from models.model import Model
    from pruning.corpus.tokenizers import Tokenizer


class ScoreError(ValueError):
    """Error for a scorer, model, vocabulary and settings that are incompatible."""


def require_predictions(config: ModelConfig, scorer: str) -> None:
    """Raise ScoreError if a model predicts no tokens: an encoder, or a model with a head."""
    if not config.predicts_tokens:
        raise ScoreError(
            f"{scorer} asks a model for its predictions of tokens, and this one has "
            f"{'an encoder only' if config.head is None else 'a head in place of them'}: give a "
            "language model, or use @Embedding() or @SequenceClassifier()."
        )


@dataclasses.dataclass(frozen=True)
class Documents:
    """The concatenated tokens of some documents.

    Attributes:
      tokens: integers, flat.
      offsets: int64 [documents + 1]; document d is tokens[offsets[d]:offsets[d + 1]].
      lost: int64 [documents], tokens that each document lost when its prompt was made
        (`Prepared.read`); None if the tokens are the stored ones.
      notes: integers of each document that the scorer's `read` passes to its `windows`, such as
        lengths of the parts of the tokens; None without any.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    lost: np.ndarray | None = None
    notes: Documents | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of tokens, int64 [documents]."""
        return np.diff(self.offsets)

    @classmethod
    def join(cls, parts: Sequence[Documents]) -> Documents:
        """Return the documents of all parts, in order."""
        lost = [part.lost for part in parts if part.lost is not None]
        notes = [part.notes for part in parts if part.notes is not None]
        return cls(
            np.concatenate([part.tokens for part in parts]),
            offsets_of(np.concatenate([part.lengths for part in parts])),
            np.concatenate(lost) if lost else None,
            cls.join(notes) if notes else None,
        )

    @classmethod
    def of(cls, documents: list[list[int]]) -> Documents:
        """Build from lists of ids."""
        flat = [token for document in documents for token in document]
        return cls(np.asarray(flat, np.int32), offsets_of(np.array([len(d) for d in documents])))

    def take(self, rows: np.ndarray) -> Documents:
        """Return some of the documents, in the order of `rows`."""
        lengths = self.lengths[rows]
        tokens = self.tokens[ranges(self.offsets[rows], lengths)]
        return Documents(
            tokens,
            offsets_of(lengths),
            None if self.lost is None else self.lost[rows],
            None if self.notes is None else self.notes.take(rows),
        )

    def cut(self, limit: int | None) -> tuple[Documents, np.ndarray]:
        """Return at most `limit` tokens of each document, and the numbers lost, int64 [n]."""
        lengths = self.lengths
        lost = np.maximum(lengths - limit, 0) if limit is not None else np.zeros_like(lengths)
        if not lost.any():
            return self, lost
        kept = lengths - lost
        return Documents(self.tokens[ranges(self.offsets[:-1], kept)], offsets_of(kept)), lost


@dataclasses.dataclass(frozen=True)
class Scores:
    """Result of `Prepared.finish`.

    Attributes:
      columns: name -> values, an array [documents] or an Arrow array of this length; values in rows
        with a status other than "ok" are discarded.
      statuses: status -> bool [documents], for documents with a status other than "ok".
      counts: additional counts for the manifest.
    """

    columns: Mapping[str, Any]
    statuses: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A scorer prepared for one model and one vocabulary.

    Attributes:
      name: name of the scorer, for the manifest.
      columns: name -> column.
      sides: the names of the windows' sides, ("encoder", "decoder") or one of them; the answers are
        at the positions of the last.
      longest: largest number of positions of a window, for each side.
      answer_shape: shape of the answer at one position; () for a number.
      windows: documents -> windows. A document may have none.
      step: parameters, batch -> float32 [rows, positions of the last side, *answer_shape]. Traced
        by jax.jit.
      finish: documents, windows, answers [positions of the last side, *answer_shape] in the
        windows' order -> Scores.
      summary: additional entries for the manifest: the estimator, the answers' token ids, ...
      absorbs: the step absorbs keys and values of cross-attention according to
        `models.flops.absorbs_cross_attention`; for counts of FLOPs.
      read: texts -> model inputs, if the inputs are not the stored tokens (a prompt whose tokens
        extend into the document); otherwise None. An empty text gives no tokens.
      pretend: lengths in tokens, int64 [n] -> documents of the shape that `read` would give them,
        with arbitrary ids, for the estimate of the cost. Required with `read`.
      settings: settings that the scorer took from the model; they are recorded as if given.
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
    absorbs: bool = False
    read: Callable[[Sequence[str]], Documents] | None = None
    pretend: Callable[[np.ndarray], Documents] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Scorer(Protocol):
    """Settings of a scorer: a frozen dataclass, whose fields are recorded in the score set."""

    def prepare(self, model: Model, tokenizer: Tokenizer) -> Prepared:
        """Check model and vocabulary, and build the three functions."""
        ...
