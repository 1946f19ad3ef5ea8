"""Scales: what makes scores of different units comparable before they are combined.

    none         as it is
    log          natural logarithm, such as of a length
    standardize  (x - mean) / standard deviation
    rank         share of the documents that are lower, ties by half: in (0, 1)
    quantile     number of the bucket, 0 to buckets - 1, of equally many documents each

Choices
- The last three are fitted to a sample of a million documents of the pool, drawn by their hashes;
  of a smaller pool to all of it. A quantile of a million is off by 0.05% of the documents.
- Documents with equal scores have one rank, so they are never divided between two buckets, which
  may then be of unequal size.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

Kind = Literal["none", "log", "standardize", "rank", "quantile"]
FITTED = ("standardize", "rank", "quantile")

_SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)


class ScaleError(ValueError):
    """A scale cannot be fitted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scale:
    """A fitted scale.

    Attributes:
      kind: of the scale.
      buckets: of "quantile".
      sample: float64 [n], sorted; empty where no fit is needed.
    """

    kind: Kind
    buckets: int
    sample: np.ndarray

    @classmethod
    def fit(cls, kind: Kind, buckets: int, sample: np.ndarray) -> Scale:
        """Return the scale fitted to finite scores, float64 [n].

        Raises:
          ScaleError: there are none, or all are equal where their spread is needed.
        """
        if kind not in FITTED:
            return cls(kind, buckets, np.zeros(0))
        if not len(sample):
            raise ScaleError(f"no document of the pool has a score that {kind!r} could be of.")
        if kind == "standardize" and not np.ptp(sample) > 0:
            raise ScaleError(f"all scores are {sample[0]:.6g}: they cannot be standardized.")
        return cls(kind, buckets, np.sort(sample))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return values on this scale, float64 [n]; NaN where they are not finite."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "none":
                return values
            if self.kind == "log":
                return np.log(values)
            if self.kind == "standardize":
                return (values - self.sample.mean()) / self.sample.std()
        below = np.searchsorted(self.sample, values, side="left")
        up_to = np.searchsorted(self.sample, values, side="right")
        rank = np.where(np.isfinite(values), (below + up_to) / (2 * len(self.sample)), np.nan)
        if self.kind == "rank":
            return rank
        return np.minimum(np.floor(rank * self.buckets), self.buckets - 1)

    def summary(self) -> dict[str, Any]:
        """Return what a manifest says of the scale."""
        if not len(self.sample):
            return {}
        shown = np.quantile(self.sample, _SHOWN).tolist()
        return {
            "fitted_to": len(self.sample),
            "mean": float(self.sample.mean()),
            "standard_deviation": float(self.sample.std()),
            "quartiles": shown,
        }
