"""A study: one corpus, some scorers, some samplers, some keep-rates, and what each of them buys.

    python -m evaluation study --gin_file=configs/quickstart.gin

One configuration names them all; `plan` writes it out as stages, each a command line that can be
run by hand, and the scheduler runs these. What the stages leave:

    vocabulary/  corpus/                what everything is made from
    splits/scoring, pool, <evaluation>  parts of the corpus that share no document
    corpora/<evaluation>                evaluation sets that are corpora of their own
    models/scoring, judge               what scores
    made/<stage>                        scores, embeddings, clusters, ...
    runs/<sampler>-<rate>-<seed>/       selection/, train/ and perplexity/ of a cell
    runs/...-<size>/                    train/ and perplexity/ at another size of the model
    runs/.../tasks/<tasks>/             fine_tuned/ and judged/
    report/index.html
    stages/                             logs and notes (stages.py)
    plan.json                           what is where, for the report

Choices
- Iso-compute: every run makes the same steps from the same initial parameters, with the same rule
  for the order of its documents; runs of one seed differ in their selection alone. The epochs that
  this makes are reported.
- What scores has not seen what it scores, and nobody has seen what is evaluated: the parts of the
  corpus are cut by the documents' hashes.
- Stages are told everything on their command line. A study has no state of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation.plan import PLAN, plan
from evaluation.recipes import Recipe
from evaluation.stages import Records
from pruning import artefact

NAME = "Study"


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Something that is made on the way: scores, embeddings, clusters, a selection, a corpus.

    Attributes:
      command: of `python -m pruning`, such as "score" or "density".
      recipe: of that command.
      inputs: its macro or parameter -> what it is given: the name of another stage, of an
        evaluation (its corpus), or "vocabulary", "corpus", "pool", "training" (the part that
        scoring models learn from), "scoring", "judge". CORPUS is "corpus" if not given.
    """

    command: str
    recipe: Recipe
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScorerPlan:
    """A score, as the report shows it: a sum of columns that stages have made.

    Attributes:
      title: for the report.
      axis: what its values are, such as "nats per token, higher is likelier". Higher is better.
      terms: (stage, named value of pruning/selection/scores.py, weight), to be summed.
    """

    title: str
    axis: str
    terms: tuple[tuple[str, str, float], ...]


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
    """A way of selecting.

    Attributes:
      title, rule: for the report.
      recipe: of `pruning select`.
      scorer: whose score it goes by, for the report; None for those that look at none.
      inputs: macro or parameter of the recipe -> what it is given, as in Stage: SCORES, and WITHIN
        for a chain. WITHIN is "pool" if not given.
      within_share: what a WITHIN of its own leaves of the pool's tokens, as it is configured: the
        budget stays a share of the pool.
    """

    title: str
    rule: str
    recipe: Recipe
    scorer: str | None = None
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    within_share: float = 1.0


@dataclasses.dataclass(frozen=True)
class TasksPlan:
    """Tasks that every model is judged by, such as GLUE, after fine-tuning or as it is.

    Attributes:
      title: for the report.
      recipe: of `evaluation tasks`.
      examples: recipe of `evaluation examples`, the same tasks' training parts; None: the models
        are not fine-tuned.
      fine_tuning: recipe of train.py, on these examples.
    """

    title: str
    recipe: Recipe
    examples: Recipe | None = None
    fine_tuning: Recipe | None = None

    def __post_init__(self) -> None:
        if (self.examples is None) != (self.fine_tuning is None):
            raise ValueError(f"{self.title}: examples and fine_tuning go together.")


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """Another size of the model, trained for over-scaling and for extrapolation.

    Attributes:
      title: for the report.
      recipe: of train.py.
      samplers: whose selections are trained on at this size, besides the full data.
      seeds: of these runs; None for all of the study's.
    """

    title: str
    recipe: Recipe
    samplers: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation set: a part of the corpus, or a corpus of its own.

    Attributes:
      title, rule: for the report; the rule says how its documents were chosen.
      recipe: of `pruning ingest`, for a corpus of its own.
      split: the part, [low, high) of the documents' draws; of the study's corpus, or of its own.
    """

    title: str
    rule: str
    recipe: Recipe | None = None
    split: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.split is None and self.recipe is None:
            raise ValueError(f"{self.title}: set recipe, split or both.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of `study`.

    Attributes:
      output: its directory.
      title, description, caveats: for the report.
      vocabulary: recipe of `pruning vocabulary`; or a vocabulary, as `Ingest.vocabulary` takes it.
      vocabulary_size: pieces of a trained vocabulary.
      corpus: recipe of `pruning ingest`.
      split: recipe of `pruning select`, for parts of the corpus.
      scoring_split: part of the corpus that the scoring model and the judge are trained on.
      pool_split: part that is scored, and selected from.
      scoring_model: recipe of train.py; or weights.
      judge: recipe of train.py, which begins with the scoring model's weights; or weights, which
        bring their vocabulary with them (Flan-T5).
      judge_examples: recipe of `pruning judge`, for a judge that is trained. It is examined on
        `judge_exam` examples from the pool, which it has not seen.
      stages, scorers, samplers, evaluations: by name. The report's headline speaks of the first of
        `evaluations`; a sampler called "random" is what others are compared with.
      keep_rates: shares of the pool's tokens.
      train: recipe of train.py, for every cell.
      sizes: other sizes of the model, by name.
      tasks: sets of tasks, by name.
      perplexity: recipe of `evaluation perplexity`.
      seeds: each makes every selection and training anew.
      workers: processes at a time.
      threads: of each process.
    """

    output: str
    title: str
    description: str = ""
    caveats: tuple[str, ...] = ()
    vocabulary: Recipe | str
    vocabulary_size: int = 8000
    corpus: Recipe
    split: Recipe = Recipe("configs/select/split.gin")  # noqa: RUF009  frozen
    scoring_split: tuple[float, float]
    pool_split: tuple[float, float]
    scoring_model: Recipe | str
    judge: Recipe | str | None = None
    judge_examples: Recipe | None = None
    judge_exam: int = 500
    stages: Mapping[str, StagePlan]
    scorers: Mapping[str, ScorerPlan]
    samplers: Mapping[str, SamplerPlan]
    evaluations: Mapping[str, EvaluationPlan]
    keep_rates: tuple[float, ...]
    train: Recipe
    sizes: Mapping[str, SizePlan] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, TasksPlan] = dataclasses.field(default_factory=dict)
    perplexity: Recipe
    seeds: tuple[int, ...] = (0,)
    workers: int = 2
    threads: int = 1


CONFIGURABLES: dict[str, type] = {
    NAME: StudyConfig,
    "Recipe": Recipe,
    "StudyStage": StagePlan,
    "Scorer": ScorerPlan,
    "Sampler": SamplerPlan,
    "Size": SizePlan,
    "StudyTasks": TasksPlan,
    "Evaluation": EvaluationPlan,
}


def run(config: StudyConfig, dry_run: bool = False, only: Sequence[str] | None = None) -> list[str]:
    """Runs what is not finished, and says what there is to see.

    Args:
      dry_run: say the stages, as commands, and run nothing.
      only: patterns of the names of stages; the others are left to other processes.

    Raises:
      StageFailed: a stage failed; the message shows the end of its log.
      KeyboardInterrupt: after the running stages have been ended in good order.
    """
    from evaluation.board import board
    from evaluation.scheduler import Scheduler

    planned = plan(config)
    records = Records(Path(config.output) / "stages")
    scheduler = Scheduler(planned.stages, records, config.workers, environment(config), only)
    if dry_run:
        lines = []
        for stage in scheduler.stages:
            if stage.name not in scheduler.ours:
                continue
            state = "finished" if scheduler.is_finished(stage) else f"about {stage.cost:.0f} s"
            lines += [f"# {stage.name}: {state}", stage.command]
        return lines
    Path(config.output).mkdir(parents=True, exist_ok=True)
    places = json.dumps(planned.places, indent=1, ensure_ascii=False) + "\n"
    artefact.write_text(Path(config.output) / PLAN, places)
    with board(Path(config.output).name) as (show, say):
        ran = scheduler.run(show, say)
    lines = [f"{len(ran)} of {len(scheduler.ours)} stages had to be run"]
    if scheduler.left:
        lines.append(f"{len(scheduler.left)} wait for stages that other processes have to run")
    elif not scheduler.unfinished:
        lines.append(f"report: {config.output}/report/index.html")
    return lines


def environment(config: StudyConfig) -> dict[str, str]:
    """What keeps several processes from fighting for the same cores.

    NOTE: XLA on CPUs takes all cores for every process otherwise; two such processes are slower
    than one after the other.
    """
    if not config.threads:
        return {}
    threads = str(config.threads)
    flags = os.environ.get("XLA_FLAGS", "")
    if config.threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    return dict.fromkeys(names, threads) | {"XLA_FLAGS": flags.strip()}
