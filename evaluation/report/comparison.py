"""What the runs say of each other: losses with intervals, differences, steps to reach.

Pure functions of the results (report/results.py).

Choices
- A cell of the study is a sampler at a keep-rate; its seeds are averaged document by document, so
  that the interval is that of the evaluation set. With several seeds their range stands beside it.
- Differences to the full data and to random are paired: same documents, same draws.
- A difference counts as one when its 95% interval excludes zero. No correction is made for looking
  at many cells at once; the report says so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from evaluation import bootstrap
from evaluation.perplexity import Losses
from evaluation.plan import FULL
from evaluation.report.results import RANDOM, Curve, Run


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value and its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of zero, else 0."""
        return (self.low > 0) - (self.high < 0)


@dataclasses.dataclass(frozen=True)
class Measures:
    """A cell of the study on one evaluation set. Losses in nats per token."""

    loss: Estimate
    bits_per_byte: Estimate
    to_full: Estimate | None  # loss minus that of the full data; None for the full data itself
    to_random: Estimate | None  # minus that of random at the same keep-rate
    by_seed: tuple[float, ...]
    steps_to_full: float | None  # see steps_to_reach

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss.value)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A sampler at a keep-rate, over all seeds, on every evaluation set."""

    sampler: str
    keep_rate: float
    runs: tuple[Run, ...]
    measures: dict[str, Measures]  # by evaluation set

    @property
    def is_full(self) -> bool:
        return self.sampler == FULL

    @property
    def share_kept(self) -> float:
        """Realised, by tokens, the mean over seeds."""
        return float(np.mean([run.share_kept for run in self.runs]))

    @property
    def epochs(self) -> float:
        return float(np.mean([run.epochs for run in self.runs]))


def compare(runs: Sequence[Run], evaluations: Sequence[str]) -> list[Cell]:
    """The cells of a study, the full data first, then by keep-rate and in the order of samplers.

    Raises:
      ValueError: two runs were evaluated on different documents.
    """
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.sampler, run.keep_rate), []).append(run)
    keys = sorted(groups, key=lambda key: (key[0] != FULL, -key[1]))  # stable: samplers in order
    measures: dict[tuple[str, float], dict[str, Measures]] = {key: {} for key in keys}
    for evaluation in evaluations:
        for key, found in _measures(groups, evaluation).items():
            measures[key][evaluation] = found
    return [Cell(*key, tuple(groups[key]), measures[key]) for key in keys]


def _measures(
    groups: dict[tuple[str, float], list[Run]], evaluation: str
) -> dict[tuple[str, float], Measures]:
    keys = list(groups)
    losses = [_mean([run.losses[evaluation] for run in groups[key]]) for key in keys]
    for key, found in zip(keys, losses, strict=True):
        if not np.array_equal(found.doc_id, losses[0].doc_id):
            raise ValueError(
                f"{key[0]} at {key[1]} and {keys[0][0]} at {keys[0][1]} were evaluated on "
                f"different documents of {evaluation}."
            )
    nats = np.stack([found.nats for found in losses])
    tokens = np.stack([found.tokens for found in losses])
    length = np.stack([found.n_bytes for found in losses])
    values = nats.sum(1) / tokens.sum(1)
    drawn = bootstrap.ratios(nats, tokens)
    bits = nats / math.log(2)
    bits_drawn = bootstrap.ratios(bits, length)

    full = next((i for i, key in enumerate(keys) if key[0] == FULL), None)
    result = {}
    for i, key in enumerate(keys):
        same_rate = [j for j, other in enumerate(keys) if other == (RANDOM, key[1])]
        to_full = to_random = None
        if full is not None and i != full:
            to_full = _estimate(values[i] - values[full], drawn[i] - drawn[full])
        if same_rate and same_rate[0] != i:
            j = same_rate[0]
            to_random = _estimate(values[i] - values[j], drawn[i] - drawn[j])
        result[key] = Measures(
            loss=_estimate(values[i], drawn[i]),
            bits_per_byte=_estimate(bits[i].sum() / length[i].sum(), bits_drawn[i]),
            to_full=to_full,
            to_random=to_random,
            by_seed=tuple(run.losses[evaluation].per_token for run in groups[key]),
            steps_to_full=None
            if full is None
            else _steps_to_full(groups[key], groups[keys[full]], evaluation),
        )
    return result


def _mean(losses: Sequence[Losses]) -> Losses:
    """The losses averaged over seeds, document by document."""
    first = losses[0]
    for other in losses:
        if not np.array_equal(other.doc_id, first.doc_id):
            raise ValueError("the seeds of one cell were evaluated on different documents.")
    return dataclasses.replace(first, nats=np.mean([found.nats for found in losses], axis=0))


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    return Estimate(float(value), *bootstrap.interval(drawn))


def _steps_to_full(runs: Sequence[Run], full: Sequence[Run], evaluation: str) -> float | None:
    """Steps to reach the full-data run of the same seed, averaged; None when a seed misses."""
    goals = {run.seed: run.curves[evaluation].loss[-1] for run in full if evaluation in run.curves}
    needed = [
        steps_to_reach(run.curves[evaluation], goals[run.seed])
        for run in runs
        if run.seed in goals and evaluation in run.curves
    ]
    if not needed or any(steps is None for steps in needed):
        return None
    return float(np.mean(needed))  # type: ignore[arg-type]


def steps_to_reach(curve: Curve, goal: float) -> float | None:
    """The step at which a loss curve first comes down to `goal`, or None when it never does.

    Between two evaluations the curve is taken as straight.

    Example: loss 4, 3, 2 at steps 10, 20, 30 reaches 2.5 at step 25.
    """
    below = np.flatnonzero(curve.loss <= goal)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(curve.step[0])
    part = (curve.loss[i - 1] - goal) / (curve.loss[i - 1] - curve.loss[i])
    return float(curve.step[i - 1] + part * (curve.step[i] - curve.step[i - 1]))
