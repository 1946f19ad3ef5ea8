"""Significance of differences between selections, over documents and seeds, after many comparisons.

    found = paired(values_by_seed_of_a, values_by_seed_of_b, drawn_a, drawn_b, error)
    found.value, found.low, found.high, found.p

Choices
- Two sources of variance: the evaluation documents and the training. The first is estimated by
  resampling documents (bootstrap.py), the second by training with several seeds. Runs of one seed
  share initial parameters and the document-order rule, so differences are taken seed by seed.
- Documents and seeds are crossed, not nested: the variance of a mean difference is the sum of the
  two, with Satterthwaite's (1946) degrees of freedom.
- Two or three seeds estimate one variance poorly. The variance of training is therefore pooled
  over all cells: the residual of the table cells x seeds with seeds as blocks (`block_error`).
  For two cells alone that is the paired t-test.
- Pooling assumes equally noisy cells. `equal_variance` tests this for the whole table, and cells
  that fail are left out of the pool; a pair that is noisier than the pool (an F-test at 10%) is
  judged by its own variance. benchmarks/verdict_error_rates.py measures what error rates remain.
- A single seed without a pooled variance gives an interval over documents and no p-value: nothing
  can be said of the training.
- p-values of many comparisons are adjusted by Holm (1979), which needs no independence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from evaluation.errors import EvaluationError
from evaluation.statistics import bootstrap
from pruning.store import randomness
from pruning.store.randomness import Stream


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval, and the p-value of a difference.

    Attributes:
      p: two-sided; None where nothing is tested, or where the variance of training is unknown.
      adjusted: p after Holm's correction, once the estimate is one of several.
    """

    value: float
    low: float
    high: float
    p: float | None = None
    adjusted: float | None = None

    @property
    def sign(self) -> int:
        """Return -1 or 1 for a significant difference, else 0.

        Significant means tested, an interval that excludes zero, and an adjusted p of at most 5%.
        """
        if self.p is None or (self.adjusted is not None and self.adjusted > 0.05):
            return 0
        return (self.low > 0) - (self.high < 0)


def of_draws(value: float, drawn: np.ndarray) -> Estimate:
    """Return a value with the 95% interval of its resampled values, float64 [resamples]."""
    return Estimate(float(value), *bootstrap.interval(drawn))


@dataclasses.dataclass(frozen=True)
class SeedError:
    """Variance of a single training around its cell's mean, without the seeds' common effects.

    Attributes:
      variance: in squared nats per token.
      freedom: degrees of freedom of the estimate.
    """

    variance: float
    freedom: int


def block_error(losses: np.ndarray) -> SeedError | None:
    """Return the residual variance of a two-way table without replication; None without freedom.

    Args:
      losses: float64 [cells, seeds].
    """
    losses = np.asarray(losses, np.float64)
    cells, seeds = losses.shape
    freedom = (cells - 1) * (seeds - 1)
    if not freedom:
        return None
    return SeedError(float((_residual(losses) ** 2).sum() / freedom), freedom)


def _residual(losses: np.ndarray) -> np.ndarray:
    """Return losses [..., cells, seeds] without the means of cells and of seeds."""
    rest = losses - losses.mean(-1, keepdims=True)
    return rest - rest.mean(-2, keepdims=True)


@dataclasses.dataclass(frozen=True)
class EqualVariance:
    """Test that all cells have the same variance of training.

    Attributes:
      p: probability of so uneven cells under equal variances.
      noisiest: index of the cell with the largest residuals.
      share: its share of all squared residuals (Cochran's C).
    """

    p: float
    noisiest: int
    share: float


def equal_variance(losses: np.ndarray, draws: int = 4000) -> EqualVariance | None:
    """Test cells for equal variance by Cochran's C (1941), with a simulated null distribution.

    The null is simulated, because residuals of a two-way table are correlated.

    Args:
      losses: float64 [cells, seeds].

    Returns:
      None for fewer than three cells or two seeds, where the test is impossible, and for a table
      without any residual.
    """
    losses = np.asarray(losses, np.float64)
    cells, seeds = losses.shape
    if cells < 3 or seeds < 2:
        return None
    squares = (_residual(losses) ** 2).sum(-1)
    if squares.sum() <= 1e-24 * max(np.abs(losses).max() ** 2, 1e-300):
        return None
    generator = randomness.generator(Stream.NULL_SIMULATION, 1, cells * seeds)
    null = (_residual(generator.normal(size=(draws, cells, seeds))) ** 2).sum(-1)
    highest = null.max(-1) / null.sum(-1)
    share = float(squares.max() / squares.sum())
    p = (1 + np.count_nonzero(highest >= share)) / (1 + draws)
    return EqualVariance(float(p), int(squares.argmax()), share)


def paired(
    a: Sequence[float],
    b: Sequence[float],
    drawn_a: np.ndarray,
    drawn_b: np.ndarray,
    seed_error: SeedError | None = None,
) -> Estimate:
    """Return the difference a - b of two models' losses.

    Args:
      a, b: losses on the whole evaluation set, seed by seed, in the same order of seeds.
      drawn_a, drawn_b: float64 [resamples], losses averaged over seeds, on the same resamples.
      seed_error: pooled over cells; None to estimate it from these two, which takes two seeds.

    Raises:
      ValueError: a and b have different numbers of seeds.
    """
    if len(a) != len(b):
        raise EvaluationError(f"{len(a)} and {len(b)} seeds cannot be paired.")
    from scipy import stats

    by_seed = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    value = float(by_seed.mean())
    documents = np.asarray(drawn_a, np.float64) - np.asarray(drawn_b, np.float64)
    of_documents = float(documents.var())
    if seed_error is None and len(by_seed) == 1:
        return Estimate(value, *bootstrap.interval(documents))
    if len(by_seed) > 1:
        own = SeedError(float(by_seed.var(ddof=1)) / 2, len(by_seed) - 1)
        if seed_error is None or _is_noisier(own, seed_error):
            seed_error = own
    assert seed_error is not None
    of_seeds = 2 * seed_error.variance / len(by_seed)
    error = (of_documents + of_seeds) ** 0.5
    if error == 0:
        return Estimate(value, value, value, float(value == 0))
    # The documents' degrees of freedom are so many that they are taken as infinite.
    freedom = error**4 / (of_seeds**2 / seed_error.freedom) if of_seeds else np.inf
    reach = float(stats.t.ppf(0.975, freedom)) * error
    p = float(2 * stats.t.sf(abs(value) / error, freedom))
    return Estimate(value, value - reach, value + reach, p)


def _is_noisier(own: SeedError, pooled: SeedError) -> bool:
    """Return whether a pair's own variance exceeds the pooled one in an F-test at 10%."""
    from scipy import stats

    limit = float(stats.f.ppf(0.9, own.freedom, pooled.freedom))
    return own.variance > limit * pooled.variance


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Holm (1979), each at most 1, in the order given.

    Example: 0.01, 0.04, 0.03 -> 0.03, 0.06, 0.06.
    """
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * factors), 1.0)
    return adjusted.tolist()


def adjusted(estimates: Sequence[Estimate | None]) -> list[Estimate | None]:
    """Return the estimates with p-values adjusted for their number; None stays None."""
    places = [i for i, item in enumerate(estimates) if item is not None and item.p is not None]
    result = list(estimates)
    for place, value in zip(places, holm([estimates[i].p for i in places]), strict=True):  # type: ignore[union-attr, misc]
        result[place] = dataclasses.replace(result[place], adjusted=value)  # type: ignore[type-var]
    return result
