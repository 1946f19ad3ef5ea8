"""Attention against plain NumPy in float64; the relative bias against T5's definition."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import RopeScaling, T5Config
from models.kernels.plain import dot_product_attention
from models.kernels.segments import segment_mask
from models.model import Model
from models.positions import rotary, rotate, segment_positions
from models.relative_bias import RelativePositionBias


def bucket_of(relative: int, bidirectional: bool, buckets: int = 32, max_distance: int = 128):
    """T5's definition, one number at a time; thresholds as exact powers, no rounding involved."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    spaced = buckets - exact
    # The largest n with distance >= exact * (max_distance / exact) ** (n / spaced).
    n = max(
        n
        for n in range(spaced)
        if distance**spaced * exact**n >= exact**spaced * max_distance**n  # integers
    )
    return offset + exact + n


def bias_module(table, bidirectional: bool, max_distance: int = 128):
    heads, buckets = table.shape
    module = RelativePositionBias(heads, buckets, max_distance, bidirectional=bidirectional)
    module.rel_embedding.set_value(table)
    return module


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(300, 300, 0), (5, 40, 0), (1, 200, 150)])
def test_relative_bias_is_the_bucket_of_each_pair(bidirectional, queries, keys, offset):
    table = jax.random.normal(jax.random.key(0), (3, 32))
    bias = bias_module(table, bidirectional)(queries, keys, offset)
    buckets = np.array(
        [[bucket_of(k - q - offset, bidirectional) for k in range(keys)] for q in range(queries)]
    )
    assert bias.shape == (1, 3, queries, keys)
    np.testing.assert_array_equal(bias[0], np.asarray(table)[:, buckets])


def test_relative_bias_offset_may_be_traced():
    table = jax.random.normal(jax.random.key(0), (2, 32))
    module = bias_module(table, bidirectional=False)
    whole = module(40, 40)
    step = jax.jit(lambda index: bias_module(table, bidirectional=False)(1, 40, index))
    for index in (0, 1, 17, 39):
        np.testing.assert_array_equal(step(index), whole[:, :, index : index + 1])


def test_relative_bias_gradient_counts_every_pair():
    table = jnp.zeros((2, 32))
    weights = jax.random.normal(jax.random.key(1), (1, 2, 150, 170))
    gradient = jax.grad(lambda t: jnp.sum(bias_module(t, True)(150, 170) * weights))(table)
    expected = np.zeros((2, 32))
    for q in range(150):
        for k in range(170):
            expected[:, bucket_of(k - q, True)] += weights[0, :, q, k]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_buckets_agree_with_transformers():
    torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = np.arange(-700, 701)
    for bidirectional in (True, False):
        theirs = t5.T5Attention._relative_position_bucket(
            torch.tensor(relative), bidirectional=bidirectional
        )
        ours = [bucket_of(int(r), bidirectional) for r in relative]
        np.testing.assert_array_equal(ours, theirs.numpy())


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.booleans(), st.integers(1, 5))
def test_segment_mask_by_its_definition(segments, causal, window):
    segments = segments + [0] * (12 - len(segments))  # one shape: operations are compiled once
    ids = jnp.array([segments])
    mask = np.asarray(segment_mask(ids, ids, causal=causal, window=window))
    for q, query in enumerate(segments):
        for k, key in enumerate(segments):
            near = 0 <= q - k < window if causal else abs(q - k) < window
            visible = query == key and key > 0 and near
            assert bool(mask[0, 0, q, k]) == visible


def test_cross_mask_joins_equal_segments():
    mask = segment_mask(jnp.array([[1, 2, 0]]), jnp.array([[1, 1, 2, 3, 0]]))
    expected = [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(mask[0, 0].astype(int), expected)


def test_positions_start_anew_in_every_segment():
    ids = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0], [0, 0, 1, 1, 1, 1, 2, 2]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 0, 1]]
    np.testing.assert_array_equal(segment_positions(ids), expected)


def plain_attention(query, key, value, bias, mask, scale, softcap):
    """One query of one head at a time, float64."""
    batch, queries, heads, _ = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                scores = key[b, :, h // group] @ query[b, q, h] * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                scores = np.where(mask[b, 0, q], scores + bias[0, h, q], -np.inf)
                weights = np.exp(scores - scores.max())
                out[b, q, h] = weights / weights.sum() @ value[b, :, h // group]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_attention_by_its_definition(heads, kv_heads, softcap):
    random = np.random.default_rng(0)
    query = random.normal(size=(2, 5, heads, 8))
    key, value = random.normal(size=(2, 2, 7, kv_heads, 8))
    bias = random.normal(size=(1, heads, 5, 7))
    mask = random.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    attend = jax.jit(dot_product_attention, static_argnames=("scale", "softcap"))
    got = attend(
        *(jnp.asarray(x, jnp.float32) for x in (query, key, value)),
        bias=jnp.asarray(bias, jnp.float32),
        mask=mask,
        scale=0.7,
        softcap=softcap,
    )
    expected = plain_attention(query, key, value, bias, mask, 0.7, softcap)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_hidden_keys_have_no_influence_and_hidden_rows_are_finite():
    random = np.random.default_rng(0)
    query, key, value = (jnp.asarray(random.normal(size=(1, 4, 2, 8)), jnp.float32) for _ in "qkv")
    mask = jnp.array([[1, 1, 0, 0]] * 3 + [[0, 0, 0, 0]], bool)[None, None]
    attended = dot_product_attention(query, key, value, mask=mask)
    changed = dot_product_attention(
        query, key.at[:, 2:].set(1e4), value.at[:, 2:].set(1e4), mask=mask
    )
    np.testing.assert_array_equal(attended[:, :3], changed[:, :3])
    assert np.isfinite(attended).all()


def test_attention_dropout_is_shared_by_queries():
    uniform = jnp.zeros((2, 6, 3, 6))
    identity = jnp.broadcast_to(jnp.eye(6)[None, :, None], (2, 6, 3, 6))
    weights = dot_product_attention(
        uniform,
        uniform,
        identity,
        dropout_rate=0.5,
        dropout_key=jax.random.key(0),
        dropout_broadcast=(2,),
    )  # [batch, queries, heads, keys], thanks to the identity
    np.testing.assert_array_equal(weights, jnp.broadcast_to(weights[:, :1], weights.shape))
    assert set(np.unique(np.round(weights, 6))) == {0.0, np.float32(round(2 / 6, 6))}


def test_rotation_is_a_complex_product():
    positions = jnp.array([[0, 1, 5, 300]])
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    rotated = rotate(x, rotary(positions, 8, 10_000.0))
    turn = np.exp(1j * np.array([0, 1, 5, 300])[:, None] * 10_000.0 ** (-np.arange(4) / 4))
    z = (np.asarray(x)[..., :4] + 1j * np.asarray(x)[..., 4:]) * turn[None, :, None]
    np.testing.assert_allclose(rotated, np.concatenate([z.real, z.imag], -1), atol=1e-4)


def test_rotated_scores_depend_on_differences_of_positions():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(q, k):
        turned_query = rotate(query, rotary(jnp.array([[q]]), 16, 10_000.0))
        turned_key = rotate(key, rotary(jnp.array([[k]]), 16, 10_000.0))
        return float(jnp.sum(turned_query * turned_key))

    assert score(17, 5) == pytest.approx(score(112, 100), abs=1e-4)
    assert score(17, 5) != pytest.approx(score(17, 6), abs=1e-2)


def test_llama3_scaling_spares_fast_frequencies_and_divides_slow_ones():
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_frequency_factor=1,
        high_frequency_factor=4,
        original_length=64,
    )
    position = jnp.array([[1]])
    cos, sin = rotary(position, 32, 10_000.0, scaling)
    plain_cos, plain_sin = rotary(position, 32, 10_000.0)
    angle, plain = np.arctan2(sin, cos)[0, 0, 0], np.arctan2(plain_sin, plain_cos)[0, 0, 0]
    turns = 64 * plain / (2 * math.pi)
    np.testing.assert_allclose(angle[turns > 4], plain[turns > 4], rtol=1e-5)
    np.testing.assert_allclose(angle[turns < 1], plain[turns < 1] / 8, rtol=1e-4)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((angle < plain) & (angle > plain / 8))[between].all()


def test_queries_may_absorb_the_projections_of_keys_and_values():
    config = T5Config(
        vocab_size=50,
        d_model=24,
        d_ff=16,
        num_heads=3,
        d_kv=8,
        num_encoder_layers=1,
        num_decoder_layers=2,
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    random = np.random.default_rng(0)
    tokens = random.integers(1, 50, (2, 30))
    segments = np.sort(random.integers(1, 5, tokens.shape), axis=1)
    segments[1, -6:] = 0
    documents = np.array([[1, 2, 3, 4], [1, 2, 3, 0]])  # one question each

    @functools.partial(jax.jit, static_argnums=1)
    def answer(params, absorb):
        module = model.bind(params)
        encoded = module.encode(tokens, segments)
        starts = jnp.zeros_like(documents)
        return module.decode(encoded, segments, starts, documents, absorb=absorb)

    asked = documents > 0
    np.testing.assert_allclose(
        answer(params, True)[asked], answer(params, False)[asked], rtol=1e-5, atol=1e-5
    )
