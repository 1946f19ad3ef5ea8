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
    scores = [np.float32(part[1] - 7) for part in parts]
    write.scores(tmp_path / "teacher", corpus, {"taste": scores}, {(0, 3): "empty"})
    return tmp_path, corpus, np.concatenate(scores)


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


def test_the_student_learns_and_the_engine_scores_with_it(world, t5, column):
    from pruning.scores.model import engine
    from pruning.scores.model.engine import ScoreConfig

    path, corpus, truth = world
    taught = encoder_student.run(config_of(world, t5, steps=100, learning_rate=3e-3))
    assert taught.manifest.summary["spearman"] > 0.85
    held_out = taught.read(0)
    assert taught.manifest.summary["held_out"] == held_out.num_rows
    scores = engine.run(
        ScoreConfig(
            corpus=str(path / "corpus"),
            output=str(path / "scores"),
            scorer=Student(max_tokens=32),
            model=str(path / "student"),
            row_length=64,
            batch_rows=8,
            dtype="float32",
            compilation_cache=None,
        )
    )
    found = column(scores, "student")
    # Packed or alone, a document has one score: that of the held-out table.
    ids = np.concatenate([corpus.columns(k, ["doc_id"])["doc_id"].to_numpy() for k in range(2)])
    at = np.searchsorted(ids, held_out["doc_id"].to_numpy())
    np.testing.assert_allclose(found[at], held_out["student"].to_numpy(), atol=1e-4)
    # In the teacher's units, but for the mean.
    slope, offset = np.polyfit(found, truth, 1)
    assert abs(slope - 1) < 0.25 and abs(offset - truth.mean()) < 0.1
    assert (
        encoder_student.run(config_of(world, t5, steps=100, learning_rate=3e-3)).digest
        == taught.digest
    )


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
