"""Pooling of token states to one vector per segment."""

import jax
import jax.numpy as jnp

from models.layers import einsum


def mean_of_segments(states: jax.Array, segment_ids: jax.Array, max_segments: int) -> jax.Array:
    """Return the mean state of segments 1 .. max_segments; zeros for those that are missing.

    Takes [rows, length, d_model] and [rows, length]; returns float32 [rows, max_segments, d_model].
    """
    states = states.astype(jnp.float32)
    wanted = jnp.arange(1, max_segments + 1)
    belongs = segment_ids[:, None, :] == wanted[None, :, None]  # [rows, segments, length]
    count = jnp.sum(belongs, axis=-1, keepdims=True)
    total = einsum("bsl,bld->bsd", belongs.astype(jnp.float32), states)
    return total / jnp.maximum(count, 1)


def pooled(pooling: str, states: jax.Array, segment_ids: jax.Array, segments: int) -> jax.Array:
    """Return one vector of each segment 1 .. `segments`; zeros for those that are missing.

    Args:
      pooling: "mean", "max", "first" or "last".
      states: [rows, length, d_model].
      segment_ids: [rows, length].

    Returns:
      float32 [rows, segments, d_model].
    """
    if pooling == "mean":
        return mean_of_segments(states, segment_ids, segments)
    states = states.astype(jnp.float32)
    wanted = jnp.broadcast_to(jnp.arange(1, segments + 1), (len(states), segments))
    if pooling == "max":
        rows, length, d_model = states.shape
        # One more segment for padding, which is cut off.
        slot = jnp.where(segment_ids > 0, segment_ids - 1, segments)
        slot = jnp.minimum(slot, segments) + (segments + 1) * jnp.arange(rows)[:, None]
        found = jax.ops.segment_max(
            states.reshape(rows * length, d_model), slot.ravel(), rows * (segments + 1)
        )
        found = found.reshape(rows, segments + 1, d_model)[:, :segments]
    else:
        index = (first_of_segments if pooling == "first" else last_of_segments)(segment_ids, wanted)
        found = jnp.take_along_axis(states, index[..., None], axis=1)
    there = jnp.any(segment_ids[:, None, :] == wanted[:, :, None], axis=-1)
    return jnp.where(there[..., None], found, 0.0)


def first_of_segments(segment_ids: jax.Array, wanted: jax.Array) -> jax.Array:
    """Return the index of each wanted segment's first token, 0 if there is none.

    Takes ids [rows, length] and [rows, segments]; returns int32 [rows, segments].
    """
    return jnp.argmax(segment_ids[:, None, :] == wanted[:, :, None], axis=-1)


def last_of_segments(segment_ids: jax.Array, wanted: jax.Array) -> jax.Array:
    """Return the index of each wanted segment's last token, 0 if there is none.

    Takes ids [rows, length] and [rows, segments]; returns int32 [rows, segments].
    """
    belongs = segment_ids[:, None, :] == wanted[:, :, None]  # [rows, segments, length]
    return jnp.max(jnp.where(belongs, jnp.arange(segment_ids.shape[1]), 0), axis=-1)


def scaled_to_unit_length(x: jax.Array) -> jax.Array:
    """Return x [..., features] divided by its length."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(length, 1e-12)
