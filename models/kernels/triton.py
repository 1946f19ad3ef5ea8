"""Attention on NVIDIA GPUs without [batch, heads, queries, keys] in memory, T5's bias included.

A Pallas kernel for Triton, forward and backward. Its reference is `plain.dot_product_attention`.

- A program computes one block of queries of one head (forward, gradient of queries) or one block
  of keys (gradients of keys and values). The softmax is in base 2 with a running maximum.
- The bias depends on key - query alone. A program gathers it from the table of its head, which has
  2 * max_distance + 1 numbers and stays in the first-level cache.
- Blocks of keys whose range of segment ids does not overlap that of the queries are skipped, so
  that the cost of a packed row is that of its documents.
- The gradient of the bias is a sum over diagonals. Pairs of blocks at the same block difference
  have the same distances. A program accumulates the gradients of the scores of all such pairs, over
  rows and blocks, in registers, and writes one block. XLA folds its diagonals into the table. This
  computes the scores once more. Atomic additions into the table would be serialized, and their
  order, and so the sum, would vary.
- There are no atomic additions: gradients are the same in every run.
- A query that sees no key gets zeros and no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from models.kernels import Needs, Operands
from models.kernels.segments import (
    SegmentKernel,
    block_spans,
    kept_keys,
    scaled_values,
)
from models.partitioning import device_kind, parts, per_shard
from models.relative_bias import RelativePositionBias

_LOG2E = math.log2(math.e)
_MASKED, _LEAST = -2e30, -1e30  # a masked score; the least maximum of a row: 2**-1e30 is 0
_UNSEEN = 1e30  # log-sum of a query that sees no key


class Blocks(NamedTuple):
    """Block sizes of one kernel: queries, keys, warps of a program, and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Block sizes of the four kernels."""

    forward: Blocks
    of_keys: Blocks  # gradients of keys and values
    of_queries: Blocks
    of_bias: Blocks  # queries = keys


# By generation and largest head size. Chosen on the compiled kernels: none of them spills registers
# (docs/gpu.md).
TUNING: dict[str, dict[int, Tuning]] = {
    "hopper": {
        64: Tuning(
            Blocks(128, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
        ),
        128: Tuning(
            Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)
        ),
    },
    "ampere": {
        64: Tuning(
            Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2)
        ),
        128: Tuning(
            Blocks(64, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(32, 32, 4, 2)
        ),
    },
}
_HOPPER = ("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200", "NVIDIA B200", "NVIDIA GB200")


def generation(kind: str) -> str:
    """Return the key of `TUNING` for a `device_kind`. Unknown GPUs get the smaller blocks."""
    return "hopper" if kind.startswith(_HOPPER) else "ampere"


def fused_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_segments: jax.Array,
    key_segments: jax.Array,
    by_distance: jax.Array | None = None,
    causal: bool = False,
    scale: float = 1.0,
    tuning: Tuning,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax(scale * query key + bias) value within segments, on an NVIDIA GPU.

    Args:
      query: [batch, queries, heads, head_dim], float32 or bfloat16.
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
      query_segments, key_segments: int32 [batch, queries] and [batch, keys], 0 for padding. Any
        order is correct; blocks are skipped if ids ascend along a row.
      by_distance: float32 [heads, 2 * n + 1], the bias at key - query = -n..n; the end values apply
        beyond. None: no bias. Queries and keys must be the same tokens.
      causal: hide keys of a higher index; queries and keys must be the same tokens.
      interpret: run the kernel's steps in XLA, on any platform, for tests.

    Returns:
      [batch, queries, heads, head_dim] in query's dtype; zeros for a query that sees no key.

    Raises:
      ValueError: the kernel does not support this head_dim; a bias or `causal` with different
        numbers of queries and keys.
    """
    if error := unsupported(query.shape[3]):
        raise ValueError(f"the kernel {error}")
    if (by_distance is not None or causal) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} queries and {key.shape[1]} keys: bias and `causal` are for tokens "
            "that attend to themselves"
        )
    shape = _Shape(
        heads=query.shape[2],
        group=query.shape[2] // key.shape[2],
        head_dim=query.shape[3],
        queries=query.shape[1],
        keys=key.shape[1],
        reach=0 if by_distance is None else by_distance.shape[1] // 2,
        causal=causal,
        scale=scale,
        biased=by_distance is not None,
        tuning=tuning,
        interpret=interpret,
    )
    ids = query_segments.astype(jnp.int32)
    key_ids = jnp.where(key_segments == 0, -1, key_segments.astype(jnp.int32))
    return _attention(shape, query, key, value, by_distance, ids, key_ids)


def unsupported(head_dim: int) -> str | None:
    """Return the reason why the kernel does not support heads of this size, or None."""
    if head_dim in (16, 32, 64, 128):
        return None
    return f"has heads of 16, 32, 64 or 128, not {head_dim}"


class _Shape(NamedTuple):
    """Static sizes and settings of the kernels."""

    heads: int
    group: int  # query heads per key head
    head_dim: int
    queries: int
    keys: int
    reach: int  # distances beyond this one have a constant bias
    causal: bool
    scale: float
    biased: bool
    tuning: Tuning
    interpret: bool


# --------------------------------------------------------------------------------------------------
# Parts shared by all kernels


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    # NOTE: without HIGHEST, float32 is multiplied in TF32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, y, precision=precision, preferred_element_type=jnp.float32)


def _read(ref: Any, start: Any, size: int, length: int, *row: Any) -> jax.Array:
    """Read [start, start + size) of a row [length, head_dim]; zeros beyond the end.

    `row` is the row's index if the reference has several, or nothing.
    """
    at = ref.at[(*row, pl.ds(start, size), slice(None))]
    if length % size == 0:
        return plgpu.load(at)
    inside = start + jnp.arange(size) < length
    return plgpu.load(at, mask=inside[:, None], other=0.0)


def _write(ref: Any, start: Any, rows: jax.Array, length: int) -> None:
    """Write rows from `start`, except those beyond the end."""
    at = ref.at[pl.ds(start, rows.shape[0]), :]
    rows = rows.astype(ref.dtype)
    if length % rows.shape[0] == 0:
        plgpu.store(at, rows)
    else:
        inside = start + jnp.arange(rows.shape[0]) < length
        plgpu.store(at, rows, mask=inside[:, None])


def _scores(
    shape: _Shape,
    table_ref: Any,
    query: jax.Array,
    key: jax.Array,
    query_ids: jax.Array,
    key_ids: jax.Array,
    query_start: Any,
    key_start: Any,
    *,
    by_key: bool = False,
) -> jax.Array:
    """Return scores in base 2, float32 [queries, keys], or [keys, queries] with `by_key`."""
    left, right = (key, query) if by_key else (query, key)
    scores = _dot(left, right.T) * (shape.scale * _LOG2E)
    queries = query_start + jnp.arange(query.shape[0])
    keys = key_start + jnp.arange(key.shape[0])
    if by_key:
        distance = keys[:, None] - queries[None]
        visible = key_ids[:, None] == query_ids[None]
    else:
        distance = keys[None] - queries[:, None]
        visible = key_ids[None] == query_ids[:, None]
    if shape.biased:
        index = jnp.clip(distance, -shape.reach, shape.reach) + shape.reach
        scores = scores + plgpu.load(table_ref.at[index])
    if shape.causal:
        visible &= distance <= 0
    return jnp.where(visible, scores, _MASKED)


def _ids(ids: jax.Array, block: int) -> jax.Array:
    """Return ids [batch, length], padded to whole blocks with ids of padding."""
    missing = -ids.shape[1] % block
    return jnp.pad(ids, ((0, 0), (0, missing)), constant_values=-2) if missing else ids


def _spans(shape: _Shape, blocks: Blocks, ids: jax.Array, key_ids: jax.Array) -> Any:
    """Return the padded ids, and the spans of `block_spans`, [batch, blocks] each."""
    ids = jnp.where(_ids(ids, blocks.queries) < 0, 0, _ids(ids, blocks.queries))
    key_ids = _ids(key_ids, blocks.keys)
    of_queries, of_keys = block_spans(
        ids, key_ids, blocks.queries, blocks.keys, causal=shape.causal
    )
    batch = ids.shape[0]
    reshaped = [tuple(x.reshape(batch, -1) for x in span) for span in (of_queries, of_keys)]
    return ids, key_ids, *reshaped


class _Specs(NamedTuple):
    """Block specs of the arrays of a program (block, head, row): whole rows of its head."""

    query: pl.BlockSpec
    key: pl.BlockSpec
    of_query: pl.BlockSpec  # a number per query and head, [batch, heads, queries]
    table: pl.BlockSpec

    @classmethod
    def of(cls, shape: _Shape, padded: int) -> _Specs:
        queries = (None, shape.queries, None, shape.head_dim)
        keys = (None, shape.keys, None, shape.head_dim)
        return cls(
            pl.BlockSpec(queries, lambda _, head, row: (row, 0, head, 0)),
            pl.BlockSpec(keys, lambda _, head, row: (row, 0, head // shape.group, 0)),
            pl.BlockSpec((None, None, padded), lambda _, head, row: (row, head, 0)),
            pl.BlockSpec((None, 2 * shape.reach + 1), lambda _, head, row: (head, 0)),
        )


def _of_row(array: jax.Array) -> pl.BlockSpec:
    """Return the spec of a row of [batch, n]."""
    return pl.BlockSpec((None, array.shape[1]), lambda _, head, row: (row, 0))


def _call(
    shape: _Shape,
    blocks: Blocks,
    kernel: Callable[..., None],
    *,
    name: str,
    grid: tuple[int, ...],
    inputs: list[tuple[Any, pl.BlockSpec]],
    outputs: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    products: int,
) -> Any:
    """Run a kernel on refs of the inputs, of the table or None, and of the outputs."""
    if not shape.biased:
        inner, count = kernel, len(inputs)
        kernel = lambda *refs: inner(*refs[:count], None, *refs[count:])  # noqa: E731
    batch = inputs[0][0].shape[0]
    pairs = batch * shape.heads * shape.queries * shape.keys
    moved = sum(x.size * x.dtype.itemsize for x, _ in inputs)
    moved += sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in outputs)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[spec for _, spec in inputs],
        out_specs=[spec for _, spec in outputs],
        out_shape=[made for made, _ in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * shape.head_dim, transcendentals=pairs, bytes_accessed=moved
        ),
        interpret=shape.interpret,
        name=name,
    )(*(x for x, _ in inputs))


# --------------------------------------------------------------------------------------------------
# Forward


def _run_forward(shape: _Shape, query, key, value, table, ids, key_ids):
    """Return the output, and the base-2 logarithm of each query's sum, [batch, heads, padded]."""
    blocks = shape.tuning.forward
    ids, key_ids, (first, end), _ = _spans(shape, blocks, ids, key_ids)
    batch, padded = ids.shape
    specs = _Specs.of(shape, padded)

    def kernel(query_ref, key_ref, value_ref, ids_ref, key_ids_ref, first_ref, end_ref, *rest):
        table_ref, out_ref, log_sum_ref = rest
        block = pl.program_id(0)
        start = block * blocks.queries
        own = _read(query_ref, start, blocks.queries, shape.queries)
        own_ids = plgpu.load(ids_ref.at[pl.ds(start, blocks.queries)])

        def visit(number, state):
            out, most, total = state
            at = number * blocks.keys
            scores = _scores(
                shape,
                table_ref,
                own,
                _read(key_ref, at, blocks.keys, shape.keys),
                own_ids,
                plgpu.load(key_ids_ref.at[pl.ds(at, blocks.keys)]),
                start,
                at,
            )
            higher = jnp.maximum(most, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - higher[:, None])
            shrink = jnp.exp2(most - higher)
            values = _read(value_ref, at, blocks.keys, shape.keys)
            out = out * shrink[:, None] + _dot(weights.astype(values.dtype), values)
            return out, higher, total * shrink + jnp.sum(weights, axis=1)

        state = (
            jnp.zeros((blocks.queries, shape.head_dim), jnp.float32),
            jnp.full(blocks.queries, _LEAST, jnp.float32),
            jnp.zeros(blocks.queries, jnp.float32),
        )
        span = plgpu.load(first_ref.at[block]), plgpu.load(end_ref.at[block])
        out, most, total = jax.lax.fori_loop(*span, visit, state)
        seen = total > 0
        total = jnp.where(seen, total, 1.0)
        _write(out_ref, start, out / total[:, None], shape.queries)
        log_sum = jnp.where(seen, most + jnp.log2(total), _UNSEEN)
        plgpu.store(log_sum_ref.at[pl.ds(start, blocks.queries)], log_sum)

    inputs = [(query, specs.query), (key, specs.key), (value, specs.key)]
    inputs += [(x, _of_row(x)) for x in (ids, key_ids, first, end)]
    if shape.biased:
        inputs.append((table, specs.table))
    return _call(
        shape,
        blocks,
        kernel,
        name="fused_attention",
        grid=(padded // blocks.queries, shape.heads, batch),
        inputs=inputs,
        outputs=[
            (jax.ShapeDtypeStruct(query.shape, query.dtype), specs.query),
            (jax.ShapeDtypeStruct((batch, shape.heads, padded), jnp.float32), specs.of_query),
        ],
        products=2,
    )


# --------------------------------------------------------------------------------------------------
# Backward


class _Backward(NamedTuple):
    """Arrays that every kernel of the backward pass reads.

    `inner` is the sum over keys of each weight times its gradient, float32 [batch, heads, queries],
    which softmax's derivative subtracts.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    gradient: jax.Array  # gradient of the output
    log_sum: jax.Array
    inner: jax.Array
    ids: jax.Array
    key_ids: jax.Array

    def in_blocks(self, shape: _Shape, blocks: Blocks) -> tuple[_Backward, Any, Any]:
        """Return the arrays with ids and query values padded to whole blocks, and the spans."""
        ids, key_ids, of_queries, of_keys = _spans(shape, blocks, self.ids, self.key_ids)
        missing = ids.shape[1] - shape.queries
        log_sum, inner = (
            jnp.pad(x[:, :, : shape.queries], ((0, 0), (0, 0), (0, missing)))
            for x in (self.log_sum, self.inner)
        )
        changed = self._replace(ids=ids, key_ids=key_ids, log_sum=log_sum, inner=inner)
        return changed, of_queries, of_keys

    def inputs(self, specs: _Specs) -> list[tuple[Any, pl.BlockSpec]]:
        """Return the arrays with their specs."""
        by_query = (specs.query, specs.key, specs.key, specs.query, specs.of_query, specs.of_query)
        return [
            *zip(self[:6], by_query, strict=True),
            (self.ids, _of_row(self.ids)),
            (self.key_ids, _of_row(self.key_ids)),
        ]


class _Refs(NamedTuple):
    """References of `_Backward`, read by blocks of queries and of keys."""

    query: Any
    key: Any
    value: Any
    gradient: Any
    log_sum: Any
    inner: Any
    ids: Any
    key_ids: Any

    def queries(self, shape: _Shape, start: Any, size: int, *row: Any) -> tuple[jax.Array, ...]:
        """Read query, gradient, log_sum, inner and ids."""
        numbers = (self.log_sum, self.inner, self.ids)
        return (
            _read(self.query, start, size, shape.queries, *row),
            _read(self.gradient, start, size, shape.queries, *row),
            *(plgpu.load(ref.at[(*row, pl.ds(start, size))]) for ref in numbers),
        )

    def keys(self, shape: _Shape, start: Any, size: int, *row: Any) -> tuple[jax.Array, ...]:
        """Read key, value and ids."""
        return (
            _read(self.key, start, size, shape.keys, *row),
            _read(self.value, start, size, shape.keys, *row),
            plgpu.load(self.key_ids.at[(*row, pl.ds(start, size))]),
        )


def _score_gradients(shape, table_ref, queries, keys, query_start, key_start, *, by_key=False):
    """Return the weights, and the gradients of the scores: float32 [queries, keys] or by key."""
    query, gradient, log_sum, inner, ids = queries
    key, value, key_ids = keys
    scores = _scores(
        shape, table_ref, query, key, ids, key_ids, query_start, key_start, by_key=by_key
    )
    if by_key:
        weights = jnp.exp2(scores - log_sum[None])
        return weights, weights * (_dot(value, gradient.T) - inner[None])
    weights = jnp.exp2(scores - log_sum[:, None])
    return weights, weights * (_dot(gradient, value.T) - inner[:, None])


def _gradients_of_keys(shape: _Shape, given: _Backward, table):
    """Return gradients of keys and values, [batch, keys, kv_heads, head_dim] each."""
    blocks = shape.tuning.of_keys
    given, _, (first, end) = given.in_blocks(shape, blocks)
    batch, padded = given.key_ids.shape
    specs = _Specs.of(shape, given.ids.shape[1])

    def kernel(*all_refs):
        refs = _Refs(*all_refs[:8])
        first_ref, end_ref, table_ref, d_key_ref, d_value_ref = all_refs[8:]
        block = pl.program_id(0)
        start = block * blocks.keys
        keys = refs.keys(shape, start, blocks.keys)

        def visit(number, state):
            d_key, d_value = state
            at = number * blocks.queries
            queries = refs.queries(shape, at, blocks.queries)
            weights, d_scores = _score_gradients(
                shape, table_ref, queries, keys, at, start, by_key=True
            )
            query, gradient = queries[:2]
            d_value = d_value + _dot(weights.astype(gradient.dtype), gradient)
            return d_key + _dot(d_scores.astype(query.dtype), query), d_value

        nothing = jnp.zeros((blocks.keys, shape.head_dim), jnp.float32)
        span = plgpu.load(first_ref.at[block]), plgpu.load(end_ref.at[block])
        d_key, d_value = jax.lax.fori_loop(*span, visit, (nothing, nothing))
        _write(d_key_ref, start, d_key * shape.scale, shape.keys)
        _write(d_value_ref, start, d_value, shape.keys)

    inputs = given.inputs(specs) + [(x, _of_row(x)) for x in (first, end)]
    if shape.biased:
        inputs.append((table, specs.table))
    # Gradients for every query head; those of one key head are summed below.
    dtype = given.key.dtype if shape.group == 1 else jnp.float32
    out = jax.ShapeDtypeStruct((batch, shape.keys, shape.heads, shape.head_dim), dtype)
    spec = pl.BlockSpec(
        (None, shape.keys, None, shape.head_dim), lambda _, head, row: (row, 0, head, 0)
    )
    d_key, d_value = _call(
        shape,
        blocks,
        kernel,
        name="fused_attention_keys",
        grid=(padded // blocks.keys, shape.heads, batch),
        inputs=inputs,
        outputs=[(out, spec), (out, spec)],
        products=4,
    )
    if shape.group > 1:
        by_group = (batch, shape.keys, -1, shape.group, shape.head_dim)
        d_key, d_value = (
            jnp.sum(x.reshape(by_group), axis=3).astype(given.key.dtype) for x in (d_key, d_value)
        )
    return d_key, d_value


def _gradient_of_queries(shape: _Shape, given: _Backward, table):
    """Return the gradient of queries."""
    blocks = shape.tuning.of_queries
    given, (first, end), _ = given.in_blocks(shape, blocks)
    batch, padded = given.ids.shape
    specs = _Specs.of(shape, padded)

    def kernel(*all_refs):
        refs = _Refs(*all_refs[:8])
        first_ref, end_ref, table_ref, d_query_ref = all_refs[8:]
        block = pl.program_id(0)
        start = block * blocks.queries
        queries = refs.queries(shape, start, blocks.queries)

        def visit(number, d_query):
            at = number * blocks.keys
            keys = refs.keys(shape, at, blocks.keys)
            _, d_scores = _score_gradients(shape, table_ref, queries, keys, start, at)
            return d_query + _dot(d_scores.astype(keys[0].dtype), keys[0])

        nothing = jnp.zeros((blocks.queries, shape.head_dim), jnp.float32)
        span = plgpu.load(first_ref.at[block]), plgpu.load(end_ref.at[block])
        d_query = jax.lax.fori_loop(*span, visit, nothing)
        _write(d_query_ref, start, d_query * shape.scale, shape.queries)

    inputs = given.inputs(specs) + [(x, _of_row(x)) for x in (first, end)]
    if shape.biased:
        inputs.append((table, specs.table))
    (d_query,) = _call(
        shape,
        blocks,
        kernel,
        name="fused_attention_queries",
        grid=(padded // blocks.queries, shape.heads, batch),
        inputs=inputs,
        outputs=[(jax.ShapeDtypeStruct(given.query.shape, given.query.dtype), specs.query)],
        products=3,
    )
    return d_query


def _gradient_of_bias(shape: _Shape, given: _Backward, table):
    """Return the gradient of the table, float32 [heads, 2 * reach + 1].

    A program sums all pairs of blocks of one block difference and head, over some rows.
    """
    blocks = shape.tuning.of_bias
    size = blocks.queries
    given, (first, end), _ = given.in_blocks(shape, blocks)
    batch, padded = given.ids.shape
    count = padded // size
    lowest, highest = 1 - count, 0 if shape.causal else count - 1
    differences = highest - lowest + 1
    splits = math.gcd(batch, 8)
    rows = batch // splits

    def kernel(*all_refs):
        refs = _Refs(*all_refs[:8])
        first_ref, end_ref, table_ref, out_ref = all_refs[8:]
        difference = pl.program_id(0) + lowest

        def visit_row(row, total):
            def visit_block(block, total):
                other = block + difference
                met = (plgpu.load(first_ref.at[row, block]) <= other) & (
                    other < plgpu.load(end_ref.at[row, block])
                )

                def add(_, total):
                    start, at = block * size, other * size
                    queries = refs.queries(shape, start, size, row)
                    keys = refs.keys(shape, at, size, row)
                    _, d_scores = _score_gradients(shape, table_ref, queries, keys, start, at)
                    return total + d_scores

                return jax.lax.fori_loop(0, met.astype(jnp.int32), add, total)

            bounds = jnp.maximum(0, -difference), jnp.minimum(count, count - difference)
            return jax.lax.fori_loop(*bounds, visit_block, total)

        nothing = jnp.zeros((size, size), jnp.float32)
        plgpu.store(out_ref, jax.lax.fori_loop(0, rows, visit_row, nothing))

    def of_rows(array, *rest):
        """Return the spec of a split's rows of an array, of one head if there is a head axis."""
        block = (rows, *(None if axis == "head" else n for axis, n in rest))
        at = [axis == "head" for axis, _ in rest]
        return pl.BlockSpec(
            block, lambda _, head, split: (split, *(head if mine else 0 for mine in at))
        )

    width = ("", shape.head_dim)
    query_spec = of_rows(given.query, ("", shape.queries), ("head", 1), width)
    key_spec = pl.BlockSpec(
        (rows, shape.keys, None, shape.head_dim),
        lambda _, head, split: (split, 0, head // shape.group, 0),
    )
    number_spec = of_rows(given.inner, ("head", 1), ("", padded))
    specs = (query_spec, key_spec, key_spec, query_spec, number_spec, number_spec)
    inputs = list(zip(given[:6], specs, strict=True))
    inputs += [(x, of_rows(x, ("", x.shape[1]))) for x in (given.ids, given.key_ids, first, end)]
    inputs.append((table, _Specs.of(shape, padded).table))
    made = jax.ShapeDtypeStruct((shape.heads, differences, splits, size, size), jnp.float32)
    spec = pl.BlockSpec(
        (None, None, None, size, size), lambda number, head, split: (head, number, split, 0, 0)
    )
    (summed,) = _call(
        shape,
        blocks,
        kernel,
        name="fused_attention_bias",
        grid=(differences, shape.heads, splits),
        inputs=inputs,
        outputs=[(made, spec)],
        products=2,
    )
    return _folded(shape, jnp.sum(summed, axis=2), lowest)


def _folded(shape: _Shape, summed: jax.Array, lowest: int) -> jax.Array:
    """Sum the diagonals of [heads, differences, size, size] by distance: [heads, distances]."""
    heads, differences, size, _ = summed.shape
    # Rows of 2 * size, read as rows of 2 * size - 1: each is shifted right by one more.
    skewed = jnp.pad(summed, ((0, 0), (0, 0), (0, 0), (0, size)))[:, :, ::-1]
    skewed = skewed.reshape(heads, differences, -1)[:, :, : size * (2 * size - 1)]
    diagonals = jnp.sum(skewed.reshape(heads, differences, size, 2 * size - 1), axis=2)
    # Row `size - 1 - q` was shifted by that number: column c holds key - query = c - (size - 1).
    block_distance = size * (lowest + np.arange(differences))
    distance = np.arange(2 * size - 1) - (size - 1) + block_distance[:, None]
    index = np.clip(distance, -shape.reach, shape.reach) + shape.reach
    into = jnp.arange(2 * shape.reach + 1)[None] == jnp.asarray(index.reshape(-1, 1))
    # A product instead of a scatter, whose order of additions varies on GPUs.
    return jnp.dot(
        diagonals.reshape(heads, -1),
        into.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, query, key, value, by_distance, ids, key_ids):
    table = by_distance * _LOG2E if shape.biased else None
    return _run_forward(shape, query, key, value, table, ids, key_ids)[0]


def _attention_forward(shape: _Shape, query, key, value, by_distance, ids, key_ids):
    table = by_distance * _LOG2E if shape.biased else None
    out, log_sum = _run_forward(shape, query, key, value, table, ids, key_ids)
    # Named, so that recomputation policies can save both and the kernel runs once.
    out, log_sum = (checkpoint_name(x, "attention") for x in (out, log_sum))
    return out, (query, key, value, table, ids, key_ids, out, log_sum)


def _attention_backward(shape: _Shape, saved, gradient):
    query, key, value, table, ids, key_ids, out, log_sum = saved
    gradient = gradient.astype(query.dtype)
    inner = jnp.einsum(
        "bqhd,bqhd->bhq", out.astype(jnp.float32), gradient.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    given = _Backward(query, key, value, gradient, log_sum, inner, ids, key_ids)
    d_key, d_value = _gradients_of_keys(shape, given, table)
    d_query = _gradient_of_queries(shape, given, table)
    d_table = _gradient_of_bias(shape, given, table) if shape.biased else None
    return d_query, d_key, d_value, d_table, None, None


_attention.defvjp(_attention_forward, _attention_backward)


# --------------------------------------------------------------------------------------------------
# The kernel


@dataclasses.dataclass(frozen=True)
class Fused(SegmentKernel):
    """The kernel of `fused_attention`. A bias is by distance: [heads, 2 * max_distance + 1]."""

    interpret: bool = False

    def unsupported(self, needs: Needs) -> str | None:
        """Return the reason why the kernel does not support this attention, or None."""
        return unsupported(needs.head_dim) or super().unsupported(needs)

    def bias(self, relative: RelativePositionBias, queries: int, keys: int) -> jax.Array:
        """Return the bias by distance."""
        return relative.by_distance()

    def attend(self, operands: Operands) -> jax.Array:
        """Return [batch, queries, heads * head_dim], see `Kernel.attend`."""
        query, key, value = operands.query, operands.key, operands.value
        heads, head_dim = query.shape[2:]
        kept = kept_keys(operands)
        if kept is not None and (group := heads // key.shape[2]) > 1:
            key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        value = scaled_values(value, kept)
        split = "heads" if key.shape[2] % parts("heads") == 0 else None
        apart = ("batch", None, split, None)
        given = {
            "query": (query, apart),
            "key": (key, apart),
            "value": (value, apart),
            "query_segments": (operands.visible.queries, ("batch", None)),
            "key_segments": (operands.visible.keys, ("batch", None)),
            "by_distance": (operands.bias, (split, None)),
        }
        sizes = TUNING[generation(device_kind())]
        run = functools.partial(
            fused_attention,
            causal=operands.visible.causal,
            scale=operands.scale,
            tuning=sizes[64 if head_dim <= 64 else 128],
            interpret=self.interpret,
        )
        attended = per_shard(run, given, apart, query.shape)
        return attended.reshape(*attended.shape[:2], -1)


KERNEL = Fused()
INTERPRETED = Fused(interpret=True)
