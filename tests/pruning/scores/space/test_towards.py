"""Similarity to target texts: the cosines of brute force, and refusal of other models."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pruning.corpus.reader import load_corpus
from pruning.scores.space import towards
from pruning.scores.space.same_model import require_same_model
from pruning.scores.space.towards import TowardsConfig
from pruning.store.manifest import ArtifactError


def of_length_one(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def world(tmp_path, write):
    """Five documents in two shards, one without an embedding; three targets in two shards."""
    random = np.random.default_rng(0)
    corpus = write.corpus(tmp_path / "corpus", [["a", "b", "c"], ["d", "e"]])
    vectors = [random.normal(size=(n, 8)).astype(np.float32) for n in (3, 2)]
    write.scores(tmp_path / "vectors", corpus, {"embedding": vectors}, {(0, 1): "empty"})
    targets = write.corpus(tmp_path / "targets", [["x", "y"], ["z"]])
    wanted = [random.normal(size=(n, 8)).astype(np.float32) for n in (2, 1)]
    write.scores(tmp_path / "wanted", targets, {"embedding": wanted})
    return tmp_path, np.concatenate(vectors), np.concatenate(wanted)


def config_of(path, **settings):
    names = ("corpus", "vectors", "targets", "wanted", "out")
    return TowardsConfig(*(str(path / name) for name in names), **settings)


def test_cosines_are_those_of_brute_force(world, column):
    path, vectors, wanted = world
    scores = towards.run(config_of(path, nearest=2))
    cosines = of_length_one(vectors.astype(float)) @ of_length_one(wanted.astype(float)).T
    cosines[1] = np.nan
    np.testing.assert_allclose(column(scores, "target_similarity"), cosines.max(axis=1), rtol=1e-5)
    best = np.sort(cosines, axis=1)[:, -2:].mean(axis=1)
    np.testing.assert_allclose(column(scores, "target_mean"), best, rtol=1e-5)
    ids = np.array([0, 1, 1 << 32])  # shard << 32 | row
    expected = ids[np.argmax(np.nan_to_num(cosines), axis=1)].astype(float)
    expected[1] = np.nan
    np.testing.assert_array_equal(column(scores, "target"), expected)
    assert scores.manifest.counts["documents"] == {"empty": 1, "ok": 4}
    assert scores.manifest.summary["targets"] == 3


def test_more_neighbors_than_targets_are_all_targets(world, column):
    path, vectors, wanted = world
    scores = towards.run(config_of(path, nearest=50))
    cosines = of_length_one(vectors.astype(float)) @ of_length_one(wanted.astype(float)).T
    keep = [0, 2, 3, 4]
    found = column(scores, "target_mean")[keep]
    np.testing.assert_allclose(found, cosines.mean(axis=1)[keep], rtol=1e-4, atol=1e-6)


def test_embeddings_of_other_targets_are_refused(world):
    path = world[0]
    with pytest.raises(ArtifactError, match="corpus"):
        towards.run(
            TowardsConfig(
                str(path / "corpus"), str(path / "vectors"), str(path / "corpus"),
                str(path / "wanted"), str(path / "other"),
            )
        )  # fmt: skip


def test_vectors_of_another_width_and_too_many_targets_are_refused(world, write, monkeypatch):
    path = world[0]
    targets = load_corpus(str(path / "targets"))
    narrow = [np.ones((n, 4), np.float32) for n in (2, 1)]
    write.scores(path / "narrow", targets, {"embedding": narrow})
    config = config_of(path)
    with pytest.raises(ArtifactError, match=r"vectors of 8 components and .*narrow of 4"):
        towards.run(dataclasses.replace(config, target_embeddings=str(path / "narrow")))
    monkeypatch.setattr(towards, "_MOST_TARGETS", 2)
    with pytest.raises(ArtifactError, match="has over 2 targets"):
        towards.run(config)


def test_models_are_compared_where_both_are_known():
    one = {"model": {"digest": "a"}, "scorer": {"max_tokens": 256}}
    require_same_model("one", one, "two", {})
    require_same_model("one", one, "two", dict(one))
    with pytest.raises(ArtifactError, match="one and two are of embeddings of different models"):
        require_same_model("one", one, "two", {"model": {"digest": "b"}})
    with pytest.raises(ArtifactError, match="max_tokens"):
        require_same_model("one", one, "two", {"scorer": {"max_tokens": 128}})
