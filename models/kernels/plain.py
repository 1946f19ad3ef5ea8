"""Attention as batched matrix products: the reference that every other kernel is compared with.

- Scores and softmax are float32 in any compute dtype.
- Scores are not scaled by default: T5 folds 1/sqrt(d) into the query's initialization.
- A padding query attends uniformly; its output has no meaning.
- Grouped-query attention repeats no key or value: queries are viewed in groups.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from models.kernels import Needs, Operands
from models.kernels.segments import MASKED, Branches, segment_mask
from models.layers import dropout, einsum
from models.relative_bias import RelativePositionBias


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_broadcast: tuple[int, ...] = (),
) -> jax.Array:
    """Return softmax(scale * query key + bias) value.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads, and query head h reads
        key head h // (heads / kv_heads).
      bias: float32, broadcastable to [batch, heads, queries, keys].
      mask: bool, broadcastable to [batch, 1, queries, keys]; False hides.
      softcap: squash scores into (-softcap, softcap) by tanh (Gemma 2).
      dropout_broadcast: axes of [batch, heads, queries, keys] that share one draw of dropout.

    Returns:
      [batch, queries, heads, head_dim] in query's dtype.
    """
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = einsum("bqgrd,bkgd->bgrqk", grouped, key, jnp.float32)
    scores = scores.reshape(batch, heads, queries, keys)
    if scale != 1.0:
        scores = scores * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = dropout(weights, dropout_rate, dropout_key, broadcast=dropout_broadcast)
    weights = weights.astype(query.dtype).reshape(batch, kv_heads, -1, queries, keys)
    attended = einsum("bgrqk,bkgd->bqgrd", weights, value)
    return attended.reshape(batch, queries, heads, value.shape[-1])


@dataclasses.dataclass(frozen=True)
class Plain:
    """The kernel of `dot_product_attention`. Visibility is a mask, bool [batch, 1, queries, keys];
    a bias is float32 [1, heads, queries, keys]."""

    def unsupported(self, needs: Needs) -> str | None:
        """Return None: everything is supported."""
        return None

    def visibility(
        self,
        query_segments: jax.Array,
        key_segments: jax.Array,
        *,
        causal: bool,
        window: int | None,
        branches: Branches | None = None,
    ) -> jax.Array:
        """Return the mask."""
        return segment_mask(
            query_segments, key_segments, causal=causal, window=window, branches=branches
        )

    def bias(self, relative: RelativePositionBias, queries: int, keys: int) -> jax.Array:
        """Return the bias of every pair."""
        return relative(queries, keys)

    def attend(self, operands: Operands) -> jax.Array:
        """Return [batch, queries, heads * head_dim], see `Kernel.attend`."""
        with jax.named_scope("plain_attention"):  # the name by which tpu/gpu_hlo.py finds it
            attended = dot_product_attention(
                operands.query,
                operands.key,
                operands.value,
                bias=operands.bias,
                mask=operands.visible,
                scale=operands.scale,
                softcap=operands.softcap,
                dropout_rate=operands.dropout.rate,
                dropout_key=operands.dropout.key,
                dropout_broadcast=operands.dropout.broadcast,
            )
        attended = checkpoint_name(attended, "attention")
        return attended.reshape(*attended.shape[:2], -1)


KERNEL = Plain()
