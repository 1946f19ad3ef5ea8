"""Questions around the stored tokens of documents: parts of prompts, window by window.

Choices
- All questions of a judge see the same tokens of a document, as many as the longest question
  allows.
- A document's windows follow each other; by default only the first is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.packing import offsets_of, ranges, within
from pruning.scores.model.prompt import Prompt, require_room
from pruning.scores.model.scorer import Documents


class Piece(NamedTuple):
    """A part of every window's tokens: lengths[w] tokens of `source`, starting at starts[w]."""

    source: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def fixed(cls, tokens: Sequence[int] | np.ndarray, windows: int) -> Piece:
        """Return the same tokens for every window."""
        source = np.asarray(tokens, np.int32)
        starts = np.zeros(windows, np.int64)
        return cls(source, starts, np.full(windows, len(source), np.int64))


class Spans(NamedTuple):
    """The windows of some documents, in the order of documents.

    Attributes:
      document: int64 [windows], ascending.
      tokens: int64 [windows], number of the document's tokens in each.
      lost: int64 [documents], number of tokens that no window shows.
    """

    document: np.ndarray
    tokens: np.ndarray
    lost: np.ndarray


class Parts(NamedTuple):
    """Tokens that the questions of a group share, and those of each question."""

    shared: list[Piece]
    own: list[list[Piece]]


@dataclasses.dataclass(frozen=True)
class StoredQuestions:
    """Prompts around stored tokens.

    Attributes:
      prompts: one per question.
      max_tokens: largest number of tokens of a prompt and its part of the document.
      most: largest number of windows of a document; None for all of it.
    """

    prompts: Sequence[Prompt]
    max_tokens: int
    most: int | None = 1

    def __post_init__(self) -> None:
        require_room(max(map(len, self.prompts)), self.max_tokens)

    @property
    def room(self) -> int:
        """Number of the document's tokens in a window."""
        return self.max_tokens - max(map(len, self.prompts))

    def spans(self, documents: Documents) -> Spans:
        """Return the windows of documents."""
        lengths = documents.lengths
        counts = -(-lengths // self.room)
        if self.most is not None:
            counts = np.minimum(counts, self.most)
        document = np.repeat(np.arange(len(documents)), counts)
        tokens = np.minimum(lengths[document] - within(counts) * self.room, self.room)
        return Spans(document, tokens, lengths - np.minimum(lengths, counts * self.room))

    def parts(self, documents: Documents, group: Sequence[int]) -> Parts:
        """Return the tokens of all windows for a group of questions."""
        spans = self.spans(documents)
        count = len(spans.document)
        first = np.searchsorted(spans.document, np.arange(len(documents)))
        starts = documents.offsets[spans.document]
        starts = starts + (np.arange(count) - first[spans.document]) * self.room
        prompts = [self.prompts[question] for question in group]
        before = Piece.fixed(prompts[0].prefix, count)
        shown = Piece(documents.tokens, starts, spans.tokens)
        return Parts([before, shown], [[Piece.fixed(p.suffix, count)] for p in prompts])

    def longest(self, group: Sequence[int]) -> int:
        """Return the largest number of tokens of a window of the group."""
        prompts = [self.prompts[question] for question in group]
        return len(prompts[0].prefix) + self.room + sum(len(p.suffix) for p in prompts)


def joined(pieces: Sequence[Piece], windows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows' tokens, flat int32, and the lengths of their pieces [windows, pieces]."""
    lengths = np.stack([piece.lengths for piece in pieces], axis=1)
    starts = offsets_of(lengths.reshape(-1))[:-1].reshape(windows, len(pieces))
    tokens = np.empty(int(lengths.sum()), np.int32)
    for index, piece in enumerate(pieces):
        at = ranges(starts[:, index], piece.lengths)
        tokens[at] = piece.source[ranges(piece.starts, piece.lengths)]
    return tokens, lengths
