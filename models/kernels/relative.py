"""Attention on TPU without [batch, heads, queries, keys] in memory, T5's relative bias included.

A Pallas kernel, forward and backward, and `plain_attention`, which says in five lines what it
computes.

- Scores stand transposed, [keys, queries]. Maxima, sums and what is saved of them are then rows,
  reduced over sublanes by plain vector operations; and all products but one small transposition per
  operand are in the form that the matrix unit takes.
- Heads are narrower than the 128 lanes of a register, and the model keeps them side by side,
  [batch, length, heads * head_dim]. A program takes the 128 // head_dim heads of one lane block:
  nothing is transposed or padded in memory. A head is singled out by zeroing the lanes of the
  others; the product over 128 lanes costs what one over 64 does.
- The bias depends on key - query alone. Programs of one lane block run one after the other over the
  batch, and the first builds for each head a strip [128, width] in which row k is one table of
  values by distance, rolled by k. Every [128, 128] block of the bias is a slice of the strip at a
  multiple of 128 lanes. The gradient adds up in a strip of the same form over the whole batch, and
  is unrolled once at the end.
- Rows longer than a block go by blocks, with a running maximum forward. Segments are told apart by
  the smallest and largest id in a block; pairs of blocks that share none are skipped, so that a
  packed row costs what its documents cost.
- A query that sees no key gets zeros, and no gradient flows there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
MASKED = -1e10  # as in models/attention.py: finite
_UNSEEN = 1e30  # the logsumexp of a query that sees nothing: exp(score - _UNSEEN) is 0

# Rows up to `whole` tokens are one block; longer ones are cut into blocks of `block`.
BLOCKS = {"whole": 512, "block": 512}
_VMEM_BYTES = 64 * 2**20


class _Shape(NamedTuple):
    """What the kernels are specialised to."""

    heads: int
    head_dim: int
    group: int  # heads in a lane block
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
    """The reference: arrays [batch, length, heads, head_dim]; bias [heads, queries, keys]."""
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
    """softmax(scale * query key + bias) value within segments, on TPU.

    Args:
      query: [batch, queries, heads * head_dim], float32 or bfloat16.
      key, value: [batch, keys, heads * head_dim].
      query_segments, key_segments: int32 [batch, queries] and [batch, keys], 0 where padding. Any
        order is right; blocks are skipped where ids ascend along a row.
      by_distance: float32 [heads, 2 * n + 1], the bias at key - query = -n..n; beyond, the ends
        hold. None: no bias. Queries and keys must be the same tokens.
      causal: a query sees no key of a higher index; likewise.
      interpret: run the kernel's steps in XLA, on any platform: for tests.

    Returns:
      [batch, queries, heads * head_dim] in query's dtype; zeros where a query sees no key.

    Raises:
      ValueError: a head_dim that neither divides 128 nor is a multiple of it; a bias or `causal`
        where there are not as many keys as queries.
    """
    if error := unsupported(head_dim):
        raise ValueError(error)
    if (by_distance is not None or causal) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} queries and {key.shape[1]} keys: bias and `causal` are for tokens "
            "that attend to themselves"
        )
    shape = _shape(query, key, by_distance, head_dim, causal, scale, interpret)
    base = None if by_distance is None else by_distance[:, _distances(shape, by_distance.shape[1])]
    ids = _ids(query_segments, shape.query_blocks * shape.query_block, empty=0)
    key_ids = _ids(key_segments, shape.key_blocks * shape.key_block, empty=-1)
    return _attention(shape, query, key, value, base, ids, key_ids)


def unsupported(head_dim: int) -> str | None:
    """Why the kernel cannot do heads of this size, or None."""
    if LANES % head_dim == 0 or head_dim % LANES == 0:
        return None
    return (
        f"attention='pallas' wants a head size that divides {LANES} or is a multiple of it, not "
        f"{head_dim}; use 'xla'"
    )


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
    """Which of `by_distance` stands in each lane of the strip's row 0."""
    lane = np.arange(shape.width)
    # The last lanes are rolled around to the first ones.
    lane = np.where(lane >= shape.width - LANES, lane - shape.width, lane)
    n = count // 2
    return np.clip(shape.origin - lane, -n, n) + n


def _ids(segments, length, *, empty):
    """Segment ids [batch, 1, length]; padding, and what is added to fill blocks, is `empty`."""
    segments = jnp.where(segments == 0, empty, segments.astype(jnp.int32))
    padding = ((0, 0), (0, length - segments.shape[1]))
    return jnp.pad(segments, padding, constant_values=empty)[:, None]


def _ranges(shape: _Shape, query_ids, key_ids):
    """Which key blocks each query block has to visit, and the other way round.

    Returns (first, end) for queries, int32 [batch * query_blocks] each, and for keys.
    """

    def extent(ids, block):
        ids = ids.reshape(ids.shape[0], -1, block)
        return jnp.min(jnp.where(ids > 0, ids, np.int32(2**30)), axis=-1), jnp.max(ids, axis=-1)

    low, high = extent(query_ids, shape.query_block)
    key_low, key_high = extent(key_ids, shape.key_block)
    meet = (low[:, :, None] <= key_high[:, None]) & (key_low[:, None] <= high[:, :, None])
    if shape.causal:
        meet &= jnp.tri(meet.shape[1], meet.shape[2], dtype=bool)

    def span(meet):
        count = meet.shape[-1]
        index = jnp.arange(count, dtype=jnp.int32)
        first = jnp.min(jnp.where(meet, index, count), axis=-1)
        end = jnp.max(jnp.where(meet, index + 1, 0), axis=-1)
        return first.reshape(-1), end.reshape(-1)

    return span(meet), span(meet.swapaxes(1, 2))


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
    """Rows [at, at + block) of a window, which are the array's from `first_row` on: [block, lanes].

    What lies beyond the array's `length` rows, or beyond its heads, is zero, not chance.
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
    """x [rows, lanes] with the lanes of all other heads zero."""
    if shape.group == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= head * shape.head_dim) & (lane < (head + 1) * shape.head_dim)
    return jnp.where(mine, x, jnp.zeros_like(x))


def _build_strips(shape: _Shape, base_ref, strip_ref):
    """strip[head, k, x] = base[head, x - k]."""
    for head in range(shape.group):
        row = jnp.broadcast_to(base_ref[0, head : head + 1, :], (LANES, shape.width))
        strip_ref[head] = pltpu.roll(row, 0, 1, stride=1, stride_axis=0)


def _strip_lane(shape: _Shape, query_block, key_block, chunk):
    """Where a strip holds the bias of rows [128 * chunk, + 128) of a block."""
    difference = query_block - key_block
    if isinstance(difference, int):
        difference = max(-shape.reach, min(shape.reach, difference))
    else:
        difference = jnp.clip(difference, -shape.reach, shape.reach)
    lane = shape.origin + difference * shape.key_block - LANES * chunk
    return lane if isinstance(lane, int) else pl.multiple_of(lane, LANES)


def _key_columns(key_ids):
    """Ids of keys [1, keys] -> [keys, 128], the same in every lane."""
    return jnp.broadcast_to(key_ids, (LANES, key_ids.shape[1])).T


def _scores(shape: _Shape, head, query, key, ids, key_columns, strip_ref, query_block, key_block):
    """Masked scores of one head, float32 [keys, queries]. `query` has the other heads' lanes 0."""
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


def _forward_kernel(shape: _Shape, first_ref, end_ref, *refs):
    if shape.biased:
        query_ref, key_ref, value_ref, ids_ref, key_ids_ref, base_ref, *refs = refs
        out_ref, logsumexp_ref, strip_ref = refs
    else:
        query_ref, key_ref, value_ref, ids_ref, key_ids_ref, out_ref, logsumexp_ref = refs
        strip_ref = None
    lane_block, row, block = (pl.program_id(axis) for axis in range(3))
    read = functools.partial(_read, shape, lane_block=lane_block)

    if shape.biased:

        @pl.when((row == 0) & (block == 0))
        def _():
            _build_strips(shape, base_ref, strip_ref)

    query = read(
        query_ref,
        at=0,
        first_row=block * shape.query_block,
        block=shape.query_block,
        length=shape.queries,
    )
    heads = [_only(shape, query, head) for head in range(shape.group)]
    ids = ids_ref[0]  # [1, query_block]

    def visit(key_block, state):
        at = key_block * shape.key_block
        rows = {"at": at, "first_row": at, "block": shape.key_block, "length": shape.keys}
        key, value = read(key_ref, **rows), read(value_ref, **rows)
        turned = value.T  # [lanes, keys]
        columns = _key_columns(key_ids_ref[0, :, pl.ds(at, shape.key_block)])
        new = []
        for head, mine in enumerate(heads):
            scores = _scores(
                shape, head, mine, key, ids, columns, strip_ref, block, key_block
            )  # [keys, queries]
            top = jnp.max(scores, axis=0, keepdims=True)  # [1, queries]
            if state is not None:
                old_top, old_total, old_out = state[head]
                top = jnp.maximum(old_top, top)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=0, keepdims=True)
            mine = turned[head * shape.head_dim : (head + 1) * shape.head_dim]
            out = _dot(mine, weights.astype(value.dtype), 1, 0)  # [head_dim, queries]
            if state is not None:
                shrink = jnp.exp(old_top - top)
                total, out = total + old_total * shrink, out + old_out * shrink
            new.append((top, total, out))
        return tuple(new)

    if shape.key_blocks == 1:
        state = visit(0, None)
    else:
        nothing = (
            jnp.full((1, shape.query_block), MASKED, jnp.float32),
            jnp.zeros((1, shape.query_block), jnp.float32),
            jnp.zeros((shape.head_dim, shape.query_block), jnp.float32),
        )
        at = row * shape.query_blocks + block
        state = jax.lax.fori_loop(first_ref[at], end_ref[at], visit, (nothing,) * shape.group)

    outs = []
    for head, (top, total, out) in enumerate(state):
        seen = top > MASKED / 2
        outs.append(out * jnp.where(seen, 1.0 / total, 0.0))
        logsumexp_ref[0, 0, head : head + 1, :] = jnp.where(seen, top + jnp.log(total), _UNSEEN)
    out_ref[0] = jnp.concatenate(outs, axis=0).astype(out_ref.dtype).T


def _by_query_block(shape: _Shape):
    return pl.BlockSpec((1, shape.query_block, shape.lanes), lambda g, b, i, *_: (b, i, g))


def _whole(length, lanes):
    return pl.BlockSpec((1, length, lanes), lambda g, b, i, *_: (b, 0, g))


def _grouped(shape: _Shape, base):
    """Tables [heads, width] -> [groups, group, width], filled up with zeros."""
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
        _whole(keys, shape.lanes),
        _whole(keys, shape.lanes),
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
    """Multiply-adds of the dense form, for the compiler's scheduling."""
    pairs = batch * shape.heads * shape.queries * shape.keys
    moved = batch * (shape.queries + shape.keys) * shape.heads * shape.head_dim * 2
    return pl.CostEstimate(
        flops=2 * products * pairs * shape.head_dim,
        transcendentals=pairs,
        bytes_accessed=products * moved,
    )


# --------------------------------------------------------------------------------------------------
# Backward


def _backward_kernel(shape: _Shape, first_ref, end_ref, *refs):
    if shape.biased:
        (query_ref, key_ref, value_ref, out_ref, gradient_ref, logsumexp_ref, ids_ref, key_ids_ref,
         base_ref, d_query_ref, d_key_ref, d_value_ref, d_base_ref, d_turned_ref, inner_ref,
         strip_ref, d_strip_ref) = refs  # fmt: skip
    else:
        (query_ref, key_ref, value_ref, out_ref, gradient_ref, logsumexp_ref, ids_ref, key_ids_ref,
         d_query_ref, d_key_ref, d_value_ref, d_turned_ref, inner_ref) = refs  # fmt: skip
        strip_ref = d_strip_ref = d_base_ref = None
    lane_block, row, key_block = (pl.program_id(axis) for axis in range(3))
    rows = pl.num_programs(1)
    read = functools.partial(_read, shape, lane_block=lane_block)
    dtype = query_ref.dtype

    def read_queries(ref, block):
        at = block * shape.query_block
        return read(ref, at=at, first_row=at, block=shape.query_block, length=shape.queries)

    if shape.biased:

        @pl.when((row == 0) & (key_block == 0))
        def _():
            _build_strips(shape, base_ref, strip_ref)
            d_strip_ref[...] = jnp.zeros(d_strip_ref.shape, jnp.float32)

    @pl.when(key_block == 0)
    def _():
        # What softmax's derivative takes off: sum over keys of weight times its gradient, which is
        # the product of output and its gradient.
        for block in range(shape.query_blocks):
            out, gradient = read_queries(out_ref, block), read_queries(gradient_ref, block)
            both = (out.astype(jnp.float32) * gradient.astype(jnp.float32)).T  # [lanes, queries]
            for head in range(shape.group):
                mine = both[head * shape.head_dim : (head + 1) * shape.head_dim]
                inner_ref[head : head + 1, pl.ds(block * shape.query_block, shape.query_block)] = (
                    jnp.sum(mine, axis=0, keepdims=True)
                )
        if shape.key_blocks > 1:
            d_turned_ref[...] = jnp.zeros(d_turned_ref.shape, jnp.float32)

    mine = {
        "at": 0,
        "first_row": key_block * shape.key_block,
        "block": shape.key_block,
        "length": shape.keys,
    }
    key, value = read(key_ref, **mine), read(value_ref, **mine)
    turned = key.T  # [lanes, keys]
    columns = _key_columns(key_ids_ref[0])

    def visit(block, state):
        at = pl.ds(block * shape.query_block, shape.query_block)
        query, gradient = read_queries(query_ref, block), read_queries(gradient_ref, block)
        ids = ids_ref[0, :, at]
        d_key, d_value = state
        d_queries = []
        for head in range(shape.group):
            my_query, my_gradient = _only(shape, query, head), _only(shape, gradient, head)
            scores = _scores(
                shape, head, my_query, key, ids, columns, strip_ref, block, key_block
            )  # [keys, queries]
            weights = jnp.exp(scores - logsumexp_ref[0, 0, head : head + 1, at])
            d_weights = _dot(value, my_gradient, 1, 1)
            d_scores = weights * (d_weights - inner_ref[head : head + 1, at])
            if shape.biased:
                _add_to_strip(shape, d_strip_ref, head, d_scores, block, key_block)
            if shape.scale != 1.0:
                d_scores = d_scores * shape.scale
            d_scores = d_scores.astype(dtype)
            d_value = d_value + _dot(weights.astype(dtype), my_gradient, 1, 0)
            d_key = d_key + _dot(d_scores, my_query, 1, 0)
            mine = turned[head * shape.head_dim : (head + 1) * shape.head_dim]
            d_queries.append(_dot(mine, d_scores, 1, 0))  # [head_dim, queries]
        d_query = jnp.concatenate(d_queries, axis=0)  # [lanes, queries]
        if shape.key_blocks == 1:
            d_query_ref[0, at, :] = d_query.astype(dtype).T
        else:
            d_turned_ref[:, at] += d_query
        return d_key, d_value

    nothing = jnp.zeros((shape.key_block, shape.lanes), jnp.float32)
    if shape.query_blocks == 1:
        d_key, d_value = visit(0, (nothing, nothing))
    else:
        at = row * shape.key_blocks + key_block
        d_key, d_value = jax.lax.fori_loop(first_ref[at], end_ref[at], visit, (nothing, nothing))
    d_key_ref[0] = d_key.astype(dtype)
    d_value_ref[0] = d_value.astype(dtype)

    if shape.key_blocks > 1:

        @pl.when(key_block == shape.key_blocks - 1)
        def _():
            for block in range(shape.query_blocks):
                at = pl.ds(block * shape.query_block, shape.query_block)
                d_query_ref[0, at, :] = d_turned_ref[:, at].astype(dtype).T

    if shape.biased:

        @pl.when((row == rows - 1) & (key_block == shape.key_blocks - 1))
        def _():
            for head in range(shape.group):
                # Row k back by k, and added up: the lower half by 64, then of what is left the
                # lower half by 32, ...; the last 8 rows outside.
                strip, rows = d_strip_ref[head], LANES
                while rows > 8:
                    rows //= 2
                    strip = strip[:rows] + pltpu.roll(strip[rows:], shape.width - rows, 1)
                d_base_ref[0, head] = strip


def _add_to_strip(shape: _Shape, d_strip_ref, head, d_scores, query_block, key_block):
    """Adds a block's gradient [keys, queries] where the strip has its bias.

    [128, 128] blocks on one diagonal fall on the same place: they are added up first.
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
    in_specs = [
        row,
        by_key_block,
        by_key_block,
        row,
        row,
        pl.BlockSpec((1, 1, shape.group, queries), lambda g, b, i, *_: (b, g, 0, 0)),
        pl.BlockSpec((1, 1, queries), lambda g, b, i, *_: (b, 0, 0)),
        pl.BlockSpec((1, 1, shape.key_block), lambda g, b, i, *_: (b, 0, i)),
    ]
    arrays = [query, key, value, out, gradient, logsumexp, ids, key_ids]
    out_specs = [row, by_key_block, by_key_block]
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
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
    if not shape.biased:
        return d_query, d_key, d_value, None
    d_base = d_base[0].reshape(-1, 8, shape.width)[: shape.heads]  # [heads, 8, width]
    d_base = sum(jnp.roll(d_base[:, k], -k, axis=1) for k in range(8))
    return d_query, d_key, d_value, d_base


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
