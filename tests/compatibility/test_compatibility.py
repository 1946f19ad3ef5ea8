"""Artifacts of the last revision before the present layout: still read, and made alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).with_name("compare.py")
BEFORE = "0b743fd"


@pytest.mark.sweep
def test_artifacts_without_models_are_read_and_made_alike(tmp_path):
    """The whole comparison, with models, a run and a study: `compare.py` by itself."""
    git = ["git", "-C", str(COMPARE.parent), "cat-file", "-e", f"{BEFORE}^{{commit}}"]
    if subprocess.run(git, capture_output=True).returncode:
        pytest.skip(f"the history of this clone does not reach back to {BEFORE}")
    command = [sys.executable, str(COMPARE), "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
