"""Logits over a vocabulary: hidden states times the output kernel.

Logits are float32: the kernel is cast to hidden's dtype and the product accumulated in float32. The
gradient towards hidden states sums over the vocabulary. In float32 and over 65,536 words it is
added up in `_SUMMANDS` parts: one running sum over 256,000 words is off by 1e-6 of the largest
gradient (against float64), this by half of that.
"""

import jax
import jax.numpy as jnp

from models.layers import einsum
from models.partitioning import constrain, parts

_SUMMANDS = 16
_LONG = 2**16  # words


def vocabulary_logits(
    hidden: jax.Array, kernel: jax.Array, scale: float = 1.0, softcap: float | None = None
) -> jax.Array:
    """scale * hidden @ kernel, squashed into (-softcap, softcap) by tanh where there is one.

    Args:
      hidden: [batch, length, d_model]; its dtype is the compute dtype.
      kernel: [d_model, vocab].

    Returns:
      float32 [batch, length, vocab].
    """
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
def _product(hidden, kernel):
    """[batch, length, d_model] x [d_model, vocab] in float32, differentiated in parts."""
    return einsum("bld,dv->blv", hidden, kernel)


def _forward(hidden, kernel):
    return _product(hidden, kernel), (hidden, kernel)


def _backward(saved, gradient):
    hidden, kernel = saved
    in_parts = (_SUMMANDS, kernel.shape[1] // _SUMMANDS)
    summands = einsum(
        "blnv,dnv->nbld",
        gradient.reshape(*gradient.shape[:2], *in_parts),
        kernel.reshape(kernel.shape[0], *in_parts),
    )
    return jnp.sum(summands, axis=0), einsum("bld,blv->dv", hidden, gradient, kernel.dtype)


_product.defvjp(_forward, _backward)
