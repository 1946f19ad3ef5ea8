"""The MLP of a layer, plain or gated, and the choice of its kernel."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.layers import ACTIVATIONS, KERNEL_INIT, Initializer, Linear, dropout
from models.partitioning import constrain, platform


class MLP(nnx.Module):
    """The map wo(activation(wi x)), or gated, wo(activation(wi_0 x) * wi_1 x).

    `kernel` computes the gated hidden layer where no gradient is taken: "triton" in one pass on
    NVIDIA GPUs (models/kernels/gated.py; "triton_interpret" for tests), "xla" as two products.
    "auto" takes "triton" on GPUs in bfloat16. Both take biases and sizes that are not multiples of
    the kernel's blocks to the plain form.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        activation: str,
        gated: bool,
        bias: bool = False,
        dropout_rate: float = 0.0,
        init: Initializer = KERNEL_INIT,
        kernel: str = "auto",
    ):
        into = functools.partial(
            Linear, d_model, d_ff, ("embed", "mlp"), bias=bias, init=init, name="hidden"
        )
        if gated:
            self.wi_0, self.wi_1 = into(), into()
        else:
            self.wi = into()
        self.wo = Linear(d_ff, d_model, ("mlp", "embed"), bias=bias, init=init)
        self.activation = activation
        self.gated = gated
        self.dropout_rate = dropout_rate
        self.kernel = kernel if gated and not bias else "xla"

    def __call__(
        self, x: jax.Array, *, dropout_key: jax.Array | None = None, broadcast: tuple[int, ...] = ()
    ) -> jax.Array:
        """Map [batch, length, d_model] to the same shape, in `Linear`'s dtype.

        The activation computes in float32. `broadcast` are the axes of the hidden layer
        [batch, length, mlp] that share a draw of dropout.
        """
        act = ACTIVATIONS[self.activation]
        on_gpu = platform() == "gpu" and x.dtype == jnp.bfloat16
        if not self.gated:
            hidden = act(self.wi(x).astype(jnp.float32))  # [batch, length, mlp]
        elif self.kernel.startswith("triton") or (self.kernel == "auto" and on_gpu):
            from models.kernels.gated import gated_hidden

            hidden = gated_hidden(
                x,
                self.wi_0.kernel[...],
                self.wi_1.kernel[...],
                activation=act,
                plain=self._gate,
                interpret=self.kernel == "triton_interpret",
            )
        else:
            hidden = self._gate(x, self.wi_0.kernel[...], self.wi_1.kernel[...])
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        hidden = dropout(
            hidden.astype(x.dtype), self.dropout_rate, dropout_key, broadcast=broadcast
        )
        return self.wo(checkpoint_name(hidden, "gated"))

    def _gate(self, x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        """Return the gated hidden layer, as two products with these kernels and their product."""
        gate = self.wi_0.with_kernel(x, first).astype(jnp.float32)
        return ACTIVATIONS[self.activation](gate) * self.wi_1.with_kernel(x, second)
