"""T5's relative position bias, a learned number per head and bucket of key - query."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.layers import RELPOS_INIT, parameter


class RelativePositionBias(nnx.Module):
    """A table of biases, float32 [heads, buckets]."""

    def __init__(self, num_heads: int, buckets: int, max_distance: int, *, bidirectional: bool):
        self.rel_embedding = parameter(
            (num_heads, buckets), ("relpos_heads", "relpos_buckets"), RELPOS_INIT
        )
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def by_distance(self) -> jax.Array:
        """Return the bias at key - query = -max_distance .. max_distance; beyond, the ends hold.

        float32 [heads, 2 * max_distance + 1].
        """
        table = self.rel_embedding[...]
        buckets = _buckets(self.bidirectional, table.shape[1], self.max_distance)
        return table.astype(jnp.float32)[:, jnp.asarray(buckets)]

    def __call__(self, queries: int, keys: int, offset: int | jax.Array = 0) -> jax.Array:
        """Return the bias of queries at indices offset, offset + 1, ... on keys at 0, 1, ...

        Array indices serve packed rows too: the bias depends on key - query alone, and other
        segments are masked. Returns float32 [1, heads, queries, keys].
        """
        by_distance = self.by_distance()
        heads = by_distance.shape[0]
        # One value per diagonal, then a Toeplitz matrix of them by reshaping: of a tiling with rows
        # of n, read as rows of n - 1, each row is the last one shifted right by one. The gradient
        # of that is a sum over rows, where gathering [queries, keys] numbers would scatter.
        n = queries + keys
        diagonal = jnp.arange(n)
        relative = jnp.where(diagonal < keys, diagonal, diagonal - n) - offset
        relative = jnp.clip(relative, -self.max_distance, self.max_distance)
        values = by_distance[:, relative + self.max_distance]  # [heads, n]
        tiled = jnp.broadcast_to(values[:, None], (heads, queries, n))
        skewed = tiled.reshape(heads, queries * n)[:, : queries * (n - 1)]
        return skewed.reshape(1, heads, queries, n - 1)[..., :keys]


@functools.cache
def _buckets(bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of each distance -max_distance .. max_distance, int32.

    Half of a direction's buckets hold one distance each; the rest are spaced by the logarithm.
    Distances of max_distance or more fall into the last one.
    """
    relative = np.arange(-max_distance, max_distance + 1)  # key - query
    if bidirectional:
        buckets //= 2
        offset, distance = np.where(relative > 0, buckets, 0), np.abs(relative)
    else:
        offset, distance = np.zeros_like(relative), np.maximum(-relative, 0)
    exact = buckets // 2
    # NOTE: T5X's epsilon keeps distances at which the logarithm is a whole number (16, 32, 64)
    # from falling one bucket short by rounding.
    ratio = np.maximum(distance, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    spaced = exact + np.log(ratio) / np.log(max_distance / exact) * (buckets - exact)
    spaced = np.minimum(spaced.astype(np.int32), buckets - 1)
    return (offset + np.where(distance < exact, distance, spaced)).astype(np.int32)
