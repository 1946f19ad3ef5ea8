"""Trials of checkpoints: damaged in every file, killed in the middle of a save, on a full disk.

A checkpoint's parameters are a function of its step, so that what is read can be judged.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import damage
import jax
import numpy as np
from trials import Kind, Outcome, Result, Workshop, files_of

from models.checkpoints import CheckpointError, Checkpoints, Retention
from models.errors import ModelError

_STEPS = (10, 20, 30)
_LONGEST = 1.0  # seconds until a saving process is killed


def state(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters and the optimizer state of a step."""
    rng = np.random.default_rng(step)
    params = {"kernel": rng.normal(size=(64, 48)), "scale": rng.normal(size=48)}
    arrays = {name: jax.numpy.asarray(value, np.float32) for name, value in params.items()}
    return arrays, {"count": jax.numpy.asarray(step), "mean": arrays["kernel"] * 2}


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def _continued(run: Path, steps: tuple[int, ...]) -> tuple[int | None, str]:
    """Continue a run as train.py does: restore, then save the steps that follow.

    Returns:
      The step that was restored; None without one, -1 if its arrays are wrong. And what was said.
    """
    params, opt_state = state(0)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            with Checkpoints(run, Retention(last=3)) as checkpoints:
                found = checkpoints.restore(_shapes(params), _shapes(opt_state))
                for step in steps:
                    if found is None or step > found[0]:
                        checkpoints.save(step, *state(step))
        except ModelError as error:
            return None, str(error)
    if found is None:
        return None, "no checkpoint"
    step, *trees = found
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), tuple(trees), state(step))
    return (step if all(jax.tree.leaves(same)) else -1), f"step {step}"


def _golden(workshop: Workshop) -> Path:
    run = workshop.root.parent / "checkpoints"
    if not run.exists():
        with Checkpoints(run, Retention(last=3)) as checkpoints:
            for step in _STEPS:
                checkpoints.save(step, *state(step))
    return run


def damaged_checkpoint(workshop: Workshop, rng: random.Random, kind: str) -> Result:
    """Damage a file of a run's checkpoints; continue from the newest whole one, and save again."""
    run = workshop.root.parent / "run-checkpoints"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(_golden(workshop), run)
    touched = damage.KINDS[kind](files_of(run), rng)
    what = ", ".join(str(file.relative_to(run)) for file in touched)
    fault = f"{kind} in checkpoints"
    try:
        step, words = _continued(run, (30, 40))
        hit = {
            int(part) for file in touched for part in file.relative_to(run).parts if part.isdigit()
        }
        least = max((step for step in _STEPS if step not in hit), default=None)
        words = f"{what}: {words}"
        if step == -1:
            return fault, "train", Outcome.WRONG, words
        if step is None or (least is not None and step < least):
            return fault, "train", Outcome.UNREPAIRED, words
        last, more = _continued(run, ())
        if last != 40:
            return fault, "train", Outcome.WRONG, f"{words}, then {more}"
        return fault, "train", Outcome.IDENTICAL if step == 30 else Outcome.REPAIRED, words
    except Exception:
        return fault, "train", Outcome.TRACEBACK, f"{what}: {traceback.format_exc()}"
    finally:
        shutil.rmtree(run, ignore_errors=True)


def _save(run: Path, log: Path, limit: int | None) -> None:
    """Save the last two steps, in a process of its own.

    Args:
      log: gets "begun" before the first save, then "saved STEP" for each save that is complete, or
        the error.
      limit: bytes beyond which no file may grow.
    """
    import sys

    with log.open("w") as stream:
        sys.stderr = sys.stdout = stream
        os.dup2(stream.fileno(), 2)
        states = {step: state(step) for step in _STEPS}
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            with Checkpoints(run, Retention(last=3)) as checkpoints:
                print("begun", flush=True)
                for step in _STEPS:
                    if limit is not None and step == 20:
                        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
                    checkpoints.save(step, *states[step])
                    checkpoints.wait()
                    print(f"saved {step}", flush=True)
        except CheckpointError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))  # the log has room
            print(f"error: {error}", flush=True)


def interrupted_save(workshop: Workshop, rng: random.Random, fills: bool) -> Result:
    """Kill a process while it saves, or let its disk be full; continue from what it has saved."""
    run, log = workshop.root.parent / "run-checkpoints", workshop.root.parent / "save-log"
    shutil.rmtree(run, ignore_errors=True)
    log.unlink(missing_ok=True)
    limit = rng.randint(1, 20_000) if fills else None
    fault = "killed while saving a checkpoint" if limit is None else "full disk while saving"
    process = workshop.process(_save, run, log, limit)
    if limit is None:
        latest = time.monotonic() + 120
        while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < latest:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, _LONGEST))
        process.kill()
    process.join()
    said = log.read_text()
    try:
        if "Traceback" in said or (limit is not None and process.exitcode):
            return fault, "train", Outcome.TRACEBACK, said
        saved = max((step for step in _STEPS if f"saved {step}" in said), default=None)
        step, words = _continued(run, (40,))
        words = f"{said}\n{words}"
        if step == -1 or (saved is not None and (step is None or step < saved)):
            return fault, "train", Outcome.WRONG, words
        last, more = _continued(run, ())
        good = Outcome.REPAIRED if "error: " in said else Outcome.IDENTICAL
        return fault, "train", good if last == 40 else Outcome.WRONG, f"{words}, then {more}"
    except Exception:
        return fault, "train", Outcome.TRACEBACK, f"{said}\n{traceback.format_exc()}"
    finally:
        shutil.rmtree(run, ignore_errors=True)


_DAMAGE = [(kind,) for kind in damage.KINDS if kind != "shards exchanged"]

TRIALS = {
    damaged_checkpoint: Kind(0.025, lambda _: _DAMAGE),
    interrupted_save: Kind(0.02, lambda _: [(False,), (True,)]),
}
