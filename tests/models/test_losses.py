"""Losses against their definition in float64, and chunked against plain, at real vocabularies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.logits import OutputHead, vocabulary_logits
from models.losses import chunked_cross_entropy, cross_entropy, token_log_likelihood

CASES = [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-3, 0.2)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def case(batch, length, d_model, vocab, dtype=jnp.float32):
    """Hidden states, kernel, targets and weights, some of them 0."""
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, d_model), dtype)
    kernel = jax.random.normal(keys[1], (d_model, vocab)) * d_model**-0.5 * 3
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    weights = jax.random.choice(keys[3], jnp.array([0.0, 0.5, 1.0]), (batch, length))
    return hidden, kernel, targets, weights


def definition(logits, targets, weights, z_loss, label_smoothing):
    """T5X's loss, written with the one-hot targets that it is defined by, in float64."""
    logits = np.asarray(logits, np.float64)
    vocab = logits.shape[-1]
    highest = logits.max(-1, keepdims=True)
    log_z = highest + np.log(np.exp(logits - highest).sum(-1, keepdims=True))
    confidence, low = 1 - label_smoothing, label_smoothing / (vocab - 1)
    soft = np.full_like(logits, low)
    np.put_along_axis(soft, np.asarray(targets)[..., None], confidence, -1)
    entropy = -(confidence * np.log(confidence) + (vocab - 1) * low * np.log(low + 1e-20))
    losses = -(soft * (logits - log_z)).sum(-1) - entropy + z_loss * log_z[..., 0] ** 2
    return (losses * np.asarray(weights, np.float64)).sum()


@pytest.mark.parametrize(("z_loss", "label_smoothing"), CASES)
def test_cross_entropy_by_its_definition(z_loss, label_smoothing):
    hidden, kernel, targets, weights = case(3, 7, 16, 101)
    logits = jnp.einsum("bld,dv->blv", hidden, kernel)
    loss, weight, aux = cross_entropy(logits, targets, weights, z_loss, label_smoothing)
    expected = definition(logits, targets, weights, z_loss, label_smoothing)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(weight) == pytest.approx(float(weights.sum()))
    assert float(aux["nll"]) == pytest.approx(definition(logits, targets, weights, 0, 0), rel=1e-6)
    best = np.asarray(logits).argmax(-1) == np.asarray(targets)
    assert float(aux["correct"]) == pytest.approx(float((best * weights).sum()))


@pytest.mark.parametrize(("z_loss", "label_smoothing"), CASES)
def test_cross_entropy_gradient_by_differences(z_loss, label_smoothing):
    hidden, kernel, targets, weights = case(2, 3, 8, 11)
    logits = np.asarray(jnp.einsum("bld,dv->blv", hidden, kernel), np.float64)
    gradient = jax.jit(
        jax.grad(lambda x: cross_entropy(x, targets, weights, z_loss, label_smoothing)[0])
    )(jnp.asarray(logits, jnp.float32))
    gradient = np.asarray(gradient)
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        above, below = (
            definition(logits + sign * step, targets, weights, z_loss, label_smoothing)
            for sign in (1, -1)
        )
        assert float(gradient[index]) == pytest.approx((above - below) / 2e-5, abs=1e-5)


def test_a_perfect_model_has_no_loss_under_label_smoothing():
    """What the subtracted entropy is for."""
    vocab, smoothing = 50, 0.1
    probabilities = np.full((1, 1, vocab), smoothing / (vocab - 1))
    probabilities[0, 0, 4] = 1 - smoothing
    loss, _, _ = cross_entropy(
        jnp.log(probabilities), jnp.array([[4]]), jnp.ones((1, 1)), label_smoothing=smoothing
    )
    assert float(loss) == pytest.approx(0.0, abs=1e-5)


def plain(hidden, kernel, targets, weights, z_loss, label_smoothing, scale, softcap):
    logits = jnp.einsum("bld,dv->blv", hidden, kernel, precision="highest") * scale
    if softcap:
        logits = jnp.tanh(logits / softcap) * softcap
    loss, weight, aux = cross_entropy(logits, targets, weights, z_loss, label_smoothing)
    return loss / weight, aux


def plain_in_models(hidden, kernel, targets, weights, z_loss, label_smoothing, scale, softcap):
    """The loss of a model's logits."""
    logits = vocabulary_logits(hidden, OutputHead(kernel, scale, softcap))
    loss, weight, aux = cross_entropy(logits, targets, weights, z_loss, label_smoothing)
    return loss / weight, aux


def chunked(hidden, kernel, targets, weights, z_loss, label_smoothing, scale, softcap, chunk):
    head = OutputHead(kernel, scale, softcap)
    loss, weight, aux = chunked_cross_entropy(
        hidden, head, targets, weights, z_loss, label_smoothing, chunk=chunk
    )
    return loss / weight, aux


def with_gradients(function, arguments, *settings):
    hidden, kernel, targets, weights = arguments
    differentiated = jax.value_and_grad(
        lambda h, k, w: function(h, k, targets, w, *settings), argnums=(0, 1, 2), has_aux=True
    )
    return jax.jit(differentiated)(hidden, kernel, weights)


def assert_close(got, expected, tolerance):
    """To `tolerance` of the largest number of each array."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()),
        got,
        expected,
    )


SMALL = (6, 7, 16, 101)


@functools.cache
def plain_of_small_case(*settings):
    """Computed once for all chunks."""
    return with_gradients(plain, case(*SMALL), *settings)


@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
@pytest.mark.parametrize(
    ("z_loss", "label_smoothing", "scale", "softcap"),
    [(0.0, 0.0, 1.0, None), (1e-2, 0.1, 0.3, None), (1e-3, 0.0, 1.0, 2.0)],
)
def test_chunked_equals_plain(chunk, z_loss, label_smoothing, scale, softcap):
    """Whatever the chunk: less than a row, a part of every row, all. Value, aux and gradients."""
    arguments = case(*SMALL)
    settings = (z_loss, label_smoothing, scale, softcap)
    expected = plain_of_small_case(*settings)
    got = with_gradients(chunked, arguments, *settings, chunk)
    assert_close(got, expected, 2e-6)
    undifferentiated = jax.jit(lambda h, k, w: chunked(h, k, arguments[2], w, *settings, chunk)[0])
    value = undifferentiated(arguments[0], arguments[1], arguments[3])
    assert float(value) == pytest.approx(float(expected[0][0]), rel=1e-6)


def in_float64(arguments, z_loss):
    """Value and gradients of the weighted mean loss, by its definition, a few tokens at a time."""
    hidden, kernel, targets, weights = (np.asarray(x) for x in arguments)
    kernel = kernel.astype(np.float64)
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64)
    weight = weights.reshape(-1).astype(np.float64)
    losses, by_hidden, by_kernel = np.empty(len(rows)), np.empty_like(rows), np.zeros_like(kernel)
    for start in range(0, len(rows), 32):
        some = slice(start, start + 32)
        logits = rows[some] @ kernel
        wanted = np.arange(len(logits)), targets.reshape(-1)[some]
        highest = logits.max(-1, keepdims=True)
        exponentials = np.exp(logits - highest)
        total = exponentials.sum(-1, keepdims=True)
        log_z = (highest + np.log(total))[:, 0]
        losses[some] = log_z - logits[wanted] + z_loss * log_z**2
        gradient = exponentials / total * (1 + 2 * z_loss * log_z[:, None])
        gradient[wanted] -= 1
        gradient *= weight[some, None] / weight.sum()
        by_hidden[some] = gradient @ kernel.T
        by_kernel += rows[some].T @ gradient
    value = (losses * weight).sum() / weight.sum()
    by_weight = (losses - value) / weight.sum()
    return value, (by_hidden.reshape(hidden.shape), by_kernel, by_weight.reshape(weights.shape))


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [32_128, 256_000])
def test_chunked_equals_plain_at_real_vocabularies(vocab, capsys):
    """Value and gradient, in a fraction of the memory, printed side by side.

    To 5e-6 of float64 and of the loss of a model's logits: about ten times the rounding of a
    normalizer near 15 in float32, which every probability inherits. CPUs differ in the order of
    their sums; errors of 0.9e-6 and of 2.2e-6 of the largest gradient have been seen.
    """
    batch, length, d_model, chunk = 2, 114, 64, 32
    arguments = case(batch, length, d_model, vocab)
    settings = (1e-4, 0.0, 1.0, None)
    got = with_gradients(chunked, arguments, *settings, chunk)
    value, gradients = in_float64(arguments, settings[0])
    assert float(got[0][0]) == pytest.approx(value, rel=1e-6)
    assert_close(got[1], gradients, 5e-6)
    assert_close(got, with_gradients(plain_in_models, arguments, *settings), 5e-6)
    running = with_gradients(plain, arguments, *settings)
    assert_close(got, running, 5e-6)

    peaks = {
        "plain": temporary_bytes(plain, arguments, *settings),
        "chunked": temporary_bytes(chunked, arguments, *settings, chunk),
    }
    with capsys.disabled():
        print(
            f"\nloss and gradient, {batch * length} tokens x {vocab} words: "
            f"plain {peaks['plain'] / 2**20:.0f} MB, "
            f"chunks of {chunk}: {peaks['chunked'] / 2**20:.0f} MB"
        )
    kernel_bytes = arguments[1].nbytes  # its gradient is accumulated in one more such array
    assert peaks["chunked"] < 3 * kernel_bytes + 4 * chunk * vocab * 4
    assert peaks["chunked"] < peaks["plain"] / 2


def test_chunked_memory_does_not_grow_with_the_batch():
    small, large = (
        temporary_bytes(chunked, case(batch, 32, 8, 5000), 0.0, 0.0, 1.0, None, 64)
        for batch in (4, 32)
    )
    # Hidden states and their gradients grow, by 8 numbers a token; logits would by 5000.
    assert large - small < (32 - 4) * 32 * 100 * 4


def temporary_bytes(function, arguments, *settings) -> int:
    """What the compiled loss and gradient allocate beside arguments and results."""
    hidden, kernel, targets, weights = arguments
    compiled = (
        jax.jit(jax.grad(lambda h, k, w: function(h, k, targets, w, *settings)[0], argnums=(0, 1)))
        .lower(hidden, kernel, weights)
        .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_bfloat16_rounds_operands_only():
    """Logits of bfloat16 operands are float32, and the kernel's gradient is not rounded."""
    hidden, kernel, targets, weights = case(4, 9, 64, 300, jnp.bfloat16)
    rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
    exact = hidden.astype(jnp.float32)
    settings = (0.0, 0.0, 1.0, None)
    (value, _), gradients = with_gradients(
        chunked, (hidden, kernel, targets, weights), *settings, 8
    )
    (expected, _), wanted = with_gradients(plain, (exact, rounded, targets, weights), *settings)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32
    assert_close(gradients[1], wanted[1], 1e-2)


@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_token_log_likelihood_by_its_definition(chunk):
    hidden, kernel, targets, _ = case(3, 7, 16, 101)
    logits = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64) * 0.5
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_probabilities, np.asarray(targets)[..., None], -1)[..., 0]

    @jax.jit
    def run(hidden, kernel, targets):
        return token_log_likelihood(hidden, OutputHead(kernel, 0.5), targets, chunk=chunk)

    np.testing.assert_allclose(run(hidden, kernel, targets), expected, rtol=1e-5, atol=1e-5)

    candidates = jnp.stack([targets, jnp.zeros_like(targets)], axis=-1)
    several = run(hidden, kernel, candidates)
    np.testing.assert_allclose(several[..., 0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(several[..., 1], log_probabilities[..., 0], rtol=1e-5, atol=1e-5)


def test_token_log_likelihood_never_holds_all_logits():
    hidden, kernel, targets, _ = case(8, 64, 8, 5000)
    compiled = (
        jax.jit(functools.partial(token_log_likelihood, chunk=32))
        .lower(hidden, OutputHead(kernel), targets)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * 64 * 5000 * 4 / 4
