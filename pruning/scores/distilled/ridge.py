"""Ridge regression from sums over documents.

Choices
- The sums of two sets of documents can be added and subtracted, so that the layers of all folds and
  the choice of the penalty read the vectors once, and only a block of them is held in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from pruning.scores.distilled.lessons import HELD_OUT
from pruning.scores.text.folds import Folds
from pruning.store import randomness
from pruning.store.randomness import Stream

_BLOCK = 4096  # vectors at a time


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over documents, of a vector v with a one appended and its target y.

    Attributes:
      outer: float64 [width + 1, width + 1], of v v^T; the last entry is the number of documents.
      product: float64 [width + 1], of v y.
      square: of y^2.
    """

    outer: np.ndarray
    product: np.ndarray
    square: float

    @classmethod
    def of(cls, vectors: np.ndarray, targets: np.ndarray) -> Sums:
        """Return the sums of vectors, floats [n, width], and targets, floats [n]."""
        width = vectors.shape[1] + 1
        total = cls(np.zeros((width, width)), np.zeros(width), 0.0)
        for begin in range(0, len(vectors), _BLOCK):
            block = vectors[begin : begin + _BLOCK].astype(np.float64)
            block = np.concatenate([block, np.ones((len(block), 1))], axis=1)
            y = targets[begin : begin + _BLOCK].astype(np.float64)
            total += cls(block.T @ block, block.T @ y, float(y @ y))
        return total

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.outer + other.outer, self.product + other.product, self.square + other.square
        )

    def __sub__(self, other: Sums) -> Sums:
        return Sums(
            self.outer - other.outer, self.product - other.product, self.square - other.square
        )

    @property
    def documents(self) -> int:
        return round(float(self.outer[-1, -1]))

    def fit(self, l2: float) -> np.ndarray:
        """Return weights and, last, the bias of ridge regression, float64 [width + 1].

        Args:
          l2: weight of the penalty, in documents; the bias is not penalized.
        """
        count = self.outer[-1, -1]
        mean, target = self.outer[-1, :-1] / count, self.product[-1] / count
        # NOTE: centered, since a direction that all vectors share would dominate the system.
        gram = self.outer[:-1, :-1] - count * np.outer(mean, mean) + l2 * np.eye(len(mean))
        weights = np.linalg.solve(gram, self.product[:-1] - count * mean * target)
        return np.append(weights, target - mean @ weights)

    def error(self, weights: np.ndarray) -> float:
        """Return the sum of squared errors of weights and bias, [width + 1]."""
        return float(self.square - 2 * self.product @ weights + weights @ self.outer @ weights)


def folded(
    vectors: np.ndarray,
    targets: np.ndarray,
    fold: np.ndarray,
    folds: Folds,
    l2: Sequence[float],
    ids: np.ndarray,
    penalty: Stream,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return a layer for each fold, fitted to the other folds, and the penalty.

    Args:
      vectors: floats [n, width].
      targets: float64 [n].
      fold: int64 [n].
      l2: penalties to choose from, by the error on a held-out tenth.
      ids: int64 [n], which decide the held-out tenth.
      penalty: stream of that decision.

    Returns:
      weights float64 [folds, width], biases float64 [folds], and the penalty.
    """
    tried = randomness.uniform(penalty, folds.seed, ids) < HELD_OUT
    known = [Sums.of(vectors[own], targets[own]) for own in _cells(fold, folds.count, ~tried)]
    asked = [Sums.of(vectors[own], targets[own]) for own in _cells(fold, folds.count, tried)]
    rest, held_out = sum(known[1:], known[0]), sum(asked[1:], asked[0])
    chosen = l2[0]
    if held_out.documents and rest.documents:
        chosen = min(l2, key=lambda weight: held_out.error(rest.fit(weight)))
    whole = rest + held_out
    layers = np.stack(
        [(whole - one - other).fit(chosen) for one, other in zip(known, asked, strict=True)]
    )
    return layers[:, :-1], layers[:, -1], chosen


def _cells(fold: np.ndarray, count: int, wanted: np.ndarray) -> list[np.ndarray]:
    """Return the wanted documents of each fold, int64 each."""
    return [np.flatnonzero(wanted & (fold == k)) for k in range(count)]
