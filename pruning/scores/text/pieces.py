"""N-grams of a corpus's tokens, the features of students of models.

A model that scores a corpus reads its tokens, often only the first ones of a document. A student
over the same tokens sees exactly what its teacher saw. Over words of the whole text it learned half
as much (docs/samplers.md).

Choices
- A document is a concatenation of vectors. The first has the logarithms of n-gram counts, scaled to
  length 1, as for words (linear.py); it suits teachers that judge content. The second has the
  frequencies of single tokens; it suits teachers that are means over tokens, such as likelihoods.
- A third one, if wanted, has the counts of single tokens apart for each part of what is read, like
  the first. It suits teachers that read a beginning, and judge by where in it something stands.
- Single tokens have buckets of their own, apart from hashed n-grams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pruning.scores.text.hashing import NGrams, hashed_runs, reduced
from pruning.scores.text.linear import Bags
from pruning.store.randomness import mix

SCHEME = "pieces-1"
_WITH_PLACES = "pieces-2"  # a scheme of its own: earlier versions refuse such models
SCHEMES = (SCHEME, _WITH_PLACES)

_SINGLE = 1 << 16  # buckets of single tokens
_PLACED = 1 << 18  # buckets of single tokens with the part of the document that they are in
# Frequencies of a document of a hundred tokens, times this, have a length of about 1.
_SCALE = 8.0

_BATCH_TOKENS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Length of n-grams of tokens, and number of buckets.

    Attributes:
      n: longest n-gram.
      buckets: of the counts; 65,536 more hold the frequencies, and 262,144 more the places.
      first: number of tokens of a document that are read; None for all.
      places: number of equal parts of the first tokens in which single tokens are counted apart; 0
        for none.
    """

    column: ClassVar[str] = "tokens"

    n: int = 2
    buckets: int = 1 << 20
    first: int | None = None
    places: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or not 2 * _SINGLE <= self.buckets <= 1 << 31:
            raise ValueError(f"{self} needs n of at least 1, and 2**17 to 2**31 buckets.")
        if self.first is not None and self.first < 1:
            raise ValueError(f"{self} looks at no token: first is at least 1.")
        if self.places and (self.first is None or not 2 <= self.places <= self.first):
            raise ValueError(f"{self} needs 2 to `first` places, or none (0) where first is None.")

    @classmethod
    def of_size(cls, n: int, size: int, first: int | None, places: int = 0) -> Pieces:
        """Return the features whose models have `size` weights."""
        return cls(n, size - _SINGLE - (_PLACED if places else 0), first, places)

    @property
    def size(self) -> int:
        return self.buckets + _SINGLE + (_PLACED if self.places else 0)

    @property
    def scheme(self) -> str:
        """Name of the hashes, stored with a model."""
        return _WITH_PLACES if self.places else SCHEME

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
        """Return the vectors of every document."""
        single = grams.buckets < _SINGLE
        lengths = np.add.reduceat(np.append(single, False), grams.offsets[:-1], dtype=np.int64)
        lengths[grams.lengths == 0] = 0  # reduceat gives the next one's
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        tokens = grams.buckets[single]  # in the order of the text
        alone = Bags.counted(NGrams(tokens, bounds))
        owner = np.repeat(np.arange(len(lengths)), np.diff(alone.offsets))
        values = (alone.values * (_SCALE / lengths[owner])).astype(np.float32)
        buckets = alone.buckets + np.int32(self.buckets)
        both = Bags.of(grams).beside(Bags(buckets, values, alone.offsets))
        return both.beside(self._placed(tokens, bounds)) if self.places else both

    def _placed(self, tokens: np.ndarray, bounds: np.ndarray) -> Bags:
        """Return the third vector. tokens: int64, of documents with these bounds, in order."""
        assert self.first is not None
        place = np.arange(len(tokens)) - np.repeat(bounds[:-1], np.diff(bounds))
        part = place * self.places // self.first
        hashes = mix((part * _SINGLE + tokens).astype(np.uint64))
        placed = Bags.of(NGrams(reduced(hashes, _PLACED), bounds))
        buckets = placed.buckets + np.int32(self.buckets + _SINGLE)
        return Bags(buckets, placed.values, placed.offsets)


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
