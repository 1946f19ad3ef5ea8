"""Ridge regression from sums over documents.

Choices
- The sums of two sets of documents can be added and subtracted, so that the layers of all folds and
  the choice of their penalties read the vectors once. Only a block of them is converted to float64
  at a time.
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
    hashes: np.ndarray,
    penalty: Stream,
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Return a layer and its penalty for each fold, fitted to and chosen on the other folds.

    Args:
      vectors: floats [n, width].
      targets: float64 [n].
      fold: int64 [n].
      l2: penalties to choose from, by the error on a held-out tenth of the other folds.
      hashes: int64 [n], of the contents; they decide the held-out tenth, so that copies are on the
        same side.
      penalty: stream of that decision.

    Returns:
      weights float64 [folds, width], biases float64 [folds], and penalties [folds].
    """
    tried = held_out(penalty, folds.seed, hashes)
    known = [Sums.of(vectors[own], targets[own]) for own in _cells(fold, folds.count, ~tried)]
    asked = [Sums.of(vectors[own], targets[own]) for own in _cells(fold, folds.count, tried)]
    whole_known, whole_asked = sum(known[1:], known[0]), sum(asked[1:], asked[0])
    penalties, layers = [], []
    for own_known, own_asked in zip(known, asked, strict=True):
        rest, others = whole_known - own_known, whole_asked - own_asked
        penalties.append(best_penalty(rest, others, l2, l2[0]))
        layers.append((rest + others).fit(penalties[-1]))
    found = np.stack(layers)
    return found[:, :-1], found[:, -1], penalties


def held_out(penalty: Stream, seed: int, hashes: np.ndarray) -> np.ndarray:
    """Return which documents choose the penalty, bool [n]: a tenth of the contents.

    Args:
      penalty, seed: of the draw.
      hashes: int64 [n], of the contents. Copies are on the same side.
    """
    return randomness.uniform(penalty, seed, hashes) < HELD_OUT


def best_penalty(known: Sums, asked: Sums, l2: Sequence[float], default: float) -> float:
    """Return the penalty whose layer of `known` has the smallest error on `asked`.

    Args:
      default: the penalty if one of the two has no documents.
    """
    if not known.documents or not asked.documents:
        return default
    return min(l2, key=lambda weight: asked.error(known.fit(weight)))


def _cells(fold: np.ndarray, count: int, wanted: np.ndarray) -> list[np.ndarray]:
    """Return the wanted documents of each fold, int64 each."""
    return [np.flatnonzero(wanted & (fold == k)) for k in range(count)]
