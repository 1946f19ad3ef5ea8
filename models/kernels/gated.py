"""The hidden layer of a gated MLP on NVIDIA GPUs, activation(x w_0) * (x w_1), in one pass.

A Pallas kernel for Triton. XLA computes two products, writes both, and reads them again to multiply
them: for Flan-T5-XL that is 0.84 GB of traffic a layer of 16 rows of 1,024 tokens, of which this
kernel needs 0.17. Both products of a block are accumulated side by side, and x is read once.

- The gradient is that of the plain form, which computes the two products apart and saves them under
  the names of remat policies: in training nothing changes.
- Programs go through the blocks of x in groups, so that those that run at the same time share
  blocks of the kernels in the second-level cache.
- Sizes that are not multiples of the blocks are computed by the plain form (`unsupported`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from models.kernels.triton import generation
from models.partitioning import device_kind, per_shard

Plain = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

NAME = "gated_products"


class Blocks(NamedTuple):
    """Block sizes: rows of x, columns of the result, columns of x at a time; warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8  # blocks of rows whose programs run after each other


# By generation. Chosen on the compiled kernels: none of them spills registers (docs/gpu.md).
BLOCKS = {
    "hopper": Blocks(128, 128, 64, 8, 3),
    "ampere": Blocks(128, 64, 32, 4, 4),
}


def unsupported(shape: tuple[int, ...], columns: int, blocks: Blocks) -> str | None:
    """Return why the kernel cannot compute x of this shape and so many columns, or None."""
    *rows, depth = shape
    rows_of_one = functools.reduce(lambda a, b: a * b, rows, 1)
    for size, block in (
        (rows_of_one, blocks.rows),
        (columns, blocks.columns),
        (depth, blocks.depth),
    ):
        if size % block:
            return f"needs multiples of {block}, not {size}"
    return None


def gated_products(
    x: jax.Array,
    first: jax.Array,
    second: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    blocks: Blocks,
    interpret: bool = False,
) -> jax.Array:
    """Return activation(x first) * (x second) in the dtype of x, accumulated in float32.

    Args:
      x: [..., depth]; all dimensions in multiples of `blocks`.
      first, second: [depth, columns], in the dtype of x.
      activation: computed in float32.
      interpret: run the kernel's steps in XLA, on any platform, for tests.
    """
    depth, columns = first.shape
    flat = x.reshape(-1, depth)
    row_blocks, column_blocks = len(flat) // blocks.rows, columns // blocks.columns
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    group = min(blocks.group, row_blocks)
    while row_blocks % group:
        group -= 1

    def place(program: Any) -> tuple[Any, Any]:
        """Return the block of rows and of columns of a program."""
        inside = program % (group * column_blocks)
        return program // (group * column_blocks) * group + inside % group, inside // group

    def kernel(x_ref: Any, first_ref: Any, second_ref: Any, out_ref: Any) -> None:
        def add(step: Any, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            at = pl.ds(step * blocks.depth, blocks.depth)
            piece = plgpu.load(x_ref.at[:, at])  # [rows, depth]
            return tuple(
                total
                + jnp.dot(
                    piece,
                    plgpu.load(ref.at[at, :]),  # [depth, columns]
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                for total, ref in zip(sums, (first_ref, second_ref), strict=True)
            )

        nothing = jnp.zeros((blocks.rows, blocks.columns), jnp.float32)
        gate, value = jax.lax.fori_loop(0, depth // blocks.depth, add, (nothing, nothing))
        plgpu.store(out_ref, (activation(gate) * value).astype(out_ref.dtype))

    kernels = pl.BlockSpec((depth, blocks.columns), lambda program: (0, place(program)[1]))
    out = pl.pallas_call(
        kernel,
        grid=(row_blocks * column_blocks,),
        in_specs=[
            pl.BlockSpec((blocks.rows, depth), lambda program: (place(program)[0], 0)),
            kernels,
            kernels,
        ],
        out_specs=pl.BlockSpec((blocks.rows, blocks.columns), place),
        out_shape=jax.ShapeDtypeStruct((len(flat), columns), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=pl.CostEstimate(
            flops=4 * len(flat) * depth * columns,
            transcendentals=len(flat) * columns,
            bytes_accessed=(flat.size + 2 * first.size + len(flat) * columns) * x.dtype.itemsize,
        ),
        interpret=interpret,
        name=NAME,
    )(flat, first, second)
    return out.reshape(*x.shape[:-1], columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_plain_gradient(
    fused: Plain, plain: Plain, x: jax.Array, first: jax.Array, second: jax.Array
) -> jax.Array:
    return fused(x, first, second)


def _forward(fused: Plain, plain: Plain, *given: jax.Array) -> tuple[jax.Array, Any]:
    return jax.vjp(plain, *given)


def _backward(fused: Plain, plain: Plain, pull: Any, gradient: jax.Array) -> Any:
    return pull(gradient)


_with_plain_gradient.defvjp(_forward, _backward)


def gated_hidden(
    x: jax.Array,
    first: jax.Array,
    second: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    plain: Plain,
    interpret: bool = False,
) -> jax.Array:
    """Return plain(x, first, second), by the kernel where its blocks fit, on every device.

    Args:
      x: [batch, length, d_model].
      first, second: [d_model, mlp], of any dtype.
      activation: as in `gated_products`.
      plain: computes the same; its gradient is taken.
    """
    blocks = BLOCKS[generation(device_kind())]
    result = (*x.shape[:-1], first.shape[1])

    def piece(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        first, second = first.astype(x.dtype), second.astype(x.dtype)
        if unsupported(x.shape, first.shape[1], blocks) is not None:
            return plain(x, first, second).astype(x.dtype)
        return gated_products(
            x, first, second, activation=activation, blocks=blocks, interpret=interpret
        )

    def fused(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        given = {
            "x": (x, ("batch", "length", None)),
            "first": (first, (None, "mlp")),
            "second": (second, (None, "mlp")),
        }
        return per_shard(piece, given, ("batch", "length", "mlp"), result)

    def rounded(*given: jax.Array) -> jax.Array:
        return plain(*given).astype(x.dtype)

    return _with_plain_gradient(fused, rounded, x, first, second)
