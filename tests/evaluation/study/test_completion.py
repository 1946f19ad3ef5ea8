"""Studies of names: what they are completed to."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from pathlib import Path

import pytest

from evaluation.errors import EvaluationError
from evaluation.study import named
from evaluation.study import run as study
from evaluation.study.completion import completed
from evaluation.study.config import CompleteStudy
from evaluation.study.plan import plan
from evaluation.study.recipes import Recipe
from evaluation.study.stages import ordered
from pruning.cli import command, configuration
from pruning.cli.main import STAGES

CONFIGS = Path(__file__).parents[3] / "configs"
ALL_OF_IT = study.EvaluationPlan(recipe=Recipe("configs/ingest/jsonl.gin"))


def build(file: str, *bindings: str) -> study.StudyConfig:
    return configuration.build("Study", study.CONFIGURABLES, [str(CONFIGS / file)], bindings)


def named_study(*names: str, **settings) -> study.StudyConfig:
    base = {"output": "runs/test", "files": "mine", "keep_rates": (0.2,)}
    return study.StudyConfig(**(base | {"samplers": names} | settings))


def test_the_shipped_study_of_your_own_is_short():
    text = (CONFIGS / "study.gin").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 40
    planned = plan(build("study.gin"))
    assert {run["sampler"] for run in planned.places["runs"]} == {
        *("full", "random", "likelihood_middle", "likelihood_high", "ask_llm")
    }
    assert set(planned.places["stages"]) == {"likelihood", "ask_llm"}
    for stage in planned.stages:
        program, *arguments = stage.argv[2:]
        if program == "pruning":
            read = arguments[0], None, *command.main_settings(STAGES[arguments[0]].module)
            given = argparse.Namespace(recipe=None, gin_file=[CONFIGS.parent / arguments[1][11:]])
            files, bindings = configuration.read_arguments(*read, given, arguments[2:])
            module = importlib.import_module(STAGES[arguments[0]].module)
            configuration.build(module.NAME, module.CONFIGURABLES, files, bindings)


def test_settings_of_what_a_study_does_not_use_are_ignored_and_unknown_names_refused(
    capsys,
):
    """configs/study.gin sets the likelihood's; a study of Ask-LLM alone has none."""
    found = completed(named_study("random", settings={"likelihood": {"WINDOW": 64}}))
    assert "likelihood" not in found.stages
    settings = {"likelihood": {"WINDOW": 64}, "random": {"Select.seed": 3}}
    study.run(named_study("random", settings=settings), dry_run=True)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("uses the settings of likelihood")
    with pytest.raises(EvaluationError, match="likelihod"):
        completed(named_study("random", settings={"likelihod": {"WINDOW": 64}}))


def test_settings_of_a_stage_and_a_sampler_of_one_name_go_where_they_are_taken():
    wanted = {"MAX_TOKENS": 165, "Score.fsdp": 2, "SCORE": "ask_llm_ratio", "Select.seed": 3}
    found = completed(named_study("ask_llm", settings={"ask_llm": wanted}))
    assert found.stages["ask_llm"].recipe.settings == {"MAX_TOKENS": 165, "Score.fsdp": 2}
    assert found.samplers["ask_llm"].recipe.settings == {"SCORE": "ask_llm_ratio", "Select.seed": 3}
    for name in ("MAX_TOKEN", "Stream.seed"):
        with pytest.raises(EvaluationError, match=f"sets '{name}', which neither configs/score/as"):
            completed(named_study("ask_llm", settings={"ask_llm": {name: 1}}))


@pytest.mark.parametrize("file", ["quickstart.gin", "evaluate/study_real.gin"])
def test_names_stand_for_what_the_shipped_studies_spell_out(file):
    shipped = build(file)
    names = [name for name in shipped.samplers if name in named.SAMPLERS]
    assert len(names) >= 6
    found = completed(named_study(*names, evaluations={"good": "good", "held_out": None}))
    for name in names:
        assert found.samplers[name] == shipped.samplers[name]
    for name, item in found.scorers.items():
        assert item == shipped.scorers[name]
    for name, item in found.stages.items():
        if name != "target":
            expected = shipped.stages[name]
            assert (item.command, item.inputs) == (expected.command, expected.inputs)
            assert item.recipe.file == expected.recipe.file
    assert completed(shipped) == CompleteStudy(
        **{f.name: getattr(shipped, f.name) for f in dataclasses.fields(study.StudyConfig)}
    )


def test_every_name_can_be_planned_and_only_what_is_needed_is_added():
    config = named_study(*named.SAMPLERS, evaluations={"good": "good/*.jsonl", "held_out": None})
    planned = plan(config)
    assert len(ordered(planned.stages)) == len(planned.stages)
    assert set(planned.places["stages"]) == {*named.STAGES, "target"}
    (target,) = [stage.command for stage in planned.stages if stage.name == "select/target"]
    assert "LOW=0.05" in target and "CORPUS=runs/test/corpora/good" in target
    alone = completed(named_study("dsir", evaluations={"held_out": None, "wiki": "wiki.jsonl"}))
    assert (
        alone.stages["dsir"].inputs["TARGET"] == alone.stages["target"].inputs["CORPUS"] == "wiki"
    )
    assert completed(named_study("random")).stages == {}
    assert completed(named_study("random")).judge is None


def test_a_sampler_of_ones_own_needs_its_recipe_and_scores_alone():
    own = study.SamplerPlan(recipe=Recipe("configs/select/likelihood_flat.gin"), scorer="mine")
    config = named_study(
        samplers={"random": "random", "mine": own, "again": "likelihood_high"},
        scorers={"mine": study.ScorerPlan(terms=(("likelihood", "nll_total", 1.0),))},
        settings={"likelihood": {"WINDOW": 64}, "mine": {"SCORE": "nll_total"}},
    )
    found = completed(config)
    assert found.samplers["mine"].title == "mine"
    assert found.samplers["mine"].inputs == {"SCORES": "likelihood"}
    assert found.samplers["mine"].recipe.settings == {"SCORE": "nll_total"}
    assert found.samplers["mine"].rule.startswith("Samples in proportion")
    assert found.samplers["again"].title == "High likelihood: again"
    assert found.scorers["mine"].title == "mine"
    assert found.stages["likelihood"].recipe.settings == {"TOKEN_NLL": True, "WINDOW": 64}
    plan(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samplers": ("likelihood_hi",)}, r"no sampler 'likelihood_hi' \(did you mean 'likelihoo"),
        ({"samplers": ("dsir",)}, "dsir compares with good text: add it to Study.evaluations"),
        (
            {"samplers": ("dsir",), "evaluations": {"c4": "c4.jsonl", "wiki": "wiki.jsonl"}},
            "or call one of c4, wiki 'good'",
        ),
        ({"files": None}, "set one of Study.files"),
        ({"files": None, "corpus": Recipe("x.gin")}, "set Study.vocabulary"),
        ({"settings": {"likelyhood": {}}}, r"'likelyhood', which is no stage"),
        ({"pool_split": (0.3, 1.0)}, "Study.pool_split leaves none"),
        ({"scorers": {"a": study.ScorerPlan()}}, "the scorer 'a' has no terms"),
        (
            {
                "samplers": ("dsir",),
                "evaluations": {"good": study.EvaluationPlan(recipe=Recipe("x"))},
            },
            "all of 'good' is evaluated on",
        ),
    ],
)
def test_what_cannot_be_completed_is_refused(settings, message):
    with pytest.raises(EvaluationError, match=message):
        completed(named_study(**({"samplers": ("likelihood_high",)} | settings)))
