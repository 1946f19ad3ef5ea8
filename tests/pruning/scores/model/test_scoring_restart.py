"""Killed at any moment and started again, scoring ends with the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pruning.store.artifact import load_artifact

REPOSITORY = Path(__file__).resolve().parents[4]
# How often each of the two workers is killed; 20 for a thorough run by hand.
KILLS = int(os.environ.get("WINNOW_TEST_KILLS", "3"))
SHARDS = 4 * KILLS  # so that nobody is done before


@pytest.fixture
def command(tmp_path, build_corpus, model_path):
    """How to start a worker: (output, worker, workers) -> Popen."""
    rng = np.random.default_rng(3)
    shards = [
        [rng.integers(3, 259, int(n)).tolist() for n in rng.integers(0, 400, 60)]
        for _ in range(SHARDS)
    ]
    build_corpus(tmp_path / "corpus", shards)

    def start(output: str, worker: int = 0, workers: int = 1) -> subprocess.Popen:
        return subprocess.Popen(
            [
                sys.executable, "-m", "pruning", "score",
                "--gin_file=configs/score/likelihood.gin",
                f"--gin.CORPUS={tmp_path / 'corpus'}",
                f"--gin.MODEL={model_path}",
                "--gin.Score.tokenizer=corpus",
                f"--gin.OUTPUT={tmp_path / output}",
                "--gin.ESTIMATOR=span", "--gin.WINDOW=48", "--gin.OVERLAP=16",
                "--gin.ROW_LENGTH=64", "--gin.BATCH_ROWS=8", "--gin.TOKEN_NLL=True",
                f"--gin.Score.worker={worker}", f"--gin.Score.workers={workers}",
                f"--gin.Score.compilation_cache={tmp_path / 'compiled'}",
            ],
            cwd=REPOSITORY,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    return output.decode()


def records(path: Path) -> int:
    return len(list((path / "unfinished").glob("data-*.json")))


@pytest.mark.slow
def test_two_workers_killed_at_random_moments(command, tmp_path):
    finish(command("undisturbed"))
    expected = contents(tmp_path / "undisturbed")

    chance = random.Random(20240212)
    output = tmp_path / "disturbed"
    kills = 0
    running = {worker: command("disturbed", worker, 2) for worker in (0, 1)}
    left = dict.fromkeys(running, KILLS)
    while running:
        for worker, process in list(running.items()):
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read().decode()
                process.communicate()
                del running[worker]
            elif left[worker]:
                # Some at the start, some while a shard is being written, some in between.
                before, limit = records(output), time.monotonic() + chance.uniform(0, 8)
                wanted = before + chance.randint(0, 2)
                while (
                    records(output) < wanted and time.monotonic() < limit and process.poll() is None
                ):
                    time.sleep(0.002)
                time.sleep(chance.uniform(0, 0.05))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    kills += 1
                    left[worker] -= 1
                    running[worker] = command("disturbed", worker, 2)
        time.sleep(0.01)
    print(f"killed {kills} times")
    assert kills >= KILLS
    # A worker that was killed after the other had finished leaves its part to a rerun.
    finish(command("disturbed", 0, 2))
    finish(command("disturbed", 1, 2))
    assert contents(output) == expected
    scores = load_artifact(output, "scores")
    scores.verify()
    ids = np.concatenate([scores.read(k)["doc_id"].to_numpy() for k in range(SHARDS)])
    assert len(np.unique(ids)) == len(ids) == SHARDS * 60


def contents(path: Path) -> dict[str, bytes]:
    """Every file but the one with the times; the manifest without the code's revision.

    A thorough run takes long enough for somebody to commit meanwhile.
    """
    found = {f.name: f.read_bytes() for f in path.iterdir() if f.name != "measured.json"}
    manifest = json.loads(found["manifest.json"])
    del manifest["code"]
    return found | {"manifest.json": json.dumps(manifest).encode()}
