"""An encoder learns a score that words explain, and the engine scores with it as it was taught."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pruning.scores.distilled import encoder_student, encoder_training
from pruning.scores.distilled.encoder_student import DistillEncoderConfig
from pruning.scores.model.scorer import ScoreError
from pruning.scores.model.student import Student


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """A directory with a small T5 of random weights for the vocabulary of bytes."""
    import jax

    from models import weights
    from models.config import T5Config
    from models.model import Model

    shape = T5Config(
        vocab_size=384, d_model=32, d_kv=16, d_ff=64, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    model = Model(shape)
    path = tmp_path_factory.mktemp("t5") / "model"
    weights.save(path, model, jax.jit(model.init)(jax.random.key(0)))
    return path


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
        assert abs(slope - 1) < 0.25 and abs(offset) < 1.5
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
