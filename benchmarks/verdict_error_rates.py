"""Error rates of a study's verdicts, by simulated studies: a null and a planted effect.

    python benchmarks/verdict_error_rates.py --studies 200

Every simulated study has a full-data run, a random sampler and 11 others at one keep-rate, each
trained with a few seeds. The loss of a document is its difficulty, plus an effect of the sampler,
plus what the seed does to all trainings, plus what is particular to this training (0.01 nats per
token, of the size that repeated trainings of T5 with a few million parameters show), plus noise of
the document. The comparison that the report makes is run on them unchanged
(evaluation/report/comparison.py), and its marked differences are counted.

Stated rates: of studies without any effect, at most 5% mark a difference to the random sampler
(family-wise, after Holm), at most 10% where one sampler's trainings are 5 times as noisy as the
others'; a planted effect of 6 standard deviations of one training is marked in at least 85% of
studies with three seeds; one seed without repeated runs marks nothing.

Result on 2026-11-29, 200 studies each, 65 s of CPU: null 3.0% (three seeds), 4.0% (two seeds), 2.5%
(one seed, repeated random and full data), 7.0% (one sampler 5 times as noisy; 24% where every cell
shares one pooled variance unless the whole table fails the test for equal variance); planted effect
90.5%, with 3.0% false marks beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

import numpy as np

from evaluation.perplexity import Losses
from evaluation.report import comparison
from evaluation.report.results import Run

SAMPLERS = ("random", *(f"sampler{i}" for i in range(11)))
DEVIATION = 0.01  # nats per token, of one training
EVALUATION = "held_out"


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A kind of study.

    Attributes:
      seeds: of every selection.
      noise_seeds: further ones of the full data and of random.
      effect: of sampler0, in nats per token; negative is better than random.
      uneven: how many times noisier the trainings of the last sampler are.
      stated: (least, most) share of studies that mark at least one difference to random.
    """

    title: str
    seeds: int
    noise_seeds: int = 0
    effect: float = 0.0
    uneven: float = 1.0
    stated: tuple[float, float] = (0.0, 0.05)


SCENARIOS = (
    Scenario("null, three seeds", 3),
    Scenario("null, two seeds", 2),
    Scenario("null, three seeds, one sampler 5 times as noisy", 3, uneven=5.0, stated=(0, 0.1)),
    Scenario("null, one seed", 1, stated=(0.0, 0.0)),
    Scenario("null, one seed, random and full data with four more", 1, 4),
    Scenario("effect of 6 deviations, three seeds", 3, effect=-6 * DEVIATION, stated=(0.85, 1.0)),
    Scenario("effect of 6 deviations, one seed", 1, effect=-6 * DEVIATION, stated=(0.0, 0.0)),
)


def study(scenario: Scenario, generator: np.random.Generator, documents: int = 60) -> list[Run]:
    """Return the runs of one simulated study."""
    total = scenario.seeds + scenario.noise_seeds
    difficulty = generator.normal(4, 1, documents)
    by_seed = generator.normal(0, DEVIATION, total)
    tokens = np.full(documents, 100)
    runs = []
    for sampler in ("full", *SAMPLERS):
        repeated = sampler in ("full", "random")
        for seed in range(total if repeated else scenario.seeds):
            deviation = DEVIATION * (scenario.uneven if sampler == SAMPLERS[-1] else 1.0)
            shift = by_seed[seed] + generator.normal(0, deviation)
            shift += scenario.effect * (sampler == "sampler0")
            per_token = difficulty + shift + generator.normal(0, 0.02, documents)
            losses = Losses(np.arange(documents), per_token * tokens, tokens, tokens * 4.0)
            rate = 1.0 if sampler == "full" else 0.2
            runs.append(_run(sampler, rate, seed, losses))
    return runs


def _run(sampler: str, rate: float, seed: int, losses: Losses) -> Run:
    return Run(
        sampler=sampler,
        keep_rate=rate,
        seed=seed,
        size="",
        documents=1,
        tokens=1,
        share_kept=rate,
        epochs=1.0,
        steps=1,
        parameters=1,
        seconds=1.0,
        flops=1.0,
        losses={EVALUATION: losses},
        curves={},
    )


@dataclasses.dataclass(frozen=True)
class Rates:
    """Shares of the simulated studies that mark a difference to random.

    Attributes:
      any: at least one of the 11 samplers.
      planted: sampler0, and in the right direction.
      false: at least one of the samplers without an effect.
    """

    any: float
    planted: float
    false: float


def rates(scenario: Scenario, studies: int, seed: int = 0) -> Rates:
    """Simulate studies and return how often differences are marked."""
    generator = np.random.default_rng(seed)
    marked = []
    for _ in range(studies):
        cells = comparison.compare(study(scenario, generator), [EVALUATION])
        marked.append(
            [
                found.sign
                for cell in cells
                if (found := cell.measures[EVALUATION].to_random) and cell.sampler != "full"
            ]
        )
    signs = np.asarray(marked)  # [studies, samplers but random]
    others = signs[:, 1:] if scenario.effect else signs
    return Rates(
        any=float((signs != 0).any(1).mean()),
        planted=float((signs[:, 0] == np.sign(scenario.effect)).mean()) if scenario.effect else 0.0,
        false=float((others != 0).any(1).mean()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print("| Scenario | Marks something | Stated | Marks the planted effect | Marks a false one |")
    print("|---|---|---|---|---|")
    for scenario in SCENARIOS:
        found = rates(scenario, given.studies, given.seed)
        low, high = scenario.stated
        planted = f"{found.planted:.1%}" if scenario.effect else "–"
        print(
            f"| {scenario.title} | {found.any:.1%} | {low:.0%} to {high:.0%} | {planted} | "
            f"{found.false:.1%} |"
        )


if __name__ == "__main__":
    main()
