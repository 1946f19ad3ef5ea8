"""The area equals a count over all pairs; its interval covers as often as it says."""

from __future__ import annotations

import numpy as np

from pruning.scores.intervals import auc, auc_interval


def test_the_area_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    good, others = rng.integers(0, 9, 40) + 1.0, rng.integers(0, 9, 70) * 1.0
    pairs = np.sign(good[:, None] - others[None, :]) / 2 + 0.5
    assert auc(good, others) == np.float64(pairs.mean())
    assert auc_interval(good, others).value == auc(good, others)
    assert auc(good, others[:0]) is None and auc_interval(good[:1], others) is None


def test_the_interval_covers_the_true_area():
    """Two normal distributions one deviation apart have an area of 0.760."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        found = auc_interval(rng.normal(1, 1, 60), rng.normal(0, 1, 90))
        covered += found.low <= 0.76025 <= found.high
    assert 0.92 <= covered / 400 <= 0.98
