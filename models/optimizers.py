"""Optimizers and learning-rate schedules, as pure optax transformations.

- Adafactor is T5's, per layer. A stacked parameter [layers, ...] is one array but many parameters:
  the update clip, the parameter scale and the factored statistics are taken over each layer alone,
  so that a stacked and an unrolled model take the same steps. (`optax.adafactor` takes them over
  the whole array, so that the layer with the largest gradients sets the step size of all.)
- Slots have T5X's names: {"v_row", "v_col"} where factored, {"v"} where not, under the parameter's
  own path. `state_axes` derives the logical axes of any optimizer's state from that correspondence.
- A schedule is a frozen dataclass that is called with the step: an optax schedule and a
  configuration at once. An optimizer is a configuration until `build` is called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

Schedule = Callable[[Any], Any]

# --------------------------------------------------------------------------------------------------
# Schedules: step (an integer, from 0) -> learning rate, float32.


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
    """T5's pretraining schedule: scale / sqrt(max(step, offset)).

    NOTE: with T5's offset of 10,000 it is flat at 0.01 for 10,000 steps and then decays; it has no
    linear warm-up.

    Attributes:
      scale: factor of all rates.
      offset: steps before the decay begins.
    """

    scale: float = 1.0
    offset: int = 10_000

    def __call__(self, step: Any) -> Any:
        return self.scale / jnp.sqrt(jnp.maximum(jnp.asarray(step, jnp.float32), self.offset))


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same rate throughout.

    Attributes:
      value: the rate; T5 fine-tunes at 1e-3.
    """

    value: float = 1e-3

    def __call__(self, step: Any) -> Any:
        return jnp.full(jnp.shape(step), self.value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class WarmupLinear:
    """Linear warm-up from 0 to `peak`, then linear decay to `final` at step `total_steps`.

    Attributes:
      peak: the highest rate.
      final: the last rate.
      warmup_steps: steps of the warm-up.
      total_steps: the step at which `final` is reached.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    final: float = 0.0

    def __call__(self, step: Any) -> Any:
        return _warmed_up(self, step, lambda done: 1.0 - done)


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up from 0 to `peak`, then half a cosine to `final` at step `total_steps`.

    Attributes:
      peak: the highest rate.
      final: the last rate.
      warmup_steps: steps of the warm-up.
      total_steps: the step at which `final` is reached.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    final: float = 0.0

    def __call__(self, step: Any) -> Any:
        return _warmed_up(self, step, lambda done: 0.5 * (1.0 + jnp.cos(jnp.pi * done)))


def _warmed_up(
    schedule: WarmupLinear | WarmupCosine, step: Any, shape: Callable[[Any], Any]
) -> Any:
    step = jnp.asarray(step, jnp.float32)
    # The first step already moves: (step + 1) / warmup_steps.
    warm = jnp.minimum((step + 1.0) / max(schedule.warmup_steps, 1), 1.0)
    span = max(schedule.total_steps - schedule.warmup_steps, 1)
    done = jnp.clip((step - schedule.warmup_steps) / span, 0.0, 1.0)
    decayed = schedule.final + (schedule.peak - schedule.final) * shape(done)
    return jnp.where(step < schedule.warmup_steps, schedule.peak * warm, decayed)


# --------------------------------------------------------------------------------------------------
# Adafactor


class AdafactorState(NamedTuple):
    """State of `adafactor`."""

    step: jax.Array  # int32 scalar: updates done
    slots: Any  # at each parameter's place: {"v_row", "v_col"} or {"v"}, float32


def adafactor(
    schedule: Schedule,
    axes: Any,
    *,
    decay_exponent: float = 0.8,
    epsilon: float = 1e-30,
    clip_threshold: float = 1.0,
    min_scale: float = 1e-3,
    min_dim_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Return Adafactor without momentum, as T5 uses it (Shazeer and Stern 2018, algorithm 4).

    With t = 1, 2, ... and, per layer, G the gradient and X the parameter:

        beta2 = 1 - t^-decay_exponent
        R, C  = beta2 R + (1 - beta2) mean(G^2 + epsilon) over columns, over rows
        U     = G / sqrt(R C / mean(R))          (or G / sqrt(V), unfactored)
        U     = U / max(1, rms(U) / clip_threshold)
        X     = X - learning rate * max(rms(X), min_scale) * U

    Args:
        schedule: learning rate as a function of the number of updates done.
        axes: tree like the parameters', with a tuple of logical names at each leaf; a leading
            "layers" marks a stack.
        min_dim_to_factor: a matrix is factored when both its dimensions are at least this.
    """

    def layer_axes(names: tuple[str | None, ...]) -> tuple[int, ...]:
        """Return the dimensions of one layer, counted from the end."""
        rank = len(names) - (names[:1] == ("layers",))
        return tuple(range(-rank, 0))

    def is_factored(shape: tuple[int, ...], dims: tuple[int, ...]) -> bool:
        return len(dims) == 2 and min(shape[-2:]) >= min_dim_to_factor

    def init_slot(param: Any, names: tuple[str | None, ...]) -> dict[str, jax.Array]:
        if is_factored(param.shape, layer_axes(names)):
            return {
                "v_row": jnp.zeros(param.shape[:-1], jnp.float32),
                "v_col": jnp.zeros((*param.shape[:-2], param.shape[-1]), jnp.float32),
            }
        return {"v": jnp.zeros(param.shape, jnp.float32)}

    def init(params: Any) -> AdafactorState:
        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree.map(init_slot, params, axes))

    def update_one(gradient, slot, param, names, beta2, rate):
        dims = layer_axes(names)
        gradient = gradient.astype(jnp.float32)
        squared = jnp.square(gradient) + epsilon
        if "v" in slot:
            slot = {"v": beta2 * slot["v"] + (1 - beta2) * squared}
            update = gradient * jax.lax.rsqrt(slot["v"])
        else:
            slot = {
                "v_row": beta2 * slot["v_row"] + (1 - beta2) * squared.mean(-1),
                "v_col": beta2 * slot["v_col"] + (1 - beta2) * squared.mean(-2),
            }
            row = jax.lax.rsqrt(slot["v_row"] / slot["v_row"].mean(-1, keepdims=True))
            column = jax.lax.rsqrt(slot["v_col"])
            update = gradient * row[..., :, None] * column[..., None, :]
        update /= jnp.maximum(1.0, _rms(update, dims) / clip_threshold)
        scale = jnp.maximum(_rms(param.astype(jnp.float32), dims), min_scale)
        return (-rate * scale * update).astype(param.dtype), slot

    def update(gradients: Any, state: AdafactorState, params: Any = None) -> tuple:
        if params is None:
            raise ValueError("adafactor scales updates by the parameters: pass them to update")
        beta2 = 1.0 - (state.step + 1).astype(jnp.float32) ** -decay_exponent
        rate = schedule(state.step)
        structure: Any = jax.tree.structure(gradients)
        pairs = [
            update_one(*leaf, beta2, rate)
            for leaf in zip(
                jax.tree.leaves(gradients),
                structure.flatten_up_to(state.slots),
                structure.flatten_up_to(params),
                structure.flatten_up_to(axes),
                strict=True,
            )
        ]
        updates, slots = (structure.unflatten(side) for side in zip(*pairs, strict=True))
        return updates, AdafactorState(optax.safe_increment(state.step), slots)

    return optax.GradientTransformation(init, update)


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), dims, keepdims=True))


# --------------------------------------------------------------------------------------------------
# Configurations


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """T5's optimizer; see `adafactor`.

    Attributes:
      schedule: @InverseSquareRoot(), @Constant(), @WarmupLinear() or @WarmupCosine().
      clip_threshold: the largest RMS of a layer's update, before the learning rate.
      min_dim_to_factor: matrices with both dimensions of at least this are factored.
    """

    schedule: Any = InverseSquareRoot()
    clip_threshold: float = 1.0
    min_dim_to_factor: int = 128

    def build(self, axes: Any) -> optax.GradientTransformation:
        return adafactor(
            self.schedule,
            axes,
            clip_threshold=self.clip_threshold,
            min_dim_to_factor=self.min_dim_to_factor,
        )


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Attributes:
      schedule: @Constant(), @WarmupLinear(), @WarmupCosine() or @InverseSquareRoot().
      beta1, beta2: decay of the running means of gradients and of their squares.
      epsilon: added to the square root of the latter.
      weight_decay: decay of matrices only, multiplied by the learning rate.
    """

    schedule: Any = Constant()
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def build(self, axes: Any) -> optax.GradientTransformation:
        decayed = _over_names(_is_matrix, axes)
        return optax.adamw(
            self.schedule,
            b1=self.beta1,
            b2=self.beta2,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            mask=decayed,
        )


@dataclasses.dataclass(frozen=True)
class Muon:
    """Muon (Jordan 2024): orthogonalized momentum for matrices; Adam for everything else.

    Each layer of a stack is orthogonalized by itself. Embeddings, output kernels, tables of
    positions and vectors are updated by Adam. Muon's updates are scaled to the usual size of
    AdamW's (Liu et al. 2025, arXiv:2502.16982, equation 4), so that both share one learning rate
    and one weight decay.

    Attributes:
      schedule: @WarmupCosine(), @WarmupLinear(), @Constant() or @InverseSquareRoot().
      beta: decay of the running mean of gradients, with Nesterov's correction, which Adam has too.
      update_rms: root mean square of a matrix's update, before the learning rate.
      beta1, beta2, epsilon: of Adam.
      weight_decay: decay of matrices only, multiplied by the learning rate.
    """

    schedule: Any = Constant()
    beta: float = 0.95
    update_rms: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def build(self, axes: Any) -> optax.GradientTransformation:
        def dimensions(names: tuple[str | None, ...]) -> Any:
            whole = {"vocab", "positions", "relpos_buckets"} & set(names)
            if whole or not _is_matrix(names):
                return None
            return optax.contrib.MuonDimensionNumbers(-2, -1)  # other dimensions are layers

        return optax.contrib.muon(
            self.schedule,
            beta=self.beta,
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            adam_b1=self.beta1,
            adam_b2=self.beta2,
            muon_weight_dimension_numbers=_over_names(dimensions, axes),
            consistent_rms=self.update_rms,
        )


def _over_names(function: Callable, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _is_matrix(names: tuple[str | None, ...]) -> bool:
    return sum(name != "layers" for name in names) >= 2


def state_axes(state: Any, params: Any, axes: Any) -> Any:
    """Return the logical axes of every leaf of an optimizer's state, from the parameters'.

    A leaf belongs to the parameter whose path its own path ends with, apart from the slot's name.
    "v_row" lacks the parameter's last dimension, "v_col" the one before it, any other leaf has its
    shape. Leaves outside of all parameters (counts, coefficients) are whole on every device.

    Args:
        state: tree of arrays or shapes, as from `jax.eval_shape(optimizer.init, params)`.
        params: tree of arrays or shapes.
        axes: tree like `params`, a tuple of logical names at each leaf.

    Raises:
        ValueError: the shape of a leaf does not follow from a parameter's.
    """
    structure: Any = jax.tree.structure(params)
    known = {
        _names(path): (leaf.shape, names)
        for (path, leaf), names in zip(
            jax.tree_util.tree_flatten_with_path(params)[0],
            structure.flatten_up_to(axes),
            strict=True,
        )
    }

    def leaf_axes(path: Any, leaf: Any) -> tuple[str | None, ...]:
        keys = _names(path)
        if leaf.shape == () or not isinstance(path[-1], jax.tree_util.DictKey):
            return (None,) * len(leaf.shape)
        # A wrapper of an optimizer may have keys before the parameter's ("adam" in Muon).
        for names in (keys[start:] for start in range(len(keys))):
            for slot, kept in (("v_row", _without_last), ("v_col", _without_second_last)):
                if names[-1] == slot and names[:-1] in known:
                    shape, parameter_axes = known[names[:-1]]
                    if leaf.shape == kept(shape):
                        return kept(parameter_axes)
            for owner in (names, names[:-1]):  # moments; slots such as "v"
                if owner in known and known[owner][0] == leaf.shape:
                    return known[owner][1]
        where = jax.tree_util.keystr(path)
        raise ValueError(f"optimizer state {where} {leaf.shape} follows from no parameter")

    return jax.tree_util.tree_map_with_path(leaf_axes, state)


def _names(path: Any) -> tuple[str, ...]:
    """Return the dictionary keys of a tree path: the parameter's, without its wrappers'."""
    return tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))


def _without_last(dimensions: tuple) -> tuple:
    return dimensions[:-1]


def _without_second_last(dimensions: tuple) -> tuple:
    return (*dimensions[:-2], dimensions[-1])
