"""Work found below a directory: artifacts, training runs and studies, finished or not.

    for item in find("runs/demo"):
        ...                              # Study, Run, Artifact or Problem

Choices
- Everything is read from the files that the work itself writes: heartbeats and records of shards
  (status.py), a run's metrics.jsonl, logs and notes of a study's stages. Nothing is written.
  Processes are not contacted.
- Files may be incomplete, damaged or hostile. What cannot be read is a `Problem` or is left out; it
  never ends the search. Only regular files are read: reading a pipe could block.
- Manifests and metrics are read again only after they have changed.
- Finished artifacts are not searched for further work.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from pruning.store import status
from pruning.store.manifest import MANIFEST, UNFINISHED, ArtifactError

STAGES = "stages"  # directory of a study's logs and notes
STAGE_LIST = "stages.json"  # file in it: workers, and name and expected seconds of every stage

_METRICS = "metrics.jsonl"
_DEEPEST = 5
_MOST = 2000  # directories
_NOT_SEARCHED = {UNFINISHED, STAGES, "checkpoints", "report"}
_LONGEST_METRICS = 1 << 26  # bytes
_RECENT = 20  # logged steps from which the rate of a run is taken
_LARGEST = 1e18  # of a number in a file; sums and products of larger ones overflow
_SILENT = 1800.0  # seconds without a report or a line of the log after which a stage counts as lost
_DAMAGED = (OSError, ValueError, ArithmeticError, KeyError, TypeError, AttributeError)


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
      state: "finished", "running", "failed", "lost" or "waiting". A lost stage was running and has
        reported nothing for half an hour: its process was probably killed.
      seconds: time that a finished stage took.
      seconds_ago: time since a running or lost stage's last report.
      progress: the last report of a running or lost stage: name, done, total, unit, rate,
        seconds_left, loss, as far as reported.
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
    stack, seen = [(Path(path), 0)], 0
    while stack:
        directory, depth = stack.pop()
        seen += 1
        if seen > _MOST:
            yield Problem(str(path), f"only the first {_MOST:,} directories were looked at")
            return
        try:
            names = {entry.name for entry in directory.iterdir()}
        except OSError as error:
            if depth == 0:
                yield Problem(str(directory), str(error))
            continue
        found = list(_in(directory, names, now))
        yield from found
        is_finished = any(isinstance(item, Artifact) and not item.unfinished for item in found)
        if depth < _DEEPEST and not is_finished:
            inner = sorted(name for name in names - _NOT_SEARCHED if name[0] != ".")
            below = [directory / name for name in reversed(inner)]
            stack += ((entry, depth + 1) for entry in below if _is_directory(entry))


def _in(directory: Path, names: set[str], now: float) -> Iterator[Found]:
    """Yield what is in a directory itself, `names`; a problem in place of what cannot be read."""
    readers: dict[str, Callable[[Path, float], Found | None]] = {
        STAGES: _study,
        _METRICS: _run,
        MANIFEST: _finished,
    }
    if MANIFEST not in names:
        readers[UNFINISHED] = _unfinished
    for name, read in readers.items():
        if name in names:
            try:
                found = read(directory, now)
            except ArtifactError as error:
                found = Problem(str(directory), str(error))
            except _DAMAGED as error:
                message = f"{name} cannot be read ({type(error).__name__}: {error})"
                found = Problem(str(directory), message)
            if found is not None:
                yield found


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _finished(directory: Path, now: float) -> Artifact | None:
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return None
    return Artifact(str(directory), None, _finished_lines(directory, manifest.stat().st_mtime_ns))


def _unfinished(directory: Path, now: float) -> Artifact | None:
    if not (directory / UNFINISHED / "plan.json").is_file():
        return None
    return Artifact(str(directory), status.look(directory, now))


@functools.lru_cache(maxsize=4096)
def _finished_lines(directory: Path, changed: int) -> tuple[str, ...]:
    return tuple(status.lines(directory))


def _json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} where it is missing, damaged or of another kind."""
    try:
        value = json.loads(file.read_text()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """Return a number; None for any other value, NaN, and numbers beyond `_LARGEST`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) <= _LARGEST else None


# --------------------------------------------------------------------------------------------------
# Training runs


@dataclasses.dataclass(frozen=True)
class _Logged:
    """Content of metrics.jsonl: lines of recent steps, and `losses` and `evaluations` of `Run`."""

    recent: Sequence[Mapping[str, Any]]
    losses: Sequence[tuple[int, float]]
    evaluations: Mapping[str, float]


_parsed: dict[Path, tuple[tuple[int, int], _Logged]] = {}  # and time and size of the file


def _run(directory: Path, now: float) -> Run | None:
    file = directory / _METRICS
    if not file.is_file():
        return None
    stat = file.stat()
    if stat.st_size > _LONGEST_METRICS:
        return None
    version = stat.st_mtime_ns, stat.st_size
    if file not in _parsed or _parsed[file][0] != version:
        if len(_parsed) >= _MOST:
            _parsed.clear()
        _parsed[file] = version, _logged(file)
    logged = _parsed[file][1]
    if not logged.recent:
        return None
    last = logged.recent[-1]
    train = _json(directory / "config.json").get("train")
    steps = _number(train.get("steps")) if isinstance(train, dict) else None
    return Run(
        path=str(directory),
        step=int(last["step"]),
        steps=None if steps is None else int(steps),
        tokens=int(_number(last.get("tokens")) or 0),
        losses=logged.losses,
        evaluations=logged.evaluations,
        tokens_per_second=_number(last.get("tokens_per_second")),
        seconds_left=_seconds_left(logged.recent, steps),
        seconds_ago=max(now - stat.st_mtime, 0.0),
        finished=(directory / "result.json").exists(),
    )


def _logged(file: Path) -> _Logged:
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
    losses = [(int(line["step"]), float(line["loss"])) for line in train]
    return _Logged(train[-_RECENT:], losses, evaluations)


def _seconds_left(recent: Sequence[Mapping[str, Any]], steps: float | None) -> float | None:
    first, last = recent[0], recent[-1]
    since, until = _number(first.get("seconds")), _number(last.get("seconds"))
    if steps is None or since is None or until is None or last["step"] <= first["step"]:
        return None
    return max((steps - last["step"]) * (until - since) / (last["step"] - first["step"]), 0.0)


# --------------------------------------------------------------------------------------------------
# Studies


def _study(directory: Path, now: float) -> Study | None:
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
    if not isinstance(name, str) or name[:1] == "/" or ".." in name.split("/"):
        return False
    return "\0" not in name and not any("\ud800" <= letter <= "\udfff" for letter in name)


def _stage(records: Path, name: str, now: float) -> Stage:
    """Return the state of a stage.

    The scheduler removes a note of a failure when the stage starts, and a report of progress when
    it ends. The note of an earlier success remains, so it counts only where neither is present.
    """
    file, log = records / f"{name}.progress", records / f"{name}.log"
    if (reported := _changed(file)) is not None:
        return _started(name, file, max(reported, _changed(log) or 0.0), now)
    if message := _json(records / f"{name}.failed").get("message"):
        return Stage(name, "failed", message=str(message))
    if "seconds" in (note := _json(records / f"{name}.json")):
        return Stage(name, "finished", _number(note["seconds"]))
    return Stage(name, "waiting")


def _changed(file: Path) -> float | None:
    """Return when a regular file was changed; None where there is none."""
    try:
        return file.stat().st_mtime if file.is_file() else None
    except OSError:
        return None


def _started(name: str, file: Path, changed: float, now: float) -> Stage:
    ago = max(now - changed, 0.0)
    is_lost = ago > _SILENT
    report = _json(file)
    fields = report.get("fields")
    numbers = ("done", "total", "rate", "seconds_left")
    progress: dict[str, Any] = {key: _number(report.get(key)) for key in numbers}
    progress |= {key: str(report[key]) for key in ("name", "unit") if key in report}
    progress["loss"] = _number(fields.get("loss")) if isinstance(fields, dict) else None
    if is_lost:
        progress |= {"rate": None, "seconds_left": None}
    return Stage(name, "lost" if is_lost else "running", seconds_ago=ago, progress=progress)


def _study_left(
    stages: Sequence[Stage], costs: Mapping[str, float], workers: float | None
) -> float | None:
    """Return expected seconds of unfinished stages, corrected by the finished ones, per worker.

    None where no stage has finished, or where stages are lost and none is running.
    """
    taken = [(stage.seconds, costs[stage.name]) for stage in stages if stage.seconds is not None]
    expected = sum(cost for _, cost in taken)
    states = {stage.state for stage in stages}
    if not expected or ("lost" in states and "running" not in states):
        return None
    ratio = sum(seconds for seconds, _ in taken) / expected
    left = 0.0
    for stage in stages:
        reported = stage.progress.get("seconds_left")
        if stage.state in ("running", "lost", "waiting"):
            left += costs[stage.name] * ratio if reported is None else reported
    return _number(left / max(workers or 1, 1))
