"""A study from configuration to report.

    python -m evaluation study --gin_file=configs/quickstart.gin

plan.py turns the configuration into stages, each a command line that can be run by hand; the
scheduler runs them. Directory of a study:

    vocabulary/  corpus/                inputs of everything else
    splits/scoring, pool, <evaluation>  disjoint splits of the corpus
    corpora/<evaluation>                evaluation sets with a corpus of their own
    models/scoring, judge               scoring models
    made/<stage>                        scores, embeddings, clusters, ...
    runs/<sampler>-<rate>-<seed>/       selection/, train/ and perplexity/ of a run
    runs/...-<size>/                    train/ and perplexity/ at another model size
    runs/.../tasks/<tasks>/             fine_tuned/ and judged/
    report/index.html
    stages/                             logs and notes (stages.py)
    plan.json                           paths of all artifacts, for the report

Choices
- Equal compute: every run takes the same steps from the same initial parameters, with the same
  document-order rule; runs of one seed differ in their selection alone. The report lists epochs.
- Scoring models are trained on a split disjoint from the pool, and evaluation sets are disjoint
  from both. Splits are intervals of the documents' hashes.
- Every setting of a stage is on its command line. The study itself has no state.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from evaluation.study import trained_judge
from evaluation.study.config import (
    EvaluationPlan,
    SamplerPlan,
    ScorerPlan,
    SizePlan,
    StagePlan,
    StudyConfig,
    TasksPlan,
)
from evaluation.study.plan import PLAN, plan
from evaluation.study.recipes import Recipe
from evaluation.study.stages import StageDirectory
from models.terminal import say
from pruning.store.atomic import write_text
from pruning.store.watch import STAGES

NAME = "Study"

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


def run(
    config: StudyConfig,
    dry_run: bool = False,
    only: Sequence[str] | None = None,
    until: Sequence[str] | None = None,
) -> list[str]:
    """Run the unfinished stages and return lines for the user.

    Args:
      dry_run: return the stages as commands without running them.
      only: name patterns of stages; other stages are left to other processes.
      until: name patterns of the stages to run, with all that they need.

    Raises:
      StageFailed: a stage failed; the message holds the end of its log.
      KeyboardInterrupt: interrupted, after the running stages were terminated.
    """
    from evaluation.study.progress_display import display
    from evaluation.study.scheduler import Scheduler

    planned = plan(config)
    if planned.unused_settings:
        names = ", ".join(planned.unused_settings)
        say(f"study: no stage or sampler of this study uses the settings of {names}", error=True)
    logs = StageDirectory(Path(config.output) / STAGES)
    scheduler = Scheduler(planned.stages, logs, config.workers, environment(config), only, until)
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
    write_text(Path(config.output) / PLAN, places)
    logs.write_list(scheduler.stages, config.workers)
    with display(Path(config.output).name) as (show, tell):
        ran = scheduler.run(show, tell)
    lines = [f"{len(ran)} of {len(scheduler.ours)} stages had to be run"]
    if scheduler.left:
        lines.append(f"{len(scheduler.left)} stages wait for stages of other processes")
    elif until is not None:
        lines += trained_judge.lines(planned.places)
    elif not scheduler.unfinished:
        lines.append(f"report: {config.output}/report/index.html")
    return lines


def environment(config: StudyConfig) -> dict[str, str]:
    """Return the environment variables that limit each process to `config.threads` threads.

    NOTE: by default XLA uses all CPU cores in every process; two such processes in parallel are
    slower than in sequence.
    """
    if not config.threads:
        return {}
    threads = str(config.threads)
    flags = os.environ.get("XLA_FLAGS", "")
    if config.threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    return dict.fromkeys(names, threads) | {"XLA_FLAGS": flags.strip()}
