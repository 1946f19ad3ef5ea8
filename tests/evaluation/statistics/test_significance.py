"""Differences and p-values, against SciPy and by what they promise."""

import numpy as np
import pytest
from scipy import stats

from evaluation.statistics import bootstrap, significance
from evaluation.statistics.significance import Estimate


def test_with_seeds_alone_it_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 0.1, 5), rng.normal(3.05, 0.1, 5)
    still = np.zeros(100)  # documents that are all alike
    found = significance.paired(a, b, still, still)
    expected = stats.ttest_rel(a, b)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-12)
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_seeds_that_agree_by_chance_do_not_make_a_difference_sure():
    """Six cells that are all alike: two seeds agree on one of them, the others tell how it is."""
    rng = np.random.default_rng(5)
    losses = 3 + rng.normal(0, 0.1, 2) + rng.normal(0, 0.05, (6, 2))
    losses[0] = losses[1] + 0.03  # the same difference with both seeds
    still = np.zeros(100)
    alone = significance.paired(losses[0], losses[1], still, still)
    among = significance.paired(
        losses[0], losses[1], still, still, significance.block_error(losses)
    )
    assert alone.value == pytest.approx(among.value) and alone.p < 1e-9
    assert among.p > 0.3 and among.low < 0 < among.high


def test_the_block_error_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(6)
    losses = rng.normal(3, 0.1, (2, 5))
    pair = significance.block_error(losses)
    still = np.zeros(100)
    found = significance.paired(losses[0], losses[1], still, still, pair)
    as_t_test = significance.paired(losses[0], losses[1], still, still)
    assert (found.low, found.high, found.p) == pytest.approx(
        (as_t_test.low, as_t_test.high, as_t_test.p), rel=1e-12
    )
    # Its expectation is the variance of one training, whatever the seeds have in common.
    tables = rng.normal(0, 0.2, (4000, 1, 3)) + rng.normal(0, 0.1, (4000, 5, 3))
    errors = [significance.block_error(table).variance for table in tables]
    assert np.mean(errors) == pytest.approx(0.01, rel=0.03)
    assert significance.block_error(losses).freedom == 4
    assert significance.block_error(losses[:, :1]) is None


def test_with_one_seed_it_is_the_bootstrap_over_documents():
    rng = np.random.default_rng(1)
    nats = rng.gamma(2, 10, (2, 400))
    nats[1] = nats[0] + rng.normal(0.3, 2, 400)
    tokens = np.full((2, 400), 10.0)
    drawn = bootstrap.ratios(nats, tokens)
    value = nats.sum(1) / tokens.sum(1)
    found = significance.paired(value[:1], value[1:], *drawn)
    difference = (nats[0] - nats[1]) / 10  # equal tokens: the ratio is a mean
    assert found.value == pytest.approx(difference.mean())
    expected = stats.bootstrap((difference,), np.mean, n_resamples=4000, rng=2)
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=3e-3)
    assert found.p is None and found.sign == 0, "nothing is known of the training"
    pooled = significance.paired(
        value[:1], value[1:], *drawn, seed_error=significance.SeedError(0.05**2, 12)
    )
    error = (difference.var() / 400 + 2 * 0.05**2) ** 0.5
    assert pooled.high - pooled.value == pytest.approx(2.17 * error, rel=0.03)


def test_the_interval_covers_what_it_promises():
    """Crossed documents and seeds: the truth lies in 95% of the intervals, or a little more."""
    rng = np.random.default_rng(3)
    covered, trials, seeds, documents = 0, 300, 3, 60
    for _ in range(trials):
        of_documents = rng.normal(0, 1, documents)
        of_seeds = rng.normal(0, 0.12, seeds)
        table = of_documents + of_seeds[:, None] + rng.normal(0, 0.3, (seeds, documents))
        drawn = bootstrap.ratios(table.mean(0)[None], np.ones((1, documents)), 400)[0]
        found = significance.paired(table.mean(1), np.zeros(seeds), drawn, np.zeros(400))
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / trials <= 0.995


def test_seeds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        significance.paired([1, 2], [1], np.zeros(3), np.zeros(3))


def test_holm():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []
    # Of 20 true hypotheses hardly ever one is rejected, where bare p-values reject one in 20.
    p = np.random.default_rng(4).uniform(size=(2000, 20))
    rejected = np.mean([min(significance.holm(row)) < 0.05 for row in p])
    assert rejected == pytest.approx(0.05, abs=0.015)


def test_an_estimate_among_others_needs_more_to_count():
    alone = Estimate(0.1, 0.01, 0.19, p=0.03)
    assert alone.sign == 1
    first, none, second = significance.adjusted([alone, None, Estimate(0.3, 0.2, 0.4, p=1e-6)])
    assert none is None and second.sign == 1 and first.sign == 1
    crowd = significance.adjusted([alone] * 4)
    assert [item.sign for item in crowd] == [0, 0, 0, 0]
