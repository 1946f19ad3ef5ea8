"""Work found below a directory: artifacts, training runs and studies, finished or not.

    for item in find("runs/demo"):
        ...                              # Study, Run, Artifact or Problem

Choices
- Everything is read from the files that the work itself writes: heartbeats and records of shards
  (status.py), a run's metrics.jsonl, logs and notes of a study's stages. Nothing is written, and no
  process is asked.
- Files may be incomplete, damaged or of strangers. What cannot be read is a `Problem` or is left
  out; it never ends the search.
- A manifest is read again only after it has changed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from pruning.store import status
from pruning.store.artifact import is_finished
from pruning.store.manifest import MANIFEST, UNFINISHED, ArtifactError

STAGES = "stages"  # directory of a study's logs and notes
STAGE_LIST = "stages.json"  # file in it: workers, and name and expected seconds of every stage

_METRICS = "metrics.jsonl"
_DEEPEST = 5
_MOST = 2000  # directories
_NOT_SEARCHED = {UNFINISHED, STAGES, "checkpoints", "report"}
_LONGEST_METRICS = 1 << 26  # bytes
_RECENT = 20  # logged steps from which the rate of a run is taken


@dataclasses.dataclass(frozen=True)
class Problem:
    """A directory that cannot be read, and why."""

    path: str
    message: str


@dataclasses.dataclass(frozen=True)
class Artifact:
    """An artifact: `unfinished` is its state, or `lines` describe what was finished."""

    path: str
    unfinished: status.Status | None
    lines: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
      step, tokens: of the last logged step.
      steps: number of steps at the end; None when unknown.
      losses: pairs of step and training loss, of the logged steps.
      evaluations: evaluation set -> its last loss.
      tokens_per_second: of the last logged step; None when unknown.
      seconds_left: estimate from the recent steps; None when unknown.
      seconds_ago: time since the last line was written.
    """

    path: str
    step: int
    steps: int | None
    tokens: int
    losses: Sequence[tuple[int, float]]
    evaluations: Mapping[str, float]
    tokens_per_second: float | None
    seconds_left: float | None
    seconds_ago: float
    finished: bool


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a study.

    Attributes:
      state: "finished", "running", "failed" or "waiting".
      seconds: time that a finished stage took.
      seconds_ago: time since a running stage's last report.
      progress: the last report of a running stage: name, done, total, unit, rate, seconds_left,
        loss, as far as reported.
      message: why it failed.
    """

    name: str
    state: str
    seconds: float | None = None
    seconds_ago: float = 0.0
    progress: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    message: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its stages in their order, and the estimated time left; None when unknown."""

    path: str
    stages: Sequence[Stage]
    seconds_left: float | None

    def of(self, state: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.state == state]


Found = Study | Run | Artifact | Problem


def find(path: epath.PathLike, now: float | None = None) -> Iterator[Found]:
    """Yield the work in a directory and below, a directory before those in it.

    Args:
      now: reference time of ages, in seconds since 1970; None for the current time.
    """
    now = time.time() if now is None else now
    stack, seen = [(epath.Path(path), 0)], 0
    while stack:
        directory, depth = stack.pop()
        seen += 1
        if seen > _MOST:
            yield Problem(str(path), f"only the first {_MOST:,} directories were looked at")
            return
        try:
            names = {entry.name: entry for entry in directory.iterdir()}
            yield from _in(directory, set(names), now)
            if depth < _DEEPEST:
                inner = [
                    entry
                    for name, entry in names.items()
                    if name not in _NOT_SEARCHED and name[0] != "." and entry.is_dir()
                ]
                ordered = sorted(inner, key=lambda entry: entry.name, reverse=True)
                stack += ((entry, depth + 1) for entry in ordered)
        except (OSError, ArtifactError) as error:
            if depth == 0 or isinstance(error, ArtifactError):
                yield Problem(str(directory), str(error))


def _in(directory: epath.Path, names: set[str], now: float) -> Iterator[Found]:
    if STAGES in names and (found := _study(directory, now)) is not None:
        yield found
    if _METRICS in names and (run := _run(directory, now)) is not None:
        yield run
    if MANIFEST in names and is_finished(directory):
        manifest = directory / MANIFEST
        yield Artifact(str(directory), None, _finished_lines(directory, manifest.stat().mtime))
    elif UNFINISHED in names and (directory / UNFINISHED / "plan.json").exists():
        yield Artifact(str(directory), status.look(directory, now))


@functools.lru_cache(maxsize=4096)
def _finished_lines(directory: epath.Path, changed: float) -> tuple[str, ...]:
    return tuple(status.lines(directory))


def _json(file: epath.Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} where it is missing, damaged or of another kind."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


# --------------------------------------------------------------------------------------------------
# Training runs


def _run(directory: epath.Path, now: float) -> Run | None:
    file = directory / _METRICS
    stat = file.stat()
    if stat.length > _LONGEST_METRICS:
        return None
    train: list[dict[str, Any]] = []
    evaluations: dict[str, float] = {}
    for text in file.read_text().split("\n")[:-1]:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict) or _number(line.get("step")) is None:
            continue
        loss = _number(line.get("loss"))
        if line.get("kind") == "train" and loss is not None:
            train.append(line)
        elif line.get("kind") == "eval" and loss is not None:
            evaluations[str(line.get("name"))] = loss
    if not train:
        return None
    last = train[-1]
    begun = _json(directory / "config.json").get("train")
    steps = _number(begun.get("steps")) if isinstance(begun, dict) else None
    return Run(
        path=str(directory),
        step=int(last["step"]),
        steps=None if steps is None else int(steps),
        tokens=int(_number(last.get("tokens")) or 0),
        losses=[(int(line["step"]), float(line["loss"])) for line in train],
        evaluations=evaluations,
        tokens_per_second=_number(last.get("tokens_per_second")),
        seconds_left=_seconds_left(train[-_RECENT:], steps),
        seconds_ago=max(now - stat.mtime, 0.0),
        finished=(directory / "result.json").exists(),
    )


def _seconds_left(recent: Sequence[Mapping[str, Any]], steps: float | None) -> float | None:
    first, last = recent[0], recent[-1]
    since, until = _number(first.get("seconds")), _number(last.get("seconds"))
    if steps is None or since is None or until is None or last["step"] <= first["step"]:
        return None
    return max((steps - last["step"]) * (until - since) / (last["step"] - first["step"]), 0.0)


# --------------------------------------------------------------------------------------------------
# Studies


def _study(directory: epath.Path, now: float) -> Study | None:
    records = directory / STAGES
    listed = _json(records / STAGE_LIST)
    stages = listed.get("stages")
    costs = {
        item["name"]: _number(item.get("seconds")) or 0.0
        for item in (stages if isinstance(stages, list) else [])
        if isinstance(item, dict) and _is_name(item.get("name"))
    }
    if not costs:
        return None
    found = [_stage(records, name, now) for name in costs]
    left = _study_left(found, costs, _number(listed.get("workers")))
    return Study(str(directory), found, left)


def _is_name(name: Any) -> bool:
    """Return whether this names files below the directory of the records."""
    return isinstance(name, str) and name[:1] != "/" and ".." not in name.split("/")


def _stage(records: epath.Path, name: str, now: float) -> Stage:
    if "seconds" in (note := _json(records / f"{name}.json")):
        return Stage(name, "finished", _number(note["seconds"]))
    if message := _json(records / f"{name}.failed").get("message"):
        return Stage(name, "failed", message=str(message))
    file = records / f"{name}.progress"
    try:
        ago = max(now - file.stat().mtime, 0.0)
    except OSError:
        return Stage(name, "waiting")
    told = _json(file)
    fields = told.pop("fields", None)
    numbers = ("done", "total", "rate", "seconds_left")
    progress: dict[str, Any] = {key: _number(told.get(key)) for key in numbers}
    progress |= {key: str(told[key]) for key in ("name", "unit") if key in told}
    progress["loss"] = _number(fields.get("loss")) if isinstance(fields, dict) else None
    return Stage(name, "running", seconds_ago=ago, progress=progress)


def _study_left(
    stages: Sequence[Stage], costs: Mapping[str, float], workers: float | None
) -> float | None:
    """Return expected seconds of unfinished stages, corrected by the finished ones, per worker."""
    taken = [(stage.seconds, costs[stage.name]) for stage in stages if stage.seconds is not None]
    expected = sum(cost for _, cost in taken)
    if not expected:
        return None
    ratio = sum(seconds for seconds, _ in taken) / expected
    left = 0.0
    for stage in stages:
        told = stage.progress.get("seconds_left")
        if stage.state in ("running", "waiting"):
            left += costs[stage.name] * ratio if told is None else told
    return left / max(workers or 1, 1)
