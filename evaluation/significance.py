"""Is a difference between two selections one? Over documents, over seeds, and after many looks.

    found = paired(values_by_seed_of_a, values_by_seed_of_b, drawn_a, drawn_b)
    found.value, found.low, found.high, found.p

Choices
- Two things vary: which documents the models are judged by, and how a training happened to go. The
  first is measured by drawing documents again (bootstrap.py), the second by training again with
  other seeds. Runs of one seed share initial parameters and the rule for the order, so that their
  differences are taken seed by seed.
- Documents and seeds are crossed, not nested: the variance of a mean difference is the sum of the
  two, and its degrees of freedom are Satterthwaite's (1946).
- Two or three seeds say little of one difference: two that happen to agree would make it sure. How
  trainings go is therefore taken to vary alike for all selections, and estimated from all of them:
  the residual of cells x seeds, seeds as blocks (`block_error`). For two cells alone that is the
  paired t-test.
- With a single seed only the documents can be spoken for; the interval is then the bootstrap's.
- Many selections are compared at once: p-values are adjusted by Holm (1979), which needs no
  independence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from evaluation import bootstrap


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; of a difference also the chance of one so large from nothing.

    Attributes:
      p: two-sided; None where it is no difference.
      adjusted: p after Holm, once the estimate stands among others.
    """

    value: float
    low: float
    high: float
    p: float | None = None
    adjusted: float | None = None

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of zero and the adjusted p allows, else 0."""
        if self.adjusted is not None and self.adjusted > 0.05:
            return 0
        return (self.low > 0) - (self.high < 0)


def of_draws(value: float, drawn: np.ndarray) -> Estimate:
    """A value with the interval of its resampled values, float64 [resamples]."""
    return Estimate(float(value), *bootstrap.interval(drawn))


@dataclasses.dataclass(frozen=True)
class SeedError:
    """How far one training lies from its cell's mean, seeds' common effects apart.

    Attributes:
      variance: of a single training.
      freedom: degrees of it.
    """

    variance: float
    freedom: int


def block_error(losses: np.ndarray) -> SeedError | None:
    """The residual of a two-way table without replication; None where there is none.

    Args:
      losses: float64 [cells, seeds].
    """
    losses = np.asarray(losses, np.float64)
    cells, seeds = losses.shape
    freedom = (cells - 1) * (seeds - 1)
    if not freedom:
        return None
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    return SeedError(float((rest * rest).sum() / freedom), freedom)


def paired(
    a: Sequence[float],
    b: Sequence[float],
    drawn_a: np.ndarray,
    drawn_b: np.ndarray,
    seed_error: SeedError | None = None,
) -> Estimate:
    """The difference a - b of two models' losses.

    Args:
      a, b: losses of the whole evaluation set, seed by seed, in the same order of seeds.
      drawn_a, drawn_b: float64 [resamples], of the losses averaged over seeds, on the same draws.
      seed_error: of all cells; None to estimate it from these two alone.

    Raises:
      ValueError: a and b have not as many seeds.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} seeds cannot be paired.")
    from scipy import stats

    by_seed = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    value = float(by_seed.mean())
    documents = np.asarray(drawn_a, np.float64) - np.asarray(drawn_b, np.float64)
    of_documents = float(documents.var())
    if len(by_seed) == 1:
        low, high = bootstrap.interval(documents)
        return Estimate(value, low, high, _normal_p(value, of_documents**0.5))
    if seed_error is None:
        seed_error = SeedError(float(by_seed.var(ddof=1)) / 2, len(by_seed) - 1)
    of_seeds = 2 * seed_error.variance / len(by_seed)
    error = (of_documents + of_seeds) ** 0.5
    if error == 0:
        return Estimate(value, value, value, float(value == 0))
    # The bootstrap's own degrees of freedom are its documents': so many that they do not count.
    freedom = error**4 / (of_seeds**2 / seed_error.freedom) if of_seeds else np.inf
    reach = float(stats.t.ppf(0.975, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Estimate(value, value - reach, value + reach, p)


def _normal_p(value: float, error: float) -> float:
    from scipy import stats

    return float(2 * stats.norm.sf(abs(value) / error)) if error else float(value == 0)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): each at most 1, in the order given.

    Example: 0.01, 0.04, 0.03 -> 0.03, 0.06, 0.06.
    """
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * factors), 1.0)
    return adjusted.tolist()


def adjusted(estimates: Sequence[Estimate | None]) -> list[Estimate | None]:
    """The estimates with their p-values adjusted for standing together; None stays None."""
    places = [i for i, item in enumerate(estimates) if item is not None and item.p is not None]
    result = list(estimates)
    for place, value in zip(places, holm([estimates[i].p for i in places]), strict=True):  # type: ignore[union-attr, misc]
        result[place] = dataclasses.replace(result[place], adjusted=value)  # type: ignore[type-var]
    return result
