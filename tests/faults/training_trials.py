"""Trials of whole training runs: killed at a step, killed while saving, on a full disk.

The run is one of train.py, with a T5 of two layers. Run again, it must end with the bits of an
undisturbed run: metrics, result and parameters of all checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from trials import Kind, Outcome, Result, Workshop, run_here

import train
from models.checkpoints import DIRECTORY, Retention, fingerprints, read_config, restore_params
from models.config import T5Config, from_dict
from models.model import Model
from models.optimizers import AdamW, Constant
from pruning.cli.command import exit_status

_STEPS = 7
_EVERY = 2  # steps between checkpoints
_MODEL = T5Config(
    vocab_size=64,
    d_model=16,
    d_ff=32,
    d_kv=8,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
_TIMES = ("seconds", "tokens_per_second", "share_of_peak")


@dataclasses.dataclass(frozen=True)
class _Reversals:
    """Batches that are functions of their step.

    Attributes:
      made: of this process; called with the step of each batch.
    """

    made: ClassVar[Callable[[int], None]] = lambda step: None

    def open(self, process_index: int, process_count: int) -> _Reversals:
        return self

    def batch(self, step: int) -> dict[str, np.ndarray]:
        _Reversals.made(step)
        inputs = np.random.default_rng(step).integers(2, 64, (4, 8)).astype(np.int32)
        targets = inputs[:, 3::-1].copy()
        return {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": np.ones(targets.shape, np.float32),
        }


def _train(root: Path, name: str) -> None:
    config = train.TrainConfig(
        output=str(root / name),
        model=_MODEL,
        data=_Reversals(),
        steps=_STEPS,
        checkpoint_every=_EVERY,
        keep=Retention(last=2),
        log_every=1,
        optimizer=AdamW(Constant(1e-2)),
        compilation_cache=str(root / "compiled"),
    )
    train.train(config)


def _work(
    root: Path, name: str, kill_at: int | None, event: int | None, delay: float, limit: int | None
) -> None:
    """Train in a process of its own, which is disturbed.

    Args:
      kill_at: step after whose batch the process is killed.
      event: number of the change of the directory of checkpoints after which it is killed.
      delay: seconds until it is killed then.
      limit: bytes beyond which no file may grow, from the second checkpoint on.
    """
    count = 0
    checkpoints = str(root / name / DIRECTORY)

    def kill() -> None:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def made(step: int) -> None:
        if step == kill_at:
            kill()
        if limit is not None and step == _EVERY + 2:  # it is made ahead of its step
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def on_event(what: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if what in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "open"):
            count += str(args[0]).startswith(checkpoints)
            if count == event:
                kill()

    def done() -> int:
        _train(root, name)
        return 0

    _Reversals.made = made
    if event is not None:
        sys.addaudithook(on_event)
    with (root / "said").open("w") as stream:
        os.dup2(stream.fileno(), 2)
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            try:
                status = exit_status(done)
            except Exception:
                status = 2
                traceback.print_exc()
    sys.exit(status)


@functools.cache
def _undisturbed(root: Path) -> dict[str, Any]:
    _train(root, "undisturbed")
    return _ended(root / "undisturbed")


def _ended(run: Path) -> dict[str, Any]:
    """Return what a run has written, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    for line in [*lines, result]:
        for name in _TIMES:
            line.pop(name, None)
    shapes = Model(from_dict(read_config(run))).shapes()
    steps = sorted(int(file.name) for file in (run / DIRECTORY).iterdir() if file.name.isdigit())
    params = [fingerprints({"params": restore_params(run, shapes, step)[1]}) for step in steps]
    return {"metrics": lines, "result": result, "steps": steps, "params": params}


def disturbed_training(workshop: Workshop, rng: random.Random, stage: str, how: str) -> Result:
    """Kill a training run once or twice, or let its disk be full, and run it again."""
    root = workshop.root.parent / "training"
    root.mkdir(exist_ok=True)
    expected = _undisturbed(root)
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    full = how == "full disk in training"
    said = ""
    try:
        for _ in range(1 if full or rng.random() < 0.7 else 2):
            step = rng.randrange(_STEPS) if how == "killed in training" else None
            event = rng.randint(1, 250) if how == "killed in training, while it saves" else None
            limit = rng.randint(1, 4000) if full else None
            process = workshop.process(_work, root, "run", step, event, rng.uniform(0, 0.03), limit)
            process.join()
            said += (root / "said").read_text()
        if "Traceback" in said or (full and process.exitcode not in (0, 1)):
            return how, stage, Outcome.TRACEBACK, said
        refused = process.exitcode == 1
        if refused and said.count("error: ") != 1:
            return how, stage, Outcome.TRACEBACK, said
        again = run_here(lambda: _train(root, "run") and None)
        said += again.words
        if again.status is None:
            return how, stage, Outcome.TRACEBACK, said
        if again.status:
            return how, stage, Outcome.UNREPAIRED, said
        found = _ended(run)
        differ = [name for name in expected if found[name] != expected[name]]
        if differ:
            return how, stage, Outcome.WRONG, f"{said}\n{differ}\n{found}"
        return how, stage, Outcome.REPAIRED if refused else Outcome.IDENTICAL, said
    except Exception:
        return how, stage, Outcome.TRACEBACK, f"{said}\n{traceback.format_exc()}"
    finally:
        shutil.rmtree(run, ignore_errors=True)


_WAYS = ("killed in training", "killed in training, while it saves", "full disk in training")

TRIALS = {disturbed_training: Kind(0.012, lambda _: [("train", way) for way in _WAYS])}
