"""Comparisons of runs: losses with intervals, differences, steps to a given loss.

Pure functions of the results (report/results.py).

Choices
- A cell of the study is a sampler at a keep-rate; its seeds are averaged document by document.
- Differences to the full data and to random are paired by documents and by seeds
  (significance.py). A difference is significant if its 95% interval excludes zero and its p-value
  is below 5% after Holm's correction for all cells of the table.
- Models of other sizes are compared separately, per evaluation set: over-scaling, effective size
  and extrapolation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.errors import EvaluationError
from evaluation.perplexity import Losses
from evaluation.report.results import Curve, Floor, Run
from evaluation.statistics import bootstrap, power_laws, significance
from evaluation.statistics.significance import Estimate
from evaluation.study.plan import FULL, RANDOM

_UNEQUAL = 0.05  # p-value of the test for equal variance below which cells count as uneven


@dataclasses.dataclass(frozen=True)
class Measures:
    """A cell of the study on one evaluation set. Losses in nats per token."""

    loss: Estimate
    bits_per_byte: Estimate
    to_full: Estimate | None  # loss minus that of the full data; None for the full data itself
    to_random: Estimate | None  # minus that of random at the same keep-rate
    by_seed: tuple[float, ...]
    below_floor: bool | None  # surely below the unigram floor; None where there is no floor
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
        """Return the mean score over tasks and seeds, and the deviation between seeds."""
        return _over_seeds([run.tasks[tasks] for run in self.runs])

    def answer(self, tasks: str) -> tuple[float, float | None] | None:
        """Return the same of the right answers' log-likelihood; None where it was not measured."""
        found = [run.answers.get(tasks) for run in self.runs]
        measured = [one for one in found if one]
        return _over_seeds(measured) if len(measured) == len(found) else None


@dataclasses.dataclass(frozen=True)
class Noise:
    """Variance of training on one evaluation set, pooled over equally noisy cells.

    Attributes:
      error: of a single training.
      cells, seeds: size of the table that it is estimated from.
      uneven: sampler and keep-rate of the cells left out for being noisier.
    """

    error: significance.SeedError
    cells: int
    seeds: int
    uneven: tuple[tuple[str, float], ...] = ()

    def detectable(self, seeds: int) -> float:
        """Return the smallest difference of two cells that one comparison can tell from zero."""
        from scipy import stats

        deviation = (2 * self.error.variance / seeds) ** 0.5
        return float(stats.t.ppf(0.975, self.error.freedom)) * deviation


def noise(runs: Sequence[Run], evaluation: str) -> Noise | None:
    """Return the variance of training, or None where no selection was trained twice.

    The table holds the cells that have at least two seeds, at the seeds that all of them have. So a
    study with one seed per sampler can repeat its random and full-data runs alone
    (Study.noise_seeds). The noisiest cell is left out until the rest pass as equally noisy.
    """
    groups: dict[tuple[str, float], dict[int, float]] = {}
    for run in runs:
        group = groups.setdefault((run.sampler, run.keep_rate), {})
        group[run.seed] = run.losses[evaluation].per_token
    shared = set.intersection(*(set(group) for group in groups.values())) if groups else set()
    if len(shared) < 2:
        groups = {key: group for key, group in groups.items() if len(group) > 1}
        shared = set.intersection(*(set(group) for group in groups.values())) if groups else set()
    keys = list(groups)
    uneven: list[tuple[str, float]] = []
    while len(keys) > 1 and len(shared) > 1:
        losses = np.array([[groups[key][seed] for seed in sorted(shared)] for key in keys])
        equal = significance.equal_variance(losses)
        if equal is None or equal.p >= _UNEQUAL:
            error = significance.block_error(losses)
            assert error is not None
            return Noise(error, len(keys), len(shared), tuple(uneven))
        uneven.append(keys.pop(equal.noisiest))
    return None


def _over_seeds(tasks: Sequence[Mapping[str, float]]) -> tuple[float, float | None]:
    means = [float(np.mean(list(one.values()))) for one in tasks]
    return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else None


def compare(
    runs: Sequence[Run],
    evaluations: Sequence[str],
    floors: Mapping[str, Sequence[Floor]] | None = None,
) -> list[Cell]:
    """Return the cells of a study: the full data, then by keep-rate in the order of samplers.

    A difference is tested only where the variance of training is known and both models are below
    the unigram floor; elsewhere it has no p-value.

    Args:
      floors: by evaluation set, the unigram model first.

    Raises:
      ValueError: two runs were evaluated on different documents.
    """
    groups: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.sampler, run.keep_rate), []).append(run)
    keys = sorted(groups, key=lambda key: (key[0] != FULL, -key[1]))  # stable: samplers in order
    measures: dict[tuple[str, float], dict[str, Measures]] = {key: {} for key in keys}
    for evaluation in evaluations:
        floor = next(iter((floors or {}).get(evaluation, ())), None)
        for key, found in _measures(groups, evaluation, floor).items():
            measures[key][evaluation] = found
    return [Cell(*key, tuple(groups[key]), measures[key]) for key in keys]


def _measures(
    groups: dict[tuple[str, float], list[Run]], evaluation: str, floor: Floor | None
) -> dict[tuple[str, float], Measures]:
    keys = list(groups)
    losses = [_mean([run.losses[evaluation] for run in groups[key]]) for key in keys]
    for key, found in zip(keys, losses, strict=True):
        if not np.array_equal(found.doc_id, losses[0].doc_id):
            raise EvaluationError(
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
    found_noise = noise([run for group in groups.values() for run in group], evaluation)
    uneven = found_noise.uneven if found_noise else ()

    def error(*pair: int) -> significance.SeedError | None:
        noisy = any(keys[k] in uneven for k in pair)
        return None if found_noise is None or noisy else found_noise.error

    below = [_below(floor, nats[i], tokens[i]) for i in range(len(keys))]
    result = {}
    for i, key in enumerate(keys):
        same_rate = [j for j, other in enumerate(keys) if other == (RANDOM, key[1])]
        to_full = to_random = None
        if full is not None and i != full:
            to_full = _difference(
                groups[key], groups[keys[full]], evaluation, drawn[[i, full]], error(i, full)
            )
            to_full = _tested(to_full, below[i], below[full])
        if same_rate and same_rate[0] != i:
            j = same_rate[0]
            to_random = _difference(
                groups[key], groups[keys[j]], evaluation, drawn[[i, j]], error(i, j)
            )
            to_random = _tested(to_random, below[i], below[j])
        result[key] = Measures(
            loss=significance.of_draws(values[i], drawn[i]),
            bits_per_byte=significance.of_draws(bits[i].sum() / length[i].sum(), bits_drawn[i]),
            to_full=to_full,
            to_random=to_random,
            by_seed=tuple(run.losses[evaluation].per_token for run in groups[key]),
            below_floor=below[i],
            steps_to_full=None
            if full is None
            else _steps_to_full(groups[key], groups[keys[full]], evaluation),
        )
    to_fulls = significance.adjusted([found.to_full for found in result.values()])
    to_randoms = significance.adjusted([found.to_random for found in result.values()])
    for key, of_full, of_random in zip(keys, to_fulls, to_randoms, strict=True):
        result[key] = dataclasses.replace(result[key], to_full=of_full, to_random=of_random)
    return result


def _below(floor: Floor | None, nats: np.ndarray, tokens: np.ndarray) -> bool | None:
    """Return whether the 95% interval of loss minus floor lies below zero."""
    if floor is None:
        return None
    if not np.array_equal(floor.tokens, tokens):
        raise EvaluationError(f"{floor.title} and the models were evaluated on different tokens.")
    drawn = bootstrap.ratios(np.stack([nats - floor.nats]), tokens[None])[0]
    return bootstrap.interval(drawn)[1] < 0


def _tested(difference: Estimate, *below: bool | None) -> Estimate:
    """Return a difference without its p-value if one of the models is not below the floor."""
    return dataclasses.replace(difference, p=None) if False in below else difference


def _mean(losses: Sequence[Losses]) -> Losses:
    """Return the losses averaged over seeds, document by document."""
    first = losses[0]
    for other in losses:
        if not np.array_equal(other.doc_id, first.doc_id):
            raise EvaluationError("the seeds of one cell were evaluated on different documents.")
    return dataclasses.replace(first, nats=np.mean([found.nats for found in losses], axis=0))


def _difference(
    one: Sequence[Run],
    other: Sequence[Run],
    evaluation: str,
    drawn: np.ndarray,
    error: significance.SeedError | None,
) -> Estimate:
    """Return the difference of two cells. Args: drawn: [2, resamples], losses over all seeds."""
    losses = [{run.seed: run.losses[evaluation].per_token for run in runs} for runs in (one, other)]
    seeds = sorted(losses[0].keys() & losses[1].keys())
    if not seeds:
        raise EvaluationError(f"{one[0].sampler} and {other[0].sampler} have no seed in common.")
    a, b = ([found[seed] for seed in seeds] for found in losses)
    return significance.paired(a, b, drawn[0], drawn[1], error)


def _seed_error(groups: Sequence[Sequence[Run]], evaluation: str) -> significance.SeedError | None:
    """Return the variance of training over all cells; None where their seeds differ."""
    tables = [{run.seed: run.losses[evaluation].per_token for run in group} for group in groups]
    seeds = sorted(tables[0])
    if len(seeds) < 2 or any(sorted(table) != seeds for table in tables):
        return None
    losses = np.array([[table[seed] for seed in seeds] for table in tables])
    return significance.block_error(losses)


def _steps_to_full(runs: Sequence[Run], full: Sequence[Run], evaluation: str) -> float | None:
    """Return mean steps to the loss of the same seed's full-data run; None if a seed misses it."""
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
    """Return the Pareto front of share kept and loss, in ascending order of share."""
    front: list[Cell] = []
    loss = {id(cell): cell.measures[evaluation].loss.value for cell in cells}
    for cell in sorted(cells, key=lambda cell: (cell.share_kept, loss[id(cell)])):
        if not front or loss[id(cell)] < loss[id(front[-1])]:
            front.append(cell)
    return front


def steps_to_reach(curve: Curve, goal: float) -> float | None:
    """Return the step at which a loss curve first reaches `goal`, or None.

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
    """Comparison of several model sizes, on one evaluation set at one keep-rate.

    Attributes:
      parameters: of the sizes, ascending.
      losses: sampler -> loss at each size; NaN where there is no run. The full data is the first.
      over_scaling, effective_size: by sampler, at the study's own size; None where there is no
        larger size, or no two sizes.
      target: the size, in parameters, that is extrapolated to.
      predicted: sampler -> loss there; of those that were trained at three sizes.
      wins: sampler -> share of all draws in which its loss is the lowest there.
      exponent: of the power laws.
      ranked_alike: smaller size -> share of the pairs of samplers that it and the largest size rank
        alike.
      ranked: number of samplers in `ranked_alike`.
    """

    parameters: tuple[int, ...]
    losses: dict[str, tuple[float, ...]]
    over_scaling: dict[str, Estimate]
    over_scaling_drawn: dict[str, np.ndarray]
    effective_size: dict[str, Estimate]
    target: float
    predicted: dict[str, Estimate]
    wins: dict[str, float]
    exponent: Estimate | None
    ranked_alike: dict[int, Estimate]
    ranked: int


def sizes(
    runs: Sequence[Run], evaluation: str, keep_rate: float, beyond: float = 10.0, seed: int = 0
) -> Sizes | None:
    """Compare model sizes; None where the study has a single size.

    Draws are over documents and over training errors. The part of an error that a seed's trainings
    share moves all points of a size, the rest moves each point by itself. Both variances are
    estimated from the seeds of the study's own size, and divided by a point's number of seeds.

    Args:
      beyond: factor from the largest size to the size that is extrapolated to.
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
    over_drawn: dict[str, np.ndarray] = {}
    if here + 1 < len(parameters):
        for i, name in enumerate(names):
            ratio = power_laws.over_scaling(
                values[i, here, None], values[0, here, None], values[0, here + 1, None]
            )
            drawn = power_laws.over_scaling(
                losses[:, i, here, None], losses[:, 0, here, None], losses[:, 0, here + 1, None]
            )
            over[name] = significance.of_draws(float(ratio), drawn)
            over_drawn[name] = drawn
    full, full_drawn = (
        power_laws.fit_power_laws(np.array(parameters), x[..., :1, :]) for x in (values, losses)
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
            power_laws.fit_power_laws(np.array(parameters), x[..., complete, :])
            for x in (values, losses)
        )
        exponent = significance.of_draws(float(fit.exponent), fits.exponent)
        there, drawn = fit.at(target), fits.at(target)
        for k, i in enumerate(complete):
            predicted[names[i]] = significance.of_draws(there[k], drawn[:, k])
        wins = dict(zip(predicted, power_laws.winners(drawn).tolist(), strict=True))
    return Sizes(
        tuple(parameters),
        {name: tuple(row) for name, row in zip(names, values.tolist(), strict=True)},
        over,
        over_drawn,
        effective,
        target,
        predicted,
        wins,
        exponent,
        *_ranked_alike(parameters, values, losses),
    )


def _ranked_alike(
    parameters: Sequence[int], values: np.ndarray, losses: np.ndarray
) -> tuple[dict[int, Estimate], int]:
    """Return the share of pairs ranked alike by smaller size, and the number of samplers ranked.

    Args:
      values, losses: [samplers, sizes] and [draws, samplers, sizes], the full data first.
    """
    rows = [i for i in range(1, len(values)) if np.isfinite(values[i]).all()]
    if len(rows) < 2:
        return {}, len(rows)
    value, drawn = values[rows], losses[:, rows]
    return {
        size: significance.of_draws(
            float(power_laws.pairs_ranked_alike(value[:, i], value[:, -1])),
            power_laws.pairs_ranked_alike(drawn[..., i], drawn[..., -1]),
        )
        for i, size in enumerate(parameters[:-1])
    }, len(rows)


def mean_over_scaling(found: Sequence[Sizes]) -> dict[str, Estimate]:
    """Return over-scaling averaged over evaluation sets, by sampler (paper A's definition).

    The sets share their trainings, so their errors are not independent: draw by draw the same
    training errors are used for every set (`sizes` draws them from the same seed), which takes them
    as fully correlated. Draws of documents are independent between sets.
    """
    result = {}
    for sampler in found[0].over_scaling if found else ():
        parts = [item for item in found if sampler in item.over_scaling]
        value = float(np.mean([item.over_scaling[sampler].value for item in parts]))
        drawn = np.mean([item.over_scaling_drawn[sampler] for item in parts], axis=0)
        result[sampler] = significance.of_draws(value, drawn)
    return result


def _spread(groups: Sequence[Sequence[Run]], evaluation: str) -> tuple[float, float]:
    """Return standard deviations of one training: of the part shared by a seed, and of the rest.

    If the cells do not all have the same seeds, the parts cannot be separated: all variance is
    counted as the rest. With one seed nothing is known, and both are 0.
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
