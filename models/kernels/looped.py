"""Attention one row and head at a time: for CPUs, where it halves the time of the batched form.

- Batched, the float32 scores [batch, heads, queries, keys] are 50 to 100 MB, and each of the
  softmax's passes streams them from memory. Those of one row and head are 1 to 4 MB and stay in
  the cache.
- The arithmetic is `attention.dot_product_attention`'s, rounding included, forward and backward.
- The backward pass computes the weights again: saved, they would be the quadratic buffer that the
  loop is there to avoid. It costs no time either, because writing and reading them back is as slow.
- Heads are the outer loop, so that the gradient of a head's bias adds up over rows in one buffer.
"""

import functools

import jax
import jax.numpy as jnp

from models.layers import einsum

MASKED = -1e10  # as in models/attention.py


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
    """softmax(scale * query key + bias) value within segments, by loops over heads and rows.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
      query_segments, key_segments: int32 [batch, queries] and [batch, keys]; 0 hides a key.
      bias: float32 [1, heads, queries, keys], or None.
      kept: what the weights of each key are multiplied with, float32 [batch, heads, keys]: dropout
        with one draw for all queries. Or None.
      causal: a query sees no key of a higher index.

    Returns:
      [batch, queries, heads, head_dim] in query's dtype.
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
    group = query.shape[2] // key.shape[2]

    def head(given):
        query, key, value, bias, kept = given

        def row(given):
            query, key, value, kept, query_segments, key_segments = given
            weights, _ = _weights(query, key, bias, query_segments, key_segments, causal, scale)
            if kept is not None:
                weights = weights * kept
            return einsum("qk,kd->qd", weights.astype(query.dtype), value)

        return jax.lax.map(row, (query, key, value, kept, query_segments, key_segments))

    out = jax.lax.map(
        head,
        (
            _heads_first(query),
            _heads_first(key, group),
            _heads_first(value, group),
            None if bias is None else bias[0],
            None if kept is None else kept.swapaxes(0, 1),
        ),
    )
    saved = (query, key, value, bias, kept, query_segments, key_segments)
    return out.transpose(1, 2, 0, 3), saved


def _backward(causal, scale, saved, gradient):
    query, key, value, bias, kept, query_segments, key_segments = saved
    group = query.shape[2] // key.shape[2]
    dtype = query.dtype

    def head(given):
        query, key, value, bias, kept, gradient = given

        def row(total, given):
            query, key, value, kept, gradient, query_segments, key_segments = given
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
            return total, (d_query, d_key, d_value)

        total = None if bias is None else jnp.zeros_like(bias)
        rows = (query, key, value, kept, gradient, query_segments, key_segments)
        return jax.lax.scan(row, total, rows)

    d_bias, (d_query, d_key, d_value) = jax.lax.map(
        head,
        (
            _heads_first(query),
            _heads_first(key, group),
            _heads_first(value, group),
            None if bias is None else bias[0],
            None if kept is None else kept.swapaxes(0, 1),
            _heads_first(gradient.astype(dtype)),
        ),
    )
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
