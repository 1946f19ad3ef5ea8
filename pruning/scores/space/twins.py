"""Similarity of each document of a cluster to the earlier documents that may drop it.

With the cluster in order of priority,

    v(j) = max of cos(i, j) over the earlier i with cos(i, j) > limit(i)

and document j is dropped at epsilon if v(j) > 1 - epsilon. Document i drops others only above the
similarity limit(i), which depends on the rule:

    nested   limit(i) = v(i). As epsilon grows from 0, a document is dropped as soon as an earlier
             document that is still kept is within epsilon. It stays dropped and drops no other. One
             number per document serves every epsilon and every budget, and a larger epsilon drops a
             superset.
    at       no limit if v(i) <= 1 - epsilon, else infinite. Exact for one epsilon: a document that
             is dropped at this epsilon drops no other.
    any      no limit. Every earlier document drops others, kept or not, so that a chain of small
             steps is dropped although its ends differ. The public code of SemDeDup does this
             (Abbas et al. 2023).

Choices
- The cluster's Gram matrix is computed tile by tile, in one pass and O(n * TWIN_TILE) memory.
- Within a tile, documents are processed one at a time, in order.
- Clusters of similar size are sent to the devices together, one cluster per device at a time.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pruning.scores.space.embeddings import AXIS

TWIN_TILE = 128
NONE = -1.0  # similarity of a document without an earlier near-duplicate

Rule = Literal["nested", "at", "any"]


def _limit(rule: Rule, threshold: float, values: jax.Array) -> jax.Array:
    """Return the similarity above which a processed document drops others, shaped as `values`."""
    if rule == "nested":
        return values
    if rule == "any":
        return jnp.full_like(values, -2.0)
    return jnp.where(values > threshold, 2.0, -2.0)


def _settle(x: jax.Array, tiles: jax.Array, rule: Rule, threshold: float) -> jax.Array:
    """Process one cluster. x: float32 [most tiles, TWIN_TILE, width]; tiles: number filled."""
    dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    places = jnp.arange(TWIN_TILE)

    def tile(j, values):
        def earlier(i, best):
            cosines = dot(x[i], x[j].T)  # [earlier, later]
            acts = cosines > _limit(rule, threshold, values[i])[:, None]
            return jnp.maximum(best, jnp.where(acts, cosines, NONE).max(axis=0))

        own = dot(x[j], x[j].T)

        def settled(row, best):
            acts = (places > row) & (own[row] > _limit(rule, threshold, best[row]))
            return jnp.maximum(best, jnp.where(acts, own[row], NONE))

        best = jax.lax.fori_loop(0, j, earlier, values[j])
        return values.at[j].set(jax.lax.fori_loop(0, TWIN_TILE, settled, best))

    # Padding follows the documents, so that it drops none of them.
    return jax.lax.fori_loop(0, tiles, tile, jnp.full(x.shape[:2], NONE) + 0 * x[..., 0])


@functools.partial(jax.jit, static_argnames=("rule", "threshold", "mesh"))
def _settle_clusters(x, tiles, rule, threshold, mesh):
    """Process clusters in parallel over a mesh.

    x: float32 [clusters, most tiles, TWIN_TILE, width]; tiles: int32 [clusters].
    """
    return jax.shard_map(
        lambda x, tiles: jax.lax.map(lambda c: _settle(c[0], c[1], rule, threshold), (x, tiles)),
        mesh=mesh,
        in_specs=(P(AXIS), P(AXIS)),
        out_specs=P(AXIS),
    )(x, tiles)


def twin_similarities(
    vectors: np.ndarray,
    bounds: np.ndarray,
    mesh: Mesh,
    rule: Rule = "nested",
    epsilon: float = 0.0,
    load_rows: int = 1 << 17,
) -> np.ndarray:
    """Return the largest similarity of every document to an earlier one that may drop it.

    Args:
      vectors: float32 [n, width], of length 1, cluster after cluster; within a cluster, in the
        order of precedence.
      bounds: int64 [clusters + 1], offsets of the clusters.
      mesh: devices that share the clusters.
      rule: see the module's docstring.
      epsilon: epsilon of the rule "at"; ignored by the others.
      load_rows: rows, padding included, that a device holds at a time; a larger cluster is
        processed alone.

    Returns:
      float32 [n], in [-1, 1]; -1 for a document without an earlier near-duplicate.
    """
    values = np.full(len(vectors), NONE, np.float32)
    sizes = np.diff(bounds)
    # A document alone in its cluster is not compared.
    several = np.flatnonzero(sizes > 1)
    tiles = -(-sizes // TWIN_TILE)
    most = 1 << np.ceil(np.log2(np.maximum(tiles, 1))).astype(np.int64)
    threshold = float(1.0 - epsilon) if rule == "at" else 0.0
    for size in np.unique(most[several]).tolist():
        alike = several[most[several] == size]
        step = mesh.size * max(1, load_rows // (size * TWIN_TILE))
        for begin in range(0, len(alike), step):
            chosen = alike[begin : begin + step]
            # Few shapes: pad the number of clusters per device to a power of two.
            per_device = 1 << (-(-len(chosen) // mesh.size) - 1).bit_length()
            x = np.zeros((per_device * mesh.size, size * TWIN_TILE, vectors.shape[1]), np.float32)
            count = np.zeros(len(x), np.int32)
            for slot, cluster in enumerate(chosen):
                x[slot, : sizes[cluster]] = vectors[bounds[cluster] : bounds[cluster + 1]]
                count[slot] = tiles[cluster]
            x = x.reshape(len(x), size, TWIN_TILE, -1)
            sharding = NamedSharding(mesh, P(AXIS))
            found = _settle_clusters(
                jax.device_put(x, sharding), jax.device_put(count, sharding), rule, threshold, mesh
            )
            found = np.asarray(found).reshape(len(x), -1)
            for slot, cluster in enumerate(chosen):
                values[bounds[cluster] : bounds[cluster + 1]] = found[slot, : sizes[cluster]]
    return np.minimum(values, 1.0)
