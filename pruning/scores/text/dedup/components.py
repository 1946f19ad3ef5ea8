"""Connected components of pairs of documents, and the representative of each component.

Choices
- Union-find over arrays: for every pair of a batch, the greater root is hooked to the lesser one,
  in parallel, until no pair has two roots. A component is identified by its least node, so the
  result does not depend on the order of the pairs.
- Only nodes that occur in a pair are held, at 16 bytes each, and a batch of a quarter as many
  pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np


def nodes_of(batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return the nodes of all pairs, ascending, without duplicates.

    Args:
      batches: arrays uint64 [., 2].

    Returns:
      uint64 [nodes].
    """
    nodes = np.zeros(0, np.uint64)
    waiting: list[np.ndarray] = []
    held = 0
    for pairs in batches:
        waiting.append(np.unique(pairs))
        held += len(waiting[-1])
        if held > max(len(nodes), 1 << 20):  # so that the number of merges is logarithmic
            nodes = np.unique(np.concatenate([nodes, *waiting]))
            waiting, held = [], 0
    return np.unique(np.concatenate([nodes, *waiting]))


def components(nodes: np.ndarray, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return the component of every node.

    Args:
      nodes: uint64 [nodes], ascending.
      batches: pairs of nodes, uint64 [., 2].

    Returns:
      int64 [nodes]: the index of the component's least node in `nodes`.
    """
    parent = np.arange(len(nodes))
    for pairs in _joined(batches, max(len(nodes) // 4, 1 << 20)):
        first, second = (parent[np.searchsorted(nodes, pairs[:, side])] for side in (0, 1))
        while (apart := first != second).any():
            first, second = first[apart], second[apart]
            # Only roots are hooked, and to lesser nodes, so no cycle can arise.
            np.minimum.at(parent, np.maximum(first, second), np.minimum(first, second))
            _shorten(parent, np.concatenate([first, second]))
            first, second = parent[first], parent[second]
        while (above := parent[parent])[parent != above].size:
            parent = above
    return parent


def _joined(batches: Iterable[np.ndarray], least: int) -> Iterator[np.ndarray]:
    """Yield batches of at least `least` pairs, because each costs a pass over all nodes."""
    held: list[np.ndarray] = []
    count = 0
    for pairs in batches:
        held.append(pairs)
        count += len(pairs)
        if count >= least:
            yield np.concatenate(held)
            held, count = [], 0
    if held:
        yield np.concatenate(held)


def _shorten(parent: np.ndarray, nodes: np.ndarray) -> None:
    """Make the parents of `nodes` roots; each round halves the paths."""
    while True:
        above = parent[parent[nodes]]
        if (above == parent[nodes]).all():
            return
        parent[nodes] = above


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Members of components, component after component, the representative first.

    Attributes:
      order: int64 [nodes], indices of the nodes.
      rank: int64 [nodes], rank in its component of the node at that index of `order`, from 0.
      head: int64 [nodes], index in `order` of the component's representative.
      size: int64 [nodes], size of the component.
    """

    order: np.ndarray
    rank: np.ndarray
    head: np.ndarray
    size: np.ndarray


def ranked(component: np.ndarray, group: np.ndarray, value: np.ndarray) -> Ranked:
    """Order the members of each component.

    Args:
      component: integers [nodes].
      group: integers [nodes]; the lowest come first.
      value: float64 [nodes]; the highest come first within a group. Ties keep the nodes' order.
    """
    order = np.lexsort((-value, group, component))
    places = np.arange(len(order))
    first = np.ones(len(order), bool)
    first[1:] = np.diff(component[order]) != 0
    start = np.flatnonzero(first)
    which = np.cumsum(first) - 1
    head = start[which] if len(start) else places
    size = np.diff(np.append(start, len(order)))[which] if len(start) else places
    return Ranked(order, places - head, head, size)
