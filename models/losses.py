"""Cross-entropy and log-likelihood over a vocabulary, whole or in chunks.

- Losses are returned as sums, with the sum of the weights: normalize by the number of real target
  tokens of the whole global batch. (Adafactor hides a forgotten division; AdamW does not.)
- Targets are never one-hot. The backward pass of the loss is one elementwise pass over the logits.
- The chunked functions take hidden states and the output head, and never hold the logits of more
  than `chunk` tokens. Under differentiation `chunked_cross_entropy` computes gradients during the
  forward pass, chunk by chunk, while the logits are in memory: three matrix products, as in the
  plain loss, and none twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.logits import OutputHead, vocabulary_logits

Sums = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


class _Settings(NamedTuple):
    """Static settings of a loss."""

    chunk: int
    scale: float
    softcap: float | None
    z_loss: float
    label_smoothing: float


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> Sums:
    """Return the weighted sum of -log softmax(logits)[target] in nats, as T5X computes it.

    Args:
      logits: float32 [batch, length, vocab].
      targets: int32 [batch, length].
      weights: float32 [batch, length]; 0 for positions without a target.
      z_loss: coefficient of log(normalizer) ** 2, which keeps logits from drifting (T5: 1e-4).
      label_smoothing: probability that is spread over the tokens other than the target. The entropy
        of that distribution is subtracted, so that a perfect model has loss 0.

    Returns:
      The loss, the sum of weights, and a dictionary of sums without gradients: "nll" (the plain
      negative log-likelihood), "z_loss" (its share of the loss), "correct" (targets whose logit is
      the largest).
    """
    losses, *statistics = _token_losses(
        logits.astype(jnp.float32), targets, z_loss, label_smoothing
    )
    return _sums(losses, statistics, weights)


def chunked_cross_entropy(
    hidden: jax.Array,
    head: OutputHead,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    *,
    chunk: int = 4096,
) -> Sums:
    """Return `cross_entropy` of the logits of `hidden`, never holding all logits in memory.

    Args:
      hidden: [batch, length, d_model]; its dtype is the compute dtype.
      head: the model's `output_head()`.
      targets, weights, z_loss, label_smoothing: as for `cross_entropy`.
      chunk: number of tokens, over all devices, whose logits are in memory at a time.
    """
    settings = _Settings(chunk, head.scale, head.softcap, z_loss, label_smoothing)
    loss, weight, aux = _chunked(hidden, head.kernel, targets, weights, settings)
    return loss, weight, jax.lax.stop_gradient(aux)


def token_log_likelihood(
    hidden: jax.Array, head: OutputHead, targets: jax.Array, *, chunk: int = 4096
) -> jax.Array:
    """Return log softmax(logits)[target] in nats, float32, in the shape of `targets`.

    `targets` is int32 [batch, length], or [batch, length, candidates] for several tokens at each
    position. Other arguments as for `chunked_cross_entropy`.
    """
    settings = _Settings(chunk, head.scale, head.softcap, 0.0, 0.0)
    batch, length = hidden.shape[:2]
    candidates = targets.reshape(batch, length, -1)
    hidden, candidates = _split((hidden, candidates), chunk)
    kernel = head.kernel.astype(hidden.dtype)

    @jax.checkpoint
    def log_likelihood(hidden, kernel, candidates):
        logits = _logits(hidden, kernel, settings)
        chosen = jnp.take_along_axis(logits, candidates, axis=-1)
        return chosen - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    chunks = jax.lax.map(
        lambda part: log_likelihood(part[0], kernel, part[1]), (hidden, candidates)
    )
    return _join(chunks, batch, length).reshape(targets.shape)


# --------------------------------------------------------------------------------------------------
# The loss of each token


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _token_losses(logits, targets, z_loss, label_smoothing):
    """Return loss, nll, z-loss and correctness of each token; only the loss has a gradient.

    Takes float32 [..., vocab] and int32 [...]; returns float32 [...].
    """
    return _token_losses_forward(logits, targets, z_loss, label_smoothing)[0]


def _token_losses_forward(logits, targets, z_loss, label_smoothing):
    highest = jnp.max(logits, axis=-1)
    log_z = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_z - target
    z_term = z_loss * jnp.square(log_z)
    losses = nll + z_term
    if label_smoothing:
        vocab = logits.shape[-1]
        confidence, low = 1.0 - label_smoothing, label_smoothing / (vocab - 1)
        entropy = -(confidence * np.log(confidence) + label_smoothing * np.log(low))
        mean_nll = log_z - jnp.mean(logits, axis=-1)
        losses = (confidence - low) * nll + low * vocab * mean_nll - entropy + z_term
    correct = (target >= highest).astype(jnp.float32)
    return (losses, nll, z_term, correct), (logits, targets, log_z)


def _token_losses_backward(z_loss, label_smoothing, saved, gradients):
    logits, targets, log_z = saved
    vocab = logits.shape[-1]
    low = label_smoothing / (vocab - 1)
    is_target = jnp.arange(vocab) == targets[..., None]
    wanted = jnp.where(is_target, 1.0 - label_smoothing, low)
    log_z = log_z[..., None]
    gradient = jnp.exp(logits - log_z) * (1.0 + 2.0 * z_loss * log_z) - wanted
    return gradient * gradients[0][..., None], None


_token_losses.defvjp(_token_losses_forward, _token_losses_backward)


def _sums(losses, statistics, weights) -> Sums:
    weights = weights.astype(jnp.float32)
    nll, z_term, correct = (jnp.sum(x * weights) for x in jax.lax.stop_gradient(statistics))
    aux = {"nll": nll, "z_loss": z_term, "correct": correct}
    return jnp.sum(losses * weights), jnp.sum(weights), aux


# --------------------------------------------------------------------------------------------------
# Chunks


def _logits(hidden, kernel, settings):
    return vocabulary_logits(hidden, OutputHead(kernel, settings.scale, settings.softcap))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _chunked(hidden, kernel, targets, weights, settings):
    def one(sums, part):
        part_hidden, part_targets, part_weights = part
        logits = _logits(part_hidden, kernel, settings)
        part_sums = cross_entropy(
            logits, part_targets, part_weights, settings.z_loss, settings.label_smoothing
        )
        return jax.tree.map(jnp.add, sums, part_sums), None

    kernel = kernel.astype(hidden.dtype)
    sums, _ = jax.lax.scan(one, _zeros(), _split((hidden, targets, weights), settings.chunk))
    return sums


def _chunked_forward(hidden, kernel, targets, weights, settings):
    """Return the sums and, as residuals, the gradients of the loss for a unit cotangent."""

    def loss(part_hidden, cast_kernel, part_weights, part_targets):
        logits = _logits(part_hidden, cast_kernel, settings)
        loss, weight, aux = cross_entropy(
            logits, part_targets, part_weights, settings.z_loss, settings.label_smoothing
        )
        return loss, (loss, weight, aux)

    def one(carry, part):
        sums, kernel_gradient = carry
        part_hidden, part_targets, part_weights = part
        # NOTE: the kernel stays float32 here and `einsum` casts it, so that the product returns its
        # gradient in float32 and the sum over chunks is not rounded to the compute dtype.
        gradients, part_sums = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
            part_hidden, kernel, part_weights, part_targets
        )
        sums = jax.tree.map(jnp.add, sums, part_sums)
        return (sums, kernel_gradient + gradients[1]), (gradients[0], gradients[2])

    parts = _split((hidden, targets, weights), settings.chunk)
    carry = _zeros(), jnp.zeros(kernel.shape, jnp.float32)
    (sums, kernel_gradient), gradients = jax.lax.scan(one, carry, parts)
    batch, length = hidden.shape[:2]
    hidden_gradient, weight_gradient = (_join(g, batch, length) for g in gradients)
    return sums, (hidden_gradient, kernel_gradient.astype(kernel.dtype), weight_gradient)


def _chunked_backward(settings, saved, gradients):
    hidden, kernel, weights = (g * gradients[0].astype(g.dtype) for g in saved)
    return hidden, kernel, None, weights + gradients[1].astype(weights.dtype)


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _zeros() -> Sums:
    zero = jnp.zeros((), jnp.float32)
    return zero, zero, {"nll": zero, "z_loss": zero, "correct": zero}


def _split(arrays, chunk: int):
    """Split [batch, length, ...] into [chunks, rows, part of length, ...], padded with zeros.

    Every chunk holds a slice of every row, so that all devices of a batch sharded by rows work on
    each chunk. A batch of more rows than `chunk` is folded to the largest divisor of its rows that
    is not greater.
    """
    batch, length = arrays[0].shape[:2]
    rows = next(n for n in range(min(batch, chunk), 0, -1) if batch % n == 0)
    length = batch // rows * length
    count = -(-length // min(length, max(1, chunk // rows)))
    part = -(-length // count)

    def split(x):
        x = x.reshape(rows, length, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, count * part - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, part, *x.shape[2:]), 1, 0)

    return tuple(split(x) for x in arrays)


def _join(chunks: jax.Array, batch: int, length: int) -> jax.Array:
    """Invert `_split`."""
    joined = jnp.moveaxis(chunks, 0, 1)
    rows, rest = joined.shape[0], joined.shape[3:]
    joined = joined.reshape(rows, -1, *rest)[:, : batch // rows * length]
    return joined.reshape(batch, length, *rest)
