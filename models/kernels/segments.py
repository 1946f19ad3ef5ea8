"""Visibility between tokens of packed rows, as a mask or as segment ids.

Tokens attend within their own segment only, and segment 0 is padding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels import Needs, Operands
from models.layers import dropout

# NOTE: finite, so that a row without any visible key gives a uniform softmax and not NaN.
MASKED = -1e10


class Branches(NamedTuple):
    """Texts of one segment with a common beginning: each sees the beginning and itself.

        tokens     a b c | d e | f g      texts a b c d e, a b c f g
        until      6 6 6   4 4   6 6
        positions  0 1 2   3 4   3 4

    Attributes:
      until: int32 [batch, length], the last array index from which each token is seen.
      positions: int32 [batch, length], position of each token in its text; windows use them.
    """

    until: jax.Array
    positions: jax.Array

    @classmethod
    def of(cls, reach: jax.Array, positions: jax.Array) -> Branches:
        """Build from the number of next tokens that see each token, int32 [batch, length]."""
        return cls(jnp.arange(reach.shape[1], dtype=reach.dtype) + reach, positions)


def segment_mask(
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    branches: Branches | None = None,
) -> jax.Array:
    """Return a mask of the keys that each query sees: those of its segment, by default.

        segments 1 1 2 0, causal:  1 . . .
                                   1 1 . .
                                   . . 1 .
                                   . . . .

    Args:
      query_segments, key_segments: ids [batch, queries] and [batch, keys], 0 for padding.
      causal: hide keys of a higher array index; queries and keys must be the same tokens.
      window: hide all but this many latest keys, the query's own included, by array index or by the
        positions of `branches`. Without `causal`, also hide all but the same number of next keys.
      branches: hide keys of other texts of the segment.

    Returns:
      bool [batch, 1, queries, keys].
    """
    queries, keys = query_segments[:, :, None], key_segments[:, None, :]
    mask = (queries == keys) & (keys > 0)
    length = query_segments.shape[1]
    if causal:
        mask &= jnp.tri(length, dtype=bool)
    if branches is not None:
        mask &= jnp.arange(length)[:, None] <= branches.until[:, None, :]
        if window is not None:
            positions = branches.positions
            mask &= positions[:, :, None] - positions[:, None, :] < window
    elif window is not None:
        mask &= ~jnp.tri(length, k=-window, dtype=bool)
        if not causal:
            mask &= ~jnp.tri(length, k=-window, dtype=bool).T
    return mask[:, None]


def block_spans(
    query_ids: jax.Array, key_ids: jax.Array, query_block: int, key_block: int, *, causal: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return the key blocks that each query block reads, and the query blocks that read each key.

    A pair of blocks is read if the ranges of their segment ids overlap.

    Args:
      query_ids, key_ids: int32 [batch, length] in whole blocks; at most 0 for padding.

    Returns:
      Two pairs (first, end), int32 [batch * query_blocks] and [batch * key_blocks] each.
    """

    def extent(ids: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
        ids = ids.reshape(ids.shape[0], -1, block)
        return jnp.min(jnp.where(ids > 0, ids, np.int32(2**30)), axis=-1), jnp.max(ids, axis=-1)

    def span(meet: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = meet.shape[-1]
        index = jnp.arange(count, dtype=jnp.int32)
        first = jnp.min(jnp.where(meet, index, count), axis=-1)
        end = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
        return first.reshape(-1), end.reshape(-1)

    low, high = extent(query_ids, query_block)
    key_low, key_high = extent(key_ids, key_block)
    meet = (low[:, :, None] <= key_high[:, None]) & (key_low[:, None] <= high[:, :, None])
    if causal:
        last_query = (np.arange(meet.shape[1]) + 1) * query_block - 1
        meet &= np.arange(meet.shape[2]) * key_block <= last_query[:, None]
    return span(meet), span(meet.swapaxes(1, 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Visibility for kernels that compute the mask block by block.

    Attributes:
      queries, keys: int32 [batch, queries] and [batch, keys], 0 for padding.
      causal: a query sees no key of a higher index.
      until: int32 [batch, keys], the last query that sees each key; None if all do.
    """

    queries: jax.Array
    keys: jax.Array
    causal: bool = dataclasses.field(metadata={"static": True})
    until: jax.Array | None = None


class SegmentKernel:
    """Parts shared by kernels that read `Segments` and have neither windows nor soft caps."""

    branched = False  # True if `attend` reads `Segments.until`

    def unsupported(self, needs: Needs) -> str | None:
        """Return the reason why the kernel does not support this attention, or None."""
        if needs.window:
            return "has no window"
        if needs.softcap:
            return "has no softcap"
        if needs.branches and not self.branched:
            return "has no branches"
        return "has no dropout drawn for each query" if needs.dropout_per_query else None

    def visibility(
        self,
        query_segments: jax.Array,
        key_segments: jax.Array,
        *,
        causal: bool,
        window: int | None,
        branches: Branches | None = None,
    ) -> Segments:
        """Return the segment ids themselves."""
        until = None if branches is None else branches.until
        return Segments(query_segments, key_segments, causal, until)


def kept_keys(operands: Operands) -> jax.Array | None:
    """Return the factor of each key's weight, [batch, heads, keys], or None without dropout.

    All queries share one draw.
    """
    drop = operands.dropout
    if drop.key is None or drop.rate == 0.0:
        return None
    batch, _, heads, _ = operands.query.shape
    ones = jnp.ones((batch, heads, 1, operands.key.shape[1]), jnp.float32)
    return dropout(ones, drop.rate, drop.key)[:, :, 0]


def scaled_values(value: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Return the values times `kept`.

    A factor of a key's weight that all queries share may multiply the key's value instead.
    """
    return value if kept is None else (value * kept.swapaxes(1, 2)[..., None]).astype(value.dtype)
