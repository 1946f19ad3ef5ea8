"""Areas under ROC curves and rank correlations, with 95% confidence intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

_NORMAL = 1.959963984540054  # two-sided, 95%


class Interval(NamedTuple):
    """An estimate with its 95% confidence interval."""

    value: float
    low: float
    high: float


def auc(good: np.ndarray, others: np.ndarray) -> float | None:
    """Return the probability that a good document scores higher than another; None without both.

    Args:
      good, others: finite scores, [n] and [m]. Ties count by half.
    """
    if not (len(good) and len(others)):
        return None
    return float(_placements(good, others).mean())


def auc_interval(good: np.ndarray, others: np.ndarray) -> Interval | None:
    """Return the area and its interval; None with fewer than two documents of a kind.

    By DeLong, DeLong and Clarke-Pearson (1988), from the placements of each kind among the other;
    documents are the independent units. Clipped to [0, 1].
    """
    if min(len(good), len(others)) < 2:
        return None
    of_good = _placements(good, others)
    of_others = _placements(others, good)
    value = float(of_good.mean())
    variance = of_good.var(ddof=1) / len(good) + of_others.var(ddof=1) / len(others)
    half = _NORMAL * float(np.sqrt(variance))
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0))


def _placements(scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return the share of `among` that each score exceeds, float64 [n]."""
    ordered = np.sort(among)
    below = np.searchsorted(ordered, scores, side="left")
    up_to = np.searchsorted(ordered, scores, side="right")
    return (below + up_to) / (2 * len(among))


def spearman_interval(a: np.ndarray, b: np.ndarray) -> Interval | None:
    """Return the rank correlation of two scores and its interval; None where it is not defined.

    By Fisher's z with the variance of Bonett and Wright (2000).

    Args:
      a, b: finite scores of the same documents, [n].
    """
    if len(a) < 4 or not (np.ptp(a) and np.ptp(b)):
        return None
    rho = float(stats.spearmanr(a, b).statistic)
    if abs(rho) >= 1:
        return Interval(rho, rho, rho)
    half = _NORMAL * np.sqrt((1 + rho * rho / 2) / (len(a) - 3))
    z = np.arctanh(rho)
    return Interval(rho, float(np.tanh(z - half)), float(np.tanh(z + half)))
