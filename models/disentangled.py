"""Disentangled attention of DeBERTa v2 and v3 (He et al., arXiv 2006.03654 and 2111.09543).

The score of query i and key j is, with a table of relative positions P and distance d = i - j,

    q_i k_j  +  q_i (W_k P_d)  +  k_j (W_q P_d),   all divided by sqrt(terms * head_dim).

- Array indices suffice for packed rows, because only distances within a segment count.
- P_d is looked up for all distances -length .. length before the product, so that the scores of a
  query at its keys are a slice of a row of [length, 2 * length] numbers. All slices together are
  one reshaping of it. transformers multiplies by the table and gathers [length, length] numbers.
- Large distances share rows by their logarithm, in float32 as in transformers. Rounding a bucket's
  border differently would change the model.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import AttentionPlan
from models.config import Disentangled, EncoderConfig
from models.kernels import Dropout, Operands
from models.layers import Embedding, Initializer, LayerNorm, Linear, einsum
from models.partitioning import constrain


class RelativePositions(nnx.Module):
    """The table of relative positions [rows, d_model], and its norm."""

    def __init__(self, config: EncoderConfig):
        relative = config.disentangled
        assert relative is not None
        init = jax.nn.initializers.normal(config.initializer_range)
        self.table = Embedding(relative.rows, config.d_model, axis="positions", init=init)
        if relative.norm:
            self.norm = LayerNorm(
                config.d_model, epsilon=config.norm_epsilon, dtype=config.residual_dtype
            )
        self.relative = relative
        self.dtype = config.dtype

    def __call__(self, length: int) -> jax.Array:
        """Return the rows of distances query - key = length .. 1 - length.

        [1, 2 * length, d_model] in the compute dtype.
        """
        rows = rows_of_distances(self.relative, length)
        table = self.table.embedding[...]
        if self.relative.norm:
            table = self.norm(table)
        return table.astype(self.dtype)[jnp.asarray(rows)][None]


@functools.cache
def rows_of_distances(relative: Disentangled, length: int) -> np.ndarray:
    """Return the table's row of each distance length, length - 1, ..., 1 - length, int32."""
    distance = np.arange(length, -length, -1)
    span = relative.rows // 2
    if relative.logarithmic:
        middle, f = span // 2, np.float32
        far = np.where(np.abs(distance) < middle, middle - 1, np.abs(distance)).astype(f)
        scale = np.log(f((relative.max_distance - 1) / middle))
        spaced = np.ceil(np.log(far / f(middle)) / scale * f(middle - 1)) + f(middle)
        distance = np.where(far <= middle, distance, spaced * np.sign(distance))
    return np.clip(distance + span, 0, relative.rows - 1).astype(np.int32)


class DisentangledAttention(nnx.Module):
    """Self-attention with its projections; their kernels are [d_model, heads * head_dim]."""

    def __init__(self, config: EncoderConfig, init: Initializer):
        relative = config.disentangled
        assert relative is not None
        into = functools.partial(
            Linear, config.d_model, config.d_model, ("embed", "heads"), init=init, name="heads"
        )
        self.query, self.key, self.value = into(bias=True), into(bias=True), into(bias=True)
        if not relative.shared and relative.to_position:
            self.position_key = into(bias=True)
        if not relative.shared and relative.from_position:
            self.position_query = into(bias=True)
        self.out = Linear(config.d_model, config.d_model, ("heads", "embed"), bias=True, init=init)
        self.relative = relative
        self.num_heads = config.num_heads
        terms = 1 + relative.to_position + relative.from_position
        self.scale = (terms * config.head_size) ** -0.5
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        *,
        rotation: jax.Array,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Attend from x to itself. [batch, length, d_model] -> the same shape.

        Args:
          plan: plan of the plain kernel.
          rotation: relative positions [1, 2 * length, d_model], from `RelativePositions`.
        """
        query, key, value = (
            self._heads(project(x)) for project in (self.query, self.key, self.value)
        )
        bias: Any = None
        if self.relative.to_position:
            project = self.key if self.relative.shared else self.position_key
            positions = self._heads(project(rotation))[0]  # [2 * length, heads, head_dim]
            bias = _skewed(einsum("blhd,phd->bhlp", query, positions, jnp.float32))
        if self.relative.from_position:
            project = self.query if self.relative.shared else self.position_query
            # The queries of a key are in reverse order, at distances -length .. length - 1. The
            # first of these is not used.
            positions = self._heads(project(rotation))[0]
            positions = jnp.roll(positions[::-1], 1, axis=0)
            scores = _skewed(einsum("blhd,phd->bhlp", key, positions, jnp.float32))
            scores = scores.swapaxes(2, 3)
            bias = scores if bias is None else bias + scores
        operands = Operands(
            *(query, key, value, plan.visible),
            bias=None if bias is None else bias * self.scale,
            scale=self.scale,
            softcap=None,
            dropout=Dropout(self.dropout_rate, dropout_key),
        )
        return self.out(plan.kernel.attend(operands))

    def _heads(self, x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:2], self.num_heads, -1)
        return constrain(x, ("batch", "length", "heads", None))


def _skewed(scores: jax.Array) -> jax.Array:
    """Return out[..., i, j] = scores[..., i, length - i + j].

    Takes [batch, heads, length, 2 * length], returns [batch, heads, length, length].
    """
    batch, heads, length, columns = scores.shape
    flat = scores.reshape(batch, heads, length * columns)
    # With one column less per row, row i begins i entries earlier.
    flat = flat[..., length:]
    return flat.reshape(batch, heads, length, columns - 1)[..., :length]
