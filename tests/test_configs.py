"""Configuration files and documented commands: each is read as it is written."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re

import pytest

import train
import winnow
from evaluation.__main__ import COMMANDS
from pruning.cli import command, configuration
from pruning.cli.main import STAGES
from tests import documented
from tpu import compile as compiling
from tpu import launch

FILES = documented.configs()
DOCUMENTED = documented.documented()
VIEWED = (["inspect"], ["status"], ["explain"])


def test_commands_are_found():
    files = [file for file, _ in DOCUMENTED]
    assert set(FILES) <= set(files) and files.count("README.md") > 15


@pytest.mark.parametrize("file", FILES)
def test_the_header_gives_a_command_for_its_file(file):
    assert any(f"--gin_file={file}" in command for command in documented.commands(file))


@pytest.mark.parametrize(("file", "line"), DOCUMENTED, ids=[f for f, _ in DOCUMENTED])
def test_a_documented_command_is_read(file, line, monkeypatch):
    """Parses the arguments, reads the configuration files and builds the configuration."""
    assert "..." not in line
    monkeypatch.chdir(documented.REPOSITORY)
    words = documented.words_of(line)
    if words[0] == "winnow":
        program, arguments = program_of(words[1]), words[1:]
        if words[1] in winnow._PROGRAMS:
            arguments = arguments[1:]
    elif words[1] == "-m":
        program, arguments = words[2], words[3:]
    else:
        program, arguments = words[1], words[2:]
    if program == "tpu.compile":
        assert compiling.variants_of(compiling.parser().parse_args(arguments))
    elif program == "tpu.launch":
        with contextlib.redirect_stdout(io.StringIO()):
            assert launch.main([word for word in arguments if word != "--yes"]) == 0
    elif program in ("models", "pytest", "recipes") or arguments[:1] in VIEWED:
        pass  # no configuration
    elif f'title="{program}"' in (documented.REPOSITORY / file).read_text():
        pass  # the page shows it
    elif program.startswith(("benchmarks/", "tests/")):
        assert (documented.REPOSITORY / program).is_file()
    else:
        read(program, arguments)


def program_of(command: str) -> str:
    """Return the module or file that `winnow COMMAND` runs."""
    if command in winnow._PROGRAMS:
        module = winnow._MODULES.get(command, command)
        return "train.py" if module == "train" else module
    return "evaluation" if command in COMMANDS else "pruning"


def read(program: str, arguments: list[str]) -> None:
    """Build the configuration of a stage, an evaluation or a training run."""
    if program == "train.py":
        command_name, module, default = "train", train, None
    else:
        command_name, *arguments = arguments
        entry = {"pruning": STAGES, "evaluation": COMMANDS}[program][command_name]
        module, default = importlib.import_module(entry.module), entry.recipe
    parser = argparse.ArgumentParser(allow_abbrev=False)
    configuration.add_arguments(parser)
    for option in ("--only", "--runner", "--beam_pipeline_options", "--distributed", "--until"):
        parser.add_argument(option)
    if command_name == "study":
        parser.add_argument("--dry-run", action="store_true")
    given, rest = parser.parse_known_args(arguments)
    main = command.main_settings(module.__name__)
    files, bindings = configuration.read_arguments(command_name, default, *main, given, rest)
    configuration.build(module.NAME, module.CONFIGURABLES, files, bindings)


@pytest.mark.parametrize("file", FILES)
def test_the_header_says_time_and_result(file):
    text = (documented.REPOSITORY / file).read_text()
    head = text[: text.index("\n\n")]
    assert re.search(r"# Time", head) and re.search(r"[Rr]esult", head)
    assert not re.search(r"\b(TIME|RESULT)(_[A-Z0-9_]+)?\b", head), "a figure is missing"
