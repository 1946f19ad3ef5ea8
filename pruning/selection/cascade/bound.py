"""Exact bounds on what a cascade gets wrong among the documents that it does not ask about.

Documents stand in the order of a cheap score. The judge's own selection is everything ranked above
an unknown cut t. Below an edge `low`, unasked documents are dropped; the errors are those that the
judge ranks above t. Above an edge `high`, unasked documents are kept; the errors are those that the
judge ranks below t. Document i is drawn into a sample with a probability r_i that was fixed before
the draw, by a hash of its own, and the judge is asked about the sample.

Theorem (docs/cascade.md has the proof). Let w_i be a document's weight, 0 <= x w_i < r_i for a
number x fixed before the draw (or r_i = 1: asked about in any case). Walking from the bottom, let

    missed(e) = total weight of the errors below the edge e that are not in the sample
    cost(e)   = sum over the errors in the sample below e of log((1 - x w_i) / (1 - x w_i / r_i))

Then, with probability 1 - alpha, x missed(e) < log(1 / alpha) + cost(e) for all edges e at once.

Choices
- The product over the errors of (1 - x w_i / r_i) ** sampled_i / (1 - x w_i) is a martingale of
  mean 1 in the order of the walk, so the bound is Ville's inequality. It is exact at any sample
  size, and no correction is needed for having looked at all edges.
- Draws are independent, not of a fixed size, which allows a rate per document: high where the cheap
  score is in doubt, and proportional to the weight where weights are skewed.
- A document that was sampled is decided by the judge, and is no error. Only the rest is bounded.
- A walk from the top bounds what is kept wrongly, likewise.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Walk:
    """A bound on the errors of one side, with all that is fixed before the draw.

    Attributes:
      x: the number of the theorem, per unit of weight; 0 for a side that decides nothing.
      allowed: largest total weight of missed errors that the promise allows.
      alpha: probability with which the bound may fail.
      least: smallest weight of a document.
    """

    x: float
    allowed: float
    alpha: float
    least: float = 1.0

    @property
    def per_weight(self) -> float:
        """Smallest -log(1 - x w) / w: what a missed error adds to the martingale's logarithm."""
        return -math.log1p(-self.x * self.least) / self.least

    @property
    def budget(self) -> float:
        """Costs of sampled errors that the promise leaves room for; negative if for none at all."""
        if self.x <= 0:
            return -math.inf
        # Weights are integers: a broken promise misses at least the next one.
        return (math.floor(self.allowed + 1e-9) + 1) * self.per_weight - math.log(1 / self.alpha)

    def costs(self, weights: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """Return the costs of sampled errors, float64 [n]; infinite where x w is not below r.

        A document with the rate 1 is asked about in any case, and costs nothing.
        """
        uncertain = rates < 1
        own = np.where(uncertain, self.x * weights, 0.0)
        share = np.minimum(own / rates, 1.0)
        with np.errstate(divide="ignore"):
            return np.log1p(-np.minimum(own, 1.0)) - np.log1p(-share)

    def missed(self, costs: np.ndarray) -> float:
        """Return the upper bound on the weight of missed errors, given those in the sample."""
        if self.x <= 0:
            return math.inf
        least_excluded = (math.log(1 / self.alpha) + float(np.sum(costs))) / self.per_weight
        return max(math.ceil(least_excluded - 1e-9) - 1, 0)

    def edge(self, places: np.ndarray, costs: np.ndarray, end: int) -> int:
        """Return the farthest edge that the promise allows.

        Args:
          places: int [sampled errors], counted from the side's end of the order.
          costs: float64 [sampled errors].
          end: number of all documents.

        Returns:
          The number of documents, from the side's end, that need not be asked about; those among
          them that are in the sample have been.
        """
        budget = self.budget
        if budget < 0:
            return 0
        order = np.argsort(places, kind="stable")
        over = np.flatnonzero(np.cumsum(costs[order]) > budget)
        return int(places[order[over[0]]]) if len(over) else end
