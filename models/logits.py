"""Logits over a vocabulary: hidden states times the kernel of the output head.

Logits are float32: the kernel is cast to the hidden states' dtype and the product is accumulated in
float32. The gradient with respect to hidden states sums over the vocabulary. In float32 and over
65,536 words the sum has `_SUMMANDS` parts: one running sum over 256,000 words has an error of 1e-6
of the largest gradient (against float64), the parts half of that.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.layers import einsum
from models.partitioning import constrain, parts

_SUMMANDS = 16
_LONG = 2**16  # words


class OutputHead(NamedTuple):
    """The map from hidden states to logits: softcap * tanh(scale * hidden @ kernel / softcap).

    Attributes:
      kernel: [d_model, vocab].
      softcap: logits are squashed into (-softcap, softcap) (Gemma 2); None leaves them.
    """

    kernel: jax.Array
    scale: float = 1.0
    softcap: float | None = None


def vocabulary_logits(hidden: jax.Array, head: OutputHead) -> jax.Array:
    """Return the logits of hidden states, float32 [batch, length, vocab].

    Takes [batch, length, d_model], whose dtype is the compute dtype.
    """
    kernel, scale, softcap = head
    vocab = kernel.shape[1]
    in_parts = vocab > _LONG and vocab % _SUMMANDS == 0 and _SUMMANDS % parts("vocab") == 0
    if in_parts and hidden.dtype == jnp.float32:
        logits = _product(hidden, kernel) * scale
    else:
        logits = einsum("bld,dv->blv", hidden, kernel, jnp.float32) * scale
    if softcap is not None:
        logits = jnp.tanh(logits / softcap) * softcap
    return constrain(logits, ("batch", "length", "vocab"))


@jax.custom_vjp
def _product(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply [batch, length, d_model] by [d_model, vocab] in float32."""
    return einsum("bld,dv->blv", hidden, kernel)


def _forward(hidden: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Any]:
    return _product(hidden, kernel), (hidden, kernel)


def _backward(saved: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, kernel = saved
    in_parts = (_SUMMANDS, kernel.shape[1] // _SUMMANDS)
    summands = einsum(
        "blnv,dnv->nbld",
        gradient.reshape(*gradient.shape[:2], *in_parts),
        kernel.reshape(kernel.shape[0], *in_parts),
    )
    return jnp.sum(summands, axis=0), einsum("bld,blv->dv", hidden, gradient, kernel.dtype)


_product.defvjp(_forward, _backward)
