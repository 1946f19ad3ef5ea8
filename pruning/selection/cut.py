"""Cutting a ranking: the exact threshold of a budget, without sorting.

Documents are ranked by a float64 key, highest first, ties by the document's hash. Each has a cost:
its tokens, or 1. The cut is at the first document that does not fit in the target, and all
documents before it are kept:

    key    9.0   7.5   7.5   3.2        costs so far, with a target of 100:
    hash    17    80    12    99        40, 70, 95, 125 -> the cut is at (3.2, 99):
    cost    40    30    25    30        three documents are kept, 95 of 100 tokens

Choices
- Radix selection, most significant digit first: one histogram of costs per 16 bits of the key, so
  four passes over the keys and four over the hashes of those that tie at the cut. Exact whatever
  the distribution of the keys, and memory does not grow with the number of documents.
- Histograms add up: documents come in chunks, from any number of shards, in any order and in any
  number of threads. Each thread returns the sum of a run of chunks.
- Documents that tie at a cut are read once and held in memory as long as they are few.
- Groups (quotas) are cut in the same passes, with shorter digits if there are many.
- The kept documents never cost more than the target, and less than it by no more than the cost of
  the first document left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

# Values that no key has. They stand outside of the ranking, and cost nothing in it.
EXCLUDED = np.uint64(0)  # kept by no budget; `ordered` maps NaN to it
INCLUDED = np.uint64(2**64 - 1)  # kept whatever the budget

_SIGN = np.uint64(1 << 63)
_ONE = np.uint64(1)
_EVERYTHING = np.iinfo(np.int64).max
_BLOCK = 1 << 15  # documents
_FEW = 1 << 25  # tokens or documents: ties are held in memory below this, read again above


@dataclasses.dataclass(frozen=True)
class RankedKeys:
    """Some documents of a ranking.

    Attributes:
      values: uint64 [n], `ordered` keys, EXCLUDED or INCLUDED.
      costs: int [n]; not used for documents outside of the ranking.
      groups: int [n], or None when there is one group.
      hashes: rows int [m] -> uint64 [m]; called for the rows that tie at a cut only.
    """

    values: np.ndarray
    costs: np.ndarray
    groups: np.ndarray | None
    hashes: Callable[[np.ndarray], np.ndarray]

    def of(self, per_group: np.ndarray) -> np.ndarray:
        """Return every document's entry of an array [groups]; a scalar when there is one group."""
        return per_group[0] if self.groups is None else per_group[self.groups]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The first document left out of every group.

    Attributes:
      value: uint64 [groups], its `ordered` key; 0 where the whole group fits.
      tie: uint64 [groups], its hash.
      cost: int64 [groups], total cost of the documents ranked before it.
      next_cost: int64 [groups], its own cost; 0 where the whole group fits.
    """

    value: np.ndarray
    tie: np.ndarray
    cost: np.ndarray
    next_cost: np.ndarray

    def before(self, chunk: RankedKeys) -> np.ndarray:
        """Return a mask of the chunk's documents ranked before the cut, bool [n]."""
        value = chunk.of(self.value)
        kept = chunk.values > value
        tied = _ranked(chunk.values, np.flatnonzero(chunk.values == value))
        if len(tied):
            tie = self.tie[0] if chunk.groups is None else self.tie[chunk.groups[tied]]
            kept[tied] = chunk.hashes(tied) > tie
        return kept

    def moved(self, groups: np.ndarray) -> Cut:
        """Return the cut moved by one document in the groups of a mask, bool [groups]."""
        groups = groups & (self.next_cost > 0) & (self.tie > 0)
        return Cut(
            self.value,
            self.tie - groups.astype(np.uint64),  # hashes are distinct
            self.cost + np.where(groups, self.next_cost, 0),
            np.where(groups, 0, self.next_cost),
        )


Each = Callable[[Callable[[Iterable[RankedKeys]], Any]], Iterable[Any]]


def between(chunk: RankedKeys, start: Cut | None, stop: Cut) -> np.ndarray:
    """Return a mask, bool [n], of documents between two cuts (None: start), and INCLUDED."""
    kept = stop.before(chunk)
    if start is not None:
        kept &= ~start.before(chunk)
        kept |= chunk.values == INCLUDED
    return kept


def ordered(keys: np.ndarray) -> np.ndarray:
    """Map float64 to uint64 of the same order; NaN to `EXCLUDED`, below all others."""
    bits = (keys + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0: the two tie
    bits = bits.view(np.uint64) ^ ((bits >> 63).view(np.uint64) | _SIGN)  # ~bits where negative
    bits[np.isnan(keys)] = EXCLUDED
    return bits


def unordered(values: np.ndarray) -> np.ndarray:
    """Return the float64 that `ordered` mapped to these values."""
    return np.where(values >= _SIGN, values & ~_SIGN, ~values).view(np.float64)


def find(each: Each, targets: np.ndarray) -> Cut:
    """Cut every group at its target.

    Args:
      each: divides the chunks of all documents into runs and applies a function to every run, anew
        at every call; gives the results in any order: `lambda function: map(function, runs)`, or in
        threads.
      targets: int64 [groups], the cost not to be exceeded.
    """

    def each_key(work: _Work) -> Iterable[np.ndarray]:
        return each(lambda chunks: work(block for chunk in chunks for block in _blocks(chunk)))

    value, cost, tied_cost, fits = _radix_select(each_key, targets, keys=True)
    value[fits] = EXCLUDED
    if fits.all():
        return Cut(value, np.zeros_like(value), cost, np.zeros_like(cost))

    def read_ties(work: _Work) -> Iterable[Any]:
        return each(lambda chunks: work(_ties(chunk, value) for chunk in chunks))

    few = tied_cost.sum() <= _FEW
    held = [tie for ties in read_ties(list) for tie in ties] if few else []

    def each_tie(work: _Work) -> Iterable[np.ndarray]:
        return [work(held)] if few else read_ties(work)

    left = np.where(fits, _EVERYTHING, targets - cost)
    tie, beyond, next_cost, _ = _radix_select(each_tie, left, keys=False)
    return Cut(value, tie, cost + beyond, next_cost)


@dataclasses.dataclass(frozen=True)
class _Column:
    """Numbers to be cut: uint64 [n], their costs, and their groups or None."""

    values: np.ndarray
    costs: np.ndarray
    groups: np.ndarray | None

    def take(self, rows: np.ndarray | slice) -> _Column:
        groups = None if self.groups is None else self.groups[rows]
        return _Column(self.values[rows], self.costs[rows], groups)


_Work = Callable[[Iterable[_Column]], Any]


def _blocks(chunk: RankedKeys) -> Iterator[_Column]:
    """Yield the keys of a chunk in blocks that fit a core's cache."""
    whole = _Column(chunk.values, chunk.costs, chunk.groups)
    for start in range(0, len(chunk.values), _BLOCK):
        yield whole.take(slice(start, start + _BLOCK))


def _ties(chunk: RankedKeys, value: np.ndarray) -> _Column:
    """Return the hashes of the chunk's documents that have the key at which their group is cut."""
    rows = _ranked(chunk.values, np.flatnonzero(chunk.values == chunk.of(value)))
    groups = None if chunk.groups is None else chunk.groups[rows]
    return _Column(chunk.hashes(rows), chunk.costs[rows], groups)


def _ranked(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the rows that are in the ranking."""
    return rows[values[rows] - _ONE < INCLUDED - _ONE]  # 0 - 1 is the highest


def _radix_select(
    each: Callable[[_Work], Iterable[np.ndarray]], targets: np.ndarray, keys: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Descend from the leading digit, into the bucket in which the costs pass the target.

    Args:
      each: applies a function to runs of columns.
      keys: whether the numbers are keys, of which two values stand outside of the ranking.

    Returns:
      value: uint64 [groups], the highest with which the costs pass the target.
      cost: int64 [groups], of all higher values; of the whole group where it fits.
      next_cost: int64 [groups], of all documents with this value; 0 where the group fits.
      fits: bool [groups], the whole group costs no more than the target.
    """
    count = len(targets)
    longest = max(8, min(16, 20 - count.bit_length()))  # bits of a digit: a million buckets in all
    value = np.zeros(count, np.uint64)
    cost = next_cost = np.zeros(count, np.int64)
    fits = np.zeros(count, bool)
    above = 64  # bits, below those that are settled
    while above and not fits.all():
        bits = min(longest, above)

        total = np.zeros(count << bits, np.int64)
        for part in each(functools.partial(_histogram, value, above, bits, keys)):
            total += part
        falling = total.reshape(count, -1)[:, ::-1]
        through = cost[:, None] + np.cumsum(falling, axis=1)  # of this digit and all above it
        if above == 64:
            fits = through[:, -1] <= targets
            cost = through[:, -1]
        digit = np.argmax(through > targets[:, None], axis=1)
        next_cost = np.where(fits, 0, falling[np.arange(count), digit])
        cost = np.where(fits, cost, through[np.arange(count), digit] - next_cost)
        value = (value << np.uint64(bits)) | (falling.shape[1] - 1 - digit).astype(np.uint64)
        above -= bits
    return value, cost, next_cost, fits


def _histogram(
    prefix: np.ndarray, above: int, bits: int, keys: bool, columns: Iterable[_Column]
) -> np.ndarray:
    """Return a histogram of costs over the next digit of keys with a group's prefix.

    Args:
      prefix: uint64 [groups], the digits that are known.
      above: number of bits that are not.
      bits: of the next digit.
      keys: whether the two values outside of the ranking are skipped.

    Returns:
      int64 [groups << bits].
    """
    found = np.zeros(len(prefix) << bits, np.int64)
    for column in columns:
        if above < 64:
            own = prefix[0] if column.groups is None else prefix[column.groups]
            column = column.take(np.flatnonzero(column.values >> np.uint64(above) == own))
        if keys:
            rows = np.flatnonzero(column.values - _ONE < INCLUDED - _ONE)
            column = column if len(rows) == len(column.values) else column.take(rows)
        bucket = (column.values >> np.uint64(above - bits)).view(np.int64) & ((1 << bits) - 1)
        if column.groups is not None:
            bucket += column.groups.astype(np.int64) << bits
        np.add.at(found, bucket, column.costs.astype(np.int64))
    return found
