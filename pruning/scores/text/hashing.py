"""Hashed n-grams of text: whole batches of documents as arrays, without a Python object per word.

    "The cat, again"  ->  the | cat | , | again   and   the cat | cat , | , again

Choices
- Words are runs of letters, digits and underscores, and runs of punctuation, lower-cased: what
  `re.findall(r"\\w+|[^\\w\\s]+", text.lower())` finds, in any script, but for the two letters
  whose lower case depends on more than themselves (the Turkish dotted I, the Greek final sigma).
- A word's hash is a polynomial in its characters. Prefix sums over the batch give every word's by
  one subtraction, and a power of the (odd, so invertible) base takes its position out again.
  Integers of 64 bits wrap around: that is the modulus.
- A document's n-grams are those of its own words: none reaches over into the next document.
- Hashes of a text never change. Models store the name of the hash (`SCHEME`) and refuse another.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from typing import ClassVar, Protocol

import numpy as np
import pyarrow as pa

from pruning.store.randomness import mix

SCHEME = "words-poly64-1"

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_NEXT = np.uint64(0xD1342543DE82EF95)  # odd; keeps "a b" apart from "b a"
_SPACE, _WORD, _PUNCTUATION = 0, 1, 2

_BATCH_BYTES = 1 << 17  # the arrays of a batch stay within a core's cache


@dataclasses.dataclass(frozen=True)
class Features:
    """Length of n-grams and number of buckets.

    Attributes:
      n: longest n-gram; 2 is unigrams and bigrams.
      buckets: size of the hashed feature space.
    """

    column: ClassVar[str] = "text"  # of the corpus
    scheme: ClassVar[str] = SCHEME

    n: int = 2
    buckets: int = 10_000

    def __post_init__(self) -> None:
        if self.n < 1 or not 1 <= self.buckets <= 1 << 32:
            raise ValueError(f"{self} needs n of at least 1, and 1 to 2**32 buckets.")

    @property
    def size(self) -> int:
        """Of a model's table."""
        return self.buckets

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        return batches(column)

    def ngrams(self, documents: pa.Array) -> NGrams:
        return hashed_ngrams(documents, self)


@dataclasses.dataclass(frozen=True)
class NGrams:
    """The n-grams of a batch of documents, document after document.

    Attributes:
      buckets: int64 [n_grams], values in [0, features.buckets).
      offsets: int64 [documents + 1]: document d has buckets[offsets[d]:offsets[d + 1]].
    """

    buckets: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64 [documents]: how many n-grams each document has."""
        return np.diff(self.offsets)

    def counts(self, buckets: int) -> np.ndarray:
        """Return counts of each bucket in the batch, int64 [buckets]; they add over batches."""
        return np.bincount(self.buckets, minlength=buckets)

    def sums(self, table: np.ndarray) -> np.ndarray:
        """Return the sum of `table` [buckets] over each document's n-grams, float64 [n]."""
        return segment_sums(table[self.buckets], self.offsets)


class NGramFeatures(Protocol):
    """Features that turn documents into n-grams: `Features`, `pieces.Pieces`, `pieces.Tokens`."""

    @property
    def column(self) -> str: ...

    def batches(self, column: pa.Array) -> Iterator[pa.Array]: ...

    def ngrams(self, documents: pa.Array) -> NGrams: ...


@dataclasses.dataclass(frozen=True)
class OfNGrams:
    """A function of the n-grams of documents; one without n-grams has no value (NaN).

    Subclasses define `values`: n-grams -> columns [documents].
    """

    features: NGramFeatures

    @property
    def column(self) -> str:
        """Column of the corpus."""
        return self.features.column

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        return self.features.batches(column)

    def values(self, grams: NGrams) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def __call__(self, documents: pa.Array) -> dict[str, np.ndarray]:
        grams = self.features.ngrams(documents)
        some = grams.lengths > 0
        return {name: np.where(some, column, np.nan) for name, column in self.values(grams).items()}


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return sums of consecutive segments; empty ones are 0.

    Args:
      values: [n].
      offsets: int64 [segments + 1], ascending from 0 to n.

    Returns:
      float64 [segments]. Each is added up on its own, so that it does not depend on its neighbors.
    """
    filled = offsets[1:] > offsets[:-1]
    sums = np.zeros(len(offsets) - 1)
    if filled.any():
        # Empty segments lie between the filled ones' starts and would only confuse reduceat.
        sums[filled] = np.add.reduceat(values, offsets[:-1][filled], dtype=np.float64)
    return sums


def hashed_ngrams(texts: pa.Array | pa.ChunkedArray, features: Features) -> NGrams:
    """Return the hashed n-grams of every document of `texts`.

    Args:
      texts: strings, none of them null.
      features: see `Features`.

    Returns:
      Within a document first its words, then its bigrams, and so on.

    Raises:
      TypeError: the column is not of strings.
      ValueError: a text is null.
    """
    words, offsets = _words(texts)
    return hashed_runs(words, offsets, features.n, features.buckets)


def hashed_runs(
    words: np.ndarray,
    offsets: np.ndarray,
    longest: int,
    buckets: int,
    first_bucket: int = 0,
    single: np.ndarray | None = None,
) -> NGrams:
    """Return the hashed n-grams of documents that are runs of hashes already.

    Args:
      words: uint64 [words], of all documents.
      offsets: int64 [documents + 1].
      longest: n-gram.
      buckets: how many n-grams are hashed into.
      first_bucket: where they begin.
      single: int64 [words], buckets of the words alone, where they are not to be hashed.

    Returns:
      Within a document first its words, then its bigrams, and so on.
    """
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    if single is None:
        single = first_bucket + reduced(words, buckets)
    parts = [(single, document)]
    grams = words
    for n in range(2, longest + 1):
        # grams[i] starts at word i; it is whole when the word n - 1 further on is of its document.
        grams = mix(grams[:-1] * _NEXT + words[n - 1 :])
        whole = document[: len(grams)] == document[n - 1 :]
        parts.append((first_bucket + reduced(grams[whole], buckets), document[: len(grams)][whole]))
    lengths = [np.bincount(owner, minlength=len(offsets) - 1) for _, owner in parts]
    bounds = np.concatenate([[0], np.cumsum(np.sum(lengths, axis=0))]).astype(np.int64)

    found = np.empty(bounds[-1], np.int64)
    start = bounds[:-1].copy()  # where each document's next part goes
    for (places, owner), length in zip(parts, lengths, strict=True):
        first = np.cumsum(length) - length
        found[np.arange(len(places)) + (start - first)[owner]] = places
        start += length
    return NGrams(found, bounds)


def ngram_hashes(
    texts: pa.Array | pa.ChunkedArray, n: int, punctuation: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return 64-bit hashes of the n-grams of exactly `n` words, not reduced to buckets.

    Args:
      texts: strings, none of them null.
      n: words.
      punctuation: whether runs of punctuation are words; else they are passed over.

    Returns:
      uint64 [n_grams], and int64 [documents + 1]: document d has hashes[offsets[d]:offsets[d + 1]],
      in the order of its text.
    """
    words, offsets = _words(texts, punctuation)
    count = max(len(words) - n + 1, 0)
    powers, inverses = _powers(1 << (max(len(words), _BATCH_BYTES) - 1).bit_length())
    prefix = np.zeros(len(words) + 1, np.uint64)
    np.cumsum(words * powers[: len(words)], out=prefix[1:])
    # As with the characters of a word: a polynomial in the words' hashes.
    grams = mix((prefix[n:] - prefix[: len(prefix) - n]) * inverses[:count])
    document = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    whole = document[:count] == document[len(words) - count :]
    lengths = np.bincount(document[:count][whole], minlength=len(offsets) - 1)
    return grams[whole], np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def batches(texts: pa.Array | pa.ChunkedArray, size: int = _BATCH_BYTES) -> Iterator[pa.Array]:
    """Cut a column of texts into runs of about `size` bytes, at least one document each."""
    chunks = texts.chunks if isinstance(texts, pa.ChunkedArray) else [texts]
    for chunk in chunks:
        if len(chunk) == 0:
            continue
        offsets = _offsets(chunk)
        # A document belongs to the batch in which it starts.
        batch = (offsets[:-1] - offsets[0]) // size
        cuts = [0, *(np.flatnonzero(np.diff(batch)) + 1), len(chunk)]
        for begin, end in itertools.pairwise(cuts):
            yield chunk.slice(begin, end - begin)


def reduced(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """Map uint64 to int64 in [0, buckets) by the high bits, with a multiplication."""
    return ((hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def _words(
    texts: pa.Array | pa.ChunkedArray, punctuation: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of all words (or of punctuation too), and where each document's begin.

    Returns:
      uint64 [words] and int64 [documents + 1].
    """
    characters, bounds = _characters(texts)
    if len(characters) == 0:
        return np.zeros(0, np.uint64), np.zeros(len(bounds), np.int64)
    codes, kinds = _tables()
    kind = kinds[characters]
    starts, ends = _runs(kind, bounds)
    if not punctuation:
        letters = kind[starts] == _WORD
        starts, ends = starts[letters], ends[letters]
    powers, inverses = _powers(1 << (max(len(characters), _BATCH_BYTES) - 1).bit_length())
    prefix = np.zeros(len(characters) + 1, np.uint64)
    np.cumsum(codes[characters] * powers[: len(characters)], out=prefix[1:])
    hashes = mix((prefix[ends] - prefix[starts]) * inverses[starts])
    return hashes, np.searchsorted(starts, bounds).astype(np.int64)


def _runs(kind: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return first and one-past-last position of every run of one kind but white space."""
    change = np.empty(len(kind) + 1, bool)
    change[0] = change[-1] = True
    np.not_equal(kind[1:], kind[:-1], out=change[1:-1])
    change[bounds] = True  # a word ends where its document does
    edges = np.flatnonzero(change)
    inked = kind[edges[:-1]] != _SPACE
    return edges[:-1][inked], edges[1:][inked]


def _characters(texts: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of all texts, one after another, and where each begins.

    Returns:
      An unsigned integer array [characters] and int64 [documents + 1].
    """
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunk at all
        array = pa.array([], pa.large_string())
    offsets = _offsets(array)
    data = array.buffers()[2]
    utf8 = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    utf8 = utf8[offsets[0] : offsets[-1]]
    bounds = offsets - offsets[0]
    if len(utf8) == 0 or utf8.max() < 0x80:
        return utf8, bounds
    order = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"
    characters = np.frombuffer(utf8.tobytes().decode().encode(order), np.uint32)
    leads = np.concatenate([[0], np.cumsum((utf8 & 0xC0) != 0x80)])  # characters before each byte
    return characters, leads[bounds].astype(np.int64)


def _offsets(array: pa.Array) -> np.ndarray:
    """Return byte offsets of a string array, int64 [documents + 1]; nulls are empty."""
    if not (pa.types.is_large_string(array.type) or pa.types.is_string(array.type)):
        raise TypeError(f"n-grams are made of strings, not of {array.type}.")
    if array.null_count:
        raise ValueError("a document's text is null: the corpus it comes from is damaged.")
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    buffer = array.buffers()[1]
    if buffer is None or buffer.size == 0:  # Arrow allows no offsets for an empty array
        return np.zeros(1, np.int64)
    raw = np.frombuffer(buffer, width)
    return raw[array.offset : array.offset + len(array) + 1].astype(np.int64)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return each code point's lower-case hash, uint64 [1,114,112], and kind, uint8."""
    size = sys.maxunicode + 1
    lower = np.arange(size, dtype=np.uint64)
    kinds = np.full(size, _PUNCTUATION, np.uint8)
    word = re.compile(r"\w")
    for code in range(size):
        character = chr(code)
        if word.match(character):
            kinds[code] = _WORD
        elif character.isspace():
            kinds[code] = _SPACE
        lowered = character.lower()
        if lowered != character and len(lowered) == 1:  # one letter alone becomes two: U+0130
            lower[code] = ord(lowered)
    return mix(lower), kinds


@functools.lru_cache(maxsize=2)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return powers of the base and of its inverse, uint64 [size] each."""
    one = np.ones(1, np.uint64)

    def powers_of(base: np.uint64) -> np.ndarray:
        return np.concatenate([one, np.cumprod(np.full(size - 1, base))])

    return powers_of(_BASE), powers_of(_INVERSE)
