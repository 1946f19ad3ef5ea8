"""Decisions of a cascade over documents in memory, whoever answers for the judge.

    cascade = decide.Cascade(population, promise, ask, seed)
    cascade.learned("teach", drawn, rate)     # documents that a student learns from
    cascade.reorder(places, unranked)         # the order of the student's score
    outcome = cascade.settle()                # certify, ask about what is in doubt

The stage (stage.py) asks the scoring engine, the simulation (benchmarks/cascade_guarantee.py) looks
answers up.

Identity. Let the judge's selection be S and the cascade's K: all unasked documents above `high`,
and the judge's best of the asked ones up to the same budget. Among the asked documents S and K are
both the judge's best so many, so one contains the other. Therefore

    S without K = the dropped documents that belong to S,     if K has at least as many of the asked
    K without S = the documents kept unasked that do not,     otherwise

and the promise holds if neither exceeds what is allowed. In the first case the judge's own cut is
not below the one that K used among the asked documents, so errors counted at K's cut are not fewer
than at the judge's: the unknown cut needs no bound of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from pruning.selection.cascade import plan as planning
from pruning.selection.cascade.plan import Doubt, Plan
from pruning.store import randomness
from pruning.store.randomness import Stream

# A name for the questions, documents int64 [n] -> the judge's scores, float64 [n]; NaN for none.
Ask = Callable[[str, np.ndarray], np.ndarray]

_HOPE = 0.02  # share of the budget by which the first band trusts the estimate of the cut
_TRUSTED = 0.15  # share of the allowed errors that a level before the last may make
_BEAT = 0.02  # share of the documents by which a plan must beat random dropping
_TRIED = 33  # cuts where nothing is in doubt
_GAP = 0.2  # of the weight that may be missed


@dataclasses.dataclass(frozen=True)
class Promise:
    """A promise about the selection.

    Attributes:
      budget: weight to keep.
      share: share of the judge's own selection that is also in the cascade's.
      confidence: probability of that.
    """

    budget: int
    share: float = 0.95
    confidence: float = 0.95

    def slack(self, largest: int) -> int:
        """Return the weight by which the cascade's selection may fall short of the budget.

        One with a larger gap keeps nothing unasked. `largest` is the weight of a document.
        """
        return min(largest - 1, int(_GAP * (1 - self.share) * self.budget))

    def allowed(self, largest: int) -> tuple[float, float]:
        """Return the weights that may be missed on the low and the high side.

        The judge's selection falls short of the budget by less than one document.
        """
        loss = 1 - self.share
        return loss * (self.budget - largest + 1), loss * self.budget - self.slack(largest)


@dataclasses.dataclass(frozen=True)
class Population:
    """Documents in the order of a cheap score.

    Attributes:
      ids: int64 [n], keys of the hashed draws.
      places: int64 [n], 0 for the lowest cheap score; a permutation.
      weights: int64 [n], positive: tokens, or 1.
      ties: uint64 [n], order among equal scores of the judge.
    """

    ids: np.ndarray
    places: np.ndarray
    weights: np.ndarray
    ties: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def order(self) -> np.ndarray:
        """Documents in ascending order, int64 [n]: the inverse of `places`."""
        order = np.empty_like(self.places)
        order[self.places] = np.arange(len(order))
        return order


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Outcome of a cascade.

    Attributes:
      kept: bool [n], its selection.
      answered: bool [n], the documents that the judge was asked about.
      low, high: edges: unasked documents at places below `low` are dropped, from `high` on kept.
      certified: share of the judge's own selection that is kept, at the confidence of the promise.
      estimated: estimate of that share.
      everything: the judge was asked about every document.
    """

    kept: np.ndarray
    answered: np.ndarray
    low: int
    high: int
    certified: float
    estimated: float
    everything: bool


def best(scores: np.ndarray, ties: np.ndarray, weights: np.ndarray, budget: float) -> np.ndarray:
    """Return the documents with the highest scores up to a budget, bool [n], as `select` does.

    Args:
      scores: float64 [n]; documents with -inf are never kept.
      ties: uint64 [n], higher first among equal scores.
      weights: [n].
    """
    order = np.lexsort((ties, scores))[::-1]
    kept = np.zeros(len(scores), bool)
    fits = np.cumsum(weights[order]) <= budget * (1 + 1e-12)
    kept[order] = fits & (scores[order] > -np.inf)
    return kept


class Cascade:
    """A cascade in progress.

    Attributes:
      population: the documents, in the order so far.
      scores: float64 [n], the judge's; NaN for documents that it was not asked about, and -inf for
        those that it gave none.
      rates: float64 [n], probability with which a document was drawn to teach.
      unranked: bool [n], documents without a place in the order; the judge was asked about them.
      plan: the plan so far.
      asked: name of the questions -> number of documents.
    """

    def __init__(self, population: Population, promise: Promise, ask: Ask, seed: int):
        self.population = population
        self.promise = promise
        self.scores = np.full(len(population), np.nan)
        self.rates = np.zeros(len(population))
        self.unranked = np.zeros(len(population), bool)
        self.plan: Plan | None = None
        self.asked: dict[str, int] = {}
        self._seed = seed
        self._ask = ask
        self._certify = np.zeros(len(population))  # rates of the certifying sample
        self._sampled = np.zeros(len(population), bool)

    @property
    def answered(self) -> np.ndarray:
        return ~np.isnan(self.scores)

    @property
    def places(self) -> np.ndarray:
        """Places over the number of documents, float64 [n] in (0, 1)."""
        return (self.population.places + 0.5) / len(self.population)

    @property
    def asks_everything(self) -> bool:
        """True if the plan hardly beats dropping documents at random.

        At random, a share of the documents as large as the share that may be missed can be dropped.
        """
        assert self.plan is not None
        asked = self.plan.asked + np.count_nonzero(self.answered)
        return bool(asked >= (self.promise.share - _BEAT) * len(self.population))

    def ask(self, name: str, documents: np.ndarray) -> None:
        """Ask the judge about those of the documents, bool [n], that it has not answered."""
        rows = np.flatnonzero(documents & ~self.answered)
        if len(rows):
            found = self._ask(name, rows)
            self.asked[name] = self.asked.get(name, 0) + len(rows)
            self.scores[rows] = np.where(np.isfinite(found), found, -np.inf)

    # ---- before the certifying sample ------------------------------------------------------------

    def learned(self, name: str, documents: np.ndarray, rates: float | np.ndarray) -> None:
        """Ask about documents, bool [n], that were drawn with these rates; plans rest on them."""
        self.plan = None
        self.ask(name, documents)
        self.rates = 1 - (1 - self.rates) * (1 - rates)

    def reorder(self, name: str, places: np.ndarray, unranked: np.ndarray) -> None:
        """Put the documents into another order, and ask about those that have no place in it."""
        self.plan = None
        self.population = dataclasses.replace(self.population, places=places)
        self.unranked = self.unranked | unranked
        self.ask(name, unranked)

    def make_plan(self) -> Plan:
        """Plan by the documents answered so far; repeated calls return the same plan."""
        if self.plan is not None:
            return self.plan
        weights, places = self.population.weights, self.places
        chances = np.where(self.unranked, 1.0, self.rates)
        rows = np.flatnonzero(self.answered & (chances > 0))
        kept = self._best(rows, self.promise.budget, 1 / chances[rows])
        ranked = ~self.unranked[rows]
        fitted = rows[ranked]
        doubt = Doubt.fit(places[fitted], kept[ranked], 1 / chances[fitted])
        order = self.population.order
        above = np.cumsum(weights[order][::-1])
        cut = 1 - np.searchsorted(above, self.promise.budget) / len(order)
        left = order[~self.answered[order]]
        self.plan = planning.make(
            doubt, places[left], weights[left], cut, self._allowed, 1 - self.promise.confidence
        )
        return self.plan

    @property
    def _allowed(self) -> tuple[float, float]:
        return self.promise.allowed(self._largest)

    @property
    def _largest(self) -> int:
        return int(self.population.weights.max(initial=1))

    def _gap(self, kept: np.ndarray) -> int:
        return self.promise.budget - int(self.population.weights[kept].sum())

    def doubtful(self) -> tuple[int, int]:
        """Return the places [first, last) that the order so far leaves in doubt.

        Outside of them, errors are expected to take up a small share of what is allowed.
        """
        doubt = self.make_plan().doubt
        order = self.population.order
        weights, kept = self.population.weights[order], doubt(self.places[order])
        low, high = (_TRUSTED * allowed for allowed in self._allowed)
        first = int(np.sum(np.cumsum(weights * kept) <= low))
        last = len(order) - int(np.sum(np.cumsum((weights * (1 - kept))[::-1]) <= high))
        return min(first, last), last

    # ---- the certifying sample and what follows --------------------------------------------------

    def settle(self) -> Outcome:
        """Draw the certifying sample, ask about it and about the documents in doubt."""
        plan = self.make_plan()
        if self.asks_everything:
            return self._everything()
        population, n = self.population, len(self.population)
        self._certify = plan.rates(self.places, population.weights)
        draws = randomness.uniform(Stream.CASCADE_SAMPLE, self._seed, population.ids)
        self._sampled = (draws < self._certify) & ~self.answered
        self.ask("certify", self._sampled)
        chances = 1 - (1 - np.where(self.unranked, 1.0, self.rates)) * (1 - self._certify)
        rows = np.flatnonzero(self.answered & (chances > 0))
        hopeful = [
            self._best(rows, self.promise.budget * factor, 1 / chances[rows])
            for factor in (1 - _HOPE, 1 + _HOPE)
        ]
        low = self._low(self._spread(rows, hopeful[0]))
        high = self._high(self._spread(rows, hopeful[1]))
        if low > high:  # nothing is in doubt: a single cut
            low = high = self._single(high, low)
        for number in itertools.count(1):
            high = self._highest(high)
            band = (population.places >= low) & (population.places < high)
            self.ask(f"doubt-{number}", band)
            kept = self._selection(high)
            lower, higher = self._low(kept), self._high(kept)
            if lower >= low and higher <= high:
                if high == n or self._gap(kept) <= self.promise.slack(self._largest):
                    break
                higher = n  # without documents kept unasked, the gap does not matter
            low, high = min(low, lower), max(high, higher)
        if self._lacks_scores(kept):
            return self._everything()
        return self._outcome(kept, low, high)

    def _lacks_scores(self, kept: np.ndarray) -> bool:
        """Return True if too few documents may have a score of the judge to fill the budget.

        What may be missed is a share of the budget, and the judge's own selection may be smaller.
        """
        short = self._gap(kept) > (1 - self.promise.share) * self.promise.budget
        return short and self._keeps_all_scored(kept)

    def _everything(self) -> Outcome:
        n = len(self.population)
        self.ask("rest", np.ones(n, bool))
        return self._outcome(self._selection(n), 0, n)

    def _spread(self, rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        whole = np.zeros(len(self.population), bool)
        whole[rows] = kept
        return whole

    def _single(self, first: int, last: int) -> int:
        """Return the cut of [first, last] that needs the fewest further questions."""

        def further(cut: int) -> int:
            kept = self._selection(cut)
            return max(cut - self._low(kept), 0) + max(self._high(kept) - cut, 0)

        tried = np.unique(np.linspace(first, last, _TRIED).astype(int))
        return int(min(tried, key=further))

    def _highest(self, high: int) -> int:
        """Return the least edge from `high` on whose unasked documents fit into the budget."""
        order = self.population.order
        weights = np.where(self.answered, 0, self.population.weights)[order]
        above = np.cumsum(weights[::-1])
        fits = int(np.searchsorted(above, self.promise.budget, side="right"))
        return max(high, len(order) - fits)

    def _best(self, rows: np.ndarray, budget: float, importance: np.ndarray) -> np.ndarray:
        """Return which answered documents are the judge's best up to a budget, bool [rows]."""
        weights = self.population.weights[rows] * importance
        return best(self.scores[rows], self.population.ties[rows], weights, budget)

    def share_of(self, kept: np.ndarray, scores: np.ndarray) -> float:
        """Return the share of the judge's own selection that a selection, bool [n], holds.

        Args:
          scores: float64 [n], the judge's, of all documents; NaN where it gives none.
        """
        population = self.population
        known = np.where(np.isfinite(scores), scores, -np.inf)
        own = best(known, population.ties, population.weights, self.promise.budget)
        return float(population.weights[own & kept].sum() / max(population.weights[own].sum(), 1))

    def _selection(self, high: int) -> np.ndarray:
        """Return the selection for an edge, bool [n]."""
        answered = self.answered
        above = ~answered & (self.population.places >= high)
        rows = np.flatnonzero(answered)
        left = self.promise.budget - int(self.population.weights[above].sum())
        return above | self._spread(rows, self._best(rows, left, np.ones(len(rows))))

    def _errors(self, kept: np.ndarray, low: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of sampled errors, from their side's end, and their costs."""
        assert self.plan is not None
        side = self.plan.low if low else self.plan.high
        rows = np.flatnonzero(self._sampled & (kept if low else ~kept) & self._on_side(low))
        places = self.population.places[rows]
        costs = side.walk.costs(self.population.weights[rows], self._certify[rows])
        return (places if low else len(self.population) - 1 - places), costs

    def _end(self, low: bool) -> int:
        """Return the number of documents below the place that a side does not pass."""
        assert self.plan is not None
        # The comparison of `Plan.rates`: a document on a side has a rate there.
        return int(np.count_nonzero(self.places < self.plan.ends[0 if low else 1]))

    def _on_side(self, low: bool) -> np.ndarray:
        places = self.population.places
        return places < self._end(low) if low else places >= self._end(low)

    def _low(self, kept: np.ndarray) -> int:
        assert self.plan is not None
        return self.plan.low.walk.edge(*self._errors(kept, True), self._end(True))

    def _high(self, kept: np.ndarray) -> int:
        assert self.plan is not None
        n = len(self.population)
        return n - self.plan.high.walk.edge(*self._errors(kept, False), n - self._end(False))

    def _outcome(self, kept: np.ndarray, low: int, high: int) -> Outcome:
        n, population = len(self.population), self.population
        answered = self.answered
        if answered.all():
            return Outcome(kept, answered, 0, n, 1.0, 1.0, True)
        assert self.plan is not None
        missed, guessed = [0.0, 0.0], [0.0]
        for number, (edge, side) in enumerate(((low, self.plan.low), (n - high, self.plan.high))):
            is_low = number == 0
            decided = population.places < low if is_low else population.places >= high
            unasked = float(population.weights[decided & ~answered].sum())
            if not unasked:
                continue
            places, costs = self._errors(kept, is_low)
            missed[number] = min(side.walk.missed(costs[places < edge]), unasked)
            rows = np.flatnonzero(self._sampled & (kept if is_low else ~kept) & decided)
            rates = self._certify[rows]
            guessed.append(float((population.weights[rows] * (1 / rates - 1)).sum()))
        estimated = 1 - max(guessed) / self.promise.budget
        return Outcome(kept, answered, low, high, self._certified(kept, *missed), estimated, False)

    def _certified(self, kept: np.ndarray, dropped: float, unasked: float) -> float:
        """Return the share of the judge's own selection that is kept at least.

        Args:
          dropped, unasked: bounds on the weights dropped wrongly, and kept wrongly without asking.
        """
        budget, gap = self.promise.budget, self._gap(kept)
        own: float = budget - self._largest + 1  # least weight of the judge's own selection
        if self._keeps_all_scored(kept):
            own = min(own, budget - gap - unasked + dropped)
        # What is left of the budget matters only where documents are kept unasked.
        lost = unasked + gap if (kept & ~self.answered).any() else 0.0
        return float(1 - max(dropped / max(own, 1), lost / budget))

    def _keeps_all_scored(self, kept: np.ndarray) -> bool:
        """Return True if every document with a score of the judge, as far as is known, is kept."""
        return bool(kept[self.scores > -np.inf].all())
