"""Completion of a study: names replaced by their plans, and defaults where nothing was set.

    Study.output = "runs/mine"
    Study.files = "mine/*.jsonl.gz"
    Study.samplers = ("random", "likelihood_middle", "dsir", "mine")

Choices
- Stages and scorers of named.py are added if a sampler or a scorer needs them, and no other.
- Good text is the evaluation named "good", or the only one with a corpus of its own.
- What the user wrote wins: a stage of the user's own with a name of named.py takes its place, for
  the named samplers as well.
- A name may be that of a stage and of a sampler ("ask_llm"). Of its settings, each recipe gets
  those that it takes.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from evaluation.errors import EvaluationError
from evaluation.study import named
from evaluation.study.config import (
    CompleteStudy,
    EvaluationPlan,
    SamplerPlan,
    ScorerPlan,
    StagePlan,
    StudyConfig,
)
from evaluation.study.recipes import Recipe
from pruning.cli import recipes
from pruning.cli.main import STAGES
from pruning.cli.values import nearest

_HELD_OUT = 0.05  # share of a corpus that is evaluated on
_GOOD, _TARGET = "good", "target"
_JSONL = "configs/ingest/jsonl.gin"
_JUDGE = Recipe("configs/pretrain/judge.gin")
_EXAMPLES = Recipe("configs/score/judge.gin")

Plan = TypeVar("Plan", StagePlan, SamplerPlan)


def completed(config: StudyConfig) -> CompleteStudy:
    """Return a study in which nothing is left to be filled in.

    Raises:
      EvaluationError: a name is unknown, or something that has no default is not set.
    """
    given = config.samplers
    chosen = given if isinstance(given, Mapping) else dict(zip(given, given, strict=True))
    samplers = {name: _sampler(name, item, config) for name, item in chosen.items()}
    scorers = {name: _entitled(name, item) for name, item in config.scorers.items()}
    for sampler in samplers.values():
        if sampler.scorer is not None and sampler.scorer in named.SCORERS:
            scorers.setdefault(sampler.scorer, named.SCORERS[sampler.scorer])
    samplers = {name: _with_inputs(item, scorers) for name, item in samplers.items()}
    evaluations = {
        name: _evaluation(name, item, config.pool_split)
        for name, item in config.evaluations.items()
    }
    stages = _stages(config, samplers, scorers, evaluations)
    # Recipes set more names than a study uses: run.py lists those that have no effect.
    known = stages.keys() | samplers.keys() | named.STAGES.keys() | named.SAMPLERS.keys()
    unknown = config.settings.keys() - known
    if unknown:
        name = min(unknown)
        raise EvaluationError(
            f"Study.settings names {name!r}, which is no stage and no sampler"
            f"{nearest(name, [*stages, *samplers])}."
        )
    for name in config.settings.keys() & stages.keys() & samplers.keys():
        _require_taken(name, stages[name], samplers[name], config)
    judge, examples = config.judge, config.judge_examples
    scoring_model: Recipe | str | None = config.scoring_model
    plans: list[StagePlan | SamplerPlan] = [*stages.values(), *samplers.values()]
    read = {name for item in plans for name in item.inputs.values()}
    if judge is None or isinstance(judge, Recipe):
        judge = (judge or _JUDGE) if "judge" in read else None
    if isinstance(judge, Recipe):
        examples = examples or _EXAMPLES
    elif "scoring" not in read and isinstance(scoring_model, Recipe):
        scoring_model = None
    corpus, vocabulary = _corpus(config)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(StudyConfig)}
    filled: dict[str, Any] = {
        "title": config.title or f"What pruning buys: {config.output.rpartition('/')[2]}",
        "vocabulary": vocabulary,
        "corpus": corpus,
        "judge": judge,
        "judge_examples": examples,
        "scoring_model": scoring_model,
        "samplers": {name: _set(name, item, config, stages) for name, item in samplers.items()},
        "scorers": scorers,
        "stages": {name: _set(name, item, config, samplers) for name, item in stages.items()},
        "evaluations": evaluations,
    }
    return CompleteStudy(**(fields | filled))


def _sampler(name: str, item: SamplerPlan | str, config: StudyConfig) -> SamplerPlan:
    if isinstance(item, SamplerPlan):
        return dataclasses.replace(
            item, title=item.title or _words(name), rule=item.rule or _summary(item.recipe)
        )
    if item not in named.SAMPLERS:
        raise EvaluationError(
            f"there is no sampler {item!r}{nearest(item, named.SAMPLERS)}: name one of "
            f"{', '.join(named.SAMPLERS)}, or give a plan, {name!r}: @{name}/Sampler()."
        )
    plan = named.SAMPLERS[item]
    return plan if item == name else dataclasses.replace(plan, title=f"{plan.title}: {name}")


def _entitled(name: str, item: ScorerPlan) -> ScorerPlan:
    if not item.terms:
        raise EvaluationError(f"the scorer {name!r} has no terms: set {name}/Scorer.terms.")
    return dataclasses.replace(item, title=item.title or _words(name))


def _with_inputs(item: SamplerPlan, scorers: Mapping[str, ScorerPlan]) -> SamplerPlan:
    """Return a sampler that reads the only stage of its scorer, if it is not told what to read."""
    if "SCORES" in item.inputs or item.scorer is None or item.scorer not in scorers:
        return item
    read = {stage for stage, _, _ in scorers[item.scorer].terms if stage}
    if len(read) != 1 or "SCORES" not in recipes.macros(item.recipe.file):
        return item
    return dataclasses.replace(item, inputs={**item.inputs, "SCORES": read.pop()})


def _evaluation(
    name: str, item: EvaluationPlan | str | None, pool: tuple[float, float]
) -> EvaluationPlan:
    title = _words(name)
    if isinstance(item, EvaluationPlan):
        source = "A part of the corpus, by the documents' hashes, that nothing was trained on."
        rule = item.rule or (source if item.recipe is None else _summary(item.recipe))
        return dataclasses.replace(item, title=item.title or title, rule=rule)
    if isinstance(item, str):
        rule = f"Documents of {item}, of which {_HELD_OUT:.0%} are evaluated on."
        recipe = Recipe(_JSONL, {"FILES": item})
        return EvaluationPlan(title, rule, recipe, (0.0, _HELD_OUT))
    if pool[1] >= 1:
        raise EvaluationError(
            f"the evaluation {name!r} is of held-out documents of the corpus, and Study.pool_split "
            "leaves none: end it before 1."
        )
    if name == "held_out":
        title = "held-out text"
    rule = "A random part of the corpus, by the documents' hashes, that nothing was trained on."
    return EvaluationPlan(title, rule, split=(pool[1], 1.0))


def _stages(
    config: StudyConfig,
    samplers: Mapping[str, SamplerPlan],
    scorers: Mapping[str, ScorerPlan],
    evaluations: Mapping[str, EvaluationPlan],
) -> dict[str, StagePlan]:
    """Return the user's stages and those of named.py that samplers, scorers or these need."""
    stages = dict(config.stages)
    wanted = [name for item in samplers.values() for name in item.inputs.values()]
    wanted += [stage for item in scorers.values() for stage, _, _ in item.terms]
    wanted += [name for item in stages.values() for name in item.inputs.values()]
    separate = [name for name, item in evaluations.items() if item.recipe is not None]
    good = _GOOD if _GOOD in evaluations else separate[0] if len(separate) == 1 else None
    while wanted:
        name = wanted.pop()
        if name in stages or name not in (*named.STAGES, _TARGET) or name in evaluations:
            continue
        if name == _TARGET:
            stages[name] = _target(good, evaluations)
            continue
        item = named.STAGES[name]
        if _GOOD in item.inputs.values():
            if good is None:
                which = f", or call one of {', '.join(separate)} {_GOOD!r}" if separate else ""
                raise EvaluationError(
                    f"{name} compares with good text: add it to Study.evaluations, such as "
                    f'{{"good": "good/*.jsonl.gz"}}{which}; a part of it is evaluated on.'
                )
            inputs = {key: good if of == _GOOD else of for key, of in item.inputs.items()}
            item = dataclasses.replace(item, inputs=inputs)
        stages[name] = item
        wanted += item.inputs.values()
    order = [*config.stages, *named.STAGES, _TARGET]
    return {name: stages[name] for name in sorted(stages, key=order.index)}


def _target(name: str | None, evaluations: Mapping[str, EvaluationPlan]) -> StagePlan:
    """Return the stage that selects the good text outside of its evaluation set."""
    if name is None:
        raise EvaluationError('"target" is a part of good text: add it to Study.evaluations.')
    split = evaluations[name].split
    if split is None or split[1] >= 1:
        raise EvaluationError(
            f"all of {name!r} is evaluated on, and nothing is left to compare with: set "
            f"{name}/Evaluation.split to a part that ends before 1."
        )
    recipe = Recipe("configs/select/split.gin", {"LOW": split[1], "HIGH": 1.0})
    return StagePlan("select", recipe, {"CORPUS": name})


def _corpus(config: StudyConfig) -> tuple[Recipe, Recipe | str]:
    """Return the configurations of the corpus and of its vocabulary."""
    if (config.corpus is None) == (config.files is None):
        raise EvaluationError("set one of Study.files (JSON lines) and Study.corpus.")
    corpus = config.corpus or Recipe(_JSONL, {"FILES": config.files})
    if config.vocabulary is not None:
        return corpus, config.vocabulary
    if config.files is None:
        raise EvaluationError("set Study.vocabulary, which only Study.files can do without.")
    source = {"SOURCE": "@JsonlSource()", "JsonlSource.paths": (config.files,)}
    return corpus, Recipe("configs/ingest/vocabulary.gin", source)


def _set(name: str, item: Plan, config: StudyConfig, others: Collection[str]) -> Plan:
    """Return a plan with the settings that Study.settings has for it.

    Args:
      others: names of the samplers if the plan is a stage, else of the stages.
    """
    further = config.settings.get(name)
    if not further:
        return item
    if name in others:
        further = {key: value for key, value in further.items() if _takes(item, key)}
    recipe = Recipe(item.recipe.file, {**item.recipe.settings, **further})
    return dataclasses.replace(item, recipe=recipe)


def _require_taken(name: str, stage: StagePlan, sampler: SamplerPlan, config: StudyConfig) -> None:
    """Raise EvaluationError for a setting that neither the stage nor the sampler takes."""
    for key in config.settings[name]:
        if not (_takes(stage, key) or _takes(sampler, key)):
            known = {*recipes.macros(stage.recipe.file), *recipes.macros(sampler.recipe.file)}
            raise EvaluationError(
                f"Study.settings[{name!r}] sets {key!r}, which neither {stage.recipe.file} nor "
                f"{sampler.recipe.file} takes{nearest(key, known)}."
            )


def _takes(item: StagePlan | SamplerPlan, setting: str) -> bool:
    """Return whether a plan's command takes a macro ("SEED") or a parameter ("Top.high")."""
    if "." not in setting:
        return setting in recipes.macros(item.recipe.file)
    command = item.command if isinstance(item, StagePlan) else "select"
    configurables = importlib.import_module(STAGES[command].module).CONFIGURABLES
    return setting.rpartition(".")[0].rpartition("/")[2] in configurables


def _words(name: str) -> str:
    return name.replace("_", " ")


def _summary(recipe: Recipe) -> str:
    known: Sequence[recipes.Recipe] = recipes.recipes()
    return next((f"{item.summary}." for item in known if item.file == recipe.file), recipe.file)
