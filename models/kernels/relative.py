"""Attention on TPUs without [batch, heads, queries, keys] in memory, T5's relative bias included.

A Pallas kernel, forward and backward, and its reference, `plain_attention`.

- Scores are transposed, [keys, queries]. Maxima and sums are then rows, reduced over sublanes by
  plain vector operations, and all products are in the form that the matrix unit takes, but for one
  small transposition per operand.
- Heads are narrower than the 128 lanes of a register, and the model keeps them side by side,
  [batch, length, heads * head_dim]. A program takes the 128 // head_dim heads of one lane block:
  nothing is transposed or padded in memory. A head is selected by zeroing the lanes of the others;
  a product over 128 lanes costs the same as one over 64.
- The bias depends on key - query alone. Programs of one lane block run one after the other over the
  batch, and the first builds for each head a strip [128, width] in which row k is one table of
  values by distance, rolled by k. Every [128, 128] block of the bias is a slice of the strip at a
  multiple of 128 lanes. The gradient is summed in a strip of the same form over the whole batch,
  and folded once at the end.
- Rows longer than a block are computed by blocks, forward with a running maximum. Pairs of blocks
  whose ranges of segment ids do not overlap are skipped, so that the cost of a packed row is that
  of its documents.
- Heads of whole lane blocks (a head size of 128 or more) may share keys and values in groups: the
  programs of a group read the same block. Their gradients are summed outside of the kernel.
- A query that sees no key gets zeros and no gradient.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.errors import ModelError
from models.kernels import Needs, Operands
from models.kernels.segments import (
    MASKED,
    SegmentKernel,
    block_spans,
    kept_keys,
    scaled_values,
)
from models.partitioning import parts, per_shard
from models.relative_bias import RelativePositionBias

LANES = 128
_UNSEEN = 1e30  # the logsumexp of a query that sees nothing: exp(score - _UNSEEN) is 0

# Rows up to `whole` tokens are one block; longer ones are cut into blocks of `block`.
BLOCKS = {"whole": 512, "block": 512}
_VMEM_BYTES = 64 * 2**20


class _Shape(NamedTuple):
    """Static sizes and settings of the kernels."""

    heads: int
    head_dim: int
    group: int  # heads in a lane block
    shared: int  # query heads that read one head of keys; 1 unless `group` is 1
    queries: int
    keys: int
    query_block: int
    key_block: int
    reach: int  # block differences beyond this one have a constant bias
    causal: bool
    scale: float
    biased: bool
    interpret: bool

    @property
    def lanes(self):
        return self.group * self.head_dim

    @property
    def groups(self):
        return pl.cdiv(self.heads, self.group)

    @property
    def query_blocks(self):
        return pl.cdiv(self.queries, self.query_block)

    @property
    def key_blocks(self):
        return pl.cdiv(self.keys, self.key_block)

    @property
    def origin(self):
        """Lane of the strip at which distance key - query = 0 stands in row 0."""
        return (self.reach + 1) * self.key_block - LANES

    @property
    def width(self):
        return (2 * self.reach + 2) * self.key_block


def plain_attention(query, key, value, bias, query_segments, key_segments, causal, scale):
    """Compute the reference: [batch, length, heads, head_dim], bias [heads, queries, keys]."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * scale + bias
    mask = (query_segments[:, :, None] == key_segments[:, None]) & (key_segments > 0)[:, None]
    mask = (jnp.tril(mask) if causal else mask)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, MASKED)) * mask.any(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def relative_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_segments: jax.Array,
    key_segments: jax.Array,
    head_dim: int,
    by_distance: jax.Array | None = None,
    causal: bool = False,
    scale: float = 1.0,
    interpret: bool = False,
) -> jax.Array:
    """Return softmax(scale * query key + bias) value within segments, on TPU.

    Args:
      query: [batch, queries, heads * head_dim], float32 or bfloat16.
      key, value: [batch, keys, heads * head_dim]; if head_dim is a multiple of 128, of fewer heads,
        each read by a group of those of the queries.
      query_segments, key_segments: int32 [batch, queries] and [batch, keys], 0 where padding. Any
        order is correct; blocks are skipped if ids ascend along a row.
      by_distance: float32 [heads, 2 * n + 1], the bias at key - query = -n..n; beyond, the ends
        hold. None: no bias. Queries and keys must be the same tokens.
      causal: a query sees no key of a higher index; likewise.
      interpret: run the kernel's steps in XLA, on any platform, for tests.

    Returns:
      [batch, queries, heads * head_dim] in query's dtype; zeros for a query that sees no key.

    Raises:
      ValueError: a head_dim that neither divides 128 nor is a multiple of it; a bias or `causal`
        with different numbers of queries and keys.
    """
    if error := unsupported(head_dim):
        raise ModelError(f"the kernel {error}")
    if not shares(query.shape[2] // head_dim, key.shape[2] // head_dim, head_dim):
        raise ModelError(f"keys of shape {key.shape} do not fit queries of shape {query.shape}")
    if (by_distance is not None or causal) and query.shape[1] != key.shape[1]:
        raise ModelError(
            f"{query.shape[1]} queries and {key.shape[1]} keys: bias and `causal` are for tokens "
            "that attend to themselves"
        )
    shape = _shape(query, key, by_distance, head_dim, causal, scale, interpret)
    base = None if by_distance is None else by_distance[:, _distances(shape, by_distance.shape[1])]
    ids = _ids(query_segments, shape.query_blocks * shape.query_block, empty=0)
    key_ids = _ids(key_segments, shape.key_blocks * shape.key_block, empty=-1)
    return _attention(shape, query, key, value, base, ids, key_ids)


def unsupported(head_dim: int) -> str | None:
    """Return why the kernel cannot compute heads of this size, or None."""
    if LANES % head_dim == 0 or head_dim % LANES == 0:
        return None
    return f"needs a head size that divides {LANES} or is a multiple of it, not {head_dim}"


def shares(heads: int, key_heads: int, head_dim: int) -> bool:
    """Return whether groups of so many heads can read one head of keys each."""
    return heads == key_heads or (head_dim % LANES == 0 and heads % key_heads == 0)


def mean_blocks(length: int) -> float:
    """Return the mean number of key blocks that a query block reads, causal, rows of one document.

    No packing of shorter documents reads more.
    """
    blocks = pl.cdiv(length, BLOCKS["block"]) if length > BLOCKS["whole"] else 1
    return (blocks + 1) / 2


def _shape(query, key, by_distance, head_dim, causal, scale, interpret) -> _Shape:
    queries, keys = query.shape[1], key.shape[1]
    heads = query.shape[2] // head_dim

    def block(length):
        return BLOCKS["block"] if length > BLOCKS["whole"] else pl.cdiv(length, LANES) * LANES

    reach = 0
    if by_distance is not None:
        n = by_distance.shape[1] // 2
        reach = min(pl.cdiv(keys, block(keys)) - 1, pl.cdiv(n - 1, block(keys)) + 1)
    return _Shape(
        heads=heads,
        head_dim=head_dim,
        group=min(heads, max(1, LANES // head_dim)),
        shared=query.shape[2] // key.shape[2],
        queries=queries,
        keys=keys,
        query_block=block(queries),
        key_block=block(keys),
        reach=reach,
        causal=causal,
        scale=scale,
        biased=by_distance is not None,
        interpret=interpret,
    )


def _distances(shape: _Shape, count: int) -> np.ndarray:
    """Return the index into `by_distance` of each lane of the strip's row 0."""
    lane = np.arange(shape.width)
    # The last lanes are rolled around to the first ones.
    lane = np.where(lane >= shape.width - LANES, lane - shape.width, lane)
    n = count // 2
    return np.clip(shape.origin - lane, -n, n) + n


def _ids(segments, length, *, empty):
    """Return segment ids [batch, 1, length]; padding and the rest of the last block are `empty`."""
    segments = jnp.where(segments == 0, empty, segments.astype(jnp.int32))
    padding = ((0, 0), (0, length - segments.shape[1]))
    return jnp.pad(segments, padding, constant_values=empty)[:, None]


def _ranges(shape: _Shape, query_ids, key_ids):
    """Return the range of key blocks that each query block meets, and of query blocks for each key.

    See `block_spans`; the ids are [batch, 1, length].
    """

    return block_spans(
        query_ids[:, 0], key_ids[:, 0], shape.query_block, shape.key_block, causal=shape.causal
    )


# --------------------------------------------------------------------------------------------------
# Pieces of both kernels


def _dot(x, y, contract_x, contract_y):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((contract_x,), (contract_y,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _read(shape: _Shape, ref, *, lane_block, at, first_row, block, length):
    """Read rows [at, at + block) of a window, the array's from `first_row` on: [block, lanes].

    Rows beyond the array's `length`, and lanes beyond its heads, are zero; memory there is not.
    """
    x = ref[0, pl.ds(at, block), :]
    valid = None
    if length % block:
        valid = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + first_row < length
    if shape.heads % shape.group:
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
        inside = lane + lane_block * shape.lanes < shape.heads * shape.head_dim
        valid = inside if valid is None else valid & inside
    return x if valid is None else jnp.where(valid, x, jnp.zeros_like(x))


def _only(shape: _Shape, x, head):
    """Return x [rows, lanes] with the lanes of all other heads zero."""
    if shape.group == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= head * shape.head_dim) & (lane < (head + 1) * shape.head_dim)
    return jnp.where(mine, x, jnp.zeros_like(x))


def _lanes(shape: _Shape, head: int) -> slice:
    """Return the lanes of a head in its lane block."""
    return slice(head * shape.head_dim, (head + 1) * shape.head_dim)


def _build_strips(shape: _Shape, base_ref, strip_ref):
    """Write strip[head, k, x] = base[head, x - k]."""
    for head in range(shape.group):
        row = jnp.broadcast_to(base_ref[0, head : head + 1, :], (LANES, shape.width))
        strip_ref[head] = pltpu.roll(row, 0, 1, stride=1, stride_axis=0)


def _strip_lane(shape: _Shape, query_block, key_block, chunk):
    """Return the lane at which a strip holds the bias of rows [128 * chunk, + 128) of a block."""
    difference = query_block - key_block
    if isinstance(difference, int):
        difference = max(-shape.reach, min(shape.reach, difference))
    else:
        difference = jnp.clip(difference, -shape.reach, shape.reach)
    lane = shape.origin + difference * shape.key_block - LANES * chunk
    return lane if isinstance(lane, int) else pl.multiple_of(lane, LANES)


def _key_columns(key_ids):
    """Return ids of keys [1, keys] as [keys, 128], the same in every lane."""
    return jnp.broadcast_to(key_ids, (LANES, key_ids.shape[1])).T


def _scores(shape: _Shape, head, query, key, ids, key_columns, strip_ref, query_block, key_block):
    """Return masked scores of one head, float32 [keys, queries]; other lanes of `query` are 0."""
    scores = _dot(key, query, 1, 1)
    if shape.scale != 1.0:
        scores = scores * shape.scale
    if shape.biased:
        chunks = [
            strip_ref[
                head, :, pl.ds(_strip_lane(shape, query_block, key_block, chunk), query.shape[0])
            ]
            for chunk in range(shape.key_block // LANES)
        ]
        scores = scores + jnp.concatenate(chunks, axis=0)
    columns = jnp.concatenate([key_columns] * (query.shape[0] // LANES), axis=1)
    mask = columns == ids
    if shape.causal:
        key_index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        query_index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        offset = key_block * shape.key_block - query_block * shape.query_block
        mask &= key_index + offset <= query_index
    return jnp.where(mask, scores, MASKED)


# --------------------------------------------------------------------------------------------------
# Forward


class _ForwardRefs(NamedTuple):
    """Blocks in memory of a program of the forward pass; strips only with a bias."""

    query: Any
    key: Any
    value: Any
    ids: Any
    key_ids: Any
    base: Any
    out: Any
    logsumexp: Any
    strip: Any

    @classmethod
    def of(cls, shape: _Shape, refs: Any) -> "_ForwardRefs":
        return cls._make(refs if shape.biased else (*refs[:5], None, *refs[5:], None))


class _Softmax(NamedTuple):
    """Running softmax of one head: maximum and sum [1, queries], output [head_dim, queries]."""

    top: jax.Array
    total: jax.Array
    out: jax.Array


def _forward_kernel(shape: _Shape, first_ref: Any, end_ref: Any, *all_refs: Any) -> None:
    """Compute one block of queries of one lane block, over all key blocks that it meets."""
    refs = _ForwardRefs.of(shape, all_refs)
    lane_block, row, block = (pl.program_id(axis) for axis in range(3))
    read = functools.partial(_read, shape, lane_block=lane_block)

    if shape.biased:

        @pl.when((row == 0) & (block == 0))
        def _begin_lane_block() -> None:
            _build_strips(shape, refs.base, refs.strip)

    query = read(
        refs.query,
        at=0,
        first_row=block * shape.query_block,
        block=shape.query_block,
        length=shape.queries,
    )
    heads = [_only(shape, query, head) for head in range(shape.group)]
    ids = refs.ids[0]  # [1, query_block]

    def visit(key_block: Any, state: tuple[_Softmax, ...] | None) -> tuple[_Softmax, ...]:
        at = key_block * shape.key_block
        rows = {"at": at, "first_row": at, "block": shape.key_block, "length": shape.keys}
        key, value = read(refs.key, **rows), read(refs.value, **rows)
        values = value.T  # [lanes, keys]
        columns = _key_columns(refs.key_ids[0, :, pl.ds(at, shape.key_block)])
        new = []
        for head, head_query in enumerate(heads):
            scores = _scores(
                shape, head, head_query, key, ids, columns, refs.strip, block, key_block
            )  # [keys, queries]
            old = None if state is None else state[head]
            new.append(_accumulate(scores, values[_lanes(shape, head)], old))
        return tuple(new)

    if shape.key_blocks == 1:
        state = visit(0, None)
    else:
        nothing = _Softmax(
            jnp.full((1, shape.query_block), MASKED, jnp.float32),
            jnp.zeros((1, shape.query_block), jnp.float32),
            jnp.zeros((shape.head_dim, shape.query_block), jnp.float32),
        )
        at = row * shape.query_blocks + block
        state = jax.lax.fori_loop(first_ref[at], end_ref[at], visit, (nothing,) * shape.group)
    _write_forward(refs, state)


def _accumulate(scores: jax.Array, values: jax.Array, old: _Softmax | None) -> _Softmax:
    """Add a block of scores [keys, queries] and values [head_dim, keys] to a running softmax."""
    top = jnp.max(scores, axis=0, keepdims=True)  # [1, queries]
    if old is not None:
        top = jnp.maximum(old.top, top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=0, keepdims=True)
    out = _dot(values, weights.astype(values.dtype), 1, 0)  # [head_dim, queries]
    if old is not None:
        shrink = jnp.exp(old.top - top)
        total, out = total + old.total * shrink, out + old.out * shrink
    return _Softmax(top, total, out)


def _write_forward(refs: _ForwardRefs, state: tuple[_Softmax, ...]) -> None:
    """Write output and logsumexp; a query that saw no key gets zeros."""
    outs = []
    for head, (top, total, out) in enumerate(state):
        seen = top > MASKED / 2
        outs.append(out * jnp.where(seen, 1.0 / total, 0.0))
        refs.logsumexp[0, 0, head : head + 1, :] = jnp.where(seen, top + jnp.log(total), _UNSEEN)
    refs.out[0] = jnp.concatenate(outs, axis=0).astype(refs.out.dtype).T


def _by_query_block(shape: _Shape):
    return pl.BlockSpec((1, shape.query_block, shape.lanes), lambda g, b, i, *_: (b, i, g))


def _whole(length, lanes, shared=1):
    if shared == 1:
        return pl.BlockSpec((1, length, lanes), lambda g, b, i, *_: (b, 0, g))
    return pl.BlockSpec((1, length, lanes), lambda g, b, i, *_: (b, 0, g // shared))


def _grouped(shape: _Shape, base):
    """Reshape tables [heads, width] to [groups, group, width], filled with zeros."""
    padding = ((0, shape.groups * shape.group - shape.heads), (0, 0))
    return jnp.pad(base, padding).reshape(shape.groups, shape.group, shape.width)


def _parameters():
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
    )


def _run_forward(shape: _Shape, query, key, value, base, ids, key_ids):
    batch = query.shape[0]
    keys = shape.key_blocks * shape.key_block
    (first, end), _ = _ranges(shape, ids, key_ids)
    in_specs = [
        _by_query_block(shape),
        _whole(keys, shape.lanes, shape.shared),
        _whole(keys, shape.lanes, shape.shared),
        pl.BlockSpec((1, 1, shape.query_block), lambda g, b, i, *_: (b, 0, i)),
        pl.BlockSpec((1, 1, keys), lambda g, b, i, *_: (b, 0, 0)),
    ]
    arrays = [query, key, value, ids, key_ids]
    scratch = []
    if shape.biased:
        in_specs.append(pl.BlockSpec((1, shape.group, shape.width), lambda g, b, i, *_: (g, 0, 0)))
        arrays.append(_grouped(shape, base))
        scratch.append(pltpu.VMEM((shape.group, LANES, shape.width), jnp.float32))
    queries = shape.query_blocks * shape.query_block
    return pl.pallas_call(
        functools.partial(_forward_kernel, shape),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((batch, shape.groups, shape.group, queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(shape.groups, batch, shape.query_blocks),
            in_specs=in_specs,
            out_specs=(
                _by_query_block(shape),
                pl.BlockSpec(
                    (1, 1, shape.group, shape.query_block), lambda g, b, i, *_: (b, g, 0, i)
                ),
            ),
            scratch_shapes=scratch,
        ),
        compiler_params=_parameters(),
        cost_estimate=_cost(shape, batch, products=2),
        interpret=shape.interpret,
        name="relative_attention",
    )(first, end, *arrays)


def _cost(shape: _Shape, batch, *, products):
    """Return the cost of the dense form, for the compiler's scheduling."""
    pairs = batch * shape.heads * shape.queries * shape.keys
    moved = batch * (shape.queries + shape.keys) * shape.heads * shape.head_dim * 2
    return pl.CostEstimate(
        flops=2 * products * pairs * shape.head_dim,
        transcendentals=pairs,
        bytes_accessed=products * moved,
    )


# --------------------------------------------------------------------------------------------------
# Backward


class _BackwardRefs(NamedTuple):
    """Blocks in memory of a program of the backward pass; strips only with a bias."""

    query: Any
    key: Any
    value: Any
    out: Any
    gradient: Any
    logsumexp: Any
    ids: Any
    key_ids: Any
    base: Any
    d_query: Any
    d_key: Any
    d_value: Any
    d_base: Any
    d_query_sum: Any  # [lanes, queries] float32, over key blocks
    inner: Any  # [heads, queries]: sum over keys of each weight times its gradient
    strip: Any
    d_strip: Any

    @classmethod
    def of(cls, shape: _Shape, refs: Any) -> "_BackwardRefs":
        if not shape.biased:
            refs = (*refs[:8], None, *refs[8:11], None, *refs[11:], None, None)
        return cls._make(refs)


class _Keys(NamedTuple):
    """A program's block of keys."""

    key: jax.Array  # [keys, lanes]
    value: jax.Array
    transposed: jax.Array  # [lanes, keys]
    columns: jax.Array  # ids [keys, 128], the same in every lane


def _backward_kernel(shape: _Shape, first_ref: Any, end_ref: Any, *all_refs: Any) -> None:
    """Compute the gradients of one block of keys of one lane block.

    Programs run over lane blocks, then rows of the batch, then key blocks. Gradients of queries add
    up over the key blocks of a row, those of the bias over all rows.
    """
    refs = _BackwardRefs.of(shape, all_refs)
    lane_block, row, key_block = (pl.program_id(axis) for axis in range(3))
    last_row = row == pl.num_programs(1) - 1
    last_block = key_block == shape.key_blocks - 1
    read = functools.partial(_read, shape, lane_block=lane_block)

    if shape.biased:

        @pl.when((row == 0) & (key_block == 0))
        def _begin_lane_block() -> None:
            _build_strips(shape, refs.base, refs.strip)
            refs.d_strip[...] = jnp.zeros(refs.d_strip.shape, jnp.float32)

    @pl.when(key_block == 0)
    def _begin_row() -> None:
        _sum_inner(shape, refs, read)
        if shape.key_blocks > 1:
            refs.d_query_sum[...] = jnp.zeros(refs.d_query_sum.shape, jnp.float32)

    keys = _read_keys(shape, refs, read, key_block)
    visit = functools.partial(_visit_queries, shape, refs, read, keys, key_block)
    nothing = jnp.zeros((shape.key_block, shape.lanes), jnp.float32)
    if shape.query_blocks == 1:
        d_key, d_value = visit(0, (nothing, nothing))
    else:
        at = row * shape.key_blocks + key_block
        d_key, d_value = jax.lax.fori_loop(first_ref[at], end_ref[at], visit, (nothing, nothing))
    refs.d_key[0] = d_key.astype(refs.d_key.dtype)
    refs.d_value[0] = d_value.astype(refs.d_value.dtype)

    if shape.key_blocks > 1:

        @pl.when(last_block)
        def _end_row() -> None:
            for block in range(shape.query_blocks):
                at = pl.ds(block * shape.query_block, shape.query_block)
                refs.d_query[0, at, :] = refs.d_query_sum[:, at].astype(refs.d_query.dtype).T

    if shape.biased:

        @pl.when(last_row & last_block)
        def _end_lane_block() -> None:
            for head in range(shape.group):
                refs.d_base[0, head] = _fold_strip(shape, refs.d_strip[head])


def _read_queries(shape: _Shape, read: Any, ref: Any, block: Any) -> jax.Array:
    """Read a block of a whole row's queries, [query_block, lanes]."""
    at = block * shape.query_block
    return read(ref, at=at, first_row=at, block=shape.query_block, length=shape.queries)


def _read_keys(shape: _Shape, refs: _BackwardRefs, read: Any, key_block: Any) -> _Keys:
    rows = {
        "at": 0,
        "first_row": key_block * shape.key_block,
        "block": shape.key_block,
        "length": shape.keys,
    }
    key, value = read(refs.key, **rows), read(refs.value, **rows)
    return _Keys(key, value, key.T, _key_columns(refs.key_ids[0]))


def _sum_inner(shape: _Shape, refs: _BackwardRefs, read: Any) -> None:
    """Compute `inner`, which softmax's derivative subtracts, of all queries of a row.

    It is the product of output and its gradient, summed over each head's lanes.
    """
    for block in range(shape.query_blocks):
        out = _read_queries(shape, read, refs.out, block)
        gradient = _read_queries(shape, read, refs.gradient, block)
        both = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).T  # [lanes, queries]
        at = pl.ds(block * shape.query_block, shape.query_block)
        for head in range(shape.group):
            refs.inner[head : head + 1, at] = jnp.sum(
                both[_lanes(shape, head)], axis=0, keepdims=True
            )


def _visit_queries(
    shape: _Shape,
    refs: _BackwardRefs,
    read: Any,
    keys: _Keys,
    key_block: Any,
    block: Any,
    state: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Add a block of queries to the gradients of the keys and values, [keys, lanes] each."""
    dtype = refs.query.dtype
    at = pl.ds(block * shape.query_block, shape.query_block)
    query = _read_queries(shape, read, refs.query, block)
    gradient = _read_queries(shape, read, refs.gradient, block)
    ids = refs.ids[0, :, at]
    d_key, d_value = state
    d_queries = []
    for head in range(shape.group):
        head_query, head_gradient = _only(shape, query, head), _only(shape, gradient, head)
        scores = _scores(
            shape, head, head_query, keys.key, ids, keys.columns, refs.strip, block, key_block
        )  # [keys, queries]
        weights = jnp.exp(scores - refs.logsumexp[0, 0, head : head + 1, at])
        d_weights = _dot(keys.value, head_gradient, 1, 1)
        d_scores = weights * (d_weights - refs.inner[head : head + 1, at])
        if shape.biased:
            _add_to_strip(shape, refs.d_strip, head, d_scores, block, key_block)
        if shape.scale != 1.0:
            d_scores = d_scores * shape.scale
        d_scores = d_scores.astype(dtype)
        d_value = d_value + _dot(weights.astype(dtype), head_gradient, 1, 0)
        d_key = d_key + _dot(d_scores, head_query, 1, 0)
        d_queries.append(_dot(keys.transposed[_lanes(shape, head)], d_scores, 1, 0))
    d_query = jnp.concatenate(d_queries, axis=0)  # [lanes, queries]
    if shape.key_blocks == 1:
        refs.d_query[0, at, :] = d_query.astype(dtype).T
    else:
        refs.d_query_sum[:, at] += d_query
    return d_key, d_value


def _fold_strip(shape: _Shape, strip: jax.Array) -> jax.Array:
    """Roll row k of a strip [128, width] back by k and add up to 8 rows.

    The lower half of the rows is rolled by 64 and added, then the lower half of the rest by 32, and
    so on. The last 8 rows are added outside of the kernel.
    """
    rows = LANES
    while rows > 8:
        rows //= 2
        strip = strip[:rows] + pltpu.roll(strip[rows:], shape.width - rows, 1)
    return strip


def _add_to_strip(shape: _Shape, d_strip_ref, head, d_scores, query_block, key_block):
    """Add a block's gradient [keys, queries] to the part of the strip that has its bias.

    [128, 128] blocks on one diagonal have the same place in the strip and are summed first.
    """
    rows, columns = (size // LANES for size in d_scores.shape)
    for diagonal in range(1 - rows, columns):
        blocks = [
            d_scores[r * LANES : (r + 1) * LANES, (r + diagonal) * LANES :][:, :LANES]
            for r in range(rows)
            if 0 <= r + diagonal < columns
        ]
        lane = _strip_lane(shape, query_block, key_block, -diagonal)
        d_strip_ref[head, :, pl.ds(lane, LANES)] += functools.reduce(jnp.add, blocks)


def _run_backward(shape: _Shape, saved, gradient):
    query, key, value, base, ids, key_ids, out, logsumexp = saved
    batch = query.shape[0]
    queries = shape.query_blocks * shape.query_block
    _, (first, end) = _ranges(shape, ids, key_ids)
    row = _whole(queries, shape.lanes)
    by_key_block = pl.BlockSpec((1, shape.key_block, shape.lanes), lambda g, b, i, *_: (b, i, g))
    of_group = by_key_block
    if shape.shared > 1:
        of_group = pl.BlockSpec(
            (1, shape.key_block, shape.lanes), lambda g, b, i, *_: (b, i, g // shape.shared)
        )
    in_specs = [
        row,
        of_group,
        of_group,
        row,
        row,
        pl.BlockSpec((1, 1, shape.group, queries), lambda g, b, i, *_: (b, g, 0, 0)),
        pl.BlockSpec((1, 1, queries), lambda g, b, i, *_: (b, 0, 0)),
        pl.BlockSpec((1, 1, shape.key_block), lambda g, b, i, *_: (b, 0, i)),
    ]
    arrays = [query, key, value, out, gradient, logsumexp, ids, key_ids]
    out_specs = [row, by_key_block, by_key_block]
    per_head = (*key.shape[:2], query.shape[2])
    out_shape = [
        jax.ShapeDtypeStruct(size, x.dtype)
        for size, x in ((query.shape, query), (per_head, key), (per_head, value))
    ]
    scratch = [
        pltpu.VMEM((shape.lanes, queries), jnp.float32),
        pltpu.VMEM((shape.group, queries), jnp.float32),
    ]
    if shape.biased:
        table = (1, shape.group, shape.width)
        in_specs.append(pl.BlockSpec(table, lambda g, b, i, *_: (g, 0, 0)))
        arrays.append(_grouped(shape, base))
        partial = (1, shape.group, 8, shape.width)
        out_specs.append(pl.BlockSpec(partial, lambda g, b, i, *_: (g, 0, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((shape.groups, *partial[1:]), jnp.float32))
        strips = pltpu.VMEM((shape.group, LANES, shape.width), jnp.float32)
        scratch += [strips, strips]
    results = pl.pallas_call(
        functools.partial(_backward_kernel, shape),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(shape.groups, batch, shape.key_blocks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=_parameters(),
        cost_estimate=_cost(shape, batch, products=5),
        interpret=shape.interpret,
        name="relative_attention_backward",
    )(first, end, *arrays)
    d_query, d_key, d_value, *d_base = results
    if shape.shared > 1:
        d_key, d_value = (_summed(shape, x) for x in (d_key, d_value))
    if not shape.biased:
        return d_query, d_key, d_value, None
    d_base = d_base[0].reshape(-1, 8, shape.width)[: shape.heads]  # [heads, 8, width]
    d_base = sum(jnp.roll(d_base[:, k], -k, axis=1) for k in range(8))
    return d_query, d_key, d_value, d_base


def _summed(shape: _Shape, gradient: jax.Array) -> jax.Array:
    """Sum gradients [batch, keys, heads * head_dim] over the heads of each group, in float32."""
    batch, keys, _ = gradient.shape
    grouped = gradient.reshape(batch, keys, -1, shape.shared, shape.head_dim)
    summed = jnp.sum(grouped, axis=3, dtype=jnp.float32)
    return summed.reshape(batch, keys, -1).astype(gradient.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(shape: _Shape, query, key, value, base, ids, key_ids):
    return _run_forward(shape, query, key, value, base, ids, key_ids)[0]


def _attention_forward(shape: _Shape, query, key, value, base, ids, key_ids):
    out, logsumexp = _run_forward(shape, query, key, value, base, ids, key_ids)
    # Named, so that recomputation policies can keep both and the kernel runs once.
    out, logsumexp = (checkpoint_name(x, "attention") for x in (out, logsumexp))
    return out, (query, key, value, base, ids, key_ids, out, logsumexp)


def _attention_backward(shape: _Shape, saved, gradient):
    return (*_run_backward(shape, saved, gradient.astype(saved[0].dtype)), None, None)


_attention.defvjp(_attention_forward, _attention_backward)


@dataclasses.dataclass(frozen=True)
class Relative(SegmentKernel):
    """The kernel of `relative_attention`. A bias is by distance: [heads, 2 * max_distance + 1]."""

    interpret: bool = False

    def unsupported(self, needs: Needs) -> str | None:
        """Return why the kernel cannot compute this attention, or None."""
        return unsupported(needs.head_dim) or super().unsupported(needs)

    def bias(self, relative: RelativePositionBias, queries: int, keys: int) -> jax.Array:
        """Return the bias by distance."""
        return relative.by_distance()

    def attend(self, operands: Operands) -> jax.Array:
        """Return [batch, queries, heads * head_dim], see `Kernel.attend`.

        Heads stay side by side in memory, as the projections compute them.
        """
        query, key, value = operands.query, operands.key, operands.value
        heads, head_dim = query.shape[2:]
        kept = kept_keys(operands)
        pieces = parts("heads")
        key_heads = key.shape[2]
        together = kept is None and shares(heads, key_heads, head_dim) and key_heads % pieces == 0
        if not together and (group := heads // key_heads) > 1:
            key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        value = scaled_values(value, kept)
        query, key, value = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        split = "heads" if heads % pieces == 0 else None
        joined = ("batch", None, split)
        given = {
            "query": (query, joined),
            "key": (key, joined),
            "value": (value, joined),
            "query_segments": (operands.visible.queries, ("batch", None)),
            "key_segments": (operands.visible.keys, ("batch", None)),
            "by_distance": (operands.bias, (split, None)),
        }
        run = functools.partial(
            relative_attention,
            head_dim=head_dim,
            causal=operands.visible.causal,
            scale=operands.scale,
            interpret=self.interpret,
        )
        return per_shard(run, given, joined, query.shape)


KERNEL = Relative()
INTERPRETED = Relative(interpret=True)
