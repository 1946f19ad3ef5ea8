"""Spherical k-means by matrix products of `TILE` rows with all centroids, never [N, k] at once.

Choices
- Spherical: vectors and centroids have length 1, similarity is the cosine, and a centroid is the
  direction of its members' sum.
- Lloyd's iterations start from random members. Each pass over the data is started by a function, so
  the data may stay on the devices or be read from files every time.
- A centroid without members splits a large cluster, drawn in proportion to its size.
- Products are in float32 at the highest precision. With k = 10,000 and C4 they take minutes of one
  host, and prototypicality is this similarity.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pruning.scores.space.embeddings import AXIS
from pruning.store import randomness
from pruning.store.randomness import Stream

Load = tuple[jax.Array, jax.Array]  # tiles float32 [tiles, TILE, width], valid bool [tiles, TILE]

_NUDGE = 1.0 / 1024  # initial distance of the halves of a split cluster from its centroid


class TooFewVectors(ValueError):
    """Error for fewer vectors than clusters."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Result of k-means.

    Attributes:
      centroids: float32 [k, width], of length 1.
      objective: mean cosine to the assigned centroid before each iteration's update; it rises.
      splits: number of empty clusters that were refilled, over all iterations.
    """

    centroids: np.ndarray
    objective: list[float]
    splits: int


def _nearest(centroids: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each row's most similar centroid, int32 [n], and its cosine, float32 [n]."""
    cosines = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)  # [n, k]
    best = jnp.max(cosines, axis=1)
    # NOTE: argmax as two reductions of one array each. XLA's argmax reduces pairs, which takes
    # twice as long as the matrix product on a CPU.
    index = jnp.arange(len(centroids), dtype=jnp.int32)
    found = jnp.where(cosines >= best[:, None], index, len(centroids) - 1)
    return jnp.min(found, axis=1), best


@functools.partial(jax.jit, static_argnames="mesh")
def assign_tiles(centroids: jax.Array, tiles: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Return the cluster of every vector.

    Args:
      centroids: float32 [k, width].
      tiles: float32 [tiles, TILE, width].

    Returns:
      int32 [tiles, TILE], the cluster; float32 [tiles, TILE], the cosine to its centroid.
    """
    return jax.shard_map(
        lambda c, t: jax.lax.map(functools.partial(_nearest, c), t),
        mesh=mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=(P(AXIS), P(AXIS)),
    )(centroids, tiles)


@functools.partial(jax.jit, static_argnames="mesh")
def _sums(centroids: jax.Array, tiles: jax.Array, valid: jax.Array, mesh: Mesh) -> tuple:
    """Return sums and numbers of the members of each cluster, and the sum of their cosines."""

    def on_device(centroids, tiles, valid):
        def add(state, tile):
            sums, sizes, total = state
            x, real = tile
            cluster, cosine = _nearest(centroids, x)
            weight = real.astype(jnp.float32)
            sums = sums.at[cluster].add(x * weight[:, None])
            sizes = sizes.at[cluster].add(real.astype(jnp.int32))
            return (sums, sizes, total + (cosine * weight).sum()), None

        empty = (
            jnp.zeros_like(centroids),
            jnp.zeros(len(centroids), jnp.int32),
            jnp.zeros((), jnp.float32),
        )
        empty = jax.lax.pcast(empty, AXIS, to="varying")
        state, _ = jax.lax.scan(add, empty, (tiles, valid))
        return jax.lax.psum(state, AXIS)

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=(P(), P(), P())
    )(centroids, tiles, valid)


def fit(
    loads: Callable[[], Iterable[Load]],
    initial: np.ndarray,
    iterations: int,
    mesh: Mesh,
    seed: int = 0,
    after: Callable[[int, float], None] = lambda iteration, objective: None,
) -> Clusters:
    """Run Lloyd's iterations.

    Args:
      loads: starts a pass over the training vectors.
      initial: float32 [k, width], initial members.
      iterations: number of updates.
      seed: seed of the splits.
      after: called with the iteration and the objective before its update.
    """
    centroids = _unit(np.asarray(initial, np.float32))
    objective: list[float] = []
    splits = 0
    for iteration in range(iterations):
        sums = np.zeros(centroids.shape, np.float64)
        sizes = np.zeros(len(centroids), np.int64)
        total = 0.0
        for tiles, valid in loads():
            state = _sums(centroids, tiles, valid, mesh)
            sums += np.asarray(state[0])
            sizes += np.asarray(state[1])
            total += float(state[2])
        objective.append(total / max(int(sizes.sum()), 1))
        after(iteration, objective[-1])
        # Members that cancel exactly have no direction: keep the old centroid.
        moved = (sizes > 0) & (np.linalg.norm(sums, axis=1) > 0)
        centroids = np.where(moved[:, None], sums, centroids)
        centroids = _unit(_split_largest(_unit(centroids), sizes, seed, iteration))
        splits += int((sizes == 0).sum())
    return Clusters(centroids, objective, splits)


def first_centroids(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], clusters: int, seed: int
) -> np.ndarray:
    """Return initial centroids: the vectors with the lowest hashes, in any reading order.

    Args:
      batches: pairs of document ids [n] and float32 [n, width].

    Returns:
      float32 [clusters, width].

    Raises:
      TooFewVectors: there are fewer vectors than clusters.
    """
    keys = np.zeros(0, np.uint64)
    vectors: np.ndarray | None = None
    for ids, x in batches:
        keys = np.concatenate([keys, randomness.hashed(Stream.FIRST_CENTROIDS, seed, ids)])
        vectors = x if vectors is None else np.concatenate([vectors, x])
        first = np.argsort(keys, kind="stable")[:clusters]
        keys, vectors = keys[first], vectors[first]
    if vectors is None or len(vectors) < clusters:
        raise TooFewVectors(
            f"{len(keys)} vectors cannot make {clusters} clusters: ask for fewer clusters or give "
            "more training documents."
        )
    return vectors


def _unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def _split_largest(
    centroids: np.ndarray, sizes: np.ndarray, seed: int, iteration: int
) -> np.ndarray:
    """Give every empty cluster one half of a large one, and move the halves apart slightly."""
    random = randomness.generator(Stream.CLUSTER_SPLIT, seed, iteration)
    centroids, sizes = centroids.copy(), sizes.astype(np.float64)
    sign = np.where(np.arange(centroids.shape[1]) % 2, -1.0, 1.0)
    for empty in np.flatnonzero(sizes == 0):
        odds = np.maximum(sizes - 1.0, 0.0)
        if odds.sum() == 0:  # every cluster has one member, so none can be split
            break
        donor = int(random.choice(len(sizes), p=odds / odds.sum()))
        centroids[empty] = centroids[donor] * (1.0 + _NUDGE * sign)
        centroids[donor] = centroids[donor] * (1.0 - _NUDGE * sign)
        sizes[empty] = sizes[donor] = sizes[donor] / 2.0
    return centroids
