"""Every configuration file reads, by the very command that its header gives."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

import train
from evaluation.__main__ import COMMANDS
from pruning import configuration
from pruning.__main__ import STAGES

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = sorted(
    str(file.relative_to(REPOSITORY))
    for file in (REPOSITORY / "configs").rglob("*.gin")
    if file.parent.name != "models"  # included by others
)


def command_of(file: str) -> list[str]:
    """The command in the comments at the head of a file that names the file, as words."""
    lines: list[str] = []
    for line in (REPOSITORY / file).read_text().splitlines():
        text = line.removeprefix("#").strip()
        if text.startswith("python ") or lines:
            lines.append(text.removesuffix("\\"))
            if not text.endswith("\\"):
                if any(f"--gin_file={file}" in part for part in lines):
                    return shlex.split(" ".join(lines))
                lines = []
    raise AssertionError(f"{file} gives no command")


@pytest.mark.parametrize("file", FILES)
def test_the_command_in_the_header_reads_the_file(file, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = command_of(file)
    flags = [word for word in words if word.startswith("--gin")]
    assert f"--gin_file={file}" in flags
    if "train.py" in words:
        name, configurables = "Train", train.CONFIGURABLES
    else:
        table = STAGES if "pruning" in words else COMMANDS
        module = importlib.import_module(table[words[3]].module)
        name, configurables = module.NAME, module.CONFIGURABLES
    bindings = configuration.split_bindings(
        [flag for flag in flags if not flag.startswith("--gin_file")]
    )
    configuration.build(name, configurables, [file], bindings)


@pytest.mark.parametrize("file", FILES)
def test_the_header_says_time_and_result(file):
    text = (REPOSITORY / file).read_text()
    head = text[: text.index("\n\n")]
    assert re.search(r"# Time", head) and re.search(r"[Rr]esult", head)
    assert not re.search(r"\b(TIME|RESULT)(_[A-Z0-9_]+)?\b", head), "a figure is missing"
