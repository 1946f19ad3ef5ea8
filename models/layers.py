"""The parts that every model is made of: linear maps, norms, embeddings, MLPs, stacks of layers.

- A module declares its parameters as shapes with logical axes and an initialiser, and holds no
  arrays until `Model.bind` puts them in: NNX is the container, nothing more.
- Matrix products take their operands in the compute dtype and accumulate in float32, forward and
  backward (`einsum`); a gradient comes out in the dtype that its parameter was given in. Operands
  that are float32 are multiplied as such: accelerators otherwise round them to bfloat16 or TF32.
- Norms compute in float32. Dropout takes its key explicitly; no key means no dropout.
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

# T5's own, as T5X initialises it. A query's has 1/sqrt(d_kv) folded in: see `attention.Attention`.
KERNEL_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
ATTENTION_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal")
RELPOS_INIT = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
ONES_INIT = jax.nn.initializers.ones
ZEROS_INIT = jax.nn.initializers.zeros

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
}

# Chips on which a product is slower with the next norm's sum of squares fused to it than both are
# apart, by the compiler's own reckoning (v5p, v6e; docs/tpu.md). On v5e it is the other way round,
# and everywhere where the residual stream is bfloat16.
_NORMS_APART = ("TPU v5", "TPU v6 lite")

_policies, _names = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names
# What the backward pass of a layer finds saved; it computes the rest again. From much memory to
# little (docs/tpu.md has what they cost):
# - "dots": every product without batch dimensions, and attention's output;
# - "projections": what `Linear` gives, and attention's output;
# - "no_cross": the same, but no keys and values of what the encoder gives;
# - "no_hidden": the same, but no hidden layers either;
# - "attention": only attention's output, before and after its projection;
# - "full": nothing inside a layer.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _names("attention")
    ),
    "projections": _names("attention", "projection", "heads", "hidden", "cross"),
    "no_cross": _names("attention", "projection", "heads", "hidden"),
    "no_hidden": _names("attention", "projection", "heads"),
    "attention": _names("attention", "projection"),
    "full": _policies.nothing_saveable,
}


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer) -> nnx.Param:
    """Declares a float32 parameter, with one logical axis name per dimension."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes, initializer=init)


# --------------------------------------------------------------------------------------------------
# Matrix products


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(subscripts: str, x: jax.Array, y: jax.Array, dtype: Any = None) -> jax.Array:
    """Two-operand einsum in x's dtype, accumulated in float32, returned in `dtype` (default x's).

    Every index must occur in exactly two of the three terms, or in all three (a batch index).
    `y` is cast to x's dtype; its gradient comes back in the dtype it had.
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
    # NOTE: the derived rule would multiply a float32 gradient with bfloat16 operands, which no
    # hardware has units for; here both are in the compute dtype, as in the forward pass.
    x, y = saved
    gradient = gradient.astype(x.dtype)
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    dx = _product(f"{out},{right}->{left}", gradient, y.astype(x.dtype), x.dtype)

    def on_cpu(x, gradient):
        # NOTE: where the kernel was a transposed table, XLA merges the transposition of its
        # gradient into the product, and its CPU backend then has no kernel for bfloat16 operands.
        return jax.lax.optimization_barrier(
            _product(f"{left},{out}->{right}", x, gradient, y.dtype)
        )

    def elsewhere(x, gradient):
        # NOTE: what a product gives is what devices send each other to add up: in y's dtype.
        return _product(f"{left},{out}->{right}", x, gradient, y.dtype, added_in=y.dtype)

    return dx, jax.lax.platform_dependent(x, gradient, cpu=on_cpu, default=elsewhere)


einsum.defvjp(_einsum_forward, _einsum_backward)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias); kernel [in, out].

    `name` is what remat policies call the result: "heads" of queries, keys and values; "cross" of
    keys and values of what the encoder gives, which are as long as that; "hidden" in an MLP;
    "projection" of what goes to the residual stream.
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
        """Maps [batch, length, in] to [batch, length, out], in x's dtype.

        On a CPU "hidden" and "projection", which no product reads as they are, are float32.
        """
        # NOTE: where an accelerator's compiler fuses the product with what follows, the sum is not
        # rounded in between; a CPU's hands it over in float32, and would round it for nothing.
        unrounded = self.name in ("hidden", "projection") and platform() == "cpu"
        y = einsum("bli,io->blo", x, self.kernel[...], jnp.float32 if unrounded else None)
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        if self.name == "cross":
            # NOTE: XLA zeroes the arrays that a scan will fill unless it sees that all of them is
            # overwritten, and it sees that only where no two scans save arrays of one shape. The
            # encoder's projections have this one's; a dimension of 1 tells them apart.
            return checkpoint_name(y[:, None], self.name)[:, 0]
        return checkpoint_name(y, self.name)


# --------------------------------------------------------------------------------------------------
# Norms, embedding, dropout


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + scale), without mean subtraction; float32 inside, `dtype` outside."""

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
        return (y * (self.scale[...] + self.offset)).astype(self.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) * scale + bias; float32 inside, `dtype` outside."""

    def __init__(self, features: int, *, epsilon: float, dtype: str):
        self.scale = parameter((features,), ("embed",), ONES_INIT)
        self.bias = parameter((features,), ("embed",), ZEROS_INIT)
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(self.dtype)


class Embedding(nnx.Module):
    """A table [rows, features]."""

    def __init__(self, rows: int, features: int, *, axis: str, init: Initializer):
        self.embedding = parameter((rows, features), (axis, "embed"), init)
        self.axis = axis

    def __call__(self, ids: jax.Array, dtype: Any) -> jax.Array:
        """Looks up [batch, length] ids -> [batch, length, features].

        An id beyond the table gives NaN: a wrong vocabulary must not pass as a poor score.
        """
        # NOTE: each device looks its own rows up in the whole width of the table. Left to the
        # compiler, the table's slices stay where they are and it is the activations, of all rows of
        # the batch, that are gathered for the gradient.
        table = constrain(self.embedding[...], (self.axis, None))
        return jnp.take(table, ids, axis=0, mode="fill").astype(dtype)


def dropout(
    x: jax.Array, rate: float, key: jax.Array | None, *, broadcast: tuple[int, ...] = ()
) -> jax.Array:
    """Zeroes entries with probability `rate` and scales up the rest; one draw along `broadcast`."""
    if key is None or rate == 0.0:
        return x
    shape = list(x.shape)
    for axis in broadcast:
        shape[axis] = 1
    keep = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(keep, x / (1.0 - rate), 0.0).astype(x.dtype)


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y in the dtype of x, the residual stream, whatever that of y."""
    return (x + y).astype(x.dtype)


def split_key(key: jax.Array | None, count: int):
    """`jax.random.split`, or as many Nones when there is no key."""
    return (None,) * count if key is None else jax.random.split(key, count)


# --------------------------------------------------------------------------------------------------
# MLP


class MLP(nnx.Module):
    """wo(activation(wi x)), or gated: wo(activation(wi_0 x) * wi_1 x).

    `dropout_broadcast` are the axes of the hidden layer [batch, length, mlp] that share a draw.
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
    ):
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            into = Linear(d_model, d_ff, ("embed", "mlp"), bias=bias, init=init, name="hidden")
            setattr(self, name, into)
        self.wo = Linear(d_ff, d_model, ("mlp", "embed"), bias=bias, init=init)
        self.activation = activation
        self.gated = gated
        self.dropout_rate = dropout_rate

    def __call__(
        self, x: jax.Array, *, dropout_key: jax.Array | None = None, broadcast: tuple[int, ...] = ()
    ) -> jax.Array:
        """Maps [batch, length, d_model] to the same shape, in `Linear`'s dtype.

        The activation computes in float32.
        """
        hidden = self.wi_0(x) if self.gated else self.wi(x)  # [batch, length, mlp]
        hidden = _ACTIVATIONS[self.activation](hidden.astype(jnp.float32))
        if self.gated:
            hidden = hidden * self.wi_1(x)
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        hidden = dropout(
            hidden.astype(x.dtype), self.dropout_rate, dropout_key, broadcast=broadcast
        )
        return self.wo(hidden)


# --------------------------------------------------------------------------------------------------
# Stacks


class Stack(nnx.Module):
    """Layers of one shape, run in order.

    Either unrolled, as attributes `layers_0`, `layers_1`, ...; or stacked, as one attribute
    `layers` whose parameters have a leading [layers] dimension, run by `lax.scan`. Stacked compiles
    in constant time; unrolled lets the compiler work across layers, and spares the copies of saved
    residuals in training.
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
        """Runs `step(layer, carry, input) -> (carry, output)` through the layers.

        `inputs` is a tree of arrays with a leading [layers] dimension (or None); outputs come back
        stacked likewise.
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
    """stacked[index], for parameters in bfloat16 on a CPU: sliced as integers.

    XLA's CPU backend slices no bfloat16. It would convert the parameters of all layers to float32
    in front of the loop, and back inside: a quarter of the time of scoring.
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
    """The layer with [count] in front of every parameter."""
    for _, param in nnx.iter_graph(layer):
        if isinstance(param, nnx.Param):
            shape = param.get_value()
            param.set_value(jax.ShapeDtypeStruct((count, *shape.shape), shape.dtype))
            param.set_metadata("axes", ("layers", *param.axes))
    return layer
