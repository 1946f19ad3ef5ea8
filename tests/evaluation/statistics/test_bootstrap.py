"""Bootstrap intervals: coverage, pairing, and a case small enough to enumerate."""

import itertools

import numpy as np
import pytest

from evaluation.statistics import bootstrap


def test_all_draws_of_two_documents():
    values = bootstrap.ratios([[2.0, 4.0]], [[1.0, 3.0]], resamples=4000)[0]
    possible = {
        sum(a) / sum(b)
        for draw in itertools.product([(2.0, 1.0), (4.0, 3.0)], repeat=2)
        for a, b in [zip(*draw, strict=True)]
    }
    assert set(np.round(values, 12)) == {round(value, 12) for value in possible}
    assert np.mean(values == 1.5) == pytest.approx(0.5, abs=0.03)  # one of each


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        tokens = rng.integers(10, 200, size=150).astype(float)
        nats = tokens * rng.normal(3.0, 0.5, size=150)
        low, high = bootstrap.interval(bootstrap.ratios([nats], [tokens], 400, seed=trial)[0], 0.9)
        covered += low <= 3.0 <= high
    assert covered / 300 == pytest.approx(0.9, abs=0.05)


def test_models_share_their_draws():
    rng = np.random.default_rng(1)
    tokens = rng.integers(10, 200, size=80).astype(float)
    nats = tokens * rng.normal(3.0, 1.0, size=80)
    both = bootstrap.ratios([nats, nats + 0.1 * tokens], [tokens, tokens], 500)
    np.testing.assert_allclose(both[1] - both[0], 0.1)
    np.testing.assert_allclose(both[0], bootstrap.ratios([nats], [tokens], 500)[0])


def test_blocks_do_not_change_the_draws(monkeypatch):
    rng = np.random.default_rng(2)
    nats, tokens = rng.random((2, 1, 50))
    whole = bootstrap.ratios(nats, tokens, 200)
    monkeypatch.setattr(bootstrap, "_BLOCK", 350)
    np.testing.assert_allclose(bootstrap.ratios(nats, tokens, 200), whole, rtol=1e-12)
