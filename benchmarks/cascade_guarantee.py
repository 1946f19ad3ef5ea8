"""Broken promises and costs of cascades on simulated corpora.

    python benchmarks/cascade_guarantee.py --corpora=1000

Each corpus has a judge's score and a cheap score of 20,000 to 60,000 documents, in one of the
shapes below, and the cheap score is anything from useless to excellent. A cascade
(pruning/selection/cascade/) asks the judge, and its selection is compared with that of the judge
alone. Printed are the broken promises with their exact 95% interval, by shape, and the questions
beside those of an oracle, which knows all answers, places both edges as far out as the promise
allows and needs no sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import numpy as np
from scipy import stats

from pruning.selection.cascade.decide import Cascade, Population, Promise
from pruning.store import randomness
from pruning.store.randomness import Stream

CORRELATIONS = (0.0, 0.3, 0.6, 0.75, 0.85, 0.9, 0.95, 0.98, 0.995)
SHARDS = 8

Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Simulated:
    """A corpus: float64 [n] judge and cheap, int64 [n] weights."""

    judge: np.ndarray
    cheap: np.ndarray
    weights: np.ndarray


def normal(rng: Rng, n: int, rho: float) -> Simulated:
    """Return jointly normal scores; the budget is in documents."""
    judge = rng.standard_normal(n)
    cheap = rho * judge + np.sqrt(1 - rho**2) * rng.standard_normal(n)
    return Simulated(judge, cheap, np.ones(n, np.int64))


def skewed(rng: Rng, n: int, rho: float) -> Simulated:
    """Return scores of heavy tails, crowded like probabilities, and a budget in tokens."""
    base = normal(rng, n, rho)
    tokens = np.maximum(rng.lognormal(5.0, 1.2, n), 4).astype(np.int64)
    return Simulated(1 / (1 + np.exp(-4 * base.judge)), np.exp(3 * base.cheap), tokens)


def tied(rng: Rng, n: int, rho: float) -> Simulated:
    """Return a judge with 6 levels and a cheap score with 12."""
    base = normal(rng, n, rho)
    return Simulated(np.floor(base.judge * 1.5), np.floor(base.cheap * 3), base.weights)


def drifting(rng: Rng, n: int, rho: float) -> Simulated:
    """Return shards that differ in the mean of both scores and in their correlation."""
    shard = np.arange(n) * SHARDS // n
    own = np.clip(rho + np.linspace(-0.4, 0.05, SHARDS), 0, 0.999)[shard]
    judge = rng.standard_normal(n) + np.linspace(-0.7, 0.7, SHARDS)[shard]
    cheap = own * judge + np.sqrt(1 - own**2) * rng.standard_normal(n)
    cheap += np.linspace(0.5, -0.5, SHARDS)[shard]
    return Simulated(judge, cheap, np.ones(n, np.int64))


def blind(rng: Rng, n: int, rho: float) -> Simulated:
    """Return a cheap score that is blind to a kind of text: a tenth of the best has the lowest."""
    base = normal(rng, n, rho)
    unseen = (base.judge > 0.5) & (rng.random(n) < rng.choice([0.02, 0.05, 0.1]))
    return Simulated(base.judge, np.where(unseen, base.cheap - 6, base.cheap), base.weights)


def clustered(rng: Rng, n: int, rho: float) -> Simulated:
    """Return bimodal judgments, and a cheap score that is exact except near the cut."""
    good = rng.random(n) < 0.25
    judge = np.where(good, 2.0, -2.0) + 0.5 * rng.standard_normal(n)
    noise = np.sqrt(1 - rho**2) * 4 * rng.standard_normal(n)
    return Simulated(judge, judge + noise, np.ones(n, np.int64))


SHAPES: dict[str, Callable[[Rng, int, float], Simulated]] = {
    f.__name__: f for f in (normal, skewed, tied, drifting, blind, clustered)
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One cascade, with what it promised and did.

    Attributes:
      shared: share of the judge's own selection that it kept.
      asked, predicted, oracle: shares of the documents.
    """

    shape: str
    rho: float
    promised: float
    shared: float
    certified: float
    asked: float
    predicted: float
    oracle: float
    everything: bool

    @property
    def broken(self) -> bool:
        return self.shared < self.promised - 1e-12


def simulate(seed: int, n: int | None = None) -> Result:
    """Return the result on one corpus, a function of the seed."""
    rng = np.random.default_rng(seed)
    shape = list(SHAPES)[seed % len(SHAPES)]
    rho = CORRELATIONS[seed // len(SHAPES) % len(CORRELATIONS)]
    n = n or int(rng.choice([20_000, 40_000, 60_000]))
    corpus = SHAPES[shape](rng, n, rho)
    keep, promised = rng.choice([0.1, 0.2, 0.5]), rng.choice([0.9, 0.95])
    return run(corpus, shape, rho, keep, promised, seed)


def run(
    corpus: Simulated, shape: str, rho: float, keep: float, promised: float, seed: int
) -> Result:
    """Return the result of a cascade on a corpus."""
    n = len(corpus.judge)
    ids = np.arange(n)
    ties = randomness.hashed(Stream.SELECTION_TIE, seed, ids)
    places = np.empty(n, np.int64)
    places[np.lexsort((ties, corpus.cheap))] = ids
    budget = round(keep * int(corpus.weights.sum()))
    population = Population(ids, places, corpus.weights, ties)
    cascade = Cascade(
        population, Promise(budget, promised), lambda _, rows: corpus.judge[rows], seed
    )
    rate = max(0.02, 1000 / n)
    cascade.learned("teach", randomness.uniform(Stream.CASCADE_TEACH, seed, ids) < rate, rate)
    plan = cascade.make_plan()
    answered = int(cascade.answered.sum())
    predicted = n if cascade.asks_everything else answered + plan.asked
    outcome = cascade.settle()
    own = judges_own(corpus, ties, budget)
    total = corpus.weights[own].sum()
    return Result(
        shape,
        rho,
        promised,
        float(corpus.weights[own & outcome.kept].sum() / total),
        outcome.certified,
        float(outcome.answered.mean()),
        float(predicted / n),
        oracle(corpus, places, own, (1 - promised) * total),
        outcome.everything,
    )


def judges_own(corpus: Simulated, ties: np.ndarray, budget: int) -> np.ndarray:
    """Return the selection of the judge alone, bool [n]."""
    order = np.lexsort((ties, corpus.judge))[::-1]
    own = np.zeros(len(order), bool)
    own[order] = np.cumsum(corpus.weights[order]) <= budget
    return own


def oracle(corpus: Simulated, places: np.ndarray, own: np.ndarray, allowed: float) -> float:
    """Return the smallest share of the documents between two edges that keep the promise."""
    order = np.argsort(places)
    good = np.where(own, corpus.weights, 0)[order]
    bad = np.where(own, 0, corpus.weights)[order]
    low = np.sum(np.cumsum(good) <= allowed)
    high = np.sum(np.cumsum(bad[::-1]) <= allowed)
    return max(len(order) - int(low) - int(high), 0) / len(order)


def row(name: str, results: list[Result]) -> str:
    """Return a row of the table."""
    broken = sum(result.broken for result in results)
    interval = stats.binomtest(broken, len(results)).proportion_ci(0.95, "exact")
    asked, oracles, predicted = (
        np.array([getattr(result, key) for result in results])
        for key in ("asked", "oracle", "predicted")
    )
    large = oracles >= 0.05
    ratios = asked[large] / oracles[large]
    shared = np.mean([result.shared - result.promised for result in results])
    ratio = (
        f"{asked[large].sum() / oracles[large].sum():.2f} | {np.quantile(ratios, 0.5):.2f}, "
        f"{np.quantile(ratios, 0.9):.2f}, {ratios.max():.2f} | {np.mean(ratios <= 2):.1%}"
        if large.any()
        else "- | - | -"
    )
    return (
        f"| {name} | {len(results)} | {broken} ({broken / len(results):.1%}) "
        f"[{interval.low:.1%}, {interval.high:.1%}] | {shared:+.3f} | {asked.mean():.3f} | "
        f"{np.abs(asked - predicted).mean():.3f} | {oracles.mean():.3f} | {ratio} |"
    )


def needed(sizes: tuple[int, ...], seeds: int) -> None:
    """Print the questions by correlation: normal scores, 20% kept, 95% promised."""
    print("| correlation | oracle | " + " | ".join(f"{n:,} documents" for n in sizes) + " |")
    print(f"|{'---|' * (2 + len(sizes))}")
    for rho in (0.6, 0.76, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99):
        cells, oracles = [], []
        for n in sizes:
            corpora = [normal(np.random.default_rng(seed), n, rho) for seed in range(seeds)]
            found = [run(c, "normal", rho, 0.2, 0.95, seed) for seed, c in enumerate(corpora)]
            cells.append(f"{np.mean([result.asked for result in found]):.2f}")
            oracles += [result.oracle for result in found]
        print(f"| {rho} | {np.mean(oracles):.2f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--needed", action="store_true", help="questions by correlation instead")
    arguments = parser.parse_args()
    if arguments.needed:
        return needed((20_000, 100_000), 6)
    started = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.corpora)
    results = [simulate(seed) for seed in seeds]
    seconds = time.perf_counter() - started
    print(f"{len(results)} corpora, {seconds:.0f} s; promises of 90% and 95%, at 95% confidence")
    print("ratios to the oracle: of the sums, then median, 90% and largest, where it asks over 5%")
    print(
        "| corpora | number | broken | shared beyond the promise | asked | off the prediction by "
        "| oracle | ratio | of single corpora | at most 2 |"
    )
    print(f"|{'---|' * 10}")
    print(row("all", results))
    for shape in SHAPES:
        print(row(shape, [result for result in results if result.shape == shape]))
    for rho in CORRELATIONS:
        some = [result for result in results if result.rho == rho]
        if some:
            print(row(f"correlation {rho:g}", some))


if __name__ == "__main__":
    main()
