"""An encoder learns a score that depends on the text, and the engine computes the same values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pruning.scores.distilled import encoder_student, encoder_training
from pruning.scores.distilled.encoder_student import DistillEncoderConfig
from pruning.scores.model.scorer import ScoreError
from pruning.scores.model.student import Student


def save(path, config):
    """Write a model of random weights, drawn by NumPy: compiling `Model.init` takes seconds."""
    import jax

    from models import weights
    from models.model import Model

    random = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "scale":  # of a norm
            return np.ones(leaf.shape, np.float32)
        return np.float32(random.normal(size=leaf.shape) * leaf.shape[-2] ** -0.5)

    model = Model(config)
    weights.save(path, model, jax.tree_util.tree_map_with_path(draw, model.shapes()))
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A directory with a small T5 of random weights for the vocabulary of bytes."""
    from models.config import T5Config

    shape = T5Config(
        vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    return save(tmp_path_factory.mktemp("t5") / "model", shape)


def texts(n, seed):
    """Strings of letters, and how many of them are vowels."""
    random = np.random.default_rng(seed)
    share = random.uniform(0.1, 0.9, n)
    vowel = random.random((n, 24)) < share[:, None]
    letters = np.where(
        vowel, random.choice(list("aeiou"), (n, 24)), random.choice(list("kmst"), (n, 24))
    )
    return ["".join(row) for row in letters], vowel.mean(axis=1)


@pytest.fixture
def world(tmp_path, write):
    parts = [texts(n, seed) for seed, n in enumerate((500, 300))]
    corpus = write.corpus(tmp_path / "corpus", [part[0] for part in parts])
    truth = np.concatenate([part[1] - 7 for part in parts])
    noise = np.random.default_rng(2).normal(size=800) * 0.1
    scores = np.split(np.float32(truth + noise), [500])
    write.scores(tmp_path / "teacher", corpus, {"taste": scores}, {(0, 3): "empty"})
    return tmp_path, corpus, truth, noise


def config_of(world, t5, **settings):
    path = world[0]
    return DistillEncoderConfig(
        corpus=str(path / "corpus"),
        teacher=str(path / "teacher"),
        model=str(t5),
        tokenizer="corpus",
        output=str(path / "student"),
        score="column:taste",
        max_tokens=32,
        batch_size=32,
        **settings,
    )


def scores_of(path, name, **settings):
    from pruning.scores.model import engine
    from pruning.scores.model.engine import ScoreConfig

    return engine.run(
        ScoreConfig(
            corpus=str(path / "corpus"),
            output=str(path / name),
            scorer=Student(**settings),
            model=str(path / "student"),
            row_length=64,
            batch_rows=8,
            dtype="float32",
            compilation_cache=None,
        )
    )


def test_the_student_learns_and_the_engine_scores_with_it(world, t5, column):
    path, corpus, truth, noise = world
    config = config_of(world, t5, steps=60, learning_rate=3e-3, folds=2)
    taught = encoder_student.run(config)
    summary = taught.manifest.summary
    assert summary["spearman"] > 0.8
    assert abs(summary["spearman_beside"]["random"]["value"]) < 0.15
    found = column(scores_of(path, "scores", examples=str(path / "student")), "student")
    # Examples have their values out of fold.
    table = taught.read(0)
    assert summary["examples"] == table.num_rows == 799
    ids = np.concatenate([corpus.columns(k, ["doc_id"])["doc_id"].to_numpy() for k in range(2)])
    at = np.searchsorted(ids, table["doc_id"].to_numpy())
    np.testing.assert_array_equal(found[at], table["student"].to_numpy())
    # What no text explains of the teacher's scores is not found again in its own examples.
    assert abs(np.corrcoef(found, noise)[0, 1]) < 0.12
    # In the teacher's units. The model that is saved knows them, and scores the one other document.
    plain = column(scores_of(path, "plain"), "student")
    assert found[3] == plain[3] and (found[at] != plain[at]).mean() > 0.9
    for values in (found, plain):
        slope, offset = np.polyfit(values, truth, 1)
        assert abs(slope - 1) < 0.25 and abs(offset) < 2
    assert encoder_student.run(config).digest == taught.digest


def test_every_epoch_takes_every_document_once():
    documents = np.arange(100, 190)
    rows = np.concatenate(list(encoder_training.batches(documents, steps=60, size=16, seed=0)))
    for epoch in range(len(rows) // len(documents)):
        part = rows[epoch * len(documents) : (epoch + 1) * len(documents)]
        np.testing.assert_array_equal(np.sort(part), documents)
        assert not np.array_equal(part, documents)


def test_what_is_no_student_is_refused(world, t5):
    from models import weights

    model, _ = weights.load(t5)
    with pytest.raises(ScoreError, match="distill_encoder"):
        Student().prepare(model, None)
    with pytest.raises(ValueError, match="at least 20"):
        dataclasses.replace(config_of(world, t5), examples=3)
    for rate in (0.0, -1e-3, float("nan")):
        with pytest.raises(ValueError, match="learning_rate is above 0"):
            config_of(world, t5, learning_rate=rate)


def test_an_encoder_that_can_have_no_head_is_refused_before_the_output_is_claimed(world):
    from models.config import DecoderConfig, T5GemmaConfig

    shape = {
        "vocab_size": 384, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 1,
        "num_kv_heads": 1, "head_dim": 16,
    }  # fmt: skip
    config = T5GemmaConfig(**shape, encoder=DecoderConfig(**shape))
    path = save(world[0] / "t5gemma", config)
    with pytest.raises(ScoreError, match=r"t5gemma cannot be a student .*give a BERT-like encoder"):
        encoder_student.run(config_of(world, path))
    assert not (world[0] / "student").exists()


def test_examples_belong_to_the_model_and_are_read_whole(tmp_path):
    """The label of the model's output names the training."""
    import types

    from models.config import Head, HeadLayer, T5Config
    from pruning.scores.model.student import KIND, Examples
    from pruning.store.build import Build

    def taught(seed):
        build = Build(tmp_path / f"{seed}", KIND, {"seed": seed}, {}, 1, encoder_student._SCHEMA)
        with build.shard(0) as writer:
            writer.write({
                "doc_id": [0, 1], "content_hash": [5, -7], "fold": [0, 1],
                "teacher": [1.0, 2.0], "student": [1.5, 2.5],
            })  # fmt: skip
        return Examples.read(str(build.finish().path))

    own, _ = taught(0), taught(1)
    np.testing.assert_array_equal(own.values(np.array([-7, 3, 5])), [2.5, np.nan, 1.5])
    head = Head(
        kind="values", pooling="mean", layers=(HeadLayer(size=1),), labels=(own.label,),
        max_tokens=32,
    )  # fmt: skip
    config = T5Config(
        vocab_size=384, d_model=32, d_ff=64, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1,
    ).with_head(head)  # fmt: skip
    model = types.SimpleNamespace(config=config)
    examples = str(tmp_path / "0")
    assert Student(None, examples).prepare(model, None).settings["max_tokens"] == 32
    assert Student(40, examples).prepare(model, None).longest == (40, 1)
    with pytest.raises(ScoreError, match="less than the 32 tokens of training"):
        Student(31, examples).prepare(model, None)
    with pytest.raises(ScoreError, match="1 is of another student than the model"):
        Student(None, str(tmp_path / "1")).prepare(model, None)


def test_a_corpus_without_examples_is_reported():
    from pruning.scores.model.engine import losses

    counts = {"documents": {"ok": 3}, "tokens": 9}
    assert not list(losses(counts | {"out_of_fold": 1}))
    assert "no scored document is an example" in next(losses(counts | {"out_of_fold": 0}))
