"""Perplexity against a computation document by document, without packing or windows."""

import json
import math

import numpy as np
import pytest

from evaluation import perplexity
from evaluation.perplexity import Losses, PerplexityConfig
from evaluation.statistics import bootstrap
from pruning.scores.model.likelihood import Likelihood
from pruning.store.artifact import load_artifact


@pytest.fixture(scope="module")
def config(small_corpus, small_model, tmp_path_factory):
    return PerplexityConfig(
        tokenizer="corpus",
        model=str(small_model),
        output=str(tmp_path_factory.mktemp("perplexity") / "out"),
        corpora={"all": str(small_corpus)},
        likelihood=Likelihood("causal", window=192, overlap=32),
        row_length=256,
        batch_rows=8,
        compilation_cache=None,
    )


@pytest.fixture(scope="module")
def result(config):
    return perplexity.evaluate(config)


@pytest.fixture(scope="module")
def by_hand(small_corpus, small_model):
    """(nats, tokens, bytes) of every document: a T5 decoder whose encoder reads EOS only."""
    import jax

    from models import weights

    model, params = weights.load(small_model)
    logits_of = jax.jit(lambda params, batch: model.bind(params)(batch))
    corpus = load_artifact(small_corpus, "corpus")
    rows = [row for shard in range(corpus.num_shards) for row in corpus.read(shard).to_pylist()]
    longest = max(len(row["tokens"]) for row in rows)
    found = []
    for row in rows:
        tokens = row["tokens"]
        inputs = np.zeros((1, longest), np.int32)  # what follows the document is in nobody's past
        inputs[0, 1 : len(tokens)] = tokens[:-1]
        batch = {"encoder_input_tokens": np.ones((1, 1), np.int32), "decoder_input_tokens": inputs}
        logits = np.asarray(logits_of(params, batch)[0, : len(tokens)], np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats = -log_likelihood[np.arange(len(tokens)), tokens].sum()
        found.append((nats, len(tokens), len(row["text"].encode())))
    return np.asarray(found)


def test_it_is_what_a_plain_model_says_document_by_document(result, config, by_hand):
    found = perplexity.read(
        load_artifact(f"{config.output}/all", "scores"),
        load_artifact(config.corpora["all"], "corpus"),
    )
    np.testing.assert_allclose(found.nats, by_hand[:, 0], rtol=1e-5)
    np.testing.assert_array_equal(found.tokens, by_hand[:, 1])
    np.testing.assert_allclose(found.n_bytes, by_hand[:, 2])


def test_the_sums(result, by_hand):
    nats, tokens, n_bytes = by_hand.sum(axis=0)
    found = result["sets"]["all"]
    assert found["documents"] == 48 and found["tokens"] == tokens and found["bytes"] == n_bytes
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    low, high = found["loss_interval"]
    assert low < found["loss"] < high


def test_it_is_finished_once(result, config):
    from pathlib import Path

    file = Path(config.output) / "result.json"
    before = file.read_bytes()
    found = json.loads(json.dumps(perplexity.evaluate(config)))
    assert found == json.loads(before) == json.loads(json.dumps(result))
    assert file.read_bytes() == before


def test_parts_of_a_corpus_add_up_to_the_whole(config, result, small_corpus, tmp_path):
    from pruning.selection import select
    from pruning.selection.strategies import Split

    parts = {}
    for name, low, high in (("one", 0.0, 0.4), ("other", 0.4, 1.0)):
        parts[name] = str(tmp_path / name)
        select.run(
            select.SelectConfig(
                corpus=str(small_corpus), output=parts[name], strategy=Split(low, high)
            )
        )
    import dataclasses

    found = perplexity.evaluate(
        dataclasses.replace(
            config,
            output=str(tmp_path / "out"),
            corpora=dict.fromkeys(parts, str(small_corpus)),
            within=parts,
        )
    )["sets"]
    for key in ("documents", "tokens", "bytes", "nats"):
        both = found["one"][key] + found["other"][key]
        assert both == pytest.approx(result["sets"]["all"][key], rel=1e-6)


def test_bytes_of_tokens_without_a_score_are_left_out():
    """A prefix estimator scores all tokens but the first: bytes shrink in proportion."""
    losses = Losses(np.arange(2), np.array([6.0, 2.0]), np.array([3, 1]), np.array([12.0, 4.0]))
    assert losses.per_token == 2.0
    assert losses.bits_per_byte == pytest.approx(8 / math.log(2) / 16)
    summary = perplexity.summary(losses)
    drawn = bootstrap.ratios(losses.nats[None], losses.tokens[None])[0]
    assert summary["loss_interval"] == bootstrap.interval(drawn)


def test_the_objectives_loss_is_the_trainers(small_corpus, small_model, config, tmp_path):
    """On the same batches, train.py's evaluation says the same."""
    import dataclasses

    import train
    from models.optimizers import AdamW
    from pruning.data.stream import StreamConfig

    stream = StreamConfig(str(small_corpus), batch_size=8, input_length=32, target_length=12)
    run = train.TrainConfig(
        output=str(tmp_path / "run"),
        initial_weights=str(small_model),
        tokenizer="corpus",
        data=stream,
        eval_data={"held_out": stream},
        optimizer=AdamW(),
        steps=2,
        eval_batches=3,
    )
    trained = train.train(run)
    found = perplexity.objective(
        dataclasses.replace(config, model=run.output, batches={"held_out": stream}, batch_count=3)
    )
    assert found["held_out"]["target_tokens"] == trained["eval"]["held_out"]["target_tokens"]
    assert found["held_out"]["loss"] == pytest.approx(trained["eval"]["held_out"]["loss"], rel=1e-5)


def test_a_part_of_no_set_is_refused(config):
    import dataclasses

    with pytest.raises(ValueError, match=r"'news', Perplexity\.corpora does not"):
        dataclasses.replace(config, within={"news": "runs/x"})


def test_a_seqio_task_is_taken_once_and_whole(small_model, config, tmp_path):
    """Every example of the split counts once, packed or not, whatever the batch size."""
    seqio = pytest.importorskip("seqio", reason="seqio is not installed")
    import dataclasses

    import tensorflow as tf

    from pruning.data.seqio_data import SeqioConfig

    texts = [f"{'grain ' * (i % 5 + 1)}and chaff {i}" for i in range(11)]
    feature = seqio.Feature(seqio.ByteVocabulary(125), add_eos=True)
    seqio.TaskRegistry.add(
        "once_for_the_test",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                {"inputs": ["say"] * 11, "targets": texts}
            ),
            splits=["validation"],
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={"inputs": feature, "targets": feature},
    )
    data = SeqioConfig("once_for_the_test", {"inputs": 16, "targets": 64}, 4, split="validation")
    batches = {"plain": data, "packed": dataclasses.replace(data, pack=True, batch_size=2)}
    found = perplexity.objective(
        dataclasses.replace(config, model=str(small_model), batches=batches, batch_count=None)
    )
    for one in found.values():
        assert one["bytes"] == sum(map(len, texts))
        assert one["target_tokens"] == sum(map(len, texts)) + len(texts)
    assert found["packed"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-5)
    nats = found["plain"]["loss"] * found["plain"]["target_tokens"]
    assert found["plain"]["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / sum(map(len, texts))
    )
