"""Attention kernels in the models, and the loop over rows and heads, against the plain form.

The TPU kernel has tests of its own; here its steps run in XLA.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import partitioning
from models.attention import plan_attention
from models.config import DecoderConfig, T5Config
from models.kernels import find
from models.kernels.looped import BLOCK, looped_attention, strip
from models.kernels.plain import dot_product_attention
from models.kernels.segments import Branches, segment_mask
from models.model import Model

CONFIG = T5Config(
    vocab_size=64,
    d_model=16,
    d_ff=32,
    num_heads=4,
    d_kv=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def inputs(batch=2, queries=12, keys=20, heads=4, kv_heads=4, dtype=jnp.float32):
    random = np.random.default_rng(0)
    query = jnp.asarray(random.normal(size=(batch, queries, heads, 8)), dtype)
    key, value = jnp.asarray(random.normal(size=(2, batch, keys, kv_heads, 8)), dtype)
    by_distance = jnp.asarray(random.normal(size=(heads, 2 * BLOCK + 1)), jnp.float32)
    kept = jnp.asarray(random.random((batch, heads, keys)) < 0.8, jnp.float32) / 0.8
    segments = np.sort(random.integers(1, 4, (batch, max(queries, keys))), axis=1)
    segments[0, -3:] = 0
    return query, key, value, by_distance, kept, segments[:, :queries], segments[:, :keys]


def spelled_out(by_distance, queries, keys, offset=0):
    """The bias of queries from index `offset` on: [1, heads, queries, keys] of [heads, odd]."""
    distance = np.arange(keys) - (offset + np.arange(queries))[:, None]
    return by_distance[None, :, by_distance.shape[1] // 2 + distance]


def plain(query, key, value, bias, kept, query_segments, key_segments, causal, scale):
    """`dot_product_attention`; `kept` through the values, one head at a time."""
    mask = segment_mask(jnp.asarray(query_segments), jnp.asarray(key_segments), causal=causal)
    if kept is None:
        return dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale)
    value = value * kept.swapaxes(1, 2)[..., None]
    return dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale)


@pytest.mark.parametrize(
    ("kv_heads", "with_bias", "with_kept", "causal"),
    [(4, True, True, False), (4, False, False, False), (2, True, False, True)],
)
def test_loop_equals_plain_attention_and_its_gradients(kv_heads, with_bias, with_kept, causal):
    query, key, value, by_distance, kept, query_segments, key_segments = inputs(
        queries=20 if causal else 12, kv_heads=kv_heads
    )
    lengths = query.shape[1], key.shape[1]
    kept = kept if with_kept else None

    def looped(query, key, value, by_distance):
        return looped_attention(
            query,
            key,
            value,
            query_segments=query_segments,
            key_segments=key_segments,
            bias=spelled_out(by_distance, *strip(*lengths)) if with_bias else None,
            kept=kept,
            causal=causal,
            scale=0.7,
        )

    def reference(query, key, value, by_distance):
        bias = spelled_out(by_distance, *lengths) if with_bias else None
        return plain(query, key, value, bias, kept, query_segments, key_segments, causal, 0.7)

    def with_gradients(attend):
        def loss(*given):
            out = attend(*given)
            return jnp.sum(jnp.sin(out)), out

        wanted = (0, 1, 2, 3) if with_bias else (0, 1, 2)
        gradients, out = jax.jit(jax.grad(loss, argnums=wanted, has_aux=True))(
            query, key, value, by_distance
        )
        return out, gradients

    (ours, our_gradients), (theirs, their_gradients) = map(with_gradients, (looped, reference))
    np.testing.assert_allclose(ours, theirs, atol=3e-6)
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("causal", "ascending"), [(False, True), (True, True), (True, False)])
def test_loop_over_several_blocks_equals_plain_attention_and_its_gradients(causal, ascending):
    length, random = 2 * BLOCK + 40, np.random.default_rng(3)
    segments = np.repeat([[1, 2, 3, 4, 0], [1, 2, 3, 0, 0]], [120, 9, 100, 57, 10], axis=1)
    if not ascending:
        segments = random.permuted(segments, axis=1)
    shape = (2, length, 2, 8)
    query, key, value = (jnp.asarray(random.normal(size=shape), jnp.float32) for _ in range(3))
    by_distance = jnp.asarray(random.normal(size=(2, 6 * BLOCK + 1)), jnp.float32)
    seen = segments > 0  # what padding gets has no meaning

    def looped(query, key, value, by_distance):
        given = {"query_segments": segments, "key_segments": segments, "causal": causal}
        bias = spelled_out(by_distance, *strip(length, length))
        return looped_attention(query, key, value, bias=bias, **given)

    def reference(query, key, value, by_distance):
        bias = spelled_out(by_distance, length, length)
        return plain(query, key, value, bias, None, segments, segments, causal, 1.0)

    def with_gradients(attend):
        def loss(*given):
            out = attend(*given)
            return jnp.sum(jnp.sin(out) * seen[..., None, None]), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(
            query, key, value, by_distance
        )
        return np.asarray(out), gradients

    (ours, our_gradients), (theirs, their_gradients) = map(with_gradients, (looped, reference))
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours[seen], theirs[seen], atol=2e-6)
    for ours, theirs in zip(our_gradients, their_gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_loop_rounds_as_the_plain_form_does_in_bfloat16():
    query, key, value, by_distance, _, query_segments, key_segments = inputs(dtype=jnp.bfloat16)
    lengths = query.shape[1], key.shape[1]
    given = {"query_segments": query_segments, "key_segments": key_segments}
    bias = spelled_out(by_distance, *strip(*lengths))
    ours = jax.jit(looped_attention)(query, key, value, bias=bias, **given)
    bias = spelled_out(by_distance, *lengths)
    theirs = plain(query, key, value, bias, None, query_segments, key_segments, False, 1.0)
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


DROPOUT_SEED = 5


def batch_of(rows=8, length=24):
    random = np.random.default_rng(1)
    segments = np.sort(random.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segments[:, -2:] = 0
    return {
        "encoder_input_tokens": random.integers(1, 64, (rows, length)).astype(np.int32),
        "encoder_segment_ids": segments,
        "decoder_input_tokens": random.integers(0, 64, (rows, length)).astype(np.int32),
        "decoder_segment_ids": segments,
    }


@functools.cache
def params_of(config):
    return jax.jit(Model(config).init)(jax.random.key(0))


@functools.cache
def plain_result(config, *, rows, dropout=False):
    """Loss and gradient without a kernel, computed once for all kernels."""
    config = dataclasses.replace(config, attention="xla")
    key = jax.random.key(DROPOUT_SEED) if dropout else None
    return loss_and_gradient(config, params_of(config), batch_of(rows), key)


def loss_and_gradient(config, params, batch, dropout_key=None):
    def loss(params):
        states = Model(config).bind(params).forward(batch, dropout_key=dropout_key)
        return jnp.sum(jnp.sin(states) * (batch["decoder_segment_ids"] > 0)[..., None])

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_close(ours, theirs):
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=str(path))


def test_branches_see_what_they_share_and_themselves():
    """The mask of a tree: from the definition, and the same attention from the loop."""
    # Texts of row 0: 0 1 2 | 3 4 and 0 1 2 | 5 6 7, another segment, padding.
    segments = jnp.asarray([[1] * 8 + [2] * 3 + [0]])
    reach = jnp.asarray([[7, 6, 5, 1, 0, 2, 1, 0, 2, 1, 0, 0]])
    positions = jnp.asarray([[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 0]])
    branches = Branches.of(reach, positions)
    texts = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [8, 9, 10]]
    for window in (None, 3):
        expected = np.zeros((12, 12), bool)
        for text in texts:
            for place, token in enumerate(text):
                first = 0 if window is None else max(0, place + 1 - window)
                expected[token, text[first : place + 1]] = True
        mask = segment_mask(segments, segments, causal=True, window=window, branches=branches)
        assert np.array_equal(mask[0, 0], expected)

    query, key, value, *_ = inputs(batch=1, queries=12, keys=12, kv_heads=2)
    given = {"query_segments": segments, "key_segments": segments, "causal": True}

    @jax.jit
    def loop(query):
        return looped_attention(query, key, value, until=branches.until, **given)[:, :11]

    @jax.jit
    def whole(query):
        tree = segment_mask(segments, segments, causal=True, branches=branches)
        return dot_product_attention(query, key, value, mask=tree)[:, :11]

    assert np.allclose(loop(query), whole(query), atol=3e-6)
    ours, theirs = (
        jax.jit(jax.grad(lambda q, f=f: jnp.sum(f(q) ** 2)))(query) for f in (loop, whole)
    )
    assert np.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kernel", ["looped", "pallas_interpret", "triton_interpret"])
def test_model_is_the_same_with_dropout_and_a_bias_per_layer(kernel):
    config = dataclasses.replace(CONFIG, dropout_rate=0.1, relpos_per_layer=True)
    with_kernel = dataclasses.replace(config, attention=kernel)
    ours = loss_and_gradient(
        with_kernel, params_of(config), batch_of(rows=2), jax.random.key(DROPOUT_SEED)
    )
    assert_close(ours, plain_result(config, rows=2, dropout=True))


@pytest.mark.parametrize("kernel", ["looped", "pallas_interpret", "triton_interpret"])
def test_sharded_equals_unsharded(kernel):
    """Of a kernel on eight devices; unsharded, without a kernel."""
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    config = dataclasses.replace(CONFIG, attention=kernel)
    params, batch = params_of(CONFIG), batch_of()
    alone = plain_result(CONFIG, rows=8)
    with partitioning.use(partitioning.make_mesh(axes)) as mesh:
        placed = jax.device_put(params, partitioning.param_shardings(Model(config), mesh))
        sharded = loss_and_gradient(config, placed, partitioning.global_batch(batch, mesh))
    assert_close(sharded, alone)


def test_auto_takes_the_kernel_of_gpus_there(monkeypatch):
    monkeypatch.setattr("models.attention.platform", lambda: "gpu")
    long, short = jnp.ones((1, 512), jnp.int32), jnp.ones((1, 12), jnp.int32)

    def choice(queries, keys, **needs):
        given = {"head_dim": 64, "dtype": "bfloat16"} | needs
        return plan_attention("auto", queries, keys, **given).kernel

    assert choice(long, long) == choice(short, long) == find("triton")
    assert choice(short, short) == find("xla")
    assert choice(long, long, head_dim=80) == find("xla")
    assert choice(long, long, causal=True, window=64) == find("xla")


def test_auto_loops_over_long_rows_on_a_cpu_and_explicit_choices_are_kept():
    def choice(setting, length, dtype="bfloat16", **more):
        ids = jnp.ones((1, length), jnp.int32)
        plan = plan_attention(setting, ids, ids, **{"head_dim": 64, "dtype": dtype} | more)
        return plan.kernel

    assert choice("auto", 512) == find("looped")
    assert choice("auto", 128) == find("xla")
    assert choice("auto", 512, softcap=True) == find("xla")
    assert choice("looped", 8) == find("looped")
    assert choice("pallas", 8) == find("pallas")
    assert choice("xla", 512) == find("xla")
    assert choice("models.kernels.looped:KERNEL", 8) == find("looped")
    with pytest.raises(ValueError, match="computes in bfloat16 only"):
        choice("cudnn", 512, dtype="float32")
    with pytest.raises(ValueError, match="needs a head size"):
        choice("pallas", 512, head_dim=80)
    with pytest.raises(ValueError, match="attention='looped' has no softcap"):
        choice("looped", 512, softcap=True)


@pytest.mark.parametrize("kernel", ["looped", "pallas_interpret", "triton_interpret"])
def test_decoder_only_models_have_them_too(kernel):
    config = DecoderConfig(
        vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16
    )
    params, batch = params_of(config), batch_of(rows=2)
    ours = loss_and_gradient(dataclasses.replace(config, attention=kernel), params, batch)
    assert_close(ours, plain_result(config, rows=2))
    windowed = dataclasses.replace(config, window=4, attention=kernel)
    with pytest.raises(ValueError, match="has no window"):
        loss_and_gradient(windowed, params, batch)


def test_cudnn_is_lowered_for_gpus(monkeypatch):
    # There is no GPU here: this shows that shapes and dtypes pass cuDNN's own checks, no more.
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    config = dataclasses.replace(CONFIG, attention="cudnn", dtype="bfloat16")
    batch = batch_of(rows=2)

    def loss(params):
        return jnp.sum(Model(config).bind(params).forward(batch).astype(jnp.float32))

    shapes = Model(config).shapes()
    lowered = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in lowered
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in lowered
