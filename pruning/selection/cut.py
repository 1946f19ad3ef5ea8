"""Where a ranking is cut: the exact threshold of a budget, without sorting.

Documents are ranked by a float64 key, highest first, ties by the document's hash. Given what each
of them costs (its tokens, or 1), the cut stands at the first document that no longer fits, and all
that are ranked before it are kept:

    key    9.0   7.5   7.5   3.2        costs so far, with a target of 100:
    hash    17    80    12    99        40, 70, 95, 125 -> the cut stands at (3.2, 99):
    cost    40    30    25    30        three documents are kept, 95 of 100 tokens

Choices
- Radix selection, most significant digit first: one histogram of costs per 16 bits of the key, so
  four passes over the keys and four over the hashes of those that tie at the cut. Exact whatever
  the distribution of the keys, and memory does not grow with the number of documents.
- Histograms add up: documents come in chunks, from any number of shards, in any order and in any
  number of threads.
- Groups (quotas) are cut in the same passes, by shorter digits where they are many.
- What is kept never costs more than the target, and falls short of it by less than the first
  document left out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np

# Values that no key has. They stand outside of the ranking, and cost nothing in it.
EXCLUDED = np.uint64(0)  # kept by no budget; what `ordered` makes of NaN
INCLUDED = np.uint64(2**64 - 1)  # kept whatever the budget

_SIGN = np.uint64(1 << 63)
_EVERYTHING = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some documents of a ranking.

    Attributes:
      values: uint64 [n], `ordered` keys, EXCLUDED or INCLUDED.
      costs: int [n]; 0 outside of the ranking.
      groups: int [n], or None when there is one group.
      hashes: rows int [m] -> uint64 [m]; asked for the rows that tie at a cut only.
    """

    values: np.ndarray
    costs: np.ndarray
    groups: np.ndarray | None
    hashes: Callable[[np.ndarray], np.ndarray]

    def of(self, per_group: np.ndarray) -> np.ndarray:
        """Every document's entry of an array [groups]; a scalar when there is one group."""
        return per_group[0] if self.groups is None else per_group[self.groups]


@dataclasses.dataclass(frozen=True)
class Cut:
    """The first document left out of every group.

    Attributes:
      value: uint64 [groups], its `ordered` key; 0 where the whole group fits.
      tie: uint64 [groups], its hash.
      cost: int64 [groups], what the documents ranked before it cost together.
      next_cost: int64 [groups], what it costs itself; 0 where the whole group fits.
    """

    value: np.ndarray
    tie: np.ndarray
    cost: np.ndarray
    next_cost: np.ndarray

    def before(self, chunk: Chunk) -> np.ndarray:
        """bool [n], which documents of the chunk are ranked before the cut."""
        kept = chunk.values > chunk.of(self.value)
        tied = _tied(chunk, self.value)
        if len(tied):
            tie = self.tie[0] if chunk.groups is None else self.tie[chunk.groups[tied]]
            kept[tied] = chunk.hashes(tied) > tie
        return kept

    def moved(self, groups: np.ndarray) -> Cut:
        """The cut with one more document before it, in the groups where bool [groups] says so."""
        groups = groups & (self.next_cost > 0) & (self.tie > 0)
        return Cut(
            self.value,
            self.tie - groups.astype(np.uint64),  # hashes are distinct
            self.cost + np.where(groups, self.next_cost, 0),
            np.where(groups, 0, self.next_cost),
        )


Each = Callable[[Callable[[Chunk], np.ndarray]], Iterable[np.ndarray]]
_Column = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # values, costs, groups


def between(chunk: Chunk, start: Cut | None, stop: Cut) -> np.ndarray:
    """bool [n], the documents from one cut (None: from the first on) to another, and INCLUDED."""
    kept = stop.before(chunk)
    if start is not None:
        kept &= ~start.before(chunk)
        kept |= chunk.values == INCLUDED
    return kept


def ordered(keys: np.ndarray) -> np.ndarray:
    """Maps float64 to uint64 of the same order; NaN to `EXCLUDED`, below all others."""
    bits = (keys + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0: the two tie
    bits = bits.view(np.uint64) ^ ((bits >> 63).view(np.uint64) | _SIGN)  # ~bits where negative
    bits[np.isnan(keys)] = EXCLUDED
    return bits


def unordered(values: np.ndarray) -> np.ndarray:
    """The float64 that `ordered` mapped to these values."""
    return np.where(values >= _SIGN, values & ~_SIGN, ~values).view(np.float64)


def find(each: Each, targets: np.ndarray) -> Cut:
    """Cuts every group at its target.

    Args:
      each: applies a function to every chunk of all documents, anew at every call, and gives the
        results in any order: `lambda function: map(function, chunks)`, or in threads.
      targets: int64 [groups], the cost not to be exceeded.
    """

    def by_key(chunk: Chunk) -> _Column:
        return chunk.values, chunk.costs, chunk.groups

    value, cost, _, fits = _radix_select(each, by_key, targets)
    value[fits] = EXCLUDED
    if fits.all():
        return Cut(value, np.zeros_like(value), cost, np.zeros_like(cost))

    def by_hash(chunk: Chunk) -> _Column:
        rows = _tied(chunk, value)
        groups = None if chunk.groups is None else chunk.groups[rows]
        return chunk.hashes(rows), chunk.costs[rows], groups

    left = np.where(fits, _EVERYTHING, targets - cost)
    tie, beyond, next_cost, _ = _radix_select(each, by_hash, left)
    return Cut(value, tie, cost + beyond, next_cost)


def _tied(chunk: Chunk, value: np.ndarray) -> np.ndarray:
    """The rows whose key is the cut's."""
    return np.flatnonzero((chunk.values == chunk.of(value)) & (chunk.values != EXCLUDED))


def _radix_select(
    each: Each, column: Callable[[Chunk], _Column], targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Descends from the leading digit, into the bucket in which the costs pass the target.

    Returns:
      value: uint64 [groups], the highest with which the costs pass the target.
      cost: int64 [groups], of all that is higher; of the whole group where it fits.
      next_cost: int64 [groups], of all that has this value; 0 where the group fits.
      fits: bool [groups], the whole group costs no more than the target.
    """
    count = len(targets)
    longest = max(8, min(16, 20 - count.bit_length()))  # bits of a digit: a million buckets in all
    value = np.zeros(count, np.uint64)
    cost = next_cost = np.zeros(count, np.int64)
    fits = np.zeros(count, bool)
    above = 64  # bits, below those that are settled
    while above:
        bits = min(longest, above)

        total = np.zeros(count << bits, np.int64)
        for part in each(functools.partial(_histogram, column, value, above, bits)):
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
    column: Callable[[Chunk], _Column], prefix: np.ndarray, above: int, bits: int, chunk: Chunk
) -> np.ndarray:
    """What the documents cost that have a group's prefix, by the next digit.

    Args:
      prefix: uint64 [groups], the digits that are settled.
      above: how many bits are not.
      bits: of the next digit.

    Returns:
      int64 [groups << bits].
    """
    values, costs, groups = column(chunk)
    if above < 64:
        own = prefix[0] if groups is None else prefix[groups]
        inside = np.flatnonzero(values >> np.uint64(above) == own)
        values, costs = values[inside], costs[inside]
        groups = None if groups is None else groups[inside]
    bucket = (values >> np.uint64(above - bits)).astype(np.int64) & ((1 << bits) - 1)
    if groups is not None:
        bucket += groups.astype(np.int64) << bits
    found = np.zeros(len(prefix) << bits, np.int64)
    np.add.at(found, bucket, costs.astype(np.int64))
    return found
