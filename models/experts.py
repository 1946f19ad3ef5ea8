"""Mixture of experts: each token is processed by some of a layer's MLPs (Mixtral, Qwen MoE, OLMoE).

- No token is dropped: a token's output is the same in any batch, and experts have no capacity.
- The weights of a layer's experts are stacked, [experts, in, out]. Tokens are sorted by expert and
  multiplied in groups (`jax.lax.ragged_dot`), with the FLOPs of the chosen experts alone.
  NOTE: XLA's CPU backend has no grouped product and multiplies by every expert.
- Each device has its rows of the batch and its share of the experts, by the rules of
  models/partitioning.py. It computes its own experts only, and the results are summed over devices.
  If the mesh does not divide the number of experts, it divides their width.
- There is no auxiliary loss for load balancing in training.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.config import Experts
from models.layers import ACTIVATIONS, Initializer, einsum, parameter
from models.mlp import MLP
from models.partitioning import per_shard

_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


class ExpertMLPs(nnx.Module):
    """A router and the stacked gated MLPs that it chooses from, with an optional shared MLP."""

    def __init__(self, d_model: int, experts: Experts, *, activation: str, init: Initializer):
        self.router = _Kernel((d_model, experts.count), ("embed", "experts"), init)
        self.experts = _Stacked(d_model, experts, init)
        if experts.shared_d_ff:
            self.shared = MLP(
                d_model, experts.shared_d_ff, activation=activation, gated=True, init=init
            )
            self.shared_gate = _Kernel((d_model, 1), ("embed", "gate"), init)
        self.chosen = experts.chosen
        self.normalized = experts.normalized
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, length, d_model] to the same shape, float32."""
        weights, indices = self._route(x)
        stacked = self.experts
        wi_0, wi_1, wo = (
            each.kernel[...].astype(x.dtype) for each in (stacked.wi_0, stacked.wi_1, stacked.wo)
        )
        rows, into, back = (
            ("batch", None, None),
            ("experts", None, "mlp"),
            ("experts", "mlp", None),
        )
        y = per_shard(
            functools.partial(_mixture, activation=self.activation),
            {
                "x": (x, rows),
                "weights": (weights, rows),
                "indices": (indices, rows),
                "numbers": (jnp.arange(wo.shape[0]), ("experts",)),
                "wi_0": (wi_0, into),
                "wi_1": (wi_1, into),
                "wo": (wo, back),
            },
            rows,
            x.shape,
            summed=("experts", "mlp"),
        )
        if hasattr(self, "shared"):
            gate = einsum("bld,dg->blg", x, self.shared_gate.kernel[...], jnp.float32)
            y = y + jax.nn.sigmoid(gate) * self.shared(x)
        return checkpoint_name(y, "projection")

    def _route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights, float32, and indices of the chosen experts, [batch, length, chosen]."""
        logits = einsum("bld,de->ble", x, self.router.kernel[...], jnp.float32)
        weights, indices = jax.lax.top_k(jax.nn.softmax(logits), self.chosen)
        if self.normalized:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, indices


class _Kernel(nnx.Module):
    """A single kernel, so that its parameter has the same name as in a linear layer."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer):
        self.kernel = parameter(shape, axes, init)


class _Stacked(nnx.Module):
    """The kernels of all experts of a layer: a separate node, which weight files split."""

    def __init__(self, d_model: int, experts: Experts, init: Initializer):
        into = experts.count, d_model, experts.d_ff
        self.wi_0 = _Kernel(into, ("experts", "embed", "mlp"), init)
        self.wi_1 = _Kernel(into, ("experts", "embed", "mlp"), init)
        back = experts.count, experts.d_ff, d_model
        self.wo = _Kernel(back, ("experts", "mlp", "embed"), init)


def _mixture(
    x: jax.Array,
    weights: jax.Array,
    indices: jax.Array,
    numbers: jax.Array,
    wi_0: jax.Array,
    wi_1: jax.Array,
    wo: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Return the weighted sum of the outputs of those chosen experts whose kernels are given.

    Args:
      x: [batch, length, d_model].
      weights, indices: weights and indices of the chosen experts, [batch, length, chosen].
      numbers: indices of the experts whose kernels are given, ascending, without gaps.
      wi_0, wi_1: [experts, d_model, d_ff].
      wo: [experts, d_ff, d_model].

    Returns:
      float32 [batch, length, d_model].
    """
    chosen, count = indices.shape[-1], len(numbers)
    expert = indices.reshape(-1) - numbers[0]  # [tokens * chosen]
    here = (expert >= 0) & (expert < count)
    expert = jnp.where(here, expert, count)  # experts of other devices: sorted last, in no group
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=count + 1)[:count].astype(jnp.int32)
    here = here[order][:, None]
    # NOTE: rows outside of all groups are undefined in a grouped product and its gradient.
    rows = jnp.where(here, x.reshape(-1, x.shape[-1])[order // chosen], 0)
    hidden = ACTIVATIONS[activation](grouped(rows, wi_0, sizes).astype(jnp.float32))
    hidden = (hidden * grouped(rows, wi_1, sizes)).astype(x.dtype)
    hidden = checkpoint_name(hidden, "hidden")
    outputs = jnp.where(here, grouped(hidden, wo, sizes).astype(jnp.float32), 0)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(len(order)), unique_indices=True)
    outputs = outputs[inverse].reshape(*indices.shape, -1)
    return jnp.sum(outputs * weights[..., None], axis=-2)


@jax.custom_vjp
def grouped(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
    """Multiply the first sizes[0] rows of x by kernels[0], the next sizes[1] by kernels[1], ...

    Takes [rows, in] and [groups, in, out], returns [rows, out] in x's dtype; accumulates in
    float32. Rows beyond the groups are undefined.
    """
    return jax.lax.ragged_dot(x, kernels, sizes, precision=_precision(x))


def _precision(x: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # see layers.einsum


def _grouped_forward(x, kernels, sizes):
    return grouped(x, kernels, sizes), (x, kernels, sizes)


def _grouped_backward(saved, gradient):
    x, kernels, sizes = saved
    dx = jax.lax.ragged_dot(gradient, jnp.swapaxes(kernels, 1, 2), sizes, precision=_precision(x))
    dkernels = jax.lax.ragged_dot_general(
        x, gradient, sizes, _ROWS, precision=_precision(x), preferred_element_type=kernels.dtype
    )
    return dx, dkernels, None


grouped.defvjp(_grouped_forward, _grouped_backward)
