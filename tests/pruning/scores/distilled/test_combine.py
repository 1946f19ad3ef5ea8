"""Learned weights: a reference's, out of fold, and nothing where there is nothing to learn."""

from __future__ import annotations

import numpy as np
import pytest

from pruning.scores.distilled import combine
from pruning.scores.distilled.combine import CombineConfig
from pruning.scores.intervals import auc
from pruning.scores.terms import Term


def test_weights_are_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)) * [1, 5, 0.1] + [0, 10, 1]
    good = rng.random(300) < 1 / (1 + np.exp(-(x[:, 0] - (x[:, 1] - 10) / 5)))
    found = combine.fit(x, good, 2.0)
    scaled = (x - x.mean(axis=0)) / x.std(axis=0)
    reference = linear_model.LogisticRegression(C=1 / 2.0, class_weight="balanced", tol=1e-8)
    reference.fit(scaled, good)
    np.testing.assert_allclose(found.weight, reference.coef_[0], atol=1e-4)
    np.testing.assert_allclose(found(x), reference.decision_function(scaled), atol=1e-3)


@pytest.fixture(scope="module")
def world(make_corpus, records, artifacts, tmp_path_factory):
    """Labels that two scores tell together; three quarters of the documents have one."""
    path = tmp_path_factory.mktemp("combine")
    rng = np.random.default_rng(1)
    counts = (300, 200)
    a, b = ([rng.normal(size=n) for n in counts] for _ in range(2))
    shards = [records(n, seed=k) for k, n in enumerate(counts)]
    for k, shard in enumerate(shards):
        for i, record in enumerate(shard):
            record["text"] += f" {k} {i}"
            noise = rng.normal(scale=0.5)
            record["label"] = None if i % 4 == 0 else int(a[k][i] - 2 * b[k][i] + noise > 0)
            record["chance"] = int(rng.random() < 0.5)
    corpus = make_corpus(path / "texts", shards, metadata=("label", "chance"))
    artifacts.scores(path / "a", corpus.artifact, {"x": a}, {(0, 7): "empty"})
    artifacts.scores(path / "b", corpus.artifact, {"y": b})
    return path, corpus


def run(world, output: str, label: str):
    path, corpus = world
    return combine.run(
        CombineConfig(
            str(corpus.artifact.path),
            str(path / output),
            (
                Term("column:x", scores="a"),
                Term("column:y", scores="b"),
                Term("corpus:n_tokens", scale="log"),
            ),
            label,
            1.0,
            {"a": str(path / "a"), "b": str(path / "b")},
        )
    )


def test_the_sum_tells_more_than_its_terms(world):
    _, corpus = world
    made = run(world, "told", "corpus:label")
    summary = made.manifest.summary
    first, second, length = summary["terms"]
    assert second["weight"] < -first["weight"] < 0 < first["weight"]
    assert abs(length["weight"]) < 0.5
    assert summary["auc_out_of_fold"]["value"] > 0.93
    assert max(t["auc_alone"]["value"] for t in summary["terms"]) < 0.8
    assert made.manifest.counts["documents"] == {"ok": 499, "empty": 1}
    # What is stored is what was measured: out of fold.
    tables = [made.read(k, ["combined"])["combined"].to_numpy() for k in range(2)]
    labels = [corpus.columns(k, ["label"])["label"].to_numpy() for k in range(2)]
    score, label = np.concatenate(tables), np.concatenate(labels)
    known = ~np.isnan(score.astype(float))
    good, others = (score[known & (label == word)] for word in ("1", "0"))
    assert auc(good, others) == pytest.approx(summary["auc_out_of_fold"]["value"], abs=1e-6)


def test_a_label_of_chance_teaches_nothing(world):
    area = run(world, "chance", "corpus:chance").manifest.summary["auc_out_of_fold"]
    assert area["low"] < 0.5 + 1e-9 and area["value"] < 0.56
