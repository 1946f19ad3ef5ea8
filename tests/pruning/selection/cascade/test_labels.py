"""Labels of a cascade's student: normal scores of the judge's ranks."""

from __future__ import annotations

import numpy as np
from scipy import stats

from pruning.selection.cascade.labels import normal_scores


def test_normal_scores_keep_the_order_and_spread_a_crowded_top():
    crowded = -(np.random.default_rng(0).exponential(size=1001) ** 4)
    found = normal_scores(crowded)
    assert (np.diff(found[np.argsort(crowded)]) > 0).all()
    assert stats.kstest(found, "norm").statistic < 0.001
    np.testing.assert_allclose(found, normal_scores(np.arctan(crowded)), atol=1e-12)


def test_ties_have_one_normal_score():
    np.testing.assert_allclose(
        normal_scores(np.array([0.0, 5.0, 5.0, 9.0])),
        [stats.norm.ppf(1 / 8), 0.0, 0.0, stats.norm.ppf(7 / 8)],
        atol=1e-12,
    )
