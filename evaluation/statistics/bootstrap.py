"""Bootstrap confidence intervals of losses, over the documents of an evaluation set.

Choices
- A loss per token is a ratio of sums (nats over tokens). Whole documents are resampled with
  replacement and the ratio is recomputed: documents are the independent units, tokens are not.
- All models are evaluated on the same resamples, so differences between models are paired: the
  difficulty of the documents, which is most of the variance, cancels.
- This is the uncertainty of the evaluation set. That of the training (another seed) is not in it:
  significance.py adds it where a study has several seeds.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from pruning.store import randomness
from pruning.store.randomness import Stream

RESAMPLES = 2000
_BLOCK = 1 << 22  # numbers held at a time


def ratios(
    numerators: np.ndarray,
    denominators: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Return ratios of sums under resampling of the documents.

    Args:
      numerators, denominators: float64 [models, documents], such as nats and tokens.
      resamples: how many times the documents are drawn again.
      seed: of the draws; equal for equal document counts, which is what pairs the models.

    Returns:
      float64 [models, resamples].

    Example:
      numerators [[2, 4]], denominators [[1, 1]]: draws (first, first), (first, second), ... give
      2, 3 or 4.
    """
    numerators = np.asarray(numerators, np.float64)
    denominators = np.asarray(denominators, np.float64)
    documents = numerators.shape[1]
    generator = randomness.generator(Stream.BOOTSTRAP, seed, documents)
    blocks = []
    step = max(1, _BLOCK // documents)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, documents, size=(size, documents))
        drawn += documents * np.arange(size)[:, None]
        # How often each document is drawn. [resamples, documents]
        times = np.bincount(drawn.ravel(), minlength=size * documents).reshape(size, documents)
        blocks.append((numerators @ times.T) / (denominators @ times.T))
    return np.concatenate(blocks, axis=1)


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return the central `level` of the resampled values (percentile interval)."""
    finite = bool(np.isfinite(samples).all())  # between infinities nothing can be interpolated
    method: Literal["linear", "nearest"] = "linear" if finite else "nearest"
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], method=method)
    return float(low), float(high)
