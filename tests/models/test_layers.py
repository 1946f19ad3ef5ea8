"""Products and their gradients, dropout, and stacks: stacked, unrolled and rematerialised alike."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import REMAT, DecoderConfig, T5Config
from models.layers import dropout, einsum
from models.model import Model, stack_layers

T5 = T5Config(
    vocab_size=60,
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
    dropout_rate=0.2,
)
LLAMA = DecoderConfig(
    vocab_size=60,
    d_model=16,
    d_ff=24,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    window=5,
    global_every=2,
    local_rope_theta=100.0,
    dropout_rate=0.2,
)


@pytest.mark.parametrize("subscripts", ["bli,io->blo", "bqgrd,bkgd->bgrqk", "bgrqk,bkgd->bqgrd"])
def test_einsum_and_its_gradients_are_those_of_numpy(subscripts):
    sizes = dict(zip("bliogrqkd", (2, 3, 4, 5, 2, 3, 4, 5, 6), strict=True))
    inputs, out = subscripts.split("->")
    left, right = inputs.split(",")
    shapes = [tuple(sizes[index] for index in term) for term in (left, right, out)]
    x, y, cotangent = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)
    )

    result, pullback = jax.vjp(lambda x, y: einsum(subscripts, x, y), x, y)
    expected, expected_pullback = jax.vjp(
        lambda x, y: jnp.einsum(subscripts, x, y, precision="highest"), x, y
    )
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_accumulate_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 3, 4096), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (4096, 5))
    result, pullback = jax.vjp(lambda k: einsum("bli,io->blo", x, k, jnp.float32), kernel)
    rounded = np.asarray(kernel.astype(jnp.bfloat16), np.float64)
    exact = np.asarray(x, np.float64) @ rounded
    np.testing.assert_allclose(result, exact, rtol=1e-5, atol=1e-3)
    (gradient,) = pullback(jnp.ones_like(result))
    assert gradient.dtype == jnp.float32


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean():
    x = jnp.ones((200, 500))
    dropped = dropout(x, 0.3, jax.random.key(0))
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.01)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.01)
    shared = dropout(x, 0.3, jax.random.key(0), broadcast=(1,))
    np.testing.assert_array_equal(shared, jnp.broadcast_to(shared[:, :1], x.shape))
    assert dropout(x, 0.3, None) is x


def examples(config) -> dict:
    random = np.random.default_rng(0)
    tokens = random.integers(2, config.vocab_size, (3, 4, 13))
    return {"encoder_input_tokens": tokens[0], "decoder_input_tokens": tokens[1, :, :9]}


UNROLLED = {"scan_layers": False}
SWEEP = pytest.mark.sweep
RUNS = [
    pytest.param(T5, {"remat": name}, marks=[] if name == "full" else SWEEP) for name in REMAT[1:]
]
# Unrolled without remat is the decoder's case, and that of the bfloat16 encoder below.
RUNS += [pytest.param(T5, UNROLLED, marks=SWEEP)]
RUNS += [(T5, UNROLLED | {"remat": "dots"}), (LLAMA, UNROLLED)]


@pytest.mark.parametrize(
    ("config", "run"),
    RUNS,
    ids=lambda value: value.family if hasattr(value, "family") else str(value),
)
def test_running_otherwise_changes_nothing(config, run):
    """Stacked or unrolled layers, every remat policy: the same loss and gradients, with dropout."""
    expected, expected_gradient = loss_and_gradient(config)
    value, gradient = loss_and_gradient(dataclasses.replace(config, **run))
    assert value == pytest.approx(float(expected), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient,
        expected_gradient,
    )


@functools.cache
def loss_and_gradient(config):
    """Of a stacked model's parameters, whichever way this one runs."""
    model, batch = Model(config), examples(config)
    params = params_of(config)

    def loss(params):
        logits = model.bind(params)(batch, dropout_key=jax.random.key(5))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return value, gradient if config.scan_layers else jax.jit(stack_layers)(gradient)


def params_of(config):
    model = Model(dataclasses.replace(config, remat=T5.remat))  # the same parameters
    return initial(model)


@functools.cache
def initial(model: Model):
    return jax.jit(model.init)(jax.random.key(0))


def test_stacked_layers_in_bfloat16_are_the_unrolled_ones_and_so_are_their_gradients():
    # On a CPU they are sliced by a function with a gradient of its own.
    config = dataclasses.replace(T5, dtype="bfloat16", dropout_rate=0.0, num_decoder_layers=0)
    unrolled = dataclasses.replace(config, scan_layers=False)
    params = jax.jit(Model(unrolled).init)(jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 1, 60)

    def run(config, params):
        def loss(params):
            return jnp.sum(jnp.sin(Model(config).bind(params).encode(tokens).astype(jnp.float32)))

        return jax.jit(jax.value_and_grad(loss))(params)

    stack = jax.jit(stack_layers)
    ours, theirs = run(config, stack(params)), run(unrolled, params)
    theirs = theirs[0], stack(theirs[1])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02 * np.abs(b).max())


def test_dropout_follows_its_key():
    model = Model(T5)
    params = initial(model)
    run = jax.jit(lambda params, key: model.bind(params)(examples(T5), dropout_key=key))
    first, again, other = (np.asarray(run(params, jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first != np.asarray(run(params, None))).any()


def test_token_beyond_the_vocabulary_is_not_a_number():
    """A wrong vocabulary must be seen at once."""
    model = Model(T5)
    tokens = np.array([[5, 6, 60]])
    encode = jax.jit(lambda params: model.bind(params).encode(tokens))
    assert np.isnan(encode(initial(model))).any()
