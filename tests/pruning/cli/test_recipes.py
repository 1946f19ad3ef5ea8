"""Recipes by name, and their macros as flags."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

import pytest

import train
from evaluation.__main__ import COMMANDS
from pruning.cli import command, configuration, recipes
from pruning.cli.configuration import ConfigurationError
from pruning.cli.main import STAGES, main
from winnow import main as winnow

REPOSITORY = Path(__file__).resolve().parents[3]


def load(name: str, line: str, recipe: str | None = None):
    given = argparse.Namespace(recipe=recipe, gin_file=[])
    return (STAGES | COMMANDS)[name].load(name, given, shlex.split(line))[1]


def test_every_configuration_with_a_command_is_a_recipe():
    files = {recipe.file for recipe in recipes.recipes()}
    configs = {
        path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("configs/**/*.gin")
    }
    assert configs - files == {file for file in configs if file.startswith("configs/models/")}
    names = [(recipe.command, recipe.name) for recipe in recipes.recipes()]
    assert len(set(names)) == len(names)
    assert {name for name, _ in names} <= {*STAGES, *COMMANDS, "train"}
    assert all(5 < len(recipe.summary) < 140 for recipe in recipes.recipes())


@pytest.mark.parametrize("recipe", recipes.recipes(), ids=lambda recipe: recipe.file)
def test_macros_read_as_text_are_those_that_gin_reads(recipe):
    import gin

    with gin.unlock_config():
        gin.clear_config()
        gin.parse_config_file(str(REPOSITORY / recipe.file), skip_unknown=True)
        defined = {scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"}
        read = {name for name, macro in recipes.macros(recipe.file).items() if macro.value}
        assert read == defined
        gin.clear_config()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_an_evaluation_can_be_configured(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(COMMANDS[name].example)
    chosen = [word.partition("=")[2] for word in words if word.startswith("--recipe=")]
    files = [word.partition("=")[2] for word in words if word.startswith("--gin_file=")]
    given = argparse.Namespace(recipe=chosen[0] if chosen else None, gin_file=files)
    rest = [word for word in words if not word.startswith(("--recipe=", "--gin_file="))]
    module, config = COMMANDS[name].load(name, given, rest)
    assert isinstance(config, module.CONFIGURABLES[module.NAME])


def test_flags_and_gin_flags_make_the_same_configuration():
    flags = load(
        "score", "--corpus runs/my=c --model=a/b --max-tokens 256 --workers 8 --worker=3 --dry-run"
    )
    files = ["configs/score/ask_llm.gin"]
    bindings = [
        *("CORPUS = runs/my=c", "MODEL = a/b", "MAX_TOKENS = 256"),
        *("Score.workers = 8", "Score.worker = 3", "Score.dry_run = True"),
    ]
    stage = STAGES["score"].load("score", argparse.Namespace(recipe="ask_llm", gin_file=[]), [])[0]
    assert flags == configuration.build(stage.NAME, stage.CONFIGURABLES, files, bindings)
    assert dataclasses.asdict(flags)["scorer"]["max_tokens"] == 256


def test_another_recipe_and_the_trainer():
    assert load("select", "--keep 20%", "likelihood_middle").keep_tokens == 0.2
    given = argparse.Namespace(recipe="t5_tiny", gin_file=[])
    files, bindings = configuration.read_arguments(
        "train", None, *command.main_settings("train"), given, ["--steps", "7", "--seed=3"]
    )
    config = configuration.build(train.NAME, train.CONFIGURABLES, files, bindings)
    assert (config.steps, config.seed) == (7, 3)


@pytest.mark.parametrize(
    ("name", "line", "recipe", "message"),
    [
        ("score", "--corpse=x", None, r"unknown flag --corpse \(did you mean '--corpus'\?\)"),
        ("score", "--corpus", None, "--corpus needs a value"),
        ("score", "runs/c4", None, "unknown argument 'runs/c4'"),
        ("ingest", "--files a.jsonl b.jsonl", None, "unknown argument 'b.jsonl': .*need quotes"),
        ("score", "--max-tokens=many", None, "MAX_TOKENS .* must be int"),
        ("score", "", "ask_lm", r"score has no recipe 'ask_lm' \(did you mean 'ask_llm'\?\)"),
        ("tokenize", "--corpus=x --output=y", None, "It needs: corpus, tokenizer, output"),
    ],
)
def test_wrong_flags_are_refused_by_name(name, line, recipe, message):
    with pytest.raises(ConfigurationError, match=message):
        load(name, line, recipe)


def test_help_shows_the_flags_of_the_recipe_that_is_meant(capsys):
    for arguments in (["score"], ["score", "--recipe=likelihood"]):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        shown = capsys.readouterr().out
        file = recipes.find("score", arguments[-1].partition("=")[2] or "ask_llm")
        for name, macro in recipes.macros(file).items():
            assert f"  {recipes.flag(name)} [{macro.value}]" in shown
        assert '--corpus ["runs/c4/corpus"]: the corpus' in shown


def test_the_list_of_recipes(capsys):
    assert winnow(["recipes", "dsir"]) == 0
    assert capsys.readouterr().out.startswith("dsir  dsir  Importance weights of a target")
    assert winnow(["recipes", "scorre"]) == 1
    assert "did you mean 'score'?" in capsys.readouterr().err
