"""N-grams of a corpus's own tokens: what a student of a model looks at.

The corpus is tokenised once, and a model that scores it reads those tokens, often only the first
ones of a document. A student that reads the same tokens sees what its teacher saw, and no more;
over words of the whole text it learned half as much (docs/samplers.md).

Choices
- A document is two vectors side by side. One holds the logarithms of its n-grams' counts, of length
  1, as for words (linear.py): for teachers that care what a document says. The other holds the
  frequencies of its single tokens: for teachers that are means over tokens, as likelihoods are.
- Single tokens have buckets of their own, so that they are told apart from hashed n-grams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pruning.ngrams.hashing import NGrams, hashed_runs
from pruning.ngrams.linear import Bags
from pruning.randomness import mix

_SINGLE = 1 << 16  # buckets of single tokens
# Frequencies of a document of a hundred tokens, times this, have a length of about 1.
_SCALE = 8.0

_BATCH_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Which n-grams of tokens, and into how many buckets.

    Attributes:
      n: longest n-gram.
      buckets: of the counts; 65,536 more hold the frequencies.
      first: how many tokens of a document are looked at; None for all.
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

    @property
    def size(self) -> int:
        return self.buckets + _SINGLE

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        """Runs of documents of about 65,536 tokens, at least one document each."""
        offsets = column.offsets.to_numpy()
        begin = 0
        while begin < len(column):
            end = int(np.searchsorted(offsets, offsets[begin] + _BATCH_TOKENS, side="right")) - 1
            end = max(end, begin + 1)
            yield column.slice(begin, end - begin)
            begin = end

    def ngrams(self, documents: pa.Array) -> NGrams:
        """Those of a batch: list<uint16 or uint32> [documents]."""
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
        """Both vectors of every document."""
        single = grams.buckets < _SINGLE
        lengths = np.add.reduceat(np.append(single, False), grams.offsets[:-1], dtype=np.int64)
        lengths[grams.lengths == 0] = 0  # reduceat gives the next one's
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        alone = Bags.counted(NGrams(grams.buckets[single], bounds))
        owner = np.repeat(np.arange(len(lengths)), np.diff(alone.offsets))
        values = (alone.values * (_SCALE / lengths[owner])).astype(np.float32)
        buckets = alone.buckets + np.int32(self.buckets)
        return Bags.of(grams).beside(Bags(buckets, values, alone.offsets))
