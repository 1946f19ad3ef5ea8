"""The student of embeddings: ridge regression, out of fold, applied to other corpora."""

from __future__ import annotations

import numpy as np
import pytest

from pruning.scores.distilled import embedding_student
from pruning.scores.distilled.embedding_student import DistillEmbeddingConfig
from pruning.scores.distilled.ridge import Sums
from pruning.store.manifest import ArtifactError


@pytest.fixture
def world(tmp_path, write):
    """Two shards of vectors; the teacher's score is linear in them, plus noise."""
    random = np.random.default_rng(0)
    texts = [[f"document {shard} {row}" for row in range(n)] for shard, n in enumerate((300, 200))]
    corpus = write.corpus(tmp_path / "corpus", texts)
    vectors = [random.normal(size=(len(part), 12)).astype(np.float32) for part in texts]
    joined = np.concatenate(vectors)
    joined /= np.linalg.norm(joined, axis=1, keepdims=True)
    truth = joined @ random.normal(size=12) + 0.05 * random.normal(size=500) + 3
    skipped = {(0, 7): "not_selected"}
    write.scores(tmp_path / "vectors", corpus, {"embedding": vectors}, skipped)
    taste = [truth[:300].astype(np.float32), truth[300:].astype(np.float32)]
    write.scores(tmp_path / "teacher", corpus, {"taste": taste}, {(1, 3): "empty"})
    return tmp_path, truth, joined


def config_of(path, name="student", **settings):
    places = {"corpus": "corpus", "embeddings": "vectors", "output": name, "teacher": "teacher"}
    places = {key: str(path / value) for key, value in places.items()}
    return DistillEmbeddingConfig(**(places | {"score": "column:taste"} | settings))


def test_it_is_ridge_regression():
    models = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    random = np.random.default_rng(1)
    x, y = random.normal(size=(60, 9)), random.normal(size=60)
    other = models.Ridge(alpha=2.5).fit(x, y)
    found = Sums.of(x, y).fit(2.5)
    weights, bias = found[:-1], found[-1]
    np.testing.assert_allclose(weights, other.coef_, rtol=1e-8)
    np.testing.assert_allclose(bias, other.intercept_, rtol=1e-8)


def test_it_learns_and_reports_out_of_fold(world, column):
    path, truth, _ = world
    scores = embedding_student.run(config_of(path))
    found = column(scores, "student")
    assert np.isnan(found[7]) and np.isfinite(np.delete(found, 7)).all()
    summary = scores.manifest.summary
    assert summary["examples"] == 498 and summary["spearman"] > 0.95
    assert summary["spearman_interval"][0] < summary["spearman"] < summary["spearman_interval"][1]
    assert abs(summary["spearman_beside"]["random"]["value"]) < 0.15
    assert np.nanmean(np.abs(found - truth)) < 0.1  # in the teacher's units
    assert np.isfinite(found[303])  # the teacher has no score of it


def test_scores_of_examples_are_out_of_fold(world, write, column):
    """A score without any relation to the vectors is not found again in its own examples."""
    path, _, _ = world
    corpus = embedding_student.load_corpus(str(path / "corpus"))
    noise = np.random.default_rng(2).normal(size=500).astype(np.float32)
    write.scores(path / "noise", corpus, {"taste": [noise[:300], noise[300:]]})
    settings = {"teacher": str(path / "noise"), "l2": (1e-6,)}
    found = column(embedding_student.run(config_of(path, "noisy", **settings)), "student")
    assert abs(np.corrcoef(np.delete(found, 7), np.delete(noise, 7))[0, 1]) < 0.15


def test_the_layer_applies_to_another_corpus(world, write, column):
    path, _, joined = world
    embedding_student.run(config_of(path))
    texts = [[f"document 1 {row}" for row in range(200)]]
    other = write.corpus(path / "other", texts)
    write.scores(path / "other_vectors", other, {"embedding": [joined[300:].astype(np.float32)]})
    applied = embedding_student.run(
        DistillEmbeddingConfig(
            str(path / "other"), str(path / "other_vectors"), str(path / "applied"),
            model=str(path / "student"),
        )
    )  # fmt: skip
    first = column(embedding_student.run(config_of(path)), "student")[300:]
    np.testing.assert_allclose(column(applied, "student"), first, atol=1e-5)
    write.scores(path / "narrow", other, {"embedding": [joined[300:, :5].astype(np.float32)]})
    with pytest.raises(ArtifactError, match=r"fitted to vectors of 12 components, .*narrow has 5"):
        embedding_student.run(
            DistillEmbeddingConfig(
                str(path / "other"), str(path / "narrow"), str(path / "y"),
                model=str(path / "student"),
            )
        )  # fmt: skip
    with pytest.raises(ArtifactError, match="holds no layer"):
        embedding_student.run(
            DistillEmbeddingConfig(
                str(path / "other"), str(path / "other_vectors"), str(path / "x"),
                model=str(path / "other_vectors"),
            )
        )  # fmt: skip


def test_settings_that_say_two_things_are_refused(tmp_path):
    with pytest.raises(ValueError, match="learn from a teacher"):
        DistillEmbeddingConfig("c", "e", "o", score="ask_llm")
    with pytest.raises(ValueError, match="remove teacher"):
        DistillEmbeddingConfig("c", "e", "o", teacher="t", model="m")


def test_a_restart_scores_with_the_layers_of_its_first_shards(world, monkeypatch, column):
    """An interrupted stage does not fit again, since a fit may differ in its last bits."""
    path, _, _ = world
    whole = column(embedding_student.run(config_of(path, "whole")), "student")
    written = embedding_student.score_set.write

    def stops(build, shard, *rest):
        if shard == 1:
            raise KeyboardInterrupt
        written(build, shard, *rest)

    monkeypatch.setattr(embedding_student.score_set, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        embedding_student.run(config_of(path, "resumed"))
    monkeypatch.setattr(embedding_student.score_set, "write", written)
    monkeypatch.setattr(embedding_student, "learn", None)
    resumed = embedding_student.run(config_of(path, "resumed"))
    np.testing.assert_array_equal(column(resumed, "student"), whole)
    assert resumed.manifest.summary["examples"] == 498
