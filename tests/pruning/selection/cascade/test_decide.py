"""Decisions of a cascade: the identity that its promise rests on, and the promise."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from pruning.selection.cascade.decide import Cascade, Population, Promise
from pruning.store import randomness
from pruning.store.randomness import Stream

_BENCHMARK = Path(__file__).parents[4] / "benchmarks" / "cascade_guarantee.py"


@pytest.fixture(scope="module")
def guarantee():
    import sys

    spec = importlib.util.spec_from_file_location("cascade_guarantee", _BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_promises_are_kept_on_corpora_of_all_shapes(guarantee):
    results = [guarantee.simulate(seed, 4000) for seed in range(54)]
    assert sum(result.broken for result in results) <= 3  # 2.7 expected at most
    certain = [result for result in results if result.everything]
    assert all(result.shared == 1 and result.asked == 1 for result in certain)
    assert 0 < len(certain) < len(results)
    assert {result.shape for result in results} == set(guarantee.SHAPES)


@pytest.mark.sweep
def test_promises_are_kept_on_a_thousand_corpora(guarantee):
    results = [guarantee.simulate(seed) for seed in range(1000)]
    assert sum(result.broken for result in results) <= 50


def population_of(judge, cheap, seed=0):
    ids = np.arange(len(judge))
    ties = randomness.hashed(Stream.SELECTION_TIE, seed, ids)
    places = np.empty(len(ids), np.int64)
    places[np.lexsort((ties, cheap))] = ids
    return Population(ids, places, np.ones(len(ids), np.int64), ties)


def judges_own(judge, population, budget):
    own = np.zeros(len(judge), bool)
    own[np.lexsort((population.ties, judge))[::-1][:budget]] = True
    return own


@pytest.mark.parametrize("seed", range(40))
def test_what_is_lost_is_the_larger_of_both_errors(seed):
    """For any partition into dropped, asked and kept: ties, and edges in odd places, included."""
    rng = np.random.default_rng(seed)
    n, budget = 200, int(rng.integers(20, 120))
    judge = np.floor(rng.standard_normal(n) * rng.choice([1.5, 20.0]))
    cheap = judge * rng.uniform(0, 2) + rng.standard_normal(n)
    population = population_of(judge, cheap)
    cascade = Cascade(population, Promise(budget), lambda _, rows: judge[rows], 0)
    low, high = np.sort(rng.integers(0, n, 2))
    high = cascade._highest(int(high))
    low = min(int(low), high)
    inside = (population.places >= low) & (population.places < high)
    cascade.ask("doubt-1", inside | (rng.random(n) < 0.1))
    kept = cascade._selection(high)
    own = judges_own(judge, population, budget)
    unasked = ~cascade.answered
    if kept.sum() < budget:  # too little was asked about to fill the budget
        return
    wrongly_dropped = np.sum(own & unasked & (population.places < low))
    wrongly_kept = np.sum(~own & unasked & (population.places >= high))
    assert np.sum(own & kept) == budget - max(wrongly_dropped, wrongly_kept)


def test_a_useless_score_asks_about_everything_and_keeps_what_the_judge_keeps():
    rng = np.random.default_rng(5)
    judge = np.where(rng.random(3000) < 0.1, np.nan, rng.standard_normal(3000))
    population = population_of(np.nan_to_num(judge, nan=-np.inf), rng.standard_normal(3000))
    asked = []

    def ask(name, rows):
        asked.append(rows)
        return judge[rows]

    cascade = Cascade(population, Promise(600), ask, 1)
    cascade.learned("teach", rng.random(3000) < 0.05, 0.05)
    outcome = cascade.settle()
    assert outcome.everything and outcome.certified == 1
    own = judges_own(np.nan_to_num(judge, nan=-np.inf), population, 600)
    assert np.array_equal(outcome.kept, own)
    # Exactly once.
    assert np.array_equal(np.sort(np.concatenate(asked)), np.arange(3000))


def test_documents_without_a_cheap_score_are_asked_about():
    rng = np.random.default_rng(2)
    judge = rng.standard_normal(6000)
    population = population_of(judge, judge + 0.1 * rng.standard_normal(6000))
    cascade = Cascade(population, Promise(1200), lambda _, rows: judge[rows], 3)
    cascade.learned("teach", rng.random(6000) < 0.1, 0.1)
    absent = rng.random(6000) < 0.05
    cascade.reorder("unscored-1", population.places, absent)
    outcome = cascade.settle()
    assert outcome.answered[absent].all() and outcome.answered.mean() < 0.7
    own = judges_own(judge, population, 1200)
    assert np.sum(own & outcome.kept) >= 0.95 * 1200


@pytest.mark.parametrize("budget", [5400, 6000])
def test_everything_is_asked_about_where_too_few_documents_may_have_a_score(budget):
    """The judge's own selection is then smaller than the budget, by an unknown weight."""
    rng = np.random.default_rng(11)
    judge = rng.standard_normal(6000)
    population = population_of(judge, judge + 0.3 * rng.standard_normal(6000))
    judge = np.where(judge + 0.05 * rng.standard_normal(6000) < 0, np.nan, judge)
    cascade = Cascade(population, Promise(budget, 0.9), lambda _, rows: judge[rows], 0)
    cascade.learned("teach", rng.random(6000) < 0.05, 0.05)
    outcome = cascade.settle()
    assert outcome.everything and np.array_equal(outcome.kept, np.isfinite(judge))


def test_every_document_on_a_side_has_a_rate_that_its_bound_allows():
    rng = np.random.default_rng(0)
    n = 4001
    judge = rng.standard_normal(n)
    population = population_of(judge, judge + 0.4 * rng.standard_normal(n))
    cascade = Cascade(population, Promise(800, 0.9), lambda _, rows: judge[rows], 0)
    cascade.learned("teach", rng.random(n) < 0.1, 0.1)
    plan = cascade.make_plan()
    assert plan.low.walk.x > 0 and plan.high.walk.x > 0
    # Ends that are the place of a document, which is not recovered exactly by a multiplication.
    odd = cascade.places[cascade.places * n - 0.5 > population.places]
    assert len(odd) > 10
    for end in (plan.ends, *((place, min(place + 0.01, 1.0)) for place in odd.tolist())):
        cascade.plan = dataclasses.replace(plan, ends=end)
        rates = cascade.plan.rates(cascade.places, population.weights)
        for low, side in ((True, plan.low), (False, plan.high)):
            assert np.all(rates[cascade._on_side(low)] > side.walk.x)


def test_the_certified_share_counts_what_is_left_of_the_budget():
    rng = np.random.default_rng(3)
    n = 6000
    judge = rng.standard_normal(n)
    given = population_of(judge, judge + 0.3 * rng.standard_normal(n))
    weights = rng.integers(20, 60, n)
    population = dataclasses.replace(given, weights=weights)
    budget = int(weights.sum() * 0.3)
    cascade = Cascade(population, Promise(budget, 0.9), lambda _, rows: judge[rows], 0)
    cascade.learned("teach", rng.random(n) < 0.1, 0.1)
    outcome = cascade.settle()
    assert not outcome.everything and (outcome.kept & ~outcome.answered).any()
    gap = budget - weights[outcome.kept].sum()
    assert 0.9 <= outcome.certified <= 1 - gap / budget
    assert cascade._certified(outcome.kept, 0.0, 0.0) == pytest.approx(1 - gap / budget)
    own = budget - weights.max() + 1
    assert cascade._certified(outcome.kept, own / 10, 0.0) == pytest.approx(0.9)


def test_the_plan_predicts_how_many_are_asked_about():
    rng = np.random.default_rng(7)
    judge = rng.standard_normal(30_000)
    population = population_of(judge, judge + 0.5 * rng.standard_normal(30_000))
    cascade = Cascade(population, Promise(6000), lambda _, rows: judge[rows], 3)
    cascade.learned("teach", rng.random(30_000) < 0.05, 0.05)
    predicted = cascade.make_plan().asked + cascade.answered.sum()
    outcome = cascade.settle()
    assert abs(outcome.answered.sum() - predicted) < 0.1 * 30_000
    assert outcome.answered.mean() < 0.5
    assert outcome.certified >= 0.95
