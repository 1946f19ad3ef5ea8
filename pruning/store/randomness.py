"""Random numbers keyed by (stream, seed, document), independent of the run.

A draw about document d is a hash of its stream, the seed and d. It is the same for every order of
the documents, number of shards or processes, and after any number of restarts.

Choices
- `Stream` lists every purpose that draws. Two purposes with the same stream and seed would get the
  same numbers for a document: a judge trained on a random selection would then label exactly the
  selected documents "yes". So the numbers are unique, and only members of `Stream` are accepted.
- The numbers are part of the data format: changing one changes selections, streams and students.
- The mixer is SplitMix64's finalizer (Steele, Lea, Flood 2014), applied twice with the seed
  between: one round of a bijective mixer, keyed by addition alone, would give shifted copies of one
  sequence for neighboring seeds.
"""

from __future__ import annotations

import enum

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@enum.unique
class Stream(enum.IntEnum):
    """Purposes of random draws, one number each."""

    # Selection
    SELECTION_DRAW = 1
    SELECTION_TIE = 2
    SELECTION_SPLIT = 3
    SELECTION_SAMPLE = 4
    SELECTION_REST = 5
    CASCADE_TEACH = 6
    CASCADE_SAMPLE = 7
    # Training examples
    EPOCH_SEED = 11
    BLOCK_ORDER = 12
    DOCUMENT_ORDER = 13
    CHUNK_ORDER = 14
    NOISE_LENGTHS = 21
    TEXT_LENGTHS = 22
    PREFIX_LENGTH = 23
    EXAMPLE_ORDER = 24
    # Scores in embedding space
    FIRST_CENTROIDS = 31
    KMEANS_TRAINING = 32
    DUPLICATE_ORDER = 33
    WHITENING_SAMPLE = 39
    CLUSTER_SPLIT = 40
    RACE_PROJECTIONS = 41
    KMEANS_GROUPS = 45
    DENSITY_SAMPLE = 46
    # Scores from text, and students
    CLASSIFIER_SAMPLE = 34
    CLASSIFIER_HELD_OUT = 35
    STUDENT_SAMPLE = 37
    STUDENT_PENALTY = 38
    COMBINE_HELD_OUT = 44
    STUDENT_FOLD = 47
    STUDENT_BESIDE = 48
    QUALITY_SAMPLE = 49
    QUALITY_FOLD = 50
    QUALITY_PAGES = 59
    EMBEDDING_STUDENT_FOLD = 56
    EMBEDDING_STUDENT_PENALTY = 57
    EMBEDDING_STUDENT_BESIDE = 58
    ENCODER_STUDENT_FOLD = 63
    ENCODER_STUDENT_PENALTY = 64
    ENCODER_STUDENT_BESIDE = 65
    MINHASH = 42
    DUPLICATE_EXAMPLE = 43
    # Examples that train a judge
    JUDGE_CHOICE = 51
    JUDGE_LABEL = 52
    JUDGE_KIND = 53
    JUDGE_STRENGTH = 54
    DAMAGE = 55
    # Vocabulary
    VOCABULARY_FILE = 61
    VOCABULARY_DOCUMENT = 62
    # Evaluation and reports
    AGREEMENT_SAMPLE = 71
    AGREEMENT_TIE = 72
    SCORE_PAGE_SAMPLE = 73
    SCORE_PAGE_EXAMPLE = 74
    REPORT_EXAMPLE = 75
    REPORT_SAMPLE = 76
    TASK_SUBSET = 77
    BOOTSTRAP = 78
    NULL_SIMULATION = 79
    LABEL_TIE = 80
    # Benchmarks and tests
    EXPERIMENT = 91


# Generators of these streams have no number in their key, as in artifacts and runs of earlier
# versions, which must resume with the same draws. They are distinguished by their number of
# counters: 1, 2 and 3.
_UNNUMBERED = (Stream.EXAMPLE_ORDER, Stream.RACE_PROJECTIONS, Stream.DAMAGE)


def mix(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer, a bijection of 64-bit integers. uint64 [...] -> [...]."""
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64, copy=False) + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashed(stream: Stream, seed: int, ids: np.ndarray) -> np.ndarray:
    """Return 64 random bits for every id.

    Args:
      stream: the purpose of the draw.
      seed: any integer.
      ids: integers [...], document ids or other counters.

    Returns:
      uint64, of the shape of `ids`.

    Raises:
      TypeError: `stream` is not a member of `Stream`.
    """
    _require_stream(stream)
    return _hashed(int(stream), seed, ids)


def uniform(stream: Stream, seed: int, ids: np.ndarray) -> np.ndarray:
    """Return a float64 in the open interval (0, 1) for every id; its logarithm is finite."""
    return ((hashed(stream, seed, ids) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def gumbel(stream: Stream, seed: int, ids: np.ndarray) -> np.ndarray:
    """Return a standard Gumbel variate, float64, for every id.

    The k largest of log w + gumbel are a sample of k without replacement, drawn one after another
    with probabilities proportional to w (Gumbel top-k; Vieira 2014).
    """
    return -np.log(-np.log(uniform(stream, seed, ids)))


def generator(stream: Stream, seed: int, *counters: int) -> np.random.Generator:
    """Return a NumPy generator keyed by all arguments, for draws of more than one number.

    Raises:
      TypeError: `stream` is not a member of `Stream`.
    """
    _require_stream(stream)
    numbers = counters if stream in _UNNUMBERED else (int(stream), *counters)
    key = _hashed(0, seed, np.asarray([0]))
    for depth, number in enumerate(numbers):
        key = _hashed(depth + 1, int(key.view(np.int64)[0]), np.asarray([number]))
    return np.random.Generator(np.random.Philox(key=int(key[0])))


def _hashed(stream: int, seed: int, ids: np.ndarray) -> np.ndarray:
    key = mix(mix(np.asarray([seed]).astype(np.int64).view(np.uint64)) ^ np.uint64(stream))
    return mix(mix(np.asarray(ids).astype(np.int64, copy=False).view(np.uint64)) ^ key[0])


def _require_stream(stream: Stream) -> None:
    if not isinstance(stream, Stream):
        raise TypeError(f"random draws are made from a member of Stream, not from {stream!r}.")
