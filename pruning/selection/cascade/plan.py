"""Plan of a cascade: rates of the certifying sample, from documents that the judge has answered.

The plan is made before the certifying sample is drawn, so it may be wrong: then the judge is asked
about more documents than necessary, and the promise holds as it would with a perfect plan.

Choices
- The probability that the judge keeps a document is a probit regression on the normal quantile of
  its place in the cheap order, with a quadratic term and hinges in both tails. It is smooth in the
  tails, where the answered documents hold hardly any exception.
- A document's rate is its weight times the larger of two rates: the least one that the bound needs,
  and one proportional to the square root of the probability that it is an error (Neyman's
  allocation), which lowers the variance of the estimate.
- The number x of the bound and the factor of that allocation are the pair, of a grid, that leaves
  most documents unasked.
- A side of which nothing can be left unasked has no bound, and the other one the whole alpha.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from scipy import optimize, special

from pruning.selection.cascade.bound import Walk

_SAMPLE = 2048  # documents, evenly spread over the order, that a plan is computed on
_STEPS = np.geomspace(1.15, 20, 11)  # x over the smallest that any promise needs
_FACTORS = np.geomspace(0.03, 2.5, 11)  # rate over the root of the probability of an error
_HINGES = (0.8, 1.6)  # normal quantiles, on both sides, from which on the slope may differ
# Penalties of the regression: constant, linear, quadratic, hinges.
_RIDGE = np.array([0.01, 0.01, 1.0, *(4 * [0.3])])
_OVERLAP = 0.01  # least share of the documents, on either side of the middle, with both rates
_CHUNK = 1 << 16  # documents whose features are in memory at a time
_ROOM = 0.9  # x w is at most this share of the rate


@dataclasses.dataclass(frozen=True)
class Doubt:
    """Probability, by place in the cheap order, that the judge ranks a document above its cut."""

    weights: np.ndarray
    floor: float

    @classmethod
    def fit(cls, places: np.ndarray, kept: np.ndarray, importance: np.ndarray) -> Doubt:
        """Fit to answered documents.

        Args:
          places: float64 [n], places in the order over the number of documents, in (0, 1).
          kept: bool [n], the judge ranks them above its cut, as far as is known.
          importance: float64 [n], one over the probability of having been asked.
        """
        x = _features(places)
        weight = importance / importance.mean()
        sign = np.where(kept, 1.0, -1.0)

        def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
            value = sign * (x @ beta)
            log_p = special.log_ndtr(value)
            density = np.exp(-(value**2) / 2 - log_p) / math.sqrt(2 * math.pi)
            slope = -x.T @ (weight * sign * density)
            return float(-(weight @ log_p) + _RIDGE @ beta**2 / 2), slope + _RIDGE * beta

        beta = optimize.minimize(loss, np.zeros(len(_RIDGE)), jac=True, method="BFGS").x
        return cls(beta, 0.2 / len(places))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return probabilities, float64 [n], not closer to 0 or 1 than the data can tell."""
        p = np.empty(len(places))
        for start in range(0, len(p), _CHUNK):
            some = slice(start, start + _CHUNK)
            p[some] = special.ndtr(_features(places[some]) @ self.weights)
        return np.clip(p, self.floor, 1 - self.floor, out=p)


def _features(places: np.ndarray) -> np.ndarray:
    normal = special.ndtri(places)
    hinges = [np.maximum(sign * normal - start, 0) for sign in (-1, 1) for start in _HINGES]
    return np.stack([np.ones_like(normal), normal, normal**2, *hinges], axis=1)


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the plan.

    Attributes:
      walk: its bound.
      factor: rate of a document of weight 1 over the root of its probability of being an error.
      unasked: expected number of documents that it decides without the judge.
      reach: expected place of its edge.
    """

    walk: Walk
    factor: float
    unasked: float
    reach: float

    def rates(self, weights: np.ndarray, errors: np.ndarray) -> np.ndarray:
        """Return the rates of documents, given their probabilities of being errors."""
        if self.walk.x <= 0:
            return np.zeros(len(weights))
        per_weight = np.maximum(self.walk.x / _ROOM, self.factor * np.sqrt(errors))
        return np.minimum(weights * per_weight, 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rates of the certifying sample, and the bounds of both sides.

    Attributes:
      low, high: the side of what is dropped, and of what is kept, without asking.
      ends: place that the low side does not pass, and the one that the high side does not pass;
        beyond them, their rates are 0. The sides overlap around the middle.
      doubt: probability that the judge keeps a document, by place.
      asked: expected number of documents that the judge will be asked about, those that it has
        answered before the plan not included.
    """

    low: Side
    high: Side
    ends: tuple[float, float]
    doubt: Doubt
    asked: float

    def rates(self, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the probability of each document to be in the certifying sample, float64 [n].

        Args:
          places: float64 [n], places over the number of documents, in (0, 1).
          weights: [n].
        """
        kept = self.doubt(places)
        low, high = self.low.rates(weights, kept), self.high.rates(weights, 1 - kept)
        below, above = places < self.ends[0], places >= self.ends[1]
        return np.maximum(np.where(below, low, 0.0), np.where(above, high, 0.0))


def make(
    doubt: Doubt,
    places: np.ndarray,
    weights: np.ndarray,
    cut: float,
    allowed: tuple[float, float],
    alpha: float,
) -> Plan:
    """Return the plan that is expected to ask about the fewest documents.

    Args:
      doubt: as fitted.
      places: float64 [n], ascending, of the documents that the judge has not answered.
      weights: [n], positive integers.
      cut: place at which the cheap score alone would cut; neither side is planned beyond it.
      allowed: weights that may be missed on the low and on the high side.
      alpha: probability with which the promise may be broken.
    """
    some = np.unique(np.linspace(0, len(places) - 1, min(len(places), _SAMPLE)).astype(int))
    scale = len(places) / max(len(some), 1)
    at, weight = places[some], weights[some].astype(np.float64)
    kept = doubt(at)
    split = int(np.searchsorted(at, cut))
    upwards, downwards = np.arange(split), np.arange(split, len(at))[::-1]
    least = float(weights.min(initial=1))

    def side(walked: np.ndarray, errors: np.ndarray, most: float, level: float) -> Side:
        found = None
        if most > 0 and level > 0 and len(walked):
            found = _best(at[walked], weight[walked], errors[walked], most, level, least, scale)
        reach = 0.0 if walked is upwards else 1.0
        return found or Side(Walk(0.0, most, level, least), 0.0, 0.0, reach)

    # Dropping alone needs no bound for what is kept, and has the whole alpha.
    low, high = max(
        (
            (
                side(upwards, kept, allowed[0], alpha - level),
                side(downwards, 1 - kept, allowed[1], level),
            )
            for level in (alpha / 2, 0.0)
        ),
        key=lambda pair: pair[0].unasked + pair[1].unasked,
    )
    ends = (1.0, 1.0)
    if high.walk.x:
        middle, gap = (low.reach + high.reach) / 2, high.reach - low.reach
        zone = max(gap / 4, _OVERLAP)
        ends = (min(middle + zone, 1.0), max(middle - zone, 0.0))
    return Plan(low, high, ends, doubt, len(places) - low.unasked - high.unasked)


def _best(
    places: np.ndarray,
    weights: np.ndarray,
    errors: np.ndarray,
    allowed: float,
    alpha: float,
    least: float,
    scale: float,
) -> Side | None:
    """Return the side with the most unasked documents; None if there is no such document."""
    best: Side | None = None
    smallest = math.log(1 / alpha) / (math.floor(allowed) + 1)
    for step in _STEPS:
        x = smallest * step
        if x * least >= _ROOM:
            break
        walk = Walk(x, allowed, alpha, least)
        per_weight = np.maximum(x / _ROOM, _FACTORS[:, None] * np.sqrt(errors))
        rates = np.minimum(per_weight * weights, 1.0)  # [factors, documents]
        spent = scale * np.cumsum(errors * rates * walk.costs(weights, rates), axis=1)
        saved = scale * np.cumsum(1 - rates, axis=1)
        reached = np.sum(spent <= walk.budget, axis=1)
        unasked = np.where(reached > 0, saved[np.arange(len(saved)), reached - 1], 0.0)
        found = int(np.argmax(unasked))
        if unasked[found] > (best.unasked if best else 0.0):
            reach = float(places[reached[found] - 1])
            best = Side(walk, float(_FACTORS[found]), float(unasked[found]), reach)
    return best
