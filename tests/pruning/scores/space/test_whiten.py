"""Whitening: no direction counts more than another, and near twins in a narrow cone are found."""

from __future__ import annotations

import io

import numpy as np
import pytest

from pruning.scores import vectors
from pruning.scores.space import whiten
from pruning.scores.space.whiten import Moments, WhitenConfig
from pruning.store.intermediate import Parts
from pruning.store.manifest import ArtifactError

WIDTH = 12


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cone(n, seed, loud=0.2, quiet=0.005):
    """Vectors around one direction, that differ much in two others and a little in the rest."""
    random = np.random.default_rng(seed)
    spread = np.array([0.0, loud, loud] + [quiet] * (WIDTH - 3))
    return unit(np.eye(WIDTH)[0] + spread * random.standard_normal((n, WIDTH))).astype(np.float32)


@pytest.fixture
def world(tmp_path, write):
    """Two shards of embeddings, one document without; (root, vectors)."""
    vectors = [cone(300, 1), cone(200, 2)]
    corpus = write.corpus(
        tmp_path / "corpus", [[f"{k}.{i}" for i in range(len(v))] for k, v in enumerate(vectors)]
    )
    write.scores(tmp_path / "embedding", corpus, {"embedding": vectors}, {(0, 7): "empty"})
    return tmp_path, vectors


def whitened(root, name="whitened", **settings):
    return whiten.run(
        WhitenConfig(
            str(root / "corpus"), str(root / "embedding"), str(root / name), documents=0, **settings
        )
    )


def rows_of(scores):
    tables = [scores.read(k, ["embedding"]) for k in range(2)]
    found = [vectors.as_lists(t["embedding"], t.schema.field("embedding")) for t in tables]
    return [np.array(rows.to_pylist()) for rows in found]


def test_whitened_vectors_vary_alike_in_all_directions():
    x = np.concatenate([cone(4000, 3), cone(4000, 4)])
    mean, directions, variances = whiten.whitening(Moments.of(x[:4000]) + Moments.of(x[4000:]))
    np.testing.assert_allclose(directions.T @ directions, np.eye(len(variances)), atol=1e-12)
    moved = (x.astype(np.float64) - mean) @ directions / np.sqrt(variances)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(np.cov(moved.T, bias=True), np.eye(len(variances)), atol=1e-6)


def test_a_stage_gives_what_numpy_gives(world):
    root, vectors = world
    scores = whitened(root)
    assert scores.read(0, ["status"])["status"].to_pylist()[7] == "empty"
    known = np.concatenate([np.delete(vectors[0], 7, axis=0), vectors[1]]).astype(np.float64)
    centred = known - known.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    expected = unit(left[:, sizes > 1e-3 * sizes[0]])
    first, second = rows_of(scores)
    found = np.concatenate([np.delete(first, 7, axis=0), second])
    # Principal components are known up to their signs: cosines are the same.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-4)
    with np.load(io.BytesIO((scores.path / whiten.WHITENING).read_bytes())) as file:
        np.testing.assert_allclose(file["mean"], known.mean(axis=0), atol=1e-7)


def test_workers_make_the_same(world, monkeypatch):
    root, _ = world
    alone = whitened(root)

    def wait(parts):
        if parts.missing():
            raise BlockingIOError("the other worker's sums are not there yet")

    monkeypatch.setattr(Parts, "wait", wait)
    with pytest.raises(BlockingIOError):
        whitened(root, "shared", worker=0, workers=2)
    assert whitened(root, "shared", worker=1, workers=2) is None
    shared = whitened(root, "shared", worker=0, workers=2)
    assert shared.manifest.shards == alone.manifest.shards


def test_near_twins_in_a_narrow_cone_are_found(tmp_path, write):
    originals = cone(250, 5)
    random = np.random.default_rng(6)
    # A copy lies where its original does, but for what varies most of all anyway.
    moved = np.array([0.0, 0.03, 0.03] + [0.0002] * (WIDTH - 3)) * random.standard_normal(
        (250, WIDTH)
    )
    copies = unit(originals + moved).astype(np.float32)
    corpus = write.corpus(tmp_path / "corpus", [[str(i) for i in range(250)] for _ in range(2)])
    write.scores(tmp_path / "embedding", corpus, {"embedding": [originals, copies]})

    def told_apart(x):
        """How often a copy is more alike to its original than other documents to any."""
        cosines = x @ x.T
        twin = np.diagonal(cosines, 250)
        others = np.sort(cosines[:250, :250], axis=1)[:, -2]
        return np.mean(twin[:, None] > others)

    assert told_apart(np.concatenate([originals, copies]).astype(np.float64)) < 0.95
    assert told_apart(np.concatenate(rows_of(whitened(tmp_path)))) > 0.999


def test_as_many_components_as_asked_for(world):
    root, _ = world
    few, all_of_them = whitened(root, "few", components=2), whitened(root, "all")
    with np.load(io.BytesIO((all_of_them.path / whiten.WHITENING).read_bytes())) as file:
        directions = file["directions"]
    with np.load(io.BytesIO((few.path / whiten.WHITENING).read_bytes())) as file:
        np.testing.assert_array_equal(file["directions"], directions[:, :2])
    assert rows_of(few)[0].shape == (300, 2)
    with pytest.raises(ArtifactError, match=f"vary in {directions.shape[1]} directions"):
        whitened(root, "many", components=40)


def test_embeddings_that_are_all_alike_are_refused(tmp_path, write):
    corpus = write.corpus(tmp_path / "corpus", [["a", "b"], ["c"]])
    same = np.tile(np.eye(4, dtype=np.float16)[:1], (2, 1))
    write.scores(tmp_path / "embedding", corpus, {"embedding": [same, same[:1]]})
    with pytest.raises(ArtifactError, match="all alike"):
        whitened(tmp_path)
