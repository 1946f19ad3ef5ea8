"""A strategy of one's own: the scores nearest to a target."""

import dataclasses

import gin
import numpy as np

from pruning.selection.strategies import Ranking


@gin.configurable(module="nearest")
@dataclasses.dataclass(frozen=True)
class Nearest(Ranking):
    """Keeps the documents whose scores are nearest to `target`."""

    target: float = 0.0

    def keys(self, score: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return -np.abs(score - self.target)
