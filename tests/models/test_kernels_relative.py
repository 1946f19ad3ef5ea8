"""The TPU attention kernel against the plain form: forward, gradients, sharding, compiled memory.

On a CPU the kernel's steps run in XLA ("interpret"); for TPUs it is compiled without a device.
"""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import partitioning
from models.config import T5Config
from models.kernels import relative
from models.kernels.relative import plain_attention, relative_attention
from models.kernels.segments import block_spans
from models.model import Model

REACH = 40


def case(heads, head_dim, queries, keys=None, *, batch=2, dtype=jnp.float32):
    """Random inputs; packed rows of ascending segments, padding at the end of the first row."""
    random = np.random.default_rng(heads * queries)
    keys = keys or queries
    width = heads * head_dim
    query, gradient = (
        jnp.asarray(random.normal(size=(batch, queries, width)), dtype) for _ in "qg"
    )
    key, value = (jnp.asarray(random.normal(size=(batch, keys, width)), dtype) for _ in "kv")
    table = jnp.asarray(random.normal(size=(heads, 2 * REACH + 1)), jnp.float32)
    segments = []
    for length in (queries, keys):
        ids = 1 + np.arange(length) * np.array([[5], [2]]) // length
        ids[0, -length // 8 :] = 0
        segments.append(jnp.asarray(ids, jnp.int32))
    return (query / head_dim**0.5).astype(dtype), key, value, gradient, table, *segments


def both(heads, inputs, *, biased=True, causal=False, scale=1.0):
    """(output, gradients) of the kernel and of the reference."""
    query, key, value, gradient, table, query_segments, key_segments = inputs
    distance = np.arange(key.shape[1])[None] - np.arange(query.shape[1])[:, None]
    distance = np.clip(distance, -REACH, REACH) + REACH

    def kernel(query, key, value, table):
        return relative_attention(
            query,
            key,
            value,
            query_segments=query_segments,
            key_segments=key_segments,
            head_dim=query.shape[2] // heads,
            by_distance=table if biased else None,
            causal=causal,
            scale=scale,
            interpret=True,
        )

    def reference(query, key, value, table):
        apart = (
            x.astype(jnp.float32).reshape(*x.shape[:2], heads, -1) for x in (query, key, value)
        )
        bias = table[:, distance] if biased else 0.0
        out = plain_attention(*apart, bias, query_segments, key_segments, causal, scale)
        return out.reshape(query.shape).astype(query.dtype)

    def run(attend):
        out, pull = jax.vjp(attend, query, key, value, table)
        return out, pull(gradient)

    return jax.jit(run, static_argnums=0)(kernel), jax.jit(run, static_argnums=0)(reference)


def assert_close(ours, theirs, tolerance):
    for name, a, b in zip(
        ("out", "query", "key", "value", "table"),
        jax.tree.leaves(ours),
        jax.tree.leaves(theirs),
        strict=True,
    ):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("length", [100, 512, 513, 2048])
def test_no_packing_reads_more_blocks_than_one_document(length):
    block = relative.BLOCKS["block"]
    rows = -(-length // block) * block
    ids = np.ones((2, rows), np.int32)
    ids[1] += np.arange(rows) // 300

    def mean_of(row):
        (first, end), _ = block_spans(ids[row:][:1], ids[row:][:1], block, block, causal=True)
        return float(np.mean(end - first))

    assert mean_of(0) == relative.mean_blocks(length)
    assert mean_of(1) <= mean_of(0)


@pytest.mark.parametrize(
    ("heads", "head_dim", "length", "causal"),
    [
        pytest.param(2, 64, 128, False, marks=pytest.mark.sweep),
        (3, 64, 200, False),  # half a lane block, and a part of a block of tokens
        (1, 128, 256, True),
        (5, 32, 384, False),
        (1, 256, 128, False),
        (3, 8, 114, True),  # fewer lanes than a register has
    ],
)
def test_kernel_equals_plain_attention_and_its_gradients(heads, head_dim, length, causal):
    inputs = case(heads, head_dim, length)
    ours, theirs = both(heads, inputs, causal=causal, scale=1.0 if causal else 0.7)
    assert_close(ours, theirs, 1e-5)


@pytest.mark.parametrize(
    ("heads", "length", "causal"),
    [pytest.param(2, 512, False, marks=pytest.mark.sweep), (3, 460, True)],
)
def test_rows_of_many_blocks_skip_what_they_may(heads, length, causal, monkeypatch):
    monkeypatch.setattr(relative, "BLOCKS", {"whole": 128, "block": 128})
    ours, theirs = both(heads, case(heads, 64, length), causal=causal)
    assert_close(ours, theirs, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, pytest.param(1024, marks=pytest.mark.sweep)])
def test_rows_at_the_block_sizes_in_use(length):
    ours, theirs = both(2, case(2, 64, length))
    assert_close(ours, theirs, 1e-5)


def test_cross_attention_without_a_bias():
    ours, theirs = both(3, case(3, 64, 114, 500), biased=False)
    assert_close(ours, theirs, 1e-5)


def test_bfloat16_is_as_near_as_its_rounding():
    ours, theirs = both(2, case(2, 64, 256, dtype=jnp.bfloat16))
    assert_close(ours, theirs, 1e-2)


def test_blocks_without_a_common_segment_are_not_visited():
    inputs = case(2, 64, 512)
    shape = relative._shape(*inputs[:2], inputs[4], 64, False, 1.0, True)
    shape = shape._replace(query_block=128, key_block=128)
    ids = jnp.asarray([[1] * 100 + [2] * 156 + [3] * 128 + [0] * 128], jnp.int32)
    (first, end), (key_first, key_end) = relative._ranges(
        shape,
        relative._ids(ids, 512, empty=0),
        relative._ids(ids, 512, empty=-1),
    )
    np.testing.assert_array_equal(first, [0, 0, 2, 4])
    np.testing.assert_array_equal(end, [2, 2, 3, 0])
    np.testing.assert_array_equal(key_first, [0, 0, 2, 4])
    np.testing.assert_array_equal(key_end, [2, 2, 3, 0])


def test_head_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="divides 128 or is a multiple of it, not 80"):
        both(2, case(2, 80, 128))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_compiled_for_tpus_a_training_step_has_no_quadratic_buffer():
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = partitioning.make_mesh({"data": 2, "tensor": 2}, devices)
    rows, length, heads = 8, 1024, 8
    config = T5Config(
        vocab_size=256,
        d_model=256,
        d_ff=256,
        num_heads=heads,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dtype="bfloat16",
        remat="projections",
    )
    batch = {
        name: jax.ShapeDtypeStruct(
            (rows, size), jnp.int32, sharding=partitioning.batch_sharding(mesh)
        )
        for name, size in (
            ("encoder_input_tokens", length),
            ("encoder_segment_ids", length),
            ("decoder_input_tokens", 256),
            ("decoder_segment_ids", 256),
        )
    }

    def temporary(attention):
        model = Model(dataclasses.replace(config, attention=attention))

        def loss(params, batch):
            return jnp.sum(model.bind(params).forward(batch).astype(jnp.float32))

        params = jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=sharding
            ),
            model.shapes(),
            partitioning.param_shardings(model, mesh),
        )
        with partitioning.use(mesh):
            compiled = jax.jit(jax.grad(loss)).lower(params, batch).compile()
        assert ("relative_attention" in compiled.as_text()) == (attention == "auto")
        return compiled.memory_analysis().temp_size_in_bytes

    scores = rows * heads * length**2 * 4 // 4  # float32, on each of four devices
    assert temporary("xla") > scores
    assert temporary("auto") < scores / 4


def test_heads_that_share_keys_equal_heads_with_copies_of_them(monkeypatch):
    """Four heads of 128 on two heads of keys, in rows of two blocks, against the plain form."""
    monkeypatch.setattr(relative, "BLOCKS", {"whole": 128, "block": 128})
    query, key, value, gradient, _, segments, key_segments = case(4, 128, 256)
    key, value = (x[..., :256] for x in (key, value))  # two heads

    def kernel(query, key, value):
        return relative_attention(
            query, key, value, query_segments=segments, key_segments=key_segments,
            head_dim=128, causal=True, interpret=True,
        )  # fmt: skip

    def reference(query, key, value):
        query, key, value = (x.reshape(*x.shape[:2], -1, 128) for x in (query, key, value))
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        out = plain_attention(query, key, value, 0.0, segments, key_segments, True, 1.0)
        return out.reshape(*out.shape[:2], -1)

    found = []
    for attend in (kernel, reference):
        out, pull = jax.vjp(jax.jit(attend), query, key, value)
        found.append((out, *jax.jit(pull)(gradient)))
    for number, (a, b) in enumerate(zip(*found, strict=True)):
        bound = 2e-6 if number == 0 else 1e-5
        assert float(jnp.abs(a - b).max()) <= bound * float(jnp.abs(b).max())
