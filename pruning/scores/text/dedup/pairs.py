"""Exact Jaccard similarity of candidate pairs whose documents are in different files.

This is an external join: the n-grams of the pair's first document are sent to the unit that holds
the second, and compared there. The texts of candidates are read twice, others not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pruning.scores.text.dedup import minhash
from pruning.scores.text.dedup.library import Library
from pruning.scores.text.hashing import Features

GRAM = np.dtype([("node", np.uint64), ("gram", np.uint32)])
_AT_ONCE = 1 << 22  # n-grams compared at a time


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """Return pairs in ascending order, without duplicates. uint64 [., 2] -> [., 2]."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]


class Sets:
    """Sets of n-grams of some documents.

    Attributes:
      nodes: uint64 [documents], ascending.
      grams: uint32, the n-grams of the concatenated documents, ascending within each.
      offsets: int64 [documents + 1].
    """

    def __init__(self, nodes: np.ndarray, grams: np.ndarray, offsets: np.ndarray):
        self.nodes = nodes
        self.grams = grams
        self.offsets = offsets

    def some(self, nodes: np.ndarray) -> Sets:
        """Return the sets of some of the nodes, ascending."""
        place = np.searchsorted(self.nodes, nodes)
        lengths = np.diff(self.offsets)[place]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return Sets(nodes, self.grams[_runs(self.offsets[place], lengths)], offsets)

    def records(self) -> np.ndarray:
        """Return every n-gram with its document, [n_grams] of `GRAM`."""
        records = np.empty(len(self.grams), GRAM)
        records["node"] = np.repeat(self.nodes, np.diff(self.offsets))
        records["gram"] = self.grams
        return records

    @classmethod
    def of(cls, records: np.ndarray) -> Sets:
        """Return the sets of `records`."""
        nodes, begin = np.unique(records["node"], return_index=True)
        return cls(nodes, records["gram"], np.append(begin, len(records)))


def read_sets(library: Library, unit: int, nodes: np.ndarray, n: int) -> Sets:
    """Read the n-grams of some documents of a unit.

    Args:
      nodes: uint64, ascending.
      n: number of words of an n-gram.
    """
    grams = [np.zeros(0, np.uint32)]
    lengths = [np.zeros(0, np.int64)]
    for place, rows in library.by_place(unit, nodes):
        for batch in library.texts(place).read(place.shard, rows, Features()):
            values, counts = _unique(batch, n)
            grams.append(values)
            lengths.append(counts)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return Sets(nodes, np.concatenate(grams), offsets)


def _unique(texts: pa.Array, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each document's distinct n-grams, ascending, uint32; and their numbers, int64 [n]."""
    grams, offsets = minhash.shingles(texts, n)
    document = np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(offsets))
    keys = np.unique(document << np.uint64(32) | grams)
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return keys.astype(np.uint32), counts


def jaccard(first: Sets, second: Sets, pairs: np.ndarray) -> np.ndarray:
    """Return the Jaccard similarity of pairs.

    Args:
      first, second: sets of the pairs' documents.
      pairs: uint64 [n, 2].

    Returns:
      float64 [n].
    """
    found = [np.zeros(0)]
    places = [np.searchsorted(s.nodes, pairs[:, side]) for side, s in enumerate((first, second))]
    sizes = [np.diff(s.offsets)[place] for s, place in zip((first, second), places, strict=True)]
    for part in _runs_of(sizes[0] + sizes[1]):
        keys = []
        for s, place, size in zip((first, second), places, sizes, strict=True):
            pair = np.repeat(np.arange(part.stop - part.start, dtype=np.uint64), size[part])
            grams = s.grams[_runs(s.offsets[place[part]], size[part])]
            keys.append(pair << np.uint64(32) | grams)
        # Keys are distinct on each side, so a key that occurs twice is on both.
        joined = np.sort(np.concatenate(keys))
        both = (joined[1:][joined[1:] == joined[:-1]] >> np.uint64(32)).astype(np.int64)
        common = np.bincount(both, minlength=part.stop - part.start)
        found.append(common / np.maximum(sizes[0][part] + sizes[1][part] - common, 1))
    return np.concatenate(found)


def _runs_of(sizes: np.ndarray) -> Iterator[slice]:
    """Yield slices of pairs of about `_AT_ONCE` n-grams, at least one pair each."""
    batch = np.cumsum(sizes) // _AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), len(sizes)]
    for begin, end in itertools.pairwise(cuts):
        if end > begin:
            yield slice(begin, end)


def _runs(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenated indices of runs, int64."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
