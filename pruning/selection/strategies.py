"""Strategies: rank keys of documents, and the interval of the ranking that is kept.

A `Ranking` orders documents by a float64 key, highest first, and `select.py` cuts the order at the
budget. A strategy is two short pure functions, `keys` and `interval`:

    Top          key = score                    the first B tokens of the ranking
    Bottom       key = -score                   the first B
    Middle       key = -score                   the B around the median token
    Percentiles  key = -score                   from one percentile of the tokens to another
    Threshold    key = score                    all documents between two scores, without a budget
    Random       key = gumbel                   the first B
    Softmax      key = score / T + gumbel       the first B
    InversePropensity, InverseFrequency: key = log w + gumbel, with w as documented there

Choices
- Weighted sampling without replacement is Gumbel top-k: the k largest of log w + gumbel are exactly
  k draws one after another with probabilities proportional to w (Vieira 2014; Kool et al. 2019).
- Random uses the same draws as the weighted strategies. With equal weights they are equal, and the
  overlap of a weighted sample with the random one of the same seed shows the effect of the weights.
- A `Filter` (All, Split, the set operations over finished selections) has no score and no budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np


class StrategyError(ValueError):
    """A strategy cannot be applied to these scores, or its parameters are invalid."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """A strategy with a score and a budget: `keys`, and `interval` where it is not the first B."""

    needs_score: ClassVar[bool] = True
    takes_budget: ClassVar[bool] = True
    takes_quotas: ClassVar[bool] = True
    needs_fit: ClassVar[bool] = False

    def fit(self, sample: np.ndarray) -> Ranking:
        """Return the strategy fitted to a sample of scores; most need no fit.

        Args:
          sample: float64 [n], the scores of a uniform sample of the documents.
        """
        return self

    def keys(self, score: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return rank keys, the highest kept first.

        Args:
          score: float64 [n], finite; zeros where `needs_score` is False.
          uniform: float64 [n] in (0, 1), the documents' own draws.

        Returns:
          float64 [n]; NaN for a document that is kept by no budget.

        Raises:
          StrategyError: a score is outside of what the strategy is defined for.
        """
        raise NotImplementedError

    def interval(self, total: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the kept stretch of the ranking, in units of cost (tokens or documents).

        Args:
          total: int64 [groups], of all ranked documents.
          budget: int64 [groups].

        Returns:
          start and stop, int64 [groups].
        """
        return np.zeros_like(total), budget

    def score_at(self, key: float) -> float | None:
        """Return the score that a key encodes; None where the key holds a random draw."""
        return None


@dataclasses.dataclass(frozen=True)
class Top(Ranking):
    """Keeps the highest scores."""

    def keys(self, score: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return score

    def score_at(self, key: float) -> float | None:
        return key


@dataclasses.dataclass(frozen=True)
class Bottom(Ranking):
    """Keeps the lowest scores."""

    def keys(self, score: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return -score

    def score_at(self, key: float) -> float | None:
        return -key


@dataclasses.dataclass(frozen=True)
class Middle(Bottom):
    """Keeps a budget's worth of tokens around the median token (Marion et al. 2023)."""

    def interval(self, total: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = np.maximum(total - budget, 0) // 2
        return start, start + budget


@dataclasses.dataclass(frozen=True)
class Percentiles(Bottom):
    """Keeps the scores from one percentile to another; 0 is the lowest score, 1 the highest.

    Percentiles are of tokens, so the share kept is high - low (Ankner et al. 2024 use 0 to 0.5,
    0.25 to 0.75 and 0.5 to 1).

    Attributes:
      low, high: the window, from 0 to 1.
    """

    low: float
    high: float
    takes_budget: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_window(self, self.low, self.high)

    def interval(self, total: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = (np.rint(total * share).astype(np.int64) for share in (self.low, self.high))
        return low, high


@dataclasses.dataclass(frozen=True)
class Threshold(Top):
    """Keeps the scores from `low` to `high`, both included, without a budget.

    For scores with a meaning of their own: SemDeDup's epsilon, a P(yes), a classifier's odds. To
    apply a budget as well, select within this selection.

    Attributes:
      low, high: the limits; at least one is given.
    """

    low: float | None = None
    high: float | None = None
    takes_budget: ClassVar[bool] = False
    takes_quotas: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise StrategyError("Threshold needs low, high or both.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise StrategyError(f"Threshold needs low <= high: [{self.low}, {self.high}].")

    def keys(self, score: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        inside = np.ones(len(score), bool)
        if self.low is not None:
            inside &= score >= self.low
        if self.high is not None:
            inside &= score <= self.high
        return np.where(inside, score, np.nan)

    def interval(self, total: np.ndarray, budget: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros_like(total), total


@dataclasses.dataclass(frozen=True)
class Weighted(Ranking):
    """A sample without replacement with probabilities proportional to weights."""

    def log_weights(self, score: np.ndarray) -> np.ndarray:
        """Return log weights of scores, float64 [n] -> float64 [n], up to a constant."""
        raise NotImplementedError

    def keys(self, score: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return self.log_weights(score) - np.log(-np.log(uniform))


@dataclasses.dataclass(frozen=True)
class Random(Weighted):
    """A uniform sample."""

    needs_score: ClassVar[bool] = False

    def log_weights(self, score: np.ndarray) -> np.ndarray:
        return np.zeros_like(score)


@dataclasses.dataclass(frozen=True)
class Softmax(Weighted):
    """Samples with w = exp(score / temperature).

    A high temperature tends to Random, a low one to Top (QuRating, Wettig et al. 2024). The
    temperature is in units of the score: for log-probabilities, 1 samples by the probability.

    Attributes:
      temperature: positive.
    """

    temperature: float

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise StrategyError(f"a temperature is positive, not {self.temperature}.")

    def log_weights(self, score: np.ndarray) -> np.ndarray:
        return score / self.temperature


@dataclasses.dataclass(frozen=True)
class InversePropensity(Weighted):
    """Samples with w = 1 / score, for densities (Sachdeva et al. 2024, section 3.3).

    NOTE: the algorithm printed in that paper samples proportionally to the density itself; its text
    and its theorem want the inverse, which flattens the distribution of what is kept.
    """

    def log_weights(self, score: np.ndarray) -> np.ndarray:
        if len(score) and not score.min() > 0:
            raise StrategyError(
                f"inverse propensity needs positive scores, and a document has {score.min():.6g}: "
                "use it on a density, or InverseFrequency on any score."
            )
        return -np.log(score)


@dataclasses.dataclass(frozen=True)
class InverseFrequency(Weighted):
    """Samples with w = 1 / p(score), p the distribution of the score itself.

    Inverse propensity for scores that are not densities, such as likelihoods: documents with common
    scores are kept with a lower probability, so a small sample has a flat histogram of scores.

    The paper does not say how p is estimated for such scores. Here it is a histogram of a sample of
    2^20 documents, with `bins` equal bins between the outer quantiles. Scores beyond these belong
    to the first and the last bin, so that outliers do not get extreme weights.

    Attributes:
      bins: their number; for a small sample of n at most 2 n^(1/3) (Rice's rule).
      outer: share of the documents beyond the bins on each side.
    """

    needs_fit: ClassVar[bool] = True

    bins: int = 64
    outer: float = 0.001

    def __post_init__(self) -> None:
        if self.bins < 1 or not 0 <= self.outer < 0.5:
            raise StrategyError(f"bins must be positive and outer in [0, 0.5): {self}.")

    def fit(self, sample: np.ndarray) -> Ranking:
        low, high = np.quantile(sample, [self.outer, 1 - self.outer]) if len(sample) else (0, 0)
        bins = max(1, min(self.bins, round(2 * len(sample) ** (1 / 3))))
        counts = np.bincount(_bins(sample, low, high, bins), minlength=bins)
        # A bin that the sample missed counts as holding one document.
        return _Binned(float(low), float(high), -np.log(np.maximum(counts, 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class _Binned(Weighted):
    """Weights by equal bins of the score: log_weight float64 [bins]."""

    low: float
    high: float
    log_weight: np.ndarray

    def log_weights(self, score: np.ndarray) -> np.ndarray:
        return self.log_weight[_bins(score, self.low, self.high, len(self.log_weight))]


def _bins(score: np.ndarray, low: float, high: float, bins: int) -> np.ndarray:
    width = (high - low) / bins or 1.0  # 0 where all scores are equal
    return np.clip((score - low) / width, 0, bins - 1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Filter:
    """A strategy without score and budget."""

    def keeps(self, uniform: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
        """Return a mask of the kept documents.

        Args:
          uniform: float64 [n] in (0, 1), the documents' draws for splits.
          masks: bool [n] for each of the selections that a set operation joins.

        Returns:
          bool [n].
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class All(Filter):
    """Keeps every document: a view of the whole corpus, or of `within`."""

    def keeps(self, uniform: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
        return np.ones(len(uniform), bool)


@dataclasses.dataclass(frozen=True)
class Split(Filter):
    """Keeps the documents whose draw lies in [low, high): parts of one seed never overlap.

    Splits draw from their own stream, so a random selection within a split is random. Splits of one
    seed cut the same line: [0.2, 0.4) within [0, 0.5) is the same fifth as without.

    Attributes:
      low, high: the part, from 0 to 1.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _require_window(self, self.low, self.high)

    def keeps(self, uniform: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
        return (uniform >= self.low) & (uniform < self.high)


@dataclasses.dataclass(frozen=True)
class SetOperation(Filter):
    """Joins finished selections of one corpus.

    Attributes:
      selections: their directories.
    """

    selections: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.selections) < 2:
            raise StrategyError(f"{type(self).__name__} needs two selections or more.")


@dataclasses.dataclass(frozen=True)
class Union(SetOperation):
    """Keeps the documents of any of the selections."""

    def keeps(self, uniform: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
        return np.logical_or.reduce(masks)


@dataclasses.dataclass(frozen=True)
class Intersection(SetOperation):
    """Keeps the documents that are in all selections."""

    def keeps(self, uniform: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
        return np.logical_and.reduce(masks)


@dataclasses.dataclass(frozen=True)
class Difference(SetOperation):
    """Keeps the documents of the first selection that are in none of the others."""

    def keeps(self, uniform: np.ndarray, masks: Sequence[np.ndarray]) -> np.ndarray:
        return masks[0] & ~np.logical_or.reduce(masks[1:])


CONFIGURABLES: dict[str, type] = {
    "Random": Random,
    "Top": Top,
    "Bottom": Bottom,
    "Middle": Middle,
    "Percentiles": Percentiles,
    "Threshold": Threshold,
    "Softmax": Softmax,
    "InversePropensity": InversePropensity,
    "InverseFrequency": InverseFrequency,
    "All": All,
    "Split": Split,
    "Union": Union,
    "Intersection": Intersection,
    "Difference": Difference,
}


def _require_window(strategy: Ranking | Filter, low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise StrategyError(
            f"{type(strategy).__name__} needs 0 <= low < high <= 1: [{low}, {high})."
        )
