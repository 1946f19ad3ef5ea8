"""Near twins against the loop over pairs that defines them."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from pruning.scores.space.embeddings import local_mesh
from pruning.scores.space.twins import NONE, TWIN_TILE, twin_similarities


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def crowd(n, seed, width=8, spread=0.3):
    """Vectors around a few points, so that many are near each other."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(n // 6, 1), width))
    which = random.integers(len(centres), size=n)
    return unit(centres[which] + spread * random.standard_normal((n, width)))


def by_events(x):
    """The nested rule as it is said: from the most similar pair down, the living drop the later."""
    cosines = x @ x.T
    pairs = [(cosines[i, j], i, j) for j in range(len(x)) for i in range(j)]
    dropped_at = np.full(len(x), NONE)
    for cosine, i, j in sorted(pairs, reverse=True):
        if dropped_at[i] == NONE and dropped_at[j] == NONE:
            dropped_at[j] = cosine
    return dropped_at


def at_one_epsilon(x, epsilon):
    cosines = x @ x.T
    kept = []
    for j in range(len(x)):
        if all(cosines[i, j] <= 1 - epsilon for i in kept):
            kept.append(j)
    return kept


def whole(x, mesh, rule="nested", epsilon=0.0):
    return twin_similarities(x, np.array([0, len(x)]), mesh, rule, epsilon)


@pytest.fixture(scope="module")
def mesh():
    return local_mesh(jax.devices()[:1])


@pytest.mark.parametrize("n", [2, TWIN_TILE, 3 * TWIN_TILE + 17])
def test_nested_is_the_order_of_events(mesh, n):
    x = crowd(n, seed=n)
    found = whole(x, mesh)
    expected = by_events(x)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.3])
def test_at_one_epsilon_the_dropped_drop_nobody(mesh, epsilon):
    x = crowd(2 * TWIN_TILE + 50, seed=5)
    value = whole(x, mesh, "at", epsilon)
    kept = np.flatnonzero(value <= np.float32(1 - epsilon))
    assert kept.tolist() == at_one_epsilon(x, epsilon)
    # So everybody who is dropped has a twin among the kept, ranked before it.
    cosines = x @ x.T
    for j in set(range(len(x))) - set(kept.tolist()):
        assert cosines[kept[kept < j], j].max() > 1 - epsilon


def test_any_is_the_maximum_over_all_earlier(mesh):
    x = crowd(TWIN_TILE + 30, seed=2)
    cosines = np.where(np.tri(len(x), k=-1, dtype=bool), x @ x.T, NONE)
    np.testing.assert_allclose(whole(x, mesh, "any"), cosines.max(axis=1), atol=2e-6)


def test_a_larger_epsilon_drops_all_that_a_smaller_one_did_and_more(mesh):
    value = whole(crowd(400, seed=3), mesh)
    dropped = [set(np.flatnonzero(value > 1 - epsilon)) for epsilon in (0.01, 0.03, 0.1, 0.3)]
    for smaller, larger in itertools.pairwise(dropped):
        assert smaller < larger


def test_a_chain_is_not_dropped_altogether(mesh):
    """Small steps along an arc: neighbors are twins, the ends have nothing in common."""
    # Radians: neighbors have cosine 0.995, the next but one 0.980. Each step is a bit wider than
    # the one before, so that the nearest pairs come first.
    angles = np.cumsum(0.1 + 1e-4 * np.arange(40))
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    epsilon = 0.01
    for rule in ("nested", "at"):
        kept = np.flatnonzero(whole(x, mesh, rule, epsilon) <= 1 - epsilon)
        assert kept.tolist() == list(range(0, 40, 2))
    assert np.flatnonzero(whole(x, mesh, "any") <= 1 - epsilon).tolist() == [0]


def test_copies_leave_one(mesh):
    x = unit(np.random.default_rng(0).standard_normal((3, 16)))[[0, 0, 1, 0, 2, 1]]
    np.testing.assert_allclose(whole(x, mesh)[[1, 3, 5]], 1.0, atol=1e-6)
    assert (whole(x, mesh) <= 1.0).all()
    assert (whole(x, mesh)[[0, 2, 4]] < 0.9).all()


def test_clusters_do_not_see_each_other_and_devices_do_not_matter(mesh, eight_devices):
    sizes = [0, 1, 5, TWIN_TILE, 1, 2 * TWIN_TILE + 3, 40, 7]
    parts = [crowd(max(n, 1), seed=9)[:n] for n in sizes]  # alike across clusters
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    together = twin_similarities(np.concatenate(parts), bounds, mesh)
    alone = [whole(part, mesh) if len(part) else np.zeros(0) for part in parts]
    np.testing.assert_array_equal(together, np.concatenate(alone).astype(np.float32))
    spread = twin_similarities(np.concatenate(parts), bounds, local_mesh(eight_devices))
    np.testing.assert_array_equal(together, spread)
    small = twin_similarities(np.concatenate(parts), bounds, mesh, load_rows=TWIN_TILE)
    np.testing.assert_array_equal(together, small)
