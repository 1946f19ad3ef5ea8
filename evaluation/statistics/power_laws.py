"""Scaling over model size: over-scaling, effective model size, and extrapolation.

    fit = fit_power_laws(sizes, losses)            # losses [..., curves, sizes]
    fit.at(10 * sizes[-1]), fit.size_of(loss)

Choices
- L(N) = E + A N^-a for every sampler's losses over model sizes, with one exponent for all samplers:
  three sizes cannot determine an exponent per curve.
- Only model size is extrapolated, at the trained number of steps. A training curve is not L(D): its
  points before the last were never annealed, and a longer run would repeat a small selection. For
  L(D), train with several numbers of steps, each with its own schedule;
  `fit_power_laws` fits their last losses over tokens as it does those over sizes.
- Given the exponent, the rest is linear: the exponent is searched on a grid, E and A are solved for
  exactly and are not negative. No initial values, and thousands of resampled fits per second.
- Over-scaling is defined by Sachdeva et al.: 100 means as good as the next model size. The ratio
  diverges if the two sizes hardly differ, so it has an interval and is shown with the raw losses.
- Effective model size, from the paper's later version: the size at which full data would reach this
  loss. It is infinite where the loss is below the limit of any size.
- Extrapolated rankings are shares of draws, over documents and over the variance of training. The
  share of pairs that two trained sizes rank alike (`pairs_ranked_alike`) shows their reliability.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from evaluation.errors import EvaluationError

_EXPONENTS = np.geomspace(0.02, 2.0, 81)


@dataclasses.dataclass(frozen=True)
class PowerLaws:
    """L(N) = floor + scale * N^-exponent.

    Attributes:
      exponent: [...], shared by the curves of a draw.
      floor, scale: [..., curves].
    """

    exponent: np.ndarray
    floor: np.ndarray
    scale: np.ndarray

    def at(self, size: float) -> np.ndarray:
        """Return the losses at a size: [..., curves]."""
        return self.floor + self.scale * np.asarray(size) ** -self.exponent[..., None]

    def size_of(self, loss: np.ndarray, curve: int = 0) -> np.ndarray:
        """Return the sizes at which a curve has these losses, [...]; infinite if it never does."""
        floor, scale = self.floor[..., curve], self.scale[..., curve]
        with np.errstate(divide="ignore", invalid="ignore"):
            size = (scale / (np.asarray(loss) - floor)) ** (1 / self.exponent)
        return np.where(np.asarray(loss) > floor, size, np.inf)


def fit_power_laws(sizes: np.ndarray, losses: np.ndarray) -> PowerLaws:
    """Fit power laws by least squares over all curves of a draw.

    Args:
      sizes: [sizes], of models in parameters, or of data in tokens: see the choices above.
      losses: float64 [..., curves, sizes], nats per token; NaN where a curve has no such point.

    Raises:
      ValueError: fewer than two sizes. With two, E is taken as 0.
    """
    sizes = np.asarray(sizes, np.float64)
    losses = np.asarray(losses, np.float64)
    if len(sizes) < 2:
        raise EvaluationError("a power law wants at least two sizes.")
    unit = float(np.exp(np.log(sizes).mean()))  # near 1, where floor and scale are told apart
    free = len(sizes) > 2
    lead = losses.shape[:-2]
    flat = losses.reshape(-1, *losses.shape[-2:])  # [draws, curves, sizes]
    candidates = np.broadcast_to(_EXPONENTS, (len(flat), len(_EXPONENTS)))
    for _ in range(4):  # each round looks between the neighbors of the best
        errors = np.stack(
            [_solve(sizes / unit, flat, exponent, free)[2] for exponent in candidates.T], axis=1
        )
        best = errors.argmin(axis=1)
        rows = np.arange(len(flat))
        low = candidates[rows, np.maximum(best - 1, 0)]
        high = candidates[rows, np.minimum(best + 1, candidates.shape[1] - 1)]
        exponent = candidates[rows, best]
        candidates = np.geomspace(low, high, 21, axis=1)
    floor, scale, _ = _solve(sizes / unit, flat, exponent, free)
    shape = (*lead, losses.shape[-2])
    return PowerLaws(
        exponent.reshape(lead),
        floor.reshape(shape),
        (scale * unit ** exponent[:, None]).reshape(shape),
    )


def _solve(
    sizes: np.ndarray, losses: np.ndarray, exponent: np.ndarray, free: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return floor, scale [draws, curves] and squared error [draws] at given exponents [draws]."""
    present = ~np.isnan(losses)
    y = np.where(present, losses, 0.0)
    x = np.where(present, sizes ** -exponent[:, None, None], 0.0)  # [draws, curves, sizes]
    count = present.sum(-1)
    mean_x, mean_y = x.sum(-1) / count, y.sum(-1) / count
    dx, dy = x - mean_x[..., None] * present, y - mean_y[..., None] * present
    spread = (dx * dx).sum(-1)
    scale = np.divide((dx * dy).sum(-1), spread, out=np.zeros_like(spread), where=spread > 0)
    floor = mean_y - scale * mean_x
    through_zero = (x * y).sum(-1) / (x * x).sum(-1)
    pinned = floor < 0 if free else np.ones_like(floor, bool)
    scale, floor = np.where(pinned, through_zero, scale), np.where(pinned, 0.0, floor)
    flat = scale < 0  # a curve that rises with size: the best that is left is its mean
    scale, floor = np.where(flat, 0.0, scale), np.where(flat, mean_y, floor)
    rest = (y - floor[..., None] - scale[..., None] * x) * present
    return floor, scale, (rest * rest).sum((-1, -2))


def over_scaling(sampled: np.ndarray, full: np.ndarray, larger: np.ndarray) -> np.ndarray:
    """Return the mean over metrics of 100 (L_sampled - L_full) / (L_next_size_full - L_full).

    Args:
      sampled, full, larger: [..., metrics], losses or qualities, but of one kind in each metric.

    Returns:
      [...]. 0 is as good as the full data, 100 as good as the next size of model on it.
    """
    sampled, full, larger = (np.asarray(x, np.float64) for x in (sampled, full, larger))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (100 * (sampled - full) / (larger - full)).mean(axis=-1)


def pairs_ranked_alike(smaller: np.ndarray, larger: np.ndarray) -> np.ndarray:
    """Return the share of pairs of curves that two sizes of model rank alike.

    This is the decision accuracy of DataDecide (Magnusson et al., arXiv 2504.11393): how often the
    choice between two data sets made at the smaller size agrees with the larger one's.

    Args:
      smaller, larger: [..., curves], losses of the same curves.

    Returns:
      [...], in [0, 1].
    """
    i, j = np.triu_indices(smaller.shape[-1], 1)
    signs = [np.sign(x[..., i] - x[..., j]) for x in (smaller, larger)]
    return (signs[0] == signs[1]).mean(-1)


def winners(losses: np.ndarray) -> np.ndarray:
    """Return how often each curve is the lowest: [draws, curves] -> shares [curves]."""
    return np.bincount(losses.argmin(axis=1), minlength=losses.shape[1]) / len(losses)
