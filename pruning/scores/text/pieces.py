"""N-grams of a corpus's tokens, the features of students of models.

A model that scores a corpus reads its tokens, often only the first ones of a document. A student
over the same tokens sees exactly what its teacher saw. Over words of the whole text it learned half
as much (docs/samplers.md).

Choices
- A document is a concatenation of two vectors. The first has the logarithms of n-gram counts,
  scaled to length 1, as for words (linear.py); it suits teachers that judge content. The second has
  the frequencies of single tokens; it suits teachers that are means over tokens, such as
  likelihoods.
- Single tokens have buckets of their own, apart from hashed n-grams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pruning.scores.text.hashing import NGrams, hashed_runs
from pruning.scores.text.linear import Bags
from pruning.store.randomness import mix

_SINGLE = 1 << 16  # buckets of single tokens
# Frequencies of a document of a hundred tokens, times this, have a length of about 1.
_SCALE = 8.0

_BATCH_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Length of n-grams of tokens, and number of buckets.

    Attributes:
      n: longest n-gram.
      buckets: of the counts; 65,536 more hold the frequencies.
      first: number of tokens of a document that are read; None for all.
    """

    column: ClassVar[str] = "tokens"
    scheme: ClassVar[str] = "pieces-1"

    n: int = 2
    buckets: int = 1 << 20
    first: int | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or not 2 * _SINGLE <= self.buckets <= 1 << 31:
            raise ValueError(f"{self} needs n of at least 1, and 2**17 to 2**31 buckets.")
        if self.first is not None and self.first < 1:
            raise ValueError(f"{self} looks at no token: first is at least 1.")

    @classmethod
    def of_size(cls, n: int, size: int, first: int | None) -> Pieces:
        """Return the features whose models have `size` weights."""
        return cls(n, size - _SINGLE, first)

    @property
    def size(self) -> int:
        return self.buckets + _SINGLE

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        """Yield runs of documents of about 65,536 tokens, at least one document each."""
        offsets = column.offsets.to_numpy()
        begin = 0
        while begin < len(column):
            end = int(np.searchsorted(offsets, offsets[begin] + _BATCH_TOKENS, side="right")) - 1
            end = max(end, begin + 1)
            yield column.slice(begin, end - begin)
            begin = end

    def ngrams(self, documents: pa.Array) -> NGrams:
        """Return the n-grams of a batch of tokens: list<uint16 or uint32> [documents]."""
        offsets = documents.offsets.to_numpy().astype(np.int64)
        tokens = documents.values.to_numpy()[offsets[0] : offsets[-1]].astype(np.uint64)
        lengths = np.diff(offsets)
        if self.first is not None:
            place = np.arange(len(tokens)) - np.repeat(offsets[:-1] - offsets[0], lengths)
            tokens, lengths = tokens[place < self.first], np.minimum(lengths, self.first)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        single = (tokens & np.uint64(_SINGLE - 1)).astype(np.int64)
        return hashed_runs(mix(tokens), bounds, self.n, self.buckets - _SINGLE, _SINGLE, single)

    def bags(self, grams: NGrams) -> Bags:
        """Return both vectors of every document."""
        single = grams.buckets < _SINGLE
        lengths = np.add.reduceat(np.append(single, False), grams.offsets[:-1], dtype=np.int64)
        lengths[grams.lengths == 0] = 0  # reduceat gives the next one's
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        alone = Bags.counted(NGrams(grams.buckets[single], bounds))
        owner = np.repeat(np.arange(len(lengths)), np.diff(alone.offsets))
        values = (alone.values * (_SCALE / lengths[owner])).astype(np.float32)
        buckets = alone.buckets + np.int32(self.buckets)
        return Bags.of(grams).beside(Bags(buckets, values, alone.offsets))


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Single tokens, with one bucket for each id.

    Attributes:
      buckets: size of the vocabulary.
    """

    column: ClassVar[str] = "tokens"

    buckets: int

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        yield column

    def ngrams(self, documents: pa.Array) -> NGrams:
        """Return the tokens of a batch: list<uint16 or uint32> [documents]."""
        offsets = documents.offsets.to_numpy().astype(np.int64)
        tokens = documents.values.to_numpy()[offsets[0] : offsets[-1]]
        return NGrams(tokens.astype(np.int64), offsets - offsets[0])
