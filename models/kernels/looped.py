"""Attention in pieces that fit a cache: for CPUs, several times as fast as the batched form.

- Batched, the float32 scores [batch, heads, queries, keys] are 50 to 100 MB, and each of the
  softmax's passes streams them from memory. Those of one head and BLOCK queries are half a megabyte
  at most and stay in the cache.
- A block of queries reads the keys from the first to the last block of keys that share a segment
  with it, and none after itself where attention is causal: a packed row costs what its documents
  cost. How many keys that are is data, and an array's size cannot be: there is one compiled branch
  for each number of blocks.
- Backward goes by whole rows and heads, and computes the weights again: saved, they would be the
  quadratic buffer that the loop is there to avoid. It costs no time either, because writing and
  reading them back is as slow. Heads are the outer loop, so that the gradient of a head's bias adds
  up over rows in one buffer.
- The bias depends on key - query alone. So one block's queries, against keys for a row's length
  before and behind them, have all of it: a `strip`, of which every block reads its part.
- The arithmetic is `attention.dot_product_attention`'s, in bfloat16 rounding included; in float32
  forward divides by the sum of the weights after the product with the values, which saves a pass.
- bfloat16 arrays are sliced as integers. XLA's CPU backend slices no bfloat16: it would convert to
  float32, outside of the loop and the whole array, and back inside.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.layers import einsum

MASKED = -1e10  # as in models/attention.py
BLOCK = 128  # queries, and keys, at a time; 64 and 256 were slower


def strip(queries: int, keys: int) -> tuple[int, int, int]:
    """The bias that `looped_attention` wants of a row of so many queries and keys.

    It is that of the row's last block of queries, on all keys before it and as many behind it as
    the row has. Returns how many queries, how many keys, and the index of the first query, which
    is what `attention.RelativePositionBias` is called with.
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
    causal: bool = False,
    scale: float = 1.0,
) -> jax.Array:
    """softmax(scale * query key + bias) value within segments, by loops over rows, blocks, heads.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
      query_segments, key_segments: int32 [batch, queries] and [batch, keys]; 0 hides a key. Any
        order is right; blocks are skipped where ids ascend along a row.
      bias: the `strip` of it, float32 [1, heads, block, keys before and behind]; or None.
      kept: what the weights of each key are multiplied with, float32 [batch, heads, keys]: dropout
        with one draw for all queries. Or None.
      causal: a query sees no key of a higher index.

    Returns:
      [batch, queries, heads, head_dim] in query's dtype. What a query that sees no key gets is
      finite, and without meaning.
    """
    return _looped(query, key, value, bias, kept, query_segments, key_segments, causal, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _looped(query, key, value, bias, kept, query_segments, key_segments, causal, scale):
    return _forward(query, key, value, bias, kept, query_segments, key_segments, causal, scale)[0]


def _weights(query, key, bias, query_segments, key_segments, causal, scale):
    """Softmax of one row and head, float32 [queries, keys], and who sees whom."""
    scores = einsum("qd,kd->qk", query, key, jnp.float32)
    if scale != 1.0:
        scores = scores * scale
    if bias is not None:
        scores = scores + bias
    mask = (query_segments[:, None] == key_segments[None]) & (key_segments > 0)[None]
    if causal:
        mask &= jnp.tri(mask.shape[0], mask.shape[1], dtype=bool)
    return jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1), mask


def _forward(query, key, value, bias, kept, query_segments, key_segments, causal, scale):
    saved = (query, key, value, bias, kept, query_segments, key_segments)
    batch, queries, heads, head_dim = query.shape
    keys, group = key.shape[1], heads // key.shape[2]
    dtype = query.dtype
    query_block, key_block = min(BLOCK, queries), min(BLOCK, keys)
    query_segments = _whole_blocks(query_segments, query_block)
    key_segments = _whole_blocks(key_segments, key_block)
    query_blocks = query_segments.shape[1] // query_block
    key_blocks = key_segments.shape[1] // key_block
    first, count = _spans(query_segments, key_segments, query_block, key_block, causal)
    # [batch, length, heads * head_dim]: heads stay side by side, nothing is transposed.
    query, key, value = (
        _bits(_whole_blocks(x.reshape(*x.shape[:2], -1), block))
        for x, block in ((query, query_block), (key, key_block), (value, key_block))
    )
    _, _, offset = strip(queries, keys)
    if kept is not None:
        kept = _whole_blocks(kept, key_block, axis=2)
    sizes = _sizes(key_blocks)

    def attend(size):
        """The branch for spans of `size` keys."""

        def run(row, block, start):
            at = block * query_block
            start = jnp.minimum(start, key_segments.shape[1] - size)
            own = _cut(query_segments, (row, at), (1, query_block))[0]
            seen = _cut(key_segments, (row, start), (1, size))[0]
            mask = (own[:, None] == seen[None]) & (seen > 0)[None]
            if causal:
                index = at + jnp.arange(query_block)
                mask &= index[:, None] >= start + jnp.arange(size)[None]

            def head(number, out):
                place = number * head_dim
                of_key = number // group * head_dim
                q = _cut(query, (row, at, place), (1, query_block, head_dim))[0]
                k = _cut(key, (row, start, of_key), (1, size, head_dim))[0]
                v = _cut(value, (row, start, of_key), (1, size, head_dim))[0]
                q, k, v = (_values(x) for x in (q, k, v))
                scores = einsum("qd,kd->qk", q, k, jnp.float32)
                if scale != 1.0:
                    scores = scores * scale
                if bias is not None:
                    where = (0, number, 0, offset + start - at)
                    scores = scores + _cut(bias, where, (1, 1, query_block, size))[0, 0]
                scores = jnp.where(mask, scores, MASKED)
                weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
                total = jnp.sum(weights, axis=-1, keepdims=True)
                if dtype != jnp.float32:
                    weights = weights / total
                if kept is not None:
                    weights = weights * _cut(kept, (row, number, start), (1, 1, size))[0]
                attended = einsum("qk,kd->qd", weights.astype(dtype), v, jnp.float32)
                if dtype == jnp.float32:
                    attended = attended / total
                attended = _bits(attended.astype(dtype))
                return jax.lax.dynamic_update_slice(
                    out, attended, (0, place), allow_negative_indices=False
                )

            out = jnp.zeros((query_block, heads * head_dim), query.dtype)
            return jax.lax.fori_loop(0, heads, head, out)

        return run

    branches = [attend(size * key_block) for size in sizes]
    branch_of = jnp.asarray(np.searchsorted(sizes, np.arange(key_blocks + 1)))

    def block(given):
        row, number, start, branch = given
        return jax.lax.switch(branch, branches, row, number, start)

    out = jax.lax.map(
        block,
        (
            jnp.repeat(jnp.arange(batch), query_blocks),
            jnp.tile(jnp.arange(query_blocks), batch),
            first.reshape(-1) * key_block,
            branch_of[count.reshape(-1)],
        ),
    )
    out = _values(out).reshape(batch, -1, heads, head_dim)
    return out[:, :queries], saved


def _spans(query_segments, key_segments, query_block, key_block, causal):
    """The blocks of keys that each block of queries reads: the first one, and how many.

    int32 [batch, query blocks] each.
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
    """For how many blocks of keys there are branches: each number to 6, then steps of a third."""
    sizes = [min(blocks, 1)]
    while sizes[-1] < blocks:
        sizes.append(min(blocks, sizes[-1] + max(1, sizes[-1] // 3)))
    return sizes


def _rounded_up(length: int, block: int) -> int:
    return -(-length // block) * block


def _whole_blocks(x, block, axis=1):
    """Zeros at the end of an axis, to a multiple of `block`."""
    missing = _rounded_up(x.shape[axis], block) - x.shape[axis]
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)]) if missing else x


def _cut(x, start, shape):
    return jax.lax.dynamic_slice(x, start, shape, allow_negative_indices=False)


def _bits(x):
    """An array in bfloat16 as integers; any other as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x):
    """The inverse of `_bits`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _backward(causal, scale, saved, gradient):
    query, key, value, bias, kept, query_segments, key_segments = saved
    queries, keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    dtype = query.dtype

    def spelled_out(of_head):
        """One head's bias [queries, keys], from its strip."""
        block, _, offset = strip(queries, keys)
        blocks = (of_head[:, offset - at :][:, :keys] for at in range(0, queries, block))
        return jnp.concatenate(list(blocks))[:queries]

    def head(given):
        query, key, value, bias, kept, gradient = given
        if bias is not None:
            bias, to_strip = jax.vjp(spelled_out, bias)

        def row(total, given):
            query, key, value, gradient = (_values(x) for x in given[:4])
            kept, query_segments, key_segments = given[4:]
            weights, mask = _weights(query, key, bias, query_segments, key_segments, causal, scale)
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

        total = None if bias is None else jnp.zeros_like(bias)
        rows = (query, key, value, gradient, kept, query_segments, key_segments)
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
    return d_query, d_key, d_value, None if bias is None else d_bias[None], None, None, None


def _heads_first(x, repeat=1):
    """[batch, length, heads, head_dim] -> [heads * repeat, batch, length, head_dim]."""
    x = x.transpose(2, 0, 1, 3)
    return x if repeat == 1 else jnp.repeat(x, repeat, axis=0)


_looped.defvjp(_forward, _backward)
