"""The bound on missed errors, against exact enumeration and simulated walks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from pruning.selection.cascade.bound import Walk


def broken(walk: Walk, weights: np.ndarray, rates: np.ndarray, errors: np.ndarray) -> float:
    """Return the exact probability that some edge is certified and misses more than is allowed."""
    total = 0.0
    costs = walk.costs(weights, rates)
    for drawn in itertools.product([False, True], repeat=len(weights)):
        sampled = np.array(drawn)
        chance = float(np.prod(np.where(sampled, rates, 1 - rates)))
        found = np.flatnonzero(sampled & errors)
        edge = walk.edge(found, costs[found], len(weights))
        missed = weights[:edge][(errors & ~sampled)[:edge]].sum()
        total += chance * (missed > walk.allowed)
    return total


@pytest.mark.parametrize("seed", range(12))
def test_no_arrangement_of_errors_breaks_the_promise_too_often(seed):
    rng = np.random.default_rng(seed)
    n, alpha = 9, float(rng.choice([0.05, 0.2, 0.4]))
    weights = rng.integers(1, 4, n) if seed % 2 else np.ones(n, int)
    allowed = float(rng.integers(1, 6))
    x = float(rng.uniform(0.2, 0.95)) / weights.max()
    rates = np.clip(x * weights * rng.uniform(1.01, 3.0, n), 0, 1)
    walk = Walk(x, allowed, alpha, float(weights.min()))
    for _ in range(4):
        errors = rng.random(n) < rng.uniform(0.2, 1.0)
        assert broken(walk, weights, rates, errors) <= alpha + 1e-12


def test_the_bound_is_nearly_attained():
    """Errors everywhere, equal rates: the geometric waiting time for the first found error."""
    rate, allowed = 0.2, 7.0
    alpha = (1 - rate) ** (allowed + 1)  # P(no error found among the first eight)
    walk = Walk(0.2 - 1e-9, allowed, alpha + 1e-6)
    n = 12
    found = broken(walk, np.ones(n, int), np.full(n, rate), np.ones(n, bool))
    assert 0.9 * alpha <= found <= alpha + 1e-6


def test_all_edges_are_bounded_at_once():
    rng = np.random.default_rng(3)
    n, alpha = 2000, 0.1
    errors = rng.random(n) < np.linspace(0.01, 0.6, n)
    rates = np.maximum(0.08, 0.5 * np.sqrt(np.linspace(0.01, 0.6, n)))
    walk = Walk(0.06, 50.0, alpha)
    costs = walk.costs(np.ones(n), rates)
    failures = 0
    for _ in range(400):
        sampled = rng.random(n) < rates
        missed = np.cumsum(errors & ~sampled)
        spent = np.cumsum(np.where(errors & sampled, costs, 0.0))
        bounds = [walk.missed(spent[k : k + 1]) for k in range(0, n, 20)]
        failures += bool(np.any(missed[::20] > np.array(bounds)))
    assert failures <= 400 * alpha + 3 * math.sqrt(400 * alpha)


def test_a_document_that_is_always_asked_about_costs_nothing():
    walk = Walk(0.05, 20.0, 0.05)
    assert np.allclose(walk.costs(np.ones(3), np.array([1.0, 1.0, 1.0])), 0)
    assert np.all(np.diff(walk.costs(np.ones(3), np.array([0.1, 0.3, 0.9]))) < 0)


def test_a_side_without_a_bound_decides_nothing():
    walk = Walk(0.0, 20.0, 0.05)
    assert walk.edge(np.zeros(0, int), np.zeros(0), 100) == 0 and walk.missed(np.zeros(0)) == np.inf
