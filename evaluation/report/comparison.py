"""What the runs say of each other: losses with intervals, differences, steps to reach.

Pure functions of the results (report/results.py).

Choices
- A cell of the study is a sampler at a keep-rate; its seeds are averaged document by document.
- Differences to the full data and to random are paired by documents and by seeds
  (significance.py). One counts where its 95% interval excludes zero and its p-value is below 5%
  after Holm's correction for all cells of the table.
- Models of other sizes stand apart: what they say is over-scaling, effective size and the
  extrapolation, per evaluation set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from evaluation import bootstrap, scaling, significance
from evaluation.perplexity import Losses
from evaluation.plan import FULL
from evaluation.report.results import RANDOM, Curve, Run
from evaluation.significance import Estimate


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

    def score(self, tasks: str) -> tuple[float, float | None]:
        """Of a set of tasks: the mean over tasks and seeds, and the deviation between seeds."""
        scores = [float(np.mean(list(run.tasks[tasks].values()))) for run in self.runs]
        return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else None


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
    error = _seed_error(list(groups.values()), evaluation)
    result = {}
    for i, key in enumerate(keys):
        same_rate = [j for j, other in enumerate(keys) if other == (RANDOM, key[1])]
        to_full = to_random = None
        if full is not None and i != full:
            to_full = _difference(
                groups[key], groups[keys[full]], evaluation, drawn[[i, full]], error
            )
        if same_rate and same_rate[0] != i:
            j = same_rate[0]
            to_random = _difference(groups[key], groups[keys[j]], evaluation, drawn[[i, j]], error)
        result[key] = Measures(
            loss=significance.of_draws(values[i], drawn[i]),
            bits_per_byte=significance.of_draws(bits[i].sum() / length[i].sum(), bits_drawn[i]),
            to_full=to_full,
            to_random=to_random,
            by_seed=tuple(run.losses[evaluation].per_token for run in groups[key]),
            steps_to_full=None
            if full is None
            else _steps_to_full(groups[key], groups[keys[full]], evaluation),
        )
    to_fulls = significance.adjusted([found.to_full for found in result.values()])
    to_randoms = significance.adjusted([found.to_random for found in result.values()])
    for key, of_full, of_random in zip(keys, to_fulls, to_randoms, strict=True):
        result[key] = dataclasses.replace(result[key], to_full=of_full, to_random=of_random)
    return result


def _mean(losses: Sequence[Losses]) -> Losses:
    """The losses averaged over seeds, document by document."""
    first = losses[0]
    for other in losses:
        if not np.array_equal(other.doc_id, first.doc_id):
            raise ValueError("the seeds of one cell were evaluated on different documents.")
    return dataclasses.replace(first, nats=np.mean([found.nats for found in losses], axis=0))


def _difference(
    one: Sequence[Run],
    other: Sequence[Run],
    evaluation: str,
    drawn: np.ndarray,
    error: significance.SeedError | None,
) -> Estimate:
    """The difference of two cells. Args: drawn: [2, resamples], of their losses over all seeds."""
    losses = [{run.seed: run.losses[evaluation].per_token for run in runs} for runs in (one, other)]
    seeds = sorted(losses[0].keys() & losses[1].keys())
    if not seeds:
        raise ValueError(f"{one[0].sampler} and {other[0].sampler} have no seed in common.")
    a, b = ([found[seed] for seed in seeds] for found in losses)
    return significance.paired(a, b, drawn[0], drawn[1], error)


def _seed_error(groups: Sequence[Sequence[Run]], evaluation: str) -> significance.SeedError | None:
    """How trainings vary, from all cells; None where these have not all the same seeds."""
    tables = [{run.seed: run.losses[evaluation].per_token for run in group} for group in groups]
    seeds = sorted(tables[0])
    if len(seeds) < 2 or any(sorted(table) != seeds for table in tables):
        return None
    losses = np.array([[table[seed] for seed in seeds] for table in tables])
    return significance.block_error(losses)


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


def pareto(cells: Sequence[Cell], evaluation: str) -> list[Cell]:
    """The cells that no other one beats: less data or a lower loss. From little data to much."""
    front: list[Cell] = []
    loss = {id(cell): cell.measures[evaluation].loss.value for cell in cells}
    for cell in sorted(cells, key=lambda cell: (cell.share_kept, loss[id(cell)])):
        if not front or loss[id(cell)] < loss[id(front[-1])]:
            front.append(cell)
    return front


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


# --------------------------------------------------------------------------------------------------
# Other sizes of the model


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What models of several sizes say, on one evaluation set and at one keep-rate.

    Attributes:
      parameters: of the sizes, ascending.
      losses: sampler -> loss at each size; NaN where there is no run. The full data is the first.
      over_scaling, effective_size: by sampler, at the study's own size; None where there is no
        larger size, or no two sizes.
      target: the size, in parameters, that is extrapolated to.
      predicted: sampler -> loss there; of those that were trained at three sizes.
      wins: sampler -> how often it is the lowest there, over all draws.
      exponent: of the power laws.
    """

    parameters: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    over_scaling: dict[str, Estimate]
    effective_size: dict[str, Estimate]
    target: float
    predicted: dict[str, Estimate]
    wins: dict[str, float]
    exponent: Estimate | None


def sizes(
    runs: Sequence[Run], evaluation: str, keep_rate: float, beyond: float = 10.0, seed: int = 0
) -> Sizes | None:
    """Compares the sizes of the model; None where the study has one only.

    Draws are of documents, and of how trainings go: what moves all trainings of a seed together
    moves all points of a size, the rest each point by itself. Both are as large as the seeds of the
    study's own size tell, over the root of how many seeds a point has.

    Args:
      beyond: how many times the largest size is extrapolated to.
    """
    parameters = sorted({run.parameters for run in runs})
    if len(parameters) < 2:
        return None
    own = next(run.parameters for run in runs if not run.size)
    groups: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        if run.sampler == FULL or run.keep_rate == keep_rate:
            groups.setdefault((run.sampler, run.parameters), []).append(run)
    names = [FULL, *dict.fromkeys(name for name, _ in groups if name != FULL)]
    shared, rest = _spread(
        [group for (_, size), group in groups.items() if size == own], evaluation
    )
    generator = np.random.default_rng(seed)
    together = generator.normal(0, shared, (len(parameters), bootstrap.RESAMPLES))
    losses = np.full((bootstrap.RESAMPLES, len(names), len(parameters)), np.nan)
    values = np.full(losses.shape[1:], np.nan)
    for (name, size), group in groups.items():
        place = names.index(name), parameters.index(size)
        found = _mean([run.losses[evaluation] for run in group])
        values[place] = found.per_token
        drawn = bootstrap.ratios(found.nats[None], found.tokens[None])[0]
        moved = together[place[1]] + generator.normal(0, rest, len(drawn))
        losses[:, *place] = drawn + moved / len(group) ** 0.5

    here = parameters.index(own)
    over: dict[str, Estimate] = {}
    if here + 1 < len(parameters):
        for i, name in enumerate(names):
            ratio = scaling.over_scaling(
                values[i, here, None], values[0, here, None], values[0, here + 1, None]
            )
            drawn = scaling.over_scaling(
                losses[:, i, here, None], losses[:, 0, here, None], losses[:, 0, here + 1, None]
            )
            over[name] = significance.of_draws(float(ratio), drawn)
    full, full_drawn = (
        scaling.fit_power_laws(np.array(parameters), x[..., :1, :]) for x in (values, losses)
    )
    effective = {
        name: significance.of_draws(
            float(full.size_of(values[i, here])), full_drawn.size_of(losses[:, i, here])
        )
        for i, name in enumerate(names)
    }
    complete = [i for i in range(len(names)) if np.isfinite(values[i]).sum() >= 3]
    target = beyond * parameters[-1]
    predicted, wins, exponent = {}, {}, None
    if len(complete) > 1:
        fit, fits = (
            scaling.fit_power_laws(np.array(parameters), x[..., complete, :])
            for x in (values, losses)
        )
        exponent = significance.of_draws(float(fit.exponent), fits.exponent)
        there, drawn = fit.at(target), fits.at(target)
        for k, i in enumerate(complete):
            predicted[names[i]] = significance.of_draws(there[k], drawn[:, k])
        wins = dict(zip(predicted, scaling.winners(drawn).tolist(), strict=True))
    return Sizes(
        tuple(parameters),
        {name: tuple(row) for name, row in zip(names, values.tolist(), strict=True)},
        over,
        effective,
        target,
        predicted,
        wins,
        exponent,
    )


def mean_over_scaling(found: Sequence[Sizes], sampler: str) -> Estimate | None:
    """Over-scaling as paper A has it, the mean over evaluation sets; None where there is none."""
    parts = [item.over_scaling[sampler] for item in found if sampler in item.over_scaling]
    if not parts:
        return None
    # The sets have different documents: their errors are taken as independent.
    value = float(np.mean([item.value for item in parts]))
    below = sum((item.value - item.low) ** 2 for item in parts) ** 0.5 / len(parts)
    above = sum((item.high - item.value) ** 2 for item in parts) ** 0.5 / len(parts)
    return Estimate(value, value - below, value + above)


def _spread(groups: Sequence[Sequence[Run]], evaluation: str) -> tuple[float, float]:
    """Standard deviations of one training: of what the trainings of a seed share, and of the rest.

    Where the cells have not all the same seeds the two cannot be told apart, and all is the rest;
    with one seed nothing is known, and both are 0.
    """
    squares, freedom = 0.0, 0
    for group in groups:
        values = np.array([run.losses[evaluation].per_token for run in group])
        squares += float(((values - values.mean()) ** 2).sum())
        freedom += len(values) - 1
    if not freedom:
        return 0.0, 0.0
    error = _seed_error(groups, evaluation)
    if error is None:
        return 0.0, (squares / freedom) ** 0.5
    return max(squares / freedom - error.variance, 0.0) ** 0.5, error.variance**0.5
