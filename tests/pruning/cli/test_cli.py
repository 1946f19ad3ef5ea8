"""The command line: help at once, settings that exist, one line for an error, the whole way."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.__main__ import COMMANDS
from pruning.cli import command, configuration
from pruning.cli.main import STAGES, main
from pruning.corpus import ingest
from pruning.corpus.reader import load_corpus

REPOSITORY = Path(__file__).resolve().parents[3]
MODULES = ["train", *(item.module for item in (STAGES | COMMANDS).values())]
HEAVY = {"jax", "numpy", "pyarrow", "tensorflow", "sentencepiece", "gin", "rich", "etils"}


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in STAGES)])
def test_help_answers_at_once_and_imports_nothing_heavy(arguments):
    code = (
        "import sys, runpy; sys.argv[0] = 'pruning'\n"
        "try: runpy.run_module('pruning', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert end.code == 0\n"
        f"print('heavy:', *sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU time, not the clock's: the machine may have other things to do.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert done.stderr.strip() == "heavy:"
    assert "usage: python -m pruning" in done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_every_setting(module):
    """The help is read from the source; the settings are those of the real dataclasses."""
    configurables = importlib.import_module(module).CONFIGURABLES
    described = dict(command.configurables(module))
    assert {name: classes[-1].name for name, classes in described.items()} == {
        name: cls.__name__ for name, cls in configurables.items()
    }
    shown = "\n\n".join(command.settings_of(module))
    for name, cls in configurables.items():
        if not (fields := dataclasses.fields(cls)):
            assert f"\n  @{name}(): " in shown
            continue
        part = shown.partition(f" of --gin.{name}.SETTING=VALUE:\n")[2].partition("\n\n")[0]
        for field in fields:
            assert re.search(rf"^  (\w+, )*{field.name}\b", part, re.MULTILINE), (name, field.name)


@pytest.mark.parametrize("name", STAGES)
def test_the_example_in_the_help_can_be_configured(name, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs/examples"))
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(STAGES[name].example)
    files = [word.partition("=")[2] for word in words if word.startswith("--gin_file=")]
    rest = [word for word in words if not word.startswith("--gin_file=")]
    given = argparse.Namespace(recipe=None, gin_file=files)
    stage, config = STAGES[name].load(name, given, rest)
    assert isinstance(config, stage.CONFIGURABLES[stage.NAME])


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs/ingest").glob("*.gin")), ids=str)
def test_every_file_of_ingest_is_a_configuration_and_says_its_command(file):
    text = file.read_text()
    stage_name = "vocabulary" if "TrainVocabulary" in text else "ingest"
    stage = importlib.import_module(STAGES[stage_name].module)
    configuration.build(stage.NAME, stage.CONFIGURABLES, [str(file)], [])
    assert f"python -m pruning {stage_name} --gin_file=configs/ingest/{file.name}" in text
    assert re.search(r"^# Time", text, re.MULTILINE)


def test_from_text_to_a_dataset(tmp_path, records, capsys, monkeypatch):
    """Vocabulary, corpus, selection, judge's examples and export, each by its command."""
    monkeypatch.chdir(REPOSITORY)
    (tmp_path / "in").mkdir()
    for shard in range(2):
        lines = [json.dumps(record) for record in records(150, shard)]
        (tmp_path / "in" / f"{shard}.jsonl").write_text("\n".join(lines))

    def run(stage: str, *arguments: str) -> str:
        assert main([stage, *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    run(
        "vocabulary",
        "--gin_file=configs/ingest/vocabulary.gin",
        "--gin.SOURCE=@JsonlSource()",
        f"--gin.JsonlSource.paths=('{tmp_path}/in',)",
        "--gin.SIZE=200",
        f"--gin.OUTPUT={tmp_path}/vocabulary",
    )
    said = run(
        "ingest",
        "--gin_file=configs/ingest/jsonl.gin",
        f"--gin.FILES={tmp_path}/in",
        f"--gin.VOCABULARY={tmp_path}/vocabulary",
        f"--gin.OUTPUT={tmp_path}/corpus",
    )
    corpus = load_corpus(tmp_path / "corpus")
    digest = corpus.artifact.digest[:12]
    assert said.strip() == (
        f"{tmp_path}/corpus: corpus {digest}, 300 rows, {corpus.artifact.manifest.tokens:,} tokens"
    )
    (tmp_path / "select.gin").write_text(
        "Select.strategy = @Random()\nSelect.keep_documents = 0.5\n"
    )
    run(
        "select",
        f"--gin_file={tmp_path}/select.gin",
        f"--gin.Select.corpus={tmp_path}/corpus",
        f"--gin.Select.output={tmp_path}/half",
    )
    run(
        "judge",
        "--gin_file=configs/score/judge.gin",
        f"--gin.CORPUS={tmp_path}/corpus",
        f"--gin.WITHIN={tmp_path}/half",
        f"--gin.OUTPUT={tmp_path}/examples",
        "--gin.Judge.workers=1",
    )
    said = run(
        "export",
        "--gin_file=configs/export.gin",
        f"--gin.CORPUS={tmp_path}/corpus",
        f"--gin.SELECTION={tmp_path}/half",
        f"--gin.OUTPUT={tmp_path}/dataset",
    )
    assert "dataset" in said and "150 rows" in said
    for artifact in ("vocabulary", "corpus", "half", "examples", "dataset"):
        assert main(["inspect", str(tmp_path / artifact), "--verify"]) == 0
        assert "verified: " in capsys.readouterr().out


def test_interrupted_work_says_how_it_goes_on(monkeypatch, capsys):

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(ingest, "run", interrupted)
    assert main(["ingest", "--gin_file=configs/ingest/jsonl.gin"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):

    def broken(config):
        raise ValueError("an array of the wrong shape")

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(ingest, "run", broken)
    with pytest.raises(ValueError, match="wrong shape"):
        main(["ingest", "--gin_file=configs/ingest/jsonl.gin"])
