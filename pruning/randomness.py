"""Random numbers that belong to a document, not to a run.

Every draw about document d is a hash of (seed, d). It is the same whatever the order of the
documents, the number of shards or processes, and however often the work was restarted.

The mixer is SplitMix64's finaliser (Steele, Lea, Flood 2014), applied twice with the seed between:
one round of a bijective mixer, keyed by addition alone, would give shifted copies of one sequence
for neighbouring seeds.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit integers. uint64 [...] -> uint64 [...]."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64, copy=False) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashed(seed: int, ids: np.ndarray, stream: int = 0) -> np.ndarray:
    """64 random bits for every id.

    Args:
      seed: any integer.
      ids: integers [...], document ids or other counters.
      stream: tells draws apart that have the same seed and ids (one stream per purpose).

    Returns:
      uint64, of the shape of `ids`.
    """
    key = mix(mix(np.asarray([seed]).astype(np.int64).view(np.uint64)) ^ np.uint64(stream))
    return mix(mix(np.asarray(ids).astype(np.int64, copy=False).view(np.uint64)) ^ key[0])


def uniform(seed: int, ids: np.ndarray, stream: int = 0) -> np.ndarray:
    """A float64 in the open interval (0, 1) for every id: its logarithm is always finite."""
    return ((hashed(seed, ids, stream) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(seed: int, ids: np.ndarray, stream: int = 0) -> np.ndarray:
    """A standard Gumbel variate, float64, for every id.

    The k largest of log w + gumbel are a sample of k without replacement, drawn one after another
    with probabilities proportional to w (Gumbel top-k; Vieira 2014).
    """
    return -np.log(-np.log(uniform(seed, ids, stream)))


def generator(seed: int, *counters: int) -> np.random.Generator:
    """A NumPy generator keyed by (seed, counters): for draws that need more than one number."""
    key = hashed(seed, np.asarray([0]), stream=0)
    for depth, counter in enumerate(counters):
        key = hashed(int(key.view(np.int64)[0]), np.asarray([counter]), stream=depth + 1)
    return np.random.Generator(np.random.Philox(key=int(key[0])))
