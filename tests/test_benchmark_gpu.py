"""benchmarks/gpu.py with tiny shapes on a CPU: it runs, and writes its table as it goes."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def rows_of(tmp_path, *arguments):
    """The rows of the table that a run wrote: [what, program, result, share]."""
    table = tmp_path / "gpu.md"
    told = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--tiny", "--output", str(table), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "-1"},
    )
    assert told.returncode == 0, told.stderr[-2000:]
    lines = table.read_text().splitlines()
    assert lines[3].startswith("|---")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]


def test_scores_and_trains(tmp_path):
    scored = rows_of(tmp_path, "--only", "Ask-LLM, Flan-T5-XL winnow")
    assert len(scored) == 1
    speed = re.match(r"([\d.]+) documents/s", scored[0][2])
    assert speed and float(speed[1]) > 0
    # A second run adds to the same table.
    trained = rows_of(tmp_path, "--only", "training, T5 v1.1 large winnow")[1:]
    assert len(trained) == 1
    loss = re.match(r"\d+ ms a step of 2 rows, loss ([\d.]+)", trained[0][2])
    assert loss and 3 < float(loss[1]) < 8  # log(512) is 6.2


def test_what_no_time_is_left_for_is_listed(tmp_path):
    rows = rows_of(tmp_path, "--minutes", "0")
    assert len(rows) >= 6
    assert all(result == "not run: 0 s left, needs 0" for _, _, result, _ in rows)


def test_the_kernel_of_gated_mlps_agrees_with_two_products(tmp_path):
    found = rows_of(tmp_path, "--only", "gated MLP")
    assert float(re.match(r"apart by (\S+) of", found[0][2])[1]) <= 1e-2
