"""Positions of tokens in packed rows, and rotary positions (RoPE; Su et al., arXiv 2104.09864)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from models.config import RopeScaling

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Return the position of each token within its segment: 1 1 1 2 2 0 -> 0 1 2 0 1 0.

    Takes and returns [batch, length].
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return index - start


def rotary(
    positions: jax.Array,
    dimensions: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> Rotation:
    """Return cosines and sines for `rotate`, float32 [batch, length, 1, dimensions // 2] each."""
    # NOTE: in NumPy and float64, because an error in the last place grows with the position.
    frequency = theta ** (-np.arange(0, dimensions, 2) / dimensions)
    magnitude = 1.0
    if scaling is not None:
        frequency = _scaled_frequencies(frequency, scaling, theta)
        magnitude = scaling.magnitude
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency.astype(np.float32)
    if magnitude == 1.0:
        return jnp.cos(angle), jnp.sin(angle)
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def _scaled_frequencies(frequency: np.ndarray, scaling: RopeScaling, theta: float) -> np.ndarray:
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    if scaling.kind == "yarn":
        share = _yarn_share(len(frequency), scaling, theta)
        return (1 - share) * slow + share * frequency
    wavelengths = scaling.original_length * frequency / (2 * np.pi)  # within the original length
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = np.clip((wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - share) * slow + share * frequency


def _yarn_share(count: int, scaling: RopeScaling, theta: float) -> np.ndarray:
    """Return the share of the unscaled frequency in each of `count` frequencies."""

    def index_of(wavelengths: float) -> float:
        """Return the index of the frequency with so many wavelengths in the original length."""
        return count * math.log(scaling.original_length / (2 * math.pi * wavelengths), theta)

    first = index_of(scaling.high_frequency_factor)
    last = index_of(scaling.low_frequency_factor)
    if scaling.whole_dimensions:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    return 1 - np.clip((np.arange(count) - first) / max(last - first, 1e-3), 0.0, 1.0)


def unrotated(rotation: Rotation) -> Rotation:
    """Return the rotation by nothing, of the same shape."""
    cos, sin = rotation
    return jnp.ones_like(cos), jnp.zeros_like(sin)


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotate the first dimensions of [batch, length, heads, head_dim].

    Of n rotated dimensions, i pairs with i + n // 2.
    """
    cos, sin = rotation
    half = cos.shape[-1]
    rest = x[..., 2 * half :]
    first, second = jnp.split(x[..., : 2 * half].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=-1)
