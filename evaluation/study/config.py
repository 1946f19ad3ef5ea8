"""Configuration of a study: one corpus, scorers, samplers, keep-rates, and how each is evaluated.

The dataclasses below are what gin files bind (configs/quickstart.gin is an example). plan.py turns
them into stages, run.py runs the stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from evaluation.study.recipes import Recipe

SMALL_MODEL = Recipe("configs/pretrain/quickstart.gin")


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """An intermediate artifact: scores, embeddings, clusters, a selection or a corpus.

    Attributes:
      command: command of `python -m pruning`, such as "score" or "density".
      recipe: configuration of that command.
      inputs: macro or parameter of the recipe -> its value, given as the name of another stage, of
        an evaluation (its corpus), or "vocabulary", "corpus", "pool", "training" (the split that
        scoring models are trained on), "scoring", "judge". CORPUS defaults to "corpus".
    """

    command: str
    recipe: Recipe
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScorerPlan:
    """A score shown in the report: a weighted sum of score columns. Higher is better.

    Attributes:
      title: title in the report; by default the name.
      axis: unit and direction of the values, such as "nats per token, higher is likelier".
      terms: summands (stage, named value of pruning/scores/terms.py, weight); the stage is "" for
        a column of the corpus ("corpus:score").
    """

    title: str = ""
    axis: str = "higher is kept first"
    terms: tuple[tuple[str, str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class SamplerPlan:
    """A selection rule.

    Attributes:
      title, rule: title and one-sentence description in the report; by default the name, and the
        first sentence of the recipe's header.
      recipe: configuration of `pruning select`; by default the highest scores.
      scorer: name of the score that it ranks by, for the report; None if it uses no score.
      inputs: macro or parameter of the recipe -> its value, as in `StagePlan`: SCORES, and WITHIN
        for a chain of selections. SCORES defaults to the only stage that `scorer` reads, WITHIN to
        "pool".
      within_share: share of the pool's tokens that a WITHIN other than the pool is configured to
        keep. Keep-rates are shares of the whole pool, so the recipe's KEEP is divided by it.
    """

    title: str = ""
    rule: str = ""
    recipe: Recipe = Recipe("configs/select/top.gin")  # noqa: RUF009  frozen
    scorer: str | None = None
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    within_share: float = 1.0


@dataclasses.dataclass(frozen=True)
class TasksPlan:
    """A set of tasks that every model is evaluated on, such as GLUE, with or without fine-tuning.

    Attributes:
      title: title in the report.
      recipe: configuration of `evaluation tasks`.
      examples: configuration of `evaluation examples` for the training splits of the same tasks;
        None: no fine-tuning.
      fine_tuning: configuration of train.py on these examples.
    """

    title: str
    recipe: Recipe
    examples: Recipe | None = None
    fine_tuning: Recipe | None = None

    def __post_init__(self) -> None:
        if (self.examples is None) != (self.fine_tuning is None):
            raise ValueError(f"{self.title}: set both examples and fine_tuning, or neither.")


@dataclasses.dataclass(frozen=True)
class SizePlan:
    """Another model size, trained for over-scaling and for extrapolation over sizes.

    Attributes:
      title: title in the report.
      recipe: configuration of train.py.
      samplers: samplers trained at this size, besides the full data.
      seeds: seeds of these runs; None for all seeds of the study.
    """

    title: str
    recipe: Recipe
    samplers: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation set: a split of the study's corpus, or a separate corpus.

    Attributes:
      title, rule: title and description in the report; the rule says how documents were chosen. By
        default the name, and where the documents are from.
      recipe: configuration of `pruning ingest`, for a separate corpus.
      split: interval [low, high) of the documents' uniform draws, within the study's corpus or the
        separate one.
    """

    title: str = ""
    rule: str = ""
    recipe: Recipe | None = None
    split: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.split is None and self.recipe is None:
            raise ValueError(f"the evaluation {self.title!r}: set recipe, split or both.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Settings of `study`.

    What is not set is filled in (completion.py), so that names suffice: configs/study.gin.

    Attributes:
      output: directory of the study.
      title, description, caveats: text of the report.
      files: JSON lines of the corpus, a file, a directory or a pattern; in place of `corpus`.
      vocabulary: configuration of `pruning vocabulary`; or an existing vocabulary, as
        `Ingest.vocabulary` accepts it. By default trained on `files`.
      vocabulary_size: number of pieces of a trained vocabulary.
      corpus: configuration of `pruning ingest`.
      split: configuration of `pruning select` for splits of the corpus.
      scoring_split: split of the corpus that the scoring model and the judge are trained on.
      pool_split: split that is scored and selected from.
      scoring_model: configuration of train.py; or existing weights. It is trained if a stage or the
        judge needs it.
      judge: configuration of train.py, starting from the scoring model's weights; or existing
        weights with their own tokenizer; by default trained, if a stage needs it. The tokenizer of
        a T5 is the study's vocabulary too; any other model (Qwen, Llama) reads the text by its
        own, and the study keeps `vocabulary`.
      judge_examples: configuration of `pruning judge`, for a judge trained here. The judge is
        tested on `judge_exam` examples from the pool, which is disjoint from its training split.
      samplers: by name, each a plan or the name of one in named.py; or such names alone. A sampler
        named "random" is the baseline of the others.
      scorers, stages: by name; those of named.py that samplers need are added.
      evaluations: by name, each a plan, the JSON lines of a corpus of its own, or None for held-out
        documents of the study's corpus. The report's headline is about the first. By default
        held-out documents alone.
      settings: name of a stage or sampler -> settings on top of those of its recipe. Where both
        have the name, each gets those that its recipe takes.
      keep_rates: shares of the pool's tokens.
      train: configuration of train.py for every run.
      sizes: other model sizes, by name.
      tasks: sets of tasks, by name.
      perplexity: configuration of `evaluation perplexity`.
      seeds: seeds of the runs; each repeats every selection and training.
      noise_seeds: additional seeds of the full-data and random runs alone. They estimate the
        variance of training, so that a study with one seed per sampler can still draw conclusions.
      workers: number of concurrent processes.
      threads: threads of each process.
    """

    output: str
    title: str = ""
    description: str = ""
    caveats: tuple[str, ...] = ()
    files: str | None = None
    vocabulary: Recipe | str | None = None
    vocabulary_size: int = 8000
    corpus: Recipe | None = None
    split: Recipe = Recipe("configs/select/split.gin")  # noqa: RUF009  frozen
    scoring_split: tuple[float, float] = (0.0, 0.3)
    pool_split: tuple[float, float] = (0.3, 0.95)
    scoring_model: Recipe | str = SMALL_MODEL
    judge: Recipe | str | None = None
    judge_examples: Recipe | None = None
    judge_exam: int = 500
    stages: Mapping[str, StagePlan] = dataclasses.field(default_factory=dict)
    scorers: Mapping[str, ScorerPlan] = dataclasses.field(default_factory=dict)
    samplers: Mapping[str, SamplerPlan | str] | tuple[str, ...]
    evaluations: Mapping[str, EvaluationPlan | str | None] = dataclasses.field(
        default_factory=lambda: {"held_out": None}
    )
    keep_rates: tuple[float, ...]
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    train: Recipe = SMALL_MODEL
    sizes: Mapping[str, SizePlan] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, TasksPlan] = dataclasses.field(default_factory=dict)
    perplexity: Recipe = Recipe("configs/evaluate/perplexity.gin")  # noqa: RUF009  frozen
    seeds: tuple[int, ...] = (0,)
    noise_seeds: tuple[int, ...] = ()
    workers: int = 2
    threads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteStudy(StudyConfig):
    """Settings of a study in which nothing is left to be filled in (completion.py)."""

    vocabulary: Recipe | str
    corpus: Recipe
    scoring_model: Recipe | str | None  # type: ignore[assignment]  # None: no stage needs it
    samplers: Mapping[str, SamplerPlan]
    evaluations: Mapping[str, EvaluationPlan]
