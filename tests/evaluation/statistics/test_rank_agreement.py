"""Rank agreement against definitions written out pair by pair."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.statistics import rank_agreement

scores = st.lists(
    st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=40
)  # few values, so many ties


def tau_b_by_pairs(x, y):
    concordant = discordant = ties_x = ties_y = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        sign = np.sign(a - c) * np.sign(b - d)
        concordant += sign > 0
        discordant += sign < 0
        ties_x += a == c
        ties_y += b == d
    pairs = len(x) * (len(x) - 1) // 2
    scale = math.sqrt((pairs - ties_x) * (pairs - ties_y))
    return (concordant - discordant) / scale if scale else float("nan")


@settings(deadline=None)
@given(scores)
def test_kendall_is_the_count_of_pairs(pairs):
    x, y = map(np.asarray, zip(*pairs, strict=True))
    np.testing.assert_allclose(
        rank_agreement.kendall_tau_b(x, y), tau_b_by_pairs(x, y), rtol=1e-12, atol=1e-12
    )


@settings(deadline=None)
@given(scores)
def test_spearman_is_scipys(pairs):
    from scipy import stats

    x, y = map(np.asarray, zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(rank_agreement.spearman(x, y))
    else:
        expected = stats.spearmanr(x, y).statistic
        np.testing.assert_allclose(rank_agreement.spearman(x, y), expected, rtol=1e-12, atol=1e-12)


def test_top_overlap_by_hand():
    x = np.array([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    y = np.array([9.0, 0, 7, 1, 8, 2, 3, 4, 5, 6])  # top four: rows 0, 4, 2, 9
    assert rank_agreement.top_overlap(x, y, 0.4) == 2 / 6
    assert rank_agreement.top_overlap(x, x, 0.4) == 1
    assert rank_agreement.top_overlap(x, -x, 0.4) == 0
    assert rank_agreement.top_overlap(x, -x, 1.0) == 1


def test_ties_at_the_edge_do_not_depend_on_the_order_of_rows():
    ids = np.arange(100)
    constant = np.zeros(100)
    kept = set(ids[rank_agreement.top(constant, 0.3, ids)])
    shuffled = np.random.default_rng(0).permutation(ids)
    assert set(shuffled[rank_agreement.top(constant, 0.3, shuffled)]) == kept
    assert len(kept) == 30


def test_independent_scorers_overlap_as_chance_says():
    x, y = np.random.default_rng(0).normal(size=(2, 20_000))
    table = rank_agreement.compare({"x": x, "y": y}, np.arange(20_000), share=0.2)
    assert table.overlap[0, 1] == pytest.approx(table.chance_overlap, abs=0.01)
    assert table.kendall[0, 1] == pytest.approx(0, abs=0.02)


def test_missing_scores_leave_the_pair_alone():
    ids = np.arange(50)
    x = np.random.default_rng(1).normal(size=50)
    y = np.where(ids % 5 == 0, np.nan, x)
    table = rank_agreement.compare({"x": x, "y": y, "nothing": np.full(50, np.nan)}, ids)
    assert table.documents.tolist() == [[50, 40, 0], [40, 40, 0], [0, 0, 0]]
    assert table.kendall[0, 1] == pytest.approx(1)
    assert np.isnan(table.kendall[0, 2])


def test_the_sample_does_not_depend_on_the_order_of_rows():
    ids = np.arange(5000)
    x = np.random.default_rng(2).normal(size=5000)
    y = x + np.random.default_rng(3).normal(size=5000)
    shuffled = np.random.default_rng(4).permutation(5000)
    one = rank_agreement.compare({"x": x, "y": y}, ids, max_documents=500)
    two = rank_agreement.compare({"x": x[shuffled], "y": y[shuffled]}, shuffled, max_documents=500)
    assert one.documents[0, 1] == 500
    np.testing.assert_allclose(one.kendall, two.kendall)
    np.testing.assert_allclose(one.overlap, two.overlap)


def test_a_short_column_is_named():
    with pytest.raises(ValueError, match="likelihood has 3 scores for 4 documents"):
        rank_agreement.compare({"likelihood": np.zeros(3)}, np.arange(4))
