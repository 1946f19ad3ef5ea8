"""MinHash: signatures of sets of n-grams, and the bands by which candidate pairs are found.

The Jaccard similarity of two sets is the probability that the least of their hashed elements is the
same (Broder 1997). A signature is that least value under several hash functions, cut into bands of
`rows` values. Two documents are candidates when a band is equal: with similarity s this has the
probability 1 - (1 - s^rows)^bands (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4).

Choices
- 5-grams of words in lower case without punctuation, 14 bands of 8: the defaults of FineWeb and
  datatrove. Pairs of similarity 0.8 become candidates with probability 0.92, of 0.7 with 0.56, of
  0.5 with 0.05.
- A hash function is x -> a x + b modulo 2**32 with odd `a`, over 32 bits of the n-gram's 64-bit
  hash, which is mixed already. Each is a permutation. 32 bits suffice: among documents of 1,000
  n-grams, two n-grams have the same value in one document of 8,600.
- One hash function at a time is applied to a batch of documents that fits into a core's cache.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow as pa

from pruning.scores.text.hashing import ngram_hashes
from pruning.store import randomness
from pruning.store.randomness import Stream, mix


@dataclasses.dataclass(frozen=True)
class MinHash:
    """N-grams and bands.

    Attributes:
      n: number of words of an n-gram.
      bands: number of bands; two documents with any equal band are candidates.
      rows: number of values of a band, all of which must be equal.
      seed: seed of the hash functions.
    """

    n: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.n, self.bands, self.rows) < 1:
            raise ValueError(f"n, bands and rows are at least 1: {self}.")

    @property
    def hashes(self) -> int:
        """Number of hash functions."""
        return self.bands * self.rows

    def probability(self, similarity: float) -> float:
        """Return the probability that documents of this Jaccard similarity share a band."""
        return 1 - (1 - similarity**self.rows) ** self.bands


def shingles(texts: pa.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the n-grams of documents.

    Args:
      texts: strings, none of them null.
      n: number of words of an n-gram.

    Returns:
      uint32 [n_grams], repeated ones included; int64 [documents + 1], the documents' offsets.
    """
    grams, offsets = ngram_hashes(texts, n, punctuation=False)
    return (grams >> np.uint64(32)).astype(np.uint32), offsets


def signatures(grams: np.ndarray, offsets: np.ndarray, minhash: MinHash) -> np.ndarray:
    """Return the signatures of documents with at least one n-gram.

    Args:
      grams: uint32 [n_grams], of the concatenated documents.
      offsets: int64 [documents + 1], strictly ascending.

    Returns:
      uint32 [hashes, documents].
    """
    multipliers, offset = _functions(minhash.hashes, minhash.seed)
    least = np.empty((minhash.hashes, len(offsets) - 1), np.uint32)
    if least.size:
        hashed = np.empty_like(grams)
        for i in range(minhash.hashes):
            np.multiply(grams, multipliers[i], out=hashed)
            np.add(hashed, offset[i], out=hashed)
            np.minimum.reduceat(hashed, offsets[:-1], out=least[i])
    return least


def band_keys(least: np.ndarray, minhash: MinHash) -> np.ndarray:
    """Return a 64-bit key of every band of signatures; keys of different bands differ.

    Args:
      least: uint32 [hashes, documents].

    Returns:
      uint64 [bands, documents].
    """
    values = least.reshape(minhash.bands, minhash.rows, -1)
    keys = np.empty((minhash.bands, values.shape[2]), np.uint64)
    for band in range(minhash.bands):
        key = np.full(values.shape[2], band, np.uint64)
        for row in values[band]:
            key = mix(key ^ row)
        keys[band] = key
    return keys


@functools.lru_cache(maxsize=4)
def _functions(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return multipliers (odd) and offsets of hash functions, uint32 [count] each."""
    bits = randomness.hashed(Stream.MINHASH, seed, np.arange(count))
    high, low = bits >> np.uint64(32), bits & np.uint64(0xFFFF_FFFF)
    return high.astype(np.uint32) | np.uint32(1), low.astype(np.uint32)
