"""Help of commands answers at once; tests/pruning/cli/test_cli.py tests that of the stages."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import winnow
from evaluation.__main__ import COMMANDS
from pruning.cli.main import VIEWS

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = ("models", "tpu.compile", "tpu.launch", "evaluation")
ALL = [
    *(["winnow.py", name, "--help"] for name in (*VIEWS, *COMMANDS, *winnow._PROGRAMS)),
    *(["-m", module, "--help"] for module in MODULES),
    ["train.py", "--help"],
    ["winnow.py", "--help"],
    ["winnow.py", "recipes"],
]


@pytest.mark.parametrize("arguments", ALL, ids=" ".join)
def test_help_answers_at_once(arguments):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and not done.stderr
    assert "usage: " in done.stdout or arguments[-1] == "recipes"
    # CPU time, not the clock's. The goal is 0.3 s; slow or loaded machines take more.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_reading_a_model_is_announced_before_slow_imports(tmp_path):
    command = [sys.executable, "-m", "models", "inspect", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    first, *others = done.stderr.splitlines()
    assert first == f"reading {tmp_path} ..." and others[-1].startswith("error: ")
