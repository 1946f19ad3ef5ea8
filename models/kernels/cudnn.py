"""cuDNN's fused attention, which keeps scores and weights on the chip.

It takes one additive bias: a relative bias and the mask are spelled out together,
[batch, heads, queries, keys] in bfloat16, and so is the gradient. Without a bias it is the mask
alone, [batch, 1, queries, keys].
"""

from __future__ import annotations

import dataclasses

import jax
from jax.ad_checkpoint import checkpoint_name

from models.kernels import Needs, Operands
from models.kernels.segments import (
    SegmentKernel,
    kept_keys,
    scaled_values,
    segment_mask,
)
from models.relative_bias import RelativePositionBias


@dataclasses.dataclass(frozen=True)
class Cudnn(SegmentKernel):
    """The kernel. A bias is float32 [1, heads, queries, keys]."""

    def unsupported(self, needs: Needs) -> str | None:
        """Return why the kernel cannot compute this attention, or None."""
        if needs.dtype != "bfloat16":
            return f"computes in bfloat16 only, not in {needs.dtype}"
        return super().unsupported(needs)

    def bias(self, relative: RelativePositionBias, queries: int, keys: int) -> jax.Array:
        """Return the bias of every pair."""
        return relative(queries, keys)

    def attend(self, operands: Operands) -> jax.Array:
        """Return [batch, queries, heads * head_dim], see `Kernel.attend`."""
        query, bias, visible = operands.query, operands.bias, operands.visible
        attended = jax.nn.dot_product_attention(
            query,
            operands.key,
            scaled_values(operands.value, kept_keys(operands)),
            bias=None if bias is None else bias.astype(query.dtype),
            mask=segment_mask(visible.queries, visible.keys, causal=visible.causal),
            scale=operands.scale,
            implementation="cudnn",
        )
        attended = checkpoint_name(attended, "attention")
        return attended.reshape(*attended.shape[:2], -1)


KERNEL = Cudnn()
