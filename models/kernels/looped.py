"""Attention in pieces that fit a cache: for CPUs, several times as fast as the batched form.

- Batched, the float32 scores [batch, heads, queries, keys] are 50 to 100 MB, and each pass of the
  softmax streams them from memory. Those of one head and BLOCK queries are half a megabyte at most
  and stay in the cache.
- A block of queries reads the keys from the first to the last block of keys that share a segment
  with it, and none after itself if attention is causal: the cost of a packed row is that of its
  documents. The number of keys is data, which an array's size cannot depend on: there is one
  compiled branch for each number of blocks.
- The backward pass runs over whole rows and heads and computes the weights again: saved weights
  would be the quadratic buffer that the loop avoids, and writing and reading them takes as long.
  Heads are the outer loop, so that the gradient of a head's bias is summed over rows in one buffer.
- The bias depends on key - query alone. A block of queries, against keys for a row's length before
  and behind it, has all of its values: a `strip`, of which every block reads a part.
- The arithmetic is that of `plain.dot_product_attention`, in bfloat16 rounding included. In float32
  the forward pass divides by the sum of the weights after the product with the values, which saves
  a pass over the scores.
- bfloat16 arrays are sliced as integers. XLA's CPU backend cannot slice bfloat16: it would convert
  the whole array to float32 outside of the loop, and back inside.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from models.kernels import Operands
from models.kernels.segments import MASKED, SegmentKernel, kept_keys
from models.layers import einsum
from models.partitioning import parts, per_shard
from models.relative_bias import RelativePositionBias

BLOCK = 128  # queries, and keys, at a time; 64 and 256 were slower


def strip(queries: int, keys: int) -> tuple[int, int, int]:
    """Return the part of a bias that `looped_attention` reads, for rows of these lengths.

    It is the bias of the row's last block of queries on all keys before it and as many behind it.
    Returns the number of queries, the number of keys, and the index of the first query: the
    arguments of `RelativePositionBias.__call__`.
    """
    block = min(BLOCK, queries)
    offset = _rounded_up(queries, block) - block
    return block, offset + _rounded_up(keys, min(BLOCK, keys)), offset


def looped_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_segments: jax.Array,
    key_segments: jax.Array,
    bias: jax.Array | None = None,
    kept: jax.Array | None = None,
    until: jax.Array | None = None,
    causal: bool = False,
    scale: float = 1.0,
) -> jax.Array:
    """Return softmax(scale * query key + bias) value within segments.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
      query_segments, key_segments: int32 [batch, queries] and [batch, keys]; 0 hides a key. Any
        order is correct; blocks are skipped if ids ascend along a row.
      bias: its `strip`, float32 [1, heads, block, keys before and behind]; or None.
      kept: factor of each key's weights, float32 [batch, heads, keys]: dropout with one draw for
        all queries. Or None.
      until: int32 [batch, keys], the last index of a query that sees each key; None: all do.
      causal: a query sees no key of a higher index.

    Returns:
      [batch, queries, heads, head_dim] in query's dtype. The output of a query that sees no key is
      finite and has no meaning.
    """
    return _looped(
        query, key, value, bias, kept, query_segments, key_segments, until, causal, scale
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9))
def _looped(query, key, value, bias, kept, query_segments, key_segments, until, causal, scale):
    return _forward(
        query, key, value, bias, kept, query_segments, key_segments, until, causal, scale
    )[0]


def _weights(query, key, bias, query_segments, key_segments, until, causal, scale):
    """Return the softmax of one row and head, float32 [queries, keys], and the mask."""
    scores = einsum("qd,kd->qk", query, key, jnp.float32)
    if scale != 1.0:
        scores = scores * scale
    if bias is not None:
        scores = scores + bias
    mask = (query_segments[:, None] == key_segments[None]) & (key_segments > 0)[None]
    if causal:
        mask &= jnp.tri(mask.shape[0], mask.shape[1], dtype=bool)
    if until is not None:
        mask &= jnp.arange(mask.shape[0])[:, None] <= until[None]
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), mask


class _Static(NamedTuple):
    """Static sizes and settings."""

    queries: int
    keys: int
    heads: int
    head_dim: int
    group: int  # query heads per key head
    dtype: Any
    causal: bool
    scale: float

    @property
    def query_block(self) -> int:
        return min(BLOCK, self.queries)

    @property
    def key_block(self) -> int:
        return min(BLOCK, self.keys)


class _Rows(NamedTuple):
    """Arrays in whole blocks; bfloat16 as integers, and heads side by side."""

    query: jax.Array  # [batch, length, heads * head_dim]
    key: jax.Array  # [batch, keys, kv_heads * head_dim]
    value: jax.Array
    bias: jax.Array | None  # the strip
    kept: jax.Array | None  # [batch, heads, keys]
    query_segments: jax.Array
    key_segments: jax.Array
    until: jax.Array | None  # [batch, keys]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    kept: jax.Array | None,
    query_segments: jax.Array,
    key_segments: jax.Array,
    until: jax.Array | None,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, Any]:
    """Return the output, and what the backward pass needs."""
    saved = (query, key, value, bias, kept, query_segments, key_segments, until)
    batch, queries, heads, head_dim = query.shape
    group = heads // key.shape[2]
    static = _Static(queries, key.shape[1], heads, head_dim, group, query.dtype, causal, scale)
    rows = _in_blocks(static, *saved)
    query_blocks = rows.query_segments.shape[1] // static.query_block
    key_blocks = rows.key_segments.shape[1] // static.key_block
    first, count = _spans(
        rows.query_segments, rows.key_segments, static.query_block, static.key_block, causal
    )
    sizes = _sizes(key_blocks)
    branches = [
        functools.partial(_attend_span, static, rows, size * static.key_block) for size in sizes
    ]
    branch_of = jnp.asarray(np.searchsorted(sizes, np.arange(key_blocks + 1)))

    def attend(given: Any) -> jax.Array:
        row, block, start, branch = given
        return jax.lax.switch(branch, branches, row, block, start)

    out = jax.lax.map(
        attend,
        (
            jnp.repeat(jnp.arange(batch), query_blocks),
            jnp.tile(jnp.arange(query_blocks), batch),
            first.reshape(-1) * static.key_block,
            branch_of[count.reshape(-1)],
        ),
    )
    out = _values(out).reshape(batch, -1, heads, head_dim)
    return out[:, :queries], saved


def _in_blocks(
    static: _Static,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    kept: jax.Array | None,
    query_segments: jax.Array,
    key_segments: jax.Array,
    until: jax.Array | None,
) -> _Rows:
    query_block, key_block = static.query_block, static.key_block
    query_segments = _whole_blocks(query_segments, query_block)
    key_segments = _whole_blocks(key_segments, key_block)
    # [batch, length, heads * head_dim]: heads stay side by side, nothing is transposed.
    query, key, value = (
        _bits(_whole_blocks(x.reshape(*x.shape[:2], -1), block))
        for x, block in ((query, query_block), (key, key_block), (value, key_block))
    )
    if kept is not None:
        kept = _whole_blocks(kept, key_block, axis=2)
    if until is not None:
        until = _whole_blocks(until, key_block)
    return _Rows(query, key, value, bias, kept, query_segments, key_segments, until)


def _attend_span(
    static: _Static, rows: _Rows, size: int, row: jax.Array, block: jax.Array, start: jax.Array
) -> jax.Array:
    """Attend from one block of queries to `size` keys: [query_block, heads * head_dim]."""
    at = block * static.query_block
    start = jnp.minimum(start, rows.key_segments.shape[1] - size)
    own = _cut(rows.query_segments, (row, at), (1, static.query_block))[0]
    seen = _cut(rows.key_segments, (row, start), (1, size))[0]
    mask = (own[:, None] == seen[None]) & (seen > 0)[None]
    if static.causal:
        index = at + jnp.arange(static.query_block)
        mask &= index[:, None] >= start + jnp.arange(size)[None]
    if rows.until is not None:
        until = _cut(rows.until, (row, start), (1, size))[0]
        mask &= (at + jnp.arange(static.query_block))[:, None] <= until[None]

    def head(number: jax.Array, out: jax.Array) -> jax.Array:
        attended = _attend_head(static, rows, mask, row, at, start, number)
        place = number * static.head_dim
        return jax.lax.dynamic_update_slice(out, attended, (0, place), allow_negative_indices=False)

    out = jnp.zeros((static.query_block, static.heads * static.head_dim), rows.query.dtype)
    return jax.lax.fori_loop(0, static.heads, head, out)


def _attend_head(
    static: _Static,
    rows: _Rows,
    mask: jax.Array,
    row: jax.Array,
    at: jax.Array,
    start: jax.Array,
    number: jax.Array,
) -> jax.Array:
    """Attend from queries at `at` to keys at `start`, by `mask`: [query_block, head_dim]."""
    query_block, size = mask.shape
    place, of_key = number * static.head_dim, number // static.group * static.head_dim
    q = _cut(rows.query, (row, at, place), (1, query_block, static.head_dim))[0]
    k = _cut(rows.key, (row, start, of_key), (1, size, static.head_dim))[0]
    v = _cut(rows.value, (row, start, of_key), (1, size, static.head_dim))[0]
    q, k, v = (_values(x) for x in (q, k, v))
    scores = einsum("qd,kd->qk", q, k, jnp.float32)
    if static.scale != 1.0:
        scores = scores * static.scale
    if rows.bias is not None:
        _, _, offset = strip(static.queries, static.keys)
        where = (0, number, 0, offset + start - at)
        scores = scores + _cut(rows.bias, where, (1, 1, query_block, size))[0, 0]
    scores = jnp.where(mask, scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if static.dtype != jnp.float32:
        weights = weights / total
    if rows.kept is not None:
        weights = weights * _cut(rows.kept, (row, number, start), (1, 1, size))[0]
    attended = einsum("qk,kd->qd", weights.astype(static.dtype), v, jnp.float32)
    if static.dtype == jnp.float32:
        attended = attended / total
    return _bits(attended.astype(static.dtype))


def _spans(query_segments, key_segments, query_block, key_block, causal):
    """Return the first block of keys that each block of queries reads, and the number of blocks.

    Both are int32 [batch, query blocks].
    """

    def extent(ids, block):
        ids = ids.reshape(ids.shape[0], -1, block)
        return jnp.min(jnp.where(ids > 0, ids, 2**30), axis=-1), jnp.max(ids, axis=-1)

    lowest, highest = (x[:, :, None] for x in extent(query_segments, query_block))
    key_lowest, key_highest = (x[:, None] for x in extent(key_segments, key_block))
    meet = (lowest <= key_highest) & (key_lowest <= highest)  # [batch, query blocks, key blocks]
    if causal:
        ends = (np.arange(meet.shape[1]) + 1) * query_block
        meet &= (np.arange(meet.shape[2]) * key_block)[None] < ends[:, None]
    some = jnp.any(meet, axis=-1)
    first = jnp.argmax(meet, axis=-1)
    end = meet.shape[2] - jnp.argmax(meet[:, :, ::-1], axis=-1)
    return jnp.where(some, first, 0), jnp.where(some, end - first, 1)


def _sizes(blocks: int) -> list[int]:
    """Return the numbers of key blocks that have a branch: each up to 6, then steps of a third."""
    sizes = [min(blocks, 1)]
    while sizes[-1] < blocks:
        sizes.append(min(blocks, sizes[-1] + max(1, sizes[-1] // 3)))
    return sizes


def _rounded_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _whole_blocks(x, block, axis=1):
    """Pad an axis with zeros at its end to a multiple of `block`."""
    missing = _rounded_up(x.shape[axis], block) - x.shape[axis]
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)]) if missing else x


def _cut(x, start, shape):
    return jax.lax.dynamic_slice(x, start, shape, allow_negative_indices=False)


def _bits(x):
    """Return an array in bfloat16 as integers; any other unchanged."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x):
    """Invert `_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _backward(causal: bool, scale: float, saved: Any, gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, bias, kept, query_segments, key_segments, until = saved
    group = query.shape[2] // key.shape[2]
    dtype = query.dtype
    lengths = query.shape[1], key.shape[1]

    def head(given: Any) -> tuple[Any, Any]:
        query, key, value, bias, kept, gradient = given
        if bias is not None:
            bias, to_strip = jax.vjp(functools.partial(_spelled_out, lengths), bias)
        row = functools.partial(_row_gradients, bias, dtype, causal, scale)
        total = None if bias is None else jnp.zeros_like(bias)
        rows = (query, key, value, gradient, kept, query_segments, key_segments, until)
        total, of_rows = jax.lax.scan(row, total, rows)
        return None if bias is None else to_strip(total)[0], of_rows

    d_bias, (d_query, d_key, d_value) = jax.lax.map(
        head,
        (
            _heads_first(_bits(query)),
            _heads_first(_bits(key), group),
            _heads_first(_bits(value), group),
            None if bias is None else bias[0],
            None if kept is None else kept.swapaxes(0, 1),
            _heads_first(_bits(gradient.astype(dtype))),
        ),
    )
    d_query, d_key, d_value = (_values(x) for x in (d_query, d_key, d_value))
    if group > 1:
        d_key, d_value = (
            jnp.sum(x.reshape(-1, group, *x.shape[1:]).astype(jnp.float32), axis=1).astype(dtype)
            for x in (d_key, d_value)
        )
    d_query, d_key, d_value = (x.transpose(1, 2, 0, 3) for x in (d_query, d_key, d_value))
    return d_query, d_key, d_value, None if bias is None else d_bias[None], *(None,) * 4


def _spelled_out(lengths: tuple[int, int], of_head: jax.Array) -> jax.Array:
    """Return one head's bias [queries, keys] from its strip."""
    queries, keys = lengths
    block, _, offset = strip(queries, keys)
    blocks = (of_head[:, offset - at :][:, :keys] for at in range(0, queries, block))
    return jnp.concatenate(list(blocks))[:queries]


def _row_gradients(
    bias: jax.Array | None,
    dtype: Any,
    causal: bool,
    scale: float,
    total: jax.Array | None,
    given: Any,
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """Return the gradients of one row and head; that of the bias is added to `total`."""
    query, key, value, gradient = (_values(x) for x in given[:4])
    kept, query_segments, key_segments, until = given[4:]
    weights, mask = _weights(query, key, bias, query_segments, key_segments, until, causal, scale)
    used = weights if kept is None else weights * kept
    d_value = einsum("qk,qd->kd", used.astype(dtype), gradient)
    d_weights = einsum("qd,kd->qk", gradient, value).astype(jnp.float32)
    if kept is not None:
        d_weights = d_weights * kept
    inner = jnp.sum(d_weights * weights, axis=-1, keepdims=True)
    d_scores = jnp.where(mask, weights * (d_weights - inner), 0.0)
    if total is not None:
        total = total + d_scores
    d_scores = (d_scores * scale if scale != 1.0 else d_scores).astype(dtype)
    d_query = einsum("qk,kd->qd", d_scores, key)
    d_key = einsum("qk,qd->kd", d_scores, query)
    return total, tuple(_bits(x) for x in (d_query, d_key, d_value))


def _heads_first(x, repeat=1):
    """Transpose [batch, length, heads, head_dim] to [heads * repeat, batch, length, head_dim]."""
    x = x.transpose(2, 0, 1, 3)
    return x if repeat == 1 else jnp.repeat(x, repeat, axis=0)


_looped.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Looped(SegmentKernel):
    """The kernel of `looped_attention`. A bias is the `strip` of it."""

    branched = True

    def bias(self, relative: RelativePositionBias, queries: int, keys: int) -> jax.Array:
        """Return the strip."""
        return relative(*strip(queries, keys))

    def attend(self, operands: Operands) -> jax.Array:
        """Return [batch, queries, heads * head_dim], see `Kernel.attend`."""
        # Rows and heads are independent, so each device loops over its own.
        visible = operands.visible
        split = "heads" if operands.key.shape[2] % parts("heads") == 0 else None
        wide = ("batch", None, split, None)
        given = {
            "query": (operands.query, wide),
            "key": (operands.key, wide),
            "value": (operands.value, wide),
            "query_segments": (visible.queries, ("batch", None)),
            "key_segments": (visible.keys, ("batch", None)),
            "bias": (operands.bias, (None, split, None, None)),
            "kept": (kept_keys(operands), ("batch", split, None)),
            "until": (visible.until, ("batch", None)),
        }
        run = functools.partial(looped_attention, causal=visible.causal, scale=operands.scale)
        attended = checkpoint_name(per_shard(run, given, wide, operands.query.shape), "attention")
        return attended.reshape(*attended.shape[:2], -1)


KERNEL = Looped()
