"""Likelihoods of continuations and generated text, against the model asked plainly, unpacked."""

import dataclasses

import numpy as np
import pytest

from evaluation import inference
from evaluation.inference import InferenceConfig, Pair
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.loading import find_tokenizer

RNG = np.random.default_rng(0)
PAIRS = [
    Pair(RNG.integers(3, 259, n).tolist(), RNG.integers(3, 259, m).tolist())
    for n, m in [(5, 1), (40, 7), (3, 90), (70, 2), (12, 12), (1, 1), (100, 20), (33, 5), (9, 3)]
]


@pytest.fixture(scope="module")
def small_decoder(tmp_path_factory):
    """A decoder-only model of bytes, with parameters large enough to have opinions."""
    import jax

    from models import weights
    from models.config import DecoderConfig
    from models.model import Model

    config = DecoderConfig(
        vocab_size=384,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    model = Model(config)
    path = tmp_path_factory.mktemp("model") / "decoder"
    weights.save(path, model, jax.jit(model.init)(jax.random.key(1)))
    return path


def config_of(path, **settings):
    given = {"vocabulary": "bytes", "row_length": 128, "batch_rows": 8, "compilation_cache": None}
    return InferenceConfig(str(path), **(given | settings))


@pytest.fixture(scope="module")
def decoder(small_decoder):
    return inference.load(config_of(small_decoder))


@pytest.fixture(scope="module")
def t5(small_model):
    return inference.load(config_of(small_model))


def by_hand(model, pairs):
    """(log-likelihood, whether greedy) of every pair: one a row, with all logits of the model."""
    import jax

    batch = {
        name: np.zeros((48, 320), np.int32)
        for name in ("encoder_input_tokens", "decoder_input_tokens")
    }
    places = []
    for row, (context, continuation) in enumerate(pairs):
        if model.has_encoder:
            given, inputs = [*context, 1], [0, *continuation[:-1]]
            batch["encoder_input_tokens"][row, : len(given)] = given
        else:
            inputs = [*context, *continuation][-(model.max_length + 1) : -1]
        batch["decoder_input_tokens"][row, : len(inputs)] = inputs
        places.append(np.arange(len(inputs) - len(continuation), len(inputs)))
    if "by_hand" not in model._programs:
        ask = jax.jit(lambda params, batch: model.model.bind(params)(batch))
        params = jax.device_get(model._params)
        model._programs["by_hand"] = lambda batch: ask(params, batch)
    logits = np.asarray(model._programs["by_hand"](batch), np.float64)
    found = []
    for row, (at, pair) in enumerate(zip(places, pairs, strict=True)):
        some, target = logits[row, at], np.asarray(pair.continuation)
        log_p = some - some.max(1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
        greedy = (some.argmax(1) == target).all()
        found.append((log_p[np.arange(len(target)), target].sum(), bool(greedy)))
    return found


@pytest.fixture(scope="module", params=["decoder", "t5"])
def model(request):
    return request.getfixturevalue(request.param)


def test_every_pair_has_the_plain_models_likelihood(model):
    found, greedy = model.log_likelihoods(PAIRS)
    expected = by_hand(model, PAIRS)
    np.testing.assert_allclose(found, [value for value, _ in expected], rtol=1e-5)
    assert greedy.tolist() == [best for _, best in expected]


def test_batches_rows_and_neighbors_change_nothing(model, small_decoder, small_model):
    path = small_model if model.has_encoder else small_decoder
    found, _ = model.log_likelihoods(PAIRS)
    for settings in ({"batch_rows": 16}, {"batch_rows": 24, "row_length": 256}):
        other = inference.load(config_of(path, **settings))
        np.testing.assert_allclose(other.log_likelihoods(PAIRS)[0], found, rtol=1e-5)
    reversed_, _ = model.log_likelihoods(PAIRS[::-1])
    np.testing.assert_allclose(reversed_[::-1], found, rtol=1e-5)


@pytest.mark.parametrize("longest, expected", [(1, 128), (64, 128), (65, 256), (600, 1024)])
def test_rows_have_room_for_two_of_the_longest_where_there_is_any(longest, expected):
    lengths = np.array([[longest, 1], [longest // 2, longest // 2]])
    rows = inference.row_lengths(lengths, 1024)
    assert rows[0] == expected and rows[1] <= rows[0]
    assert (lengths <= rows).all()


def test_pairs_that_share_all_but_the_last_token_share_a_computation(model):
    pairs = [Pair(p.context, [*p.continuation[:-1], 50 + k]) for p in PAIRS[:4] for k in range(11)]
    assert max(map(len, model._grouped(pairs))) == inference._CANDIDATES
    found, greedy = model.log_likelihoods(pairs)
    expected = by_hand(model, pairs)
    np.testing.assert_allclose(found, [value for value, _ in expected], rtol=1e-5)
    assert greedy.tolist() == [best for _, best in expected]


def test_the_same_pair_twice_and_an_empty_continuation(model):
    found, greedy = model.log_likelihoods([PAIRS[1], PAIRS[1], Pair([5], [])])
    assert found[0] == found[1] and (found[2], greedy[2]) == (0.0, True)


def test_what_is_too_long_loses_its_beginning_and_is_counted(model):
    before = model.cut
    pair = Pair(RNG.integers(3, 259, 300).tolist(), [40, 41, 42])
    found, _ = model.log_likelihoods([pair, PAIRS[0]])
    assert model.cut == before + 1
    room = model.max_length - 1 if model.has_encoder else model.max_length + 1 - 3
    [(expected, _)] = by_hand(model, [Pair(pair.context[-room:], pair.continuation)])
    assert found[0] == pytest.approx(expected, rel=1e-5)


def test_generated_text_is_what_the_likelihoods_call_greedy(model):
    prompts = [pair.context for pair in PAIRS]
    texts = model.generate(prompts, 6)
    pairs = [Pair(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    assert any(texts) and model.log_likelihoods(pairs)[1].all()


def test_sentinels_are_no_text(t5):
    first = Vocabulary.from_file("bytes").sentinel(0)
    assert t5.decode([100, first, 101, 383]) == Vocabulary.from_file("bytes").decode([100, 101])


def test_whole_documents_are_scored_as_the_scoring_engine_scores_them(t5):
    """Masks and windows come from the scorer; each document by itself is the reference."""
    documents = [RNG.integers(3, 259, n).tolist() for n in (5, 60, 200)]
    likelihood = Likelihood("span", window=64, overlap=16)
    found = t5.document_log_likelihoods(documents, likelihood)
    alone = [t5.document_log_likelihoods([one], likelihood)[0] for one in documents]
    np.testing.assert_allclose(found, alone, rtol=1e-5)
    causal = t5.document_log_likelihoods(documents[:2], Likelihood("causal", window=96, overlap=16))
    expected = by_hand(t5, [Pair([], one) for one in documents[:2]])
    np.testing.assert_allclose(causal, [value for value, _ in expected], rtol=1e-5)


def test_infilling_asks_with_sentinels_and_does_not_score_them(t5, small_model):
    infill = inference.load(config_of(small_model, infill=True))
    first = Vocabulary.from_file("bytes").sentinel(0)
    context, continuation = PAIRS[1]
    found, _ = infill.log_likelihoods([PAIRS[1]])
    asked = [*context, first]
    (whole, _), (sentinel, _) = by_hand(
        t5, [Pair(asked, [first, *continuation]), Pair(asked, [first])]
    )
    assert found[0] == pytest.approx(whole - sentinel, rel=1e-5)


def test_settings_that_cannot_work_say_so(small_decoder, small_model, decoder):
    with pytest.raises(ValueError, match="multiple of 128"):
        config_of(small_decoder, row_length=100)
    with pytest.raises(ValueError, match="infill is for a T5"):
        inference.load(config_of(small_decoder, infill=True))
    with pytest.raises(ValueError, match="give a multiple of 8"):
        inference.load(config_of(small_decoder, batch_rows=3))
    with pytest.raises(ValueError, match="pair 0 has no context"):
        decoder.log_likelihoods([Pair([], [5])])
    with pytest.raises(ValueError, match="raise row_length"):
        decoder.log_likelihoods([Pair([5], [6] * 500)])


def test_the_tokenizer_is_found_beside_the_model_or_asked_for(small_model, small_corpus, tmp_path):
    with pytest.raises(VocabularyError, match=r"Inference\.vocabulary"):
        find_tokenizer(str(small_model))
    assert find_tokenizer(str(small_model), "bytes") == Vocabulary.from_file("bytes")
    assert find_tokenizer(str(small_model), str(small_corpus)).digest == (
        Vocabulary.from_file("bytes").digest
    )


def test_a_training_run_knows_the_vocabulary_of_its_corpus(small_corpus, small_model, tmp_path):
    import train
    from models.optimizers import AdamW
    from pruning.data.stream import StreamConfig

    run = train.TrainConfig(
        output=str(tmp_path / "run"),
        initial_weights=str(small_model),
        tokenizer="corpus",
        data=StreamConfig(str(small_corpus), batch_size=8, input_length=32, target_length=12),
        optimizer=AdamW(),
        steps=1,
    )
    train.train(run)
    assert find_tokenizer(run.output) == Vocabulary.from_file("bytes")
    assert dataclasses.replace(config_of(run.output), vocabulary=None).identity()
