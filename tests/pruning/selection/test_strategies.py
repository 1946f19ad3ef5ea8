"""Strategies sample with the probabilities that they promise, and cut where they say."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from scipy import stats

from pruning.selection import strategies
from pruning.selection.strategies import (
    InverseFrequency,
    InversePropensity,
    Middle,
    Percentiles,
    Random,
    Softmax,
    Split,
    StrategyError,
    Top,
)
from pruning.store import randomness
from pruning.store.randomness import Stream

SCORES = np.asarray([0.3, 1.0, 2.5, 0.7, 5.0, 1.9])


def exact_probabilities(weights: np.ndarray, k: int) -> dict[tuple[int, ...], float]:
    """Of every set of k that can be drawn one after another without replacement."""
    probabilities: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), k):
        probability, left = 1.0, weights.sum()
        for i in order:
            probability *= weights[i] / left
            left -= weights[i]
        key = tuple(sorted(order))
        probabilities[key] = probabilities.get(key, 0.0) + probability
    return probabilities


@pytest.fixture(scope="module")
def many_seeds() -> np.ndarray:
    """The draws of the six documents under many seeds."""
    return np.stack(
        [randomness.uniform(Stream.EXPERIMENT, seed, np.arange(6)) for seed in range(10_000)]
    )


@pytest.mark.parametrize(
    ("strategy", "weights"),
    [
        (Random(), np.ones(6)),
        (Softmax(1.5), np.exp(SCORES / 1.5)),
        (InversePropensity(), 1 / SCORES),
    ],
)
@pytest.mark.parametrize("k", [1, 3])
def test_inclusion_is_that_of_sequential_sampling(strategy, weights, k, many_seeds):
    found = collections.Counter(
        tuple(sorted(np.argsort(-strategy.keys(SCORES, uniform))[:k].tolist()))
        for uniform in many_seeds
    )
    exact = exact_probabilities(weights, k)
    assert set(found) <= set(exact)
    observed = [found[chosen] for chosen in exact]
    expected = [len(many_seeds) * probability for probability in exact.values()]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_a_low_temperature_takes_the_top_and_a_high_one_anything():
    rng = np.random.default_rng(0)
    scores, uniform = rng.normal(size=1000), rng.uniform(size=1000)
    order = np.argsort(-Softmax(1e-9).keys(scores, uniform))
    np.testing.assert_array_equal(order, np.argsort(-Top().keys(scores, uniform)))
    order = np.argsort(-Softmax(1e9).keys(scores, uniform))
    np.testing.assert_array_equal(order, np.argsort(-Random().keys(scores, uniform)))


def test_inverse_frequency_flattens_the_distribution_of_the_score():
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0, 0.1, 90_000), rng.uniform(-4, 4, 10_000)])
    strategy = InverseFrequency(bins=32, outer=0.0).fit(scores)
    keys = strategy.keys(scores, rng.uniform(size=len(scores)))
    kept = scores[np.argsort(-keys)[:4000]]
    tail = np.abs(kept) > 0.5
    # The bins cover (-4, 4) evenly: a flat sample has 7/8 of its documents beyond 0.5.
    assert np.mean(np.abs(scores) > 0.5) < 0.1
    assert np.mean(tail) == pytest.approx(7 / 8, abs=0.03)
    assert stats.kstest(kept[tail & (kept > 0)], stats.uniform(0.5, 3.5).cdf).pvalue > 1e-3


def test_inverse_frequency_of_equal_scores_is_uniform():
    strategy = InverseFrequency().fit(np.ones(100))
    np.testing.assert_allclose(np.ptp(strategy.log_weights(np.ones(10))), 0)


def test_inverse_propensity_refuses_what_is_no_density():
    with pytest.raises(StrategyError, match="positive"):
        InversePropensity().keys(np.asarray([1.0, -2.0]), np.asarray([0.5, 0.5]))


def test_percentile_windows_divide_the_ranking():
    total = np.asarray([1001, 10])
    cuts = [Percentiles(a, b).interval(total, total) for a, b in ((0, 0.3), (0.3, 0.9), (0.9, 1))]
    np.testing.assert_array_equal(cuts[0][0], 0)
    for left, right in itertools.pairwise(cuts):
        np.testing.assert_array_equal(left[1], right[0])
    np.testing.assert_array_equal(cuts[-1][1], total)


def test_middle_lies_around_the_median():
    start, stop = Middle().interval(np.asarray([1000]), np.asarray([200]))
    assert (start[0], stop[0]) == (400, 600)
    start, _ = Middle().interval(np.asarray([100]), np.asarray([200]))
    assert start[0] == 0


def test_splits_of_one_seed_divide_the_documents():
    uniform = randomness.uniform(Stream.EXPERIMENT, 3, np.arange(10_000))
    parts = [Split(a, b).keeps(uniform, ()) for a, b in ((0, 0.2), (0.2, 0.7), (0.7, 1))]
    np.testing.assert_array_equal(np.sum(parts, axis=0), 1)
    assert [part.mean() for part in parts] == pytest.approx([0.2, 0.5, 0.3], abs=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Split(0.5, 0.5),
        lambda: Percentiles(-0.1, 0.5),
        lambda: Softmax(0.0),
        lambda: InverseFrequency(outer=0.5),
        lambda: strategies.Union(("only one",)),
        lambda: strategies.Threshold(),
        lambda: strategies.Threshold(low=1.0, high=0.0),
    ],
)
def test_senseless_parameters_are_refused(make):
    with pytest.raises(StrategyError):
        make()
