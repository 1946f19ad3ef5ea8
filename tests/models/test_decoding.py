"""Decoding finds what transformers finds, and what the definition says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import partitioning
from models.config import DecoderConfig, T5Config, T5GemmaConfig
from models.decoding import Beam, Greedy, Sample, _draw, _generate, generate
from models.model import Model, stack_layers
from models.weights import huggingface

STEPS = 12
ENDS = (1, 5, 7, 11, 13, 17, 19, 23)  # of 96 tokens: random models do end
T5 = T5Config(
    vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2,
)  # fmt: skip
LLAMA = DecoderConfig(
    vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)
GPT2 = dataclasses.replace(
    LLAMA, num_kv_heads=4, max_length=64, positions="learned", norm="layer", activation="gelu",
    gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=True,
)  # fmt: skip
MODELS = {
    "t5": T5,
    "t5_tied": dataclasses.replace(T5, tie_embeddings=True, activation="relu", gated=False),
    "umt5": dataclasses.replace(T5, relpos_per_layer=True, scan_layers=False),
    "llama": LLAMA,
    "gpt2": GPT2,
    "gemma3": dataclasses.replace(
        LLAMA, num_layers=4, window=3, global_every=2, local_rope_theta=100.0, norm_offset=1.0,
        post_norms=True, qk_norm=True, embedding_scale=32**0.5, tie_embeddings=True,
        attention_scale=0.25, activation="gelu",
    ),
}  # fmt: skip
GEMMA2 = dataclasses.replace(
    LLAMA, num_layers=4, window=3, global_every=2, norm_offset=1.0, post_norms=True,
    embedding_scale=32**0.5, tie_embeddings=True, attention_scale=0.25, attention_softcap=5.0,
    logit_softcap=4.0, activation="gelu", bos_id=0,
)  # fmt: skip
MODELS["t5gemma"] = T5GemmaConfig(
    **{field.name: getattr(GEMMA2, field.name) for field in dataclasses.fields(GEMMA2)},
    encoder=dataclasses.replace(
        GEMMA2, d_model=48, num_layers=2, window=2, embedding_scale=48**0.5
    ),
)
TOKENS = np.random.default_rng(0).integers(2, 96, (3, 7)).astype(np.int32)
LENGTHS = np.array([7, 4, 1])


@functools.cache
def random_model(name: str):
    """A model whose next token is neither certain nor arbitrary."""
    model = Model(MODELS[name])
    spread = 0.1 if model.config.has_encoder else 0.3

    def draw(key):
        params = model.init(key)
        return jax.tree.map(lambda x: x + spread * jax.random.normal(key, x.shape), params)

    return model, jax.jit(draw)(jax.random.key(1))


def inputs(model: Model) -> dict:
    """Rows of several lengths, padded."""
    tokens = np.where(np.arange(7) < LENGTHS[:, None], TOKENS, 0)
    if model.config.has_encoder:
        return {"tokens": tokens}
    return {"tokens": tokens, "lengths": LENGTHS}


def likelihoods(model: Model, params, generated: np.ndarray) -> np.ndarray:
    """Log-probabilities [rows, STEPS, vocab] along generated texts, without a cache.

    The model's own pass over whole texts; what follows a text is in nobody's past.
    """
    tokens = inputs(model)["tokens"]
    if model.config.has_encoder:
        shifted = np.pad(generated[:, :-1], ((0, 0), (1, 0)))
        batch = {"encoder_input_tokens": tokens, "decoder_input_tokens": shifted}
        first = np.zeros(len(tokens), int)
    else:
        whole = np.pad(tokens, ((0, 0), (0, STEPS)))
        for row, length in enumerate(LENGTHS):
            whole[row, length : length + STEPS] = generated[row]
        batch = {"decoder_input_tokens": whole}
        first = LENGTHS - 1
    at = first[:, None] + np.arange(STEPS)
    found = np.asarray(log_probabilities(model, params, batch))
    return found[np.arange(len(tokens))[:, None], at]


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(model: Model, params, batch):
    return jax.nn.log_softmax(model.bind(params)(batch))


@pytest.mark.parametrize(
    "name",
    # Texts of a tied T5 and of a Llama are compared with those of transformers below.
    [
        pytest.param(name, marks=pytest.mark.sweep if name in ("t5_tied", "llama") else ())
        for name in MODELS
    ],
)
def test_the_cache_changes_nothing(name):
    """Each greedy token is the likeliest after those before it, and the scores add up."""
    model, params = random_model(name)
    found = generate(model, params, **inputs(model), max_new_tokens=STEPS, eos_ids=ENDS)
    tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
    expected = likelihoods(model, params, tokens)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[row, :length], expected[row, :length].argmax(axis=1))
        total = expected[row, :length].max(axis=1).sum()
        np.testing.assert_allclose(found.scores[row], total, rtol=1e-5)
        assert np.all(tokens[row, length:] == model.config.pad_id)
        assert not np.isin(tokens[row, : length - 1], ENDS).any()
        assert length == STEPS or tokens[row, length - 1] in ENDS


@pytest.mark.parametrize("name", ["t5", "llama"])
@pytest.mark.parametrize("how", [Greedy(), Beam(beams=4, length_penalty=0.6, keep=2), Sample()])
def test_rows_do_not_depend_on_their_neighbors(name, how):
    model, params = random_model(name)
    given = inputs(model)
    settings = {"how": how, "max_new_tokens": STEPS, "eos_ids": ENDS}
    if isinstance(how, Sample):
        settings["key"] = jax.random.key(3)
    expected = generate(model, params, **given, **settings)
    others = given | {"tokens": np.concatenate([given["tokens"][:1], TOKENS[1:, ::-1]])}
    found = generate(model, params, **others, **settings)
    np.testing.assert_array_equal(found.tokens[0], expected.tokens[0])
    np.testing.assert_array_equal(found.scores[0], expected.scores[0])
    assert not np.array_equal(found.tokens, expected.tokens)


@pytest.mark.parametrize("name", ["umt5", "gemma3"])
def test_padding_changes_nothing(name):
    model, params = random_model(name)
    given, settings = inputs(model), {"max_new_tokens": STEPS, "eos_ids": ENDS}
    expected = generate(model, params, **given, **settings)
    wider = given | {"tokens": np.pad(given["tokens"], ((0, 0), (0, 5)))}
    found = generate(model, params, **wider, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)


def test_one_beam_is_greedy():
    model, params = random_model("gpt2")
    settings = {"max_new_tokens": STEPS, "eos_ids": ENDS}
    greedy = generate(model, params, **inputs(model), **settings)
    one = Beam(beams=1, length_penalty=0.0)
    beam = generate(model, params, **inputs(model), how=one, **settings)
    np.testing.assert_array_equal(greedy.tokens, beam.tokens[:, 0])
    np.testing.assert_allclose(greedy.scores, beam.scores[:, 0], rtol=1e-6)


def test_wide_beams_find_the_best_of_all_sequences():
    """With beams as wide as the space the search is exhaustive: compare with all 3-token texts."""
    model = Model(dataclasses.replace(LLAMA, vocab_size=6, num_layers=1))
    params = jax.jit(lambda key: jax.tree.map(lambda x: 4 * x, model.init(key)))(jax.random.key(0))
    prompt = np.array([[2, 3]], np.int32)
    texts = np.stack(np.meshgrid(*[np.arange(6)] * 3, indexing="ij"), -1).reshape(-1, 3)
    whole = np.concatenate([np.repeat(prompt, len(texts), axis=0), texts], axis=1)
    known = np.asarray(log_probabilities(model, params, {"decoder_input_tokens": whole}))
    gained = np.take_along_axis(known[:, 1:-1], texts[..., None], 2)[..., 0]
    best: dict[tuple, float] = {}
    for text, scores in zip(texts, gained, strict=True):
        ends = np.flatnonzero(text == 1)
        length = ends[0] + 1 if len(ends) else 3
        best[tuple(text[:length])] = scores[:length].sum() / length**0.7
    ranked = sorted(best, key=best.get, reverse=True)[:5]
    how = Beam(beams=40, keep=5, length_penalty=0.7, early_stopping="never")
    found = jax.device_get(generate(model, params, prompt, max_new_tokens=3, how=how))
    for text, tokens, length, score in zip(
        ranked, found.tokens[0], found.lengths[0], found.scores[0], strict=True
    ):
        assert tuple(np.asarray(tokens[:length]).tolist()) == text
        np.testing.assert_allclose(score, best[text], rtol=1e-5)


# --------------------------------------------------------------------------------------------------
# Sampling


def test_sampling_is_reproducible_and_scored():
    model, params = random_model("t5")
    settings = {"max_new_tokens": STEPS, "how": Sample(), "eos_ids": ENDS}
    a, b, c = (
        generate(model, params, **inputs(model), key=jax.random.key(seed), **settings)
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert not np.array_equal(a.tokens, c.tokens)
    expected = likelihoods(model, params, np.asarray(a.tokens))
    for row, length in enumerate(np.asarray(a.lengths)):
        gained = expected[row, np.arange(length), a.tokens[row, :length]].sum()
        np.testing.assert_allclose(a.scores[row], gained, rtol=1e-5)


def test_top_k_of_one_is_greedy():
    model, params = random_model("llama")
    settings = {"max_new_tokens": STEPS, "eos_ids": ENDS}
    greedy = generate(model, params, **inputs(model), **settings)
    settings |= {"how": Sample(top_k=1), "key": jax.random.key(0)}
    sampled = generate(model, params, **inputs(model), **settings)
    np.testing.assert_array_equal(sampled.tokens, greedy.tokens)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Sample(), [0.5, 0.25, 0.15, 0.1]),
        (Sample(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sample(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sample(top_p=0.7), [2 / 3, 1 / 3, 0, 0]),
        (Sample(top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0]),
        (Sample(top_k=3, top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # 0.5 / 0.9 < 0.6: a second is needed
    ],
)
def test_sampled_frequencies_are_those_of_the_cut_distribution(how, expected):
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1])), (20_000, 4))
    drawn = np.asarray(jax.jit(_draw, static_argnums=0)(how, jax.random.key(0), logits, 0))
    frequencies = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(frequencies, expected, atol=0.015)
    assert np.all((frequencies > 0) == (np.array(expected) > 0))


# --------------------------------------------------------------------------------------------------
# Against transformers


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """name -> a random transformers model, and the same loaded here."""
    torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")

    def make(name: str):
        model, params = random_model(name)
        path = tmp_path_factory.mktemp(name)
        huggingface.save(path, model, params)
        encoder_decoder = model.config.has_encoder
        kind = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
        theirs = getattr(transformers, kind).from_pretrained(path).eval()
        theirs.config.tie_word_embeddings = model.config.tie_embeddings
        return model, params, theirs, torch

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_as_transformers(reference, name):
    """Greedy, and beams under every penalty and way of stopping, two sequences a row."""
    model, params, theirs, torch = reference(name)
    ways: list = [(Greedy(), {})]
    for beams, penalty, stopping in [(4, 0.6, False), (3, 1.0, True), (2, 2.0, "never")]:
        settings = {"num_beams": beams, "length_penalty": penalty, "early_stopping": stopping}
        how = Beam(beams=beams, length_penalty=penalty, early_stopping=stopping, keep=2)
        ways.append((how, settings | {"num_return_sequences": 2}))
    if name not in ("t5", "llama"):
        ways = ways[:2]
    for how, settings in ways:
        found = generate(
            model, params, **inputs(model), max_new_tokens=STEPS, how=how, eos_ids=ENDS
        )
        for row in range(len(LENGTHS)):
            prompt = torch.tensor(TOKENS[row : row + 1, : LENGTHS[row]], dtype=torch.long)
            with torch.no_grad():
                expected = theirs.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=STEPS,
                    do_sample=False,
                    eos_token_id=list(ENDS),
                    return_dict_in_generate=True,
                    output_scores=True,
                    **settings,
                )
            start = 1 if model.config.has_encoder else prompt.shape[1]
            tokens = np.asarray(found.tokens[row]).reshape(-1, STEPS)
            lengths = np.asarray(found.lengths[row]).reshape(-1)
            others = expected.sequences[:, start:].numpy()
            for mine, length, other in zip(tokens, lengths, others, strict=True):
                np.testing.assert_array_equal(mine[:length], other[:length])
                assert length == STEPS or mine[length - 1] in ENDS
            if settings:
                scores = expected.sequences_scores.numpy()
                np.testing.assert_allclose(found.scores[row], scores, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# Around it


def test_layouts_dtypes_and_shardings_agree(eight_devices):
    model, params = random_model("umt5")
    # The search of the comparison with transformers, whose program serves here.
    how = Beam(beams=4, length_penalty=0.6, keep=2)
    settings = {"max_new_tokens": STEPS, "how": how, "eos_ids": ENDS}
    expected = generate(model, params, **inputs(model), **settings)
    stacked = Model(dataclasses.replace(model.config, scan_layers=True))
    found = generate(stacked, stack_layers(params), **inputs(model), **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    mesh = partitioning.make_mesh({"data": -1, "fsdp": 2, "tensor": 4}, eight_devices)
    placed = jax.device_put(params, partitioning.param_shardings(model, mesh))
    found = generate(model, placed, **inputs(model), **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    short = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    found = generate(short, half, **inputs(model), **settings)
    assert np.isfinite(found.scores).all()


def test_one_program_for_a_shape():
    model, params = random_model("llama")
    _generate.clear_cache()
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(2, 96, (2, 5)).astype(np.int32)
        lengths = np.array([5, seed + 1])
        generate(model, params, tokens, lengths=lengths, max_new_tokens=4)
    assert _generate._cache_size() == 1


def test_bad_requests_are_refused():
    model, params = random_model("gpt2")
    with pytest.raises(ValueError, match="64 positions"):
        generate(model, params, TOKENS, max_new_tokens=59)
    with pytest.raises(ValueError, match="Sample needs a key"):
        generate(model, params, TOKENS, max_new_tokens=2, how=Sample())
    with pytest.raises(ValueError, match="between 1 and beams"):
        Beam(beams=2, keep=3)
    with pytest.raises(ValueError, match="temperature"):
        Sample(temperature=0.0)
    encoder = Model(dataclasses.replace(T5, num_decoder_layers=0))
    with pytest.raises(ValueError, match="encoder only"):
        generate(encoder, {}, TOKENS, max_new_tokens=2)
