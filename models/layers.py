"""Layers of all models: linear maps, norms, embeddings, and stacks of layers.

- A module declares its parameters as shapes with logical axes and an initializer, and holds no
  arrays until `Model.bind` inserts them: NNX is used as a container only.
- Matrix products take their operands in the compute dtype and accumulate in float32, forward and
  backward (`einsum`); a gradient has the dtype of its parameter. Operands in float32 are multiplied
  in float32: accelerators round them to bfloat16 or TF32 by default.
- Norms compute in float32. Dropout takes its key explicitly; without a key there is no dropout.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.partitioning import constrain, device_kind, platform

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

# T5X's initializers of T5. That of queries includes 1/sqrt(d_kv): see `attention.Attention`.
KERNEL_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ATTENTION_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
RELPOS_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ONES_INIT = jax.nn.initializers.ones
ZEROS_INIT = jax.nn.initializers.zeros

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}

# Chips on which a product fused with the next norm's sum of squares is slower than both apart, by
# the compiler's estimate (v5p, v6e; docs/tpu.md). On v5e, and wherever the residual stream is
# bfloat16, fusing is faster.
_NORMS_APART = ("TPU v5", "TPU v6 lite")

_policies, _names = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names
# Values of a layer that are saved for the backward pass; it computes the rest again. From much
# memory to little (docs/tpu.md has the costs):
# - "dots": every product without batch dimensions, and attention's output;
# - "operands": the outputs of `Linear`, attention's output, and what products read: normed inputs
#   and the gated hidden layer of MLPs;
# - "projections": the outputs of `Linear`, and attention's output;
# - "no_cross": the same without keys and values of the encoder's states;
# - "no_hidden": the same without hidden layers of MLPs;
# - "attention": only attention's output, before and after its projection;
# - "full": nothing inside a layer.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _names("attention")
    ),
    "operands": _names("attention", "projection", "heads", "hidden", "cross", "normed", "gated"),
    "projections": _names("attention", "projection", "heads", "hidden", "cross"),
    "no_cross": _names("attention", "projection", "heads", "hidden"),
    "no_hidden": _names("attention", "projection", "heads"),
    "attention": _names("attention", "projection"),
    "full": _policies.nothing_saveable,
}


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer) -> nnx.Param:
    """Declare a float32 parameter, with one logical axis name per dimension."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, initializer=init)


# --------------------------------------------------------------------------------------------------
# Matrix products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """Return an einsum of two operands in x's dtype, accumulated in float32, in `dtype` (or x's).

    Every index must occur in exactly two of the three terms, or in all three (a batch index).
    `y` is cast to x's dtype; its gradient has y's own dtype.
    """
    return _product(subscripts, x, y.astype(x.dtype), dtype or x.dtype)


def _product(
    subscripts: str, x: jax.Array, y: jax.Array, dtype: Any, added_in: Any = jnp.float32
) -> jax.Array:
    # NOTE: without HIGHEST, float32 is multiplied in bfloat16 on TPU and in TF32 on GPU.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        subscripts, x, y, precision=precision, preferred_element_type=added_in
    ).astype(dtype)


def _einsum_forward(subscripts, x, y, dtype):
    return einsum(subscripts, x, y, dtype), (x, y)


def _einsum_backward(subscripts, dtype, saved, gradient):
    # NOTE: the derived rule would multiply a float32 gradient with bfloat16 operands, for which no
    # hardware has units; here both are in the compute dtype, as in the forward pass.
    x, y = saved
    gradient = gradient.astype(x.dtype)
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    dx = _product(f"{out},{right}->{left}", gradient, y.astype(x.dtype), x.dtype)

    def on_cpu(x, gradient):
        # NOTE: of a transposed table, XLA merges the transposition of the gradient into
        # the product, for which its CPU backend has no bfloat16 kernel.
        return jax.lax.optimization_barrier(
            _product(f"{left},{out}->{right}", x, gradient, y.dtype)
        )

    def elsewhere(x, gradient):
        # NOTE: devices sum products over the mesh in the products' dtype: y's.
        return _product(f"{left},{out}->{right}", x, gradient, y.dtype, added_in=y.dtype)

    return dx, jax.lax.platform_dependent(x, gradient, cpu=on_cpu, default=elsewhere)


einsum.defvjp(_einsum_forward, _einsum_backward)


class Linear(nnx.Module):
    """A linear map y = x @ kernel (+ bias); kernel [in, out].

    `name` is the result's name in remat policies: "heads" for queries, keys and values; "cross" for
    keys and values of the encoder's states, which have the encoder's length; "hidden" in an MLP;
    "projection" for what is added to the residual stream.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        bias: bool = False,
        init: Initializer = KERNEL_INIT,
        name: str = "projection",
    ):
        self.kernel = parameter((inputs, outputs), axes, init)
        self.bias = parameter((outputs,), axes[1:], ZEROS_INIT) if bias else None
        self.name = name

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, length, in] to [batch, length, out], in x's dtype.

        On a CPU "hidden" and "projection", which no product reads directly, are float32.
        """
        return self.with_kernel(x, self.kernel[...])

    def with_kernel(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Map as `__call__` does, with this kernel instead of the layer's own."""
        # NOTE: an accelerator's compiler fuses the product with what follows and does not round in
        # between. The CPU's product is float32, and rounding it would cost a pass for nothing.
        unrounded = self.name in ("hidden", "projection") and platform() == "cpu"
        y = einsum("bli,io->blo", x, kernel, jnp.float32 if unrounded else None)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.name == "cross":
            # NOTE: XLA zeroes arrays that a scan fills unless it can prove they are overwritten,
            # which it can only if no two scans save arrays of one shape. The encoder's projections
            # have this shape too; a dimension of 1 makes them different.
            return checkpoint_name(y[:, None], self.name)[:, 0]
        return checkpoint_name(y, self.name)


# --------------------------------------------------------------------------------------------------
# Norms, embedding, dropout


class RMSNorm(nnx.Module):
    """The norm x / rms(x) * (offset + scale), computed in float32 and returned in `dtype`."""

    def __init__(
        self,
        features: int,
        *,
        epsilon: float,
        dtype: str,
        offset: float = 0.0,
        axis: str = "embed",
    ):
        self.scale = parameter((features,), (axis,), ZEROS_INIT if offset else ONES_INIT)
        self.epsilon = epsilon
        self.offset = offset
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.dtype == jnp.float32 and device_kind() in _NORMS_APART:
            x = jax.lax.optimization_barrier(x)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = (y * (self.scale[...] + self.offset)).astype(self.dtype)
        return checkpoint_name(y, "normed")


class LayerNorm(nnx.Module):
    """The norm (x - mean) / std * scale (+ bias), computed in float32 and returned in `dtype`."""

    def __init__(
        self, features: int, *, epsilon: float, dtype: str, bias: bool = True, axis: str = "embed"
    ):
        self.scale = parameter((features,), (axis,), ONES_INIT)
        self.bias = parameter((features,), (axis,), ZEROS_INIT) if bias else None
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * self.scale[...]
        y = (y if self.bias is None else y + self.bias[...]).astype(self.dtype)
        return checkpoint_name(y, "normed")


class Embedding(nnx.Module):
    """A table [rows, features]."""

    def __init__(self, rows: int, features: int, *, axis: str, init: Initializer):
        self.embedding = parameter((rows, features), (axis, "embed"), init)
        self.axis = axis

    def __call__(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Look up ids [batch, length] -> [batch, length, features].

        An id beyond the table gives NaN: a wrong vocabulary must not pass as a poor score.
        """
        # NOTE: each device looks up its own rows in the whole width of the table. By default the
        # compiler keeps the table's slices in place, and gathers the activations of all rows of the
        # batch for the gradient.
        table = constrain(self.embedding[...], (self.axis, None))
        return jnp.take(table, ids, axis=0, mode="fill").astype(dtype)


def dropout(
    x: jax.Array, rate: float, key: jax.Array | None, *, broadcast: tuple[int, ...] = ()
) -> jax.Array:
    """Zero entries with probability `rate` and scale up the rest; one draw along `broadcast`."""
    if key is None or rate == 0.0:
        return x
    shape = list(x.shape)
    for axis in broadcast:
        shape[axis] = 1
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return x + y in the dtype of x, the residual stream."""
    return (x + y).astype(x.dtype)


def split_key(key: jax.Array | None, count: int):
    """Return `jax.random.split`, or as many Nones if there is no key."""
    return (None,) * count if key is None else jax.random.split(key, count)


# --------------------------------------------------------------------------------------------------
# Stacks


class Stack(nnx.Module):
    """Layers of one shape, run in order.

    They are unrolled, as attributes `layers_0`, `layers_1`, ..., or stacked, as one attribute
    `layers` whose parameters have a leading [layers] dimension, run by `lax.scan`. Stacked layers
    compile in constant time; unrolled ones let the compiler optimize across layers and avoid copies
    of saved residuals in training.
    """

    def add_layers(self, make: Callable[[], nnx.Module], count: int, *, scan: bool, remat: str):
        self.count = count
        self.scan = scan
        self.remat = remat
        if scan:
            self.layers = _stacked(make(), count)
        else:
            for index in range(count):
                setattr(self, f"layers_{index}", make())

    def over_layers(self, step: Callable, carry: Any, inputs: Any = None) -> tuple[Any, Any]:
        """Run `step(layer, carry, input) -> (carry, output)` through the layers.

        `inputs` is a tree of arrays with a leading [layers] dimension, or None; the outputs have
        that dimension too.
        """

        def run(graph, params, carry, given):
            return step(nnx.merge(graph, params), carry, given)

        if self.remat != "none":
            run = jax.checkpoint(
                run,
                policy=REMAT_POLICIES[self.remat],
                prevent_cse=not self.scan,  # a scan's body is safe from it already
                static_argnums=(0,),
            )
        if self.scan:
            graph, params = nnx.split(self.layers)
            halved = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
            if halved and platform() == "cpu":
                return jax.lax.scan(
                    lambda carry, given: run(
                        graph,
                        jax.tree.map(lambda leaf: _layer(leaf, given[0]), params),
                        carry,
                        given[1],
                    ),
                    carry,
                    (jnp.arange(self.count), inputs),
                )
            return jax.lax.scan(
                lambda carry, given: run(graph, given[0], carry, given[1]), carry, (params, inputs)
            )
        outputs = []
        for index in range(self.count):
            graph, params = nnx.split(getattr(self, f"layers_{index}"))
            given = jax.tree.map(lambda x, index=index: x[index], inputs)
            carry, output = run(graph, params, carry, given)
            outputs.append(output)
        return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)


@jax.custom_vjp
def _layer(stacked: jax.Array, index: jax.Array) -> jax.Array:
    """Return stacked[index], for parameters in bfloat16 on a CPU, which are sliced as integers.

    XLA's CPU backend cannot slice bfloat16. It would convert the parameters of all layers to
    float32 before the loop, and back inside: a quarter of the time of scoring.
    """
    if stacked.dtype != jnp.bfloat16:
        return jax.lax.dynamic_index_in_dim(stacked, index, keepdims=False)
    bits = jax.lax.bitcast_convert_type(stacked, jnp.uint16)
    layer = jax.lax.dynamic_index_in_dim(bits, index, keepdims=False)
    return jax.lax.bitcast_convert_type(layer, jnp.bfloat16)


def _layer_forward(stacked, index):
    return _layer(stacked, index), (stacked, index)


def _layer_backward(saved, gradient):
    stacked, index = saved
    return jnp.zeros_like(stacked).at[index].set(gradient), None


_layer.defvjp(_layer_forward, _layer_backward)


def _stacked(layer: nnx.Module, count: int) -> nnx.Module:
    """Return the layer with a dimension [count] in front of every parameter."""
    for _, param in nnx.iter_graph(layer):
        if isinstance(param, nnx.Param):
            shape = param.get_value()
            param.set_value(jax.ShapeDtypeStruct((count, *shape.shape), shape.dtype))
            param.set_metadata("axes", ("layers", *param.axes))
    return layer
