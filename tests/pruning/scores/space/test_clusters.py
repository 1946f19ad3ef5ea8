"""k-means against the textbook loop, and against the optimum that was planted."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from pruning.scores.space.clusters import assign_tiles, first_centroids, fit
from pruning.scores.space.embeddings import loads, local_mesh

WIDTH = 12


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def topics(n, k, seed=0, spread=0.25):
    random = np.random.default_rng(seed)
    centres = random.standard_normal((k, WIDTH))
    topic = random.integers(k, size=n)
    return unit(centres[topic] + spread * random.standard_normal((n, WIDTH))), topic


def passes(x, mesh, batch=700):
    def start():
        parts = ((np.arange(b, min(b + batch, len(x))), x[b : b + batch])
                 for b in range(0, len(x), batch))  # fmt: skip
        for _, tiles, valid in loads(parts, mesh):
            yield tiles, valid

    return start


def textbook(x, centroids, iterations):
    """Spherical k-means as anybody would write it."""
    objective = []
    for _ in range(iterations):
        cosines = x @ centroids.T
        own = cosines.argmax(axis=1)
        objective.append(cosines.max(axis=1).mean())
        for c in range(len(centroids)):
            if (own == c).any():
                centroids[c] = unit(x[own == c].sum(axis=0))
    return centroids, objective


@pytest.fixture(scope="module")
def mesh():
    return local_mesh(jax.devices()[:1])


def test_it_is_lloyds_algorithm(mesh):
    x, _ = topics(3000, 20)
    start = x[:20]
    found = fit(passes(x, mesh), start, 8, mesh)
    centroids, objective = textbook(x, start.copy(), 8)
    np.testing.assert_allclose(found.objective, objective, rtol=1e-5)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-4)
    assert (np.diff(found.objective) >= -1e-6).all()
    np.testing.assert_allclose(np.linalg.norm(found.centroids, axis=1), 1.0, atol=1e-6)


def test_batches_and_devices_do_not_matter(mesh, eight_devices):
    x, _ = topics(3000, 10)
    one = fit(passes(x, mesh), x[:10], 5, mesh)
    many = local_mesh(eight_devices)
    eight = fit(passes(x, many, batch=3000), x[:10], 5, many)
    np.testing.assert_allclose(one.centroids, eight.centroids, atol=1e-5)


def test_assignment_is_the_nearest_centroid_and_its_cosine(mesh):
    x, _ = topics(1500, 30)
    centroids = x[:70]
    for _, tiles, _ in loads(iter([(np.arange(1500), x)]), mesh):
        cluster, cosine = assign_tiles(centroids, tiles, mesh)
        cosines = x @ centroids.T
        found = np.asarray(cluster).reshape(-1)[:1500]
        np.testing.assert_allclose(np.asarray(cosine).reshape(-1)[:1500], cosines.max(1), atol=1e-6)
        np.testing.assert_allclose(cosines[np.arange(1500), found], cosines.max(1), atol=1e-6)


def test_planted_clusters_are_found(mesh):
    x, topic = topics(4000, 6, spread=0.05)
    found = fit(passes(x, mesh), first_centroids([(np.arange(4000), x)], 24, 0), 15, mesh)
    own = (x @ found.centroids.T).argmax(axis=1)
    # With more clusters than topics none of them holds two topics.
    for cluster in np.unique(own):
        assert len(np.unique(topic[own == cluster])) == 1


def test_a_cluster_that_lost_its_members_splits_a_large_one(mesh):
    x, _ = topics(2000, 5)
    start = np.concatenate([x[:4], np.repeat(-unit(x.sum(axis=0))[None], 3, axis=0)])
    found = fit(passes(x, mesh), start, 10, mesh)
    assert found.splits > 0
    own = (x @ found.centroids.T).argmax(axis=1)
    assert len(np.unique(own)) == 7


def test_first_centroids_do_not_depend_on_the_order(mesh):
    x, _ = topics(500, 5)
    ids = np.arange(500) << 20
    shuffled = np.random.default_rng(0).permutation(500)
    whole = first_centroids([(ids, x)], 20, seed=3)
    parts = first_centroids(
        [(ids[p], x[p]) for p in np.array_split(shuffled, 7)], 20, seed=3
    )  # fmt: skip
    np.testing.assert_array_equal(whole, parts)
    assert not np.array_equal(whole, first_centroids([(ids, x)], 20, seed=4))
    with pytest.raises(ValueError, match="cannot make 20 clusters"):
        first_centroids([(ids[:19], x[:19])], 20, seed=3)
