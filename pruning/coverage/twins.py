"""Near twins: for every document of a cluster, how similar an earlier and still kept one is.

    order the cluster by who is to be kept first; then
    v(j) = max of cos(i, j) over the earlier i with cos(i, j) > limit(i)

and whoever has v > 1 - epsilon is dropped. `limit` says from which similarity on i still acts:

    nested   limit(i) = v(i). Let epsilon grow from 0: a document is dropped as soon as an earlier
             one that is still there comes within epsilon, and stays dropped; from then on it drops
             nobody. One number per document serves every epsilon and every budget, and a larger
             epsilon drops all that a smaller one did, and more.
    at       none if v(i) <= 1 - epsilon, else infinite. Exact for one epsilon: who is dropped at
             this epsilon drops nobody.
    any      none. Every earlier document acts, dropped or not: a chain of small steps goes
             altogether, though its ends have nothing in common. This is what the public code of
             SemDeDup does (Abbas et al. 2023).

Choices
- The cluster's Gram matrix is made tile by tile: memory O(n * TWIN_TILE), and one pass.
- Within a tile, one document at a time is settled and acts on the later ones.
- Clusters of about the same size go to the devices together, one cluster per device at a time.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pruning.coverage.embeddings import AXIS

TWIN_TILE = 128
NONE = -1.0  # the similarity of a document that has no earlier twin

Rule = Literal["nested", "at", "any"]


def _limit(rule: Rule, threshold: float, values: jax.Array) -> jax.Array:
    """From which similarity on a settled document acts. float32, of the shape of `values`."""
    if rule == "nested":
        return values
    if rule == "any":
        return jnp.full_like(values, -2.0)
    return jnp.where(values > threshold, 2.0, -2.0)


def _settle(x: jax.Array, tiles: jax.Array, rule: Rule, threshold: float) -> jax.Array:
    """One cluster. x: float32 [most tiles, TWIN_TILE, width]; tiles: how many are filled."""
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

    # Padding follows the documents, so that it acts on none of them.
    return jax.lax.fori_loop(0, tiles, tile, jnp.full(x.shape[:2], NONE) + 0 * x[..., 0])


@functools.partial(jax.jit, static_argnames=("rule", "threshold", "mesh"))
def _settle_clusters(x, tiles, rule, threshold, mesh):
    """x: float32 [clusters, most tiles, TWIN_TILE, width]; tiles: int32 [clusters]."""
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
    """The similarity of every document to an earlier one of its cluster that acts on it.

    Args:
      vectors: float32 [n, width], of length 1, cluster after cluster; within a cluster, who is to
        be kept first comes first.
      bounds: int64 [clusters + 1]: where the clusters begin and end.
      mesh: of the devices that share the clusters.
      rule: see above.
      epsilon: of the rule "at"; ignored by the others.
      load_rows: rows, padding included, that a device holds at a time; a larger cluster goes alone.

    Returns:
      float32 [n], in [-1, 1]; -1 for a document with no earlier twin.
    """
    values = np.full(len(vectors), NONE, np.float32)
    sizes = np.diff(bounds)
    # Alone in its cluster: nothing to compare with.
    several = np.flatnonzero(sizes > 1)
    tiles = -(-sizes // TWIN_TILE)
    most = 1 << np.ceil(np.log2(np.maximum(tiles, 1))).astype(np.int64)
    threshold = float(1.0 - epsilon) if rule == "at" else 0.0
    for size in np.unique(most[several]).tolist():
        alike = several[most[several] == size]
        step = mesh.size * max(1, load_rows // (size * TWIN_TILE))
        for begin in range(0, len(alike), step):
            chosen = alike[begin : begin + step]
            # Few shapes: the number of clusters is a power of two per device, the rest is empty.
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
