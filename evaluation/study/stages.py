"""Stages: commands with a result, their dependencies, and whether they are finished.

Choices
- Artifacts are the state. A finished stage has a note of its inputs beside its log: the command,
  its gin files, the results of its dependencies. While the note holds and the result
  exists, the stage is not started. Without notes, the stage's own command finds its artifact
  finished within seconds; a changed configuration is refused with the difference.
- A stage is judged by one small file that its command writes last (a manifest, a result), so
  checking a study of hundreds of stages takes a moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pruning.cli.recipes import located
from pruning.store.atomic import write_text
from pruning.store.manifest import digest_of
from pruning.store.watch import STAGE_LIST

_INCLUDE = re.compile(r"^\s*include\s+['\"](.+?)['\"]", re.MULTILINE)


class StudyError(ValueError):
    """The stages do not fit together."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command and its result.

    Attributes:
      name: unique, of the form "sort/which"; stages of one sort are taken to cost alike.
      argv: the command line; a leading "python" stands for the running interpreter.
      result: the file that exists if and only if the work is done.
      needs: names of the stages that must finish first.
      cost: expected seconds.
      slots: number of workers it occupies.
    """

    name: str
    argv: tuple[str, ...]
    result: str
    needs: tuple[str, ...] = ()
    cost: float = 1.0
    slots: int = 1

    @property
    def sort(self) -> str:
        return self.name.partition("/")[0]

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        return shlex.join(self.argv)


# --------------------------------------------------------------------------------------------------
# Finished stages


@dataclasses.dataclass(frozen=True)
class Note:
    """Record of a finished stage, for people and for the next run."""

    command: str
    key: str  # see key_of
    result: str  # SHA-256 of the result file
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class StageDirectory:
    """Logs and notes of the stages, in one directory."""

    directory: Path

    def log(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.log"

    def progress(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.progress"

    def failure(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.failed"

    def write_list(self, stages: Sequence[Stage], workers: int) -> None:
        """Write the names and expected seconds of all stages, for `status --serve`."""
        listed = [{"name": stage.name, "seconds": stage.cost} for stage in stages]
        content = json.dumps({"workers": workers, "stages": listed}, indent=1)
        self.directory.mkdir(parents=True, exist_ok=True)
        write_text(self.directory / STAGE_LIST, content)

    def _note(self, stage: Stage) -> Path:
        return self.directory / f"{stage.name}.json"

    def read(self, stage: Stage) -> Note | None:
        try:
            return Note(**json.loads(self._note(stage).read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None  # no note only means that the stage's own command decides

    def write(self, stage: Stage, note: Note) -> None:
        write_text(self._note(stage), json.dumps(dataclasses.asdict(note), indent=1))

    def current(self, stage: Stage, needs: Sequence[Stage]) -> Note | None:
        """Return the stage's note if command, inputs and result are unchanged."""
        note = self.read(stage)
        if note is None or not Path(stage.result).exists():
            return None
        same = note.result == checksum(stage.result) and note.key == key_of(stage, needs)
        return note if same else None


def key_of(stage: Stage, needs: Sequence[Stage]) -> str:
    """Return a digest of a stage's inputs: command, gin files, results of its dependencies."""
    prefix = "--gin_file="
    files = [word.removeprefix(prefix) for word in stage.argv if word.startswith(prefix)]
    return digest_of(
        {
            "argv": stage.argv,
            "files": {file: checksum(located(file)) for file in _with_included(files)},
            "needs": {need.name: checksum(need.result) for need in needs},
        }
    )


def _with_included(files: Sequence[str]) -> list[str]:
    """Return gin files and the files they include, as far as these are found."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file not in found and (path := located(file)).exists():
            found.add(file)
            waiting += _INCLUDE.findall(path.read_text())
    return sorted(found)


def checksum(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------
# Order


def ordered(stages: Sequence[Stage]) -> list[Stage]:
    """Return the stages in topological order.

    Raises:
      StudyError: two have one name, a needed one is missing, or they need each other in a circle.
    """
    by_name: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in by_name:
            raise StudyError(f"two stages are called {stage.name!r}.")
        by_name[stage.name] = stage
    order: dict[str, Stage] = {}
    path: list[str] = []

    def visit(name: str, wanted_by: str) -> None:
        if name not in by_name:
            raise StudyError(f"{wanted_by!r} needs {name!r}, which is no stage.")
        if name in path:
            raise StudyError(f"stages need each other: {' -> '.join([*path, name])}.")
        if name not in order:
            path.append(name)
            for need in by_name[name].needs:
                visit(need, name)
            path.pop()
            order[name] = by_name[name]

    for name in by_name:
        visit(name, name)
    return list(order.values())


def with_needs(stages: Sequence[Stage], names: Collection[str]) -> set[str]:
    """Return names of stages and of all stages that these need.

    Args:
      stages: in topological order.
    """
    found = set(names)
    for stage in reversed(stages):
        if stage.name in found:
            found.update(stage.needs)
    return found


def urgency(stages: Sequence[Stage], seconds: Callable[[Stage], float]) -> dict[str, float]:
    """Return the seconds from each stage's start to the end of its longest chain.

    Args:
      stages: in order; needs outside of them count as met.
      seconds: what a stage takes.
    """
    behind: dict[str, float] = {}
    total: dict[str, float] = {}
    for stage in reversed(stages):
        total[stage.name] = seconds(stage) + behind.get(stage.name, 0.0)
        for need in stage.needs:
            behind[need] = max(behind.get(need, 0.0), total[stage.name])
    return total


def seconds_left(
    stages: Sequence[Stage],
    seconds: Callable[[Stage], float],
    running: Mapping[str, float],
    workers: int,
) -> float:
    """Simulate the rest of the schedule and return its duration.

    Args:
      stages: those not finished, in order, the running ones included.
      seconds: what a stage takes.
      running: name of a running stage -> seconds that it still needs.
      workers: how many slots there are.
    """
    slots = {stage.name: min(stage.slots, workers) for stage in stages}
    first = urgency(stages, seconds)
    waiting = sorted(
        (stage for stage in stages if stage.name not in running),
        key=lambda stage: -first[stage.name],
    )
    ends = [(left, name) for name, left in running.items()]
    heapq.heapify(ends)
    unfinished = {stage.name for stage in stages}
    free = workers - sum(slots[name] for name in running)
    now = 0.0
    while True:
        for stage in list(waiting):
            if unfinished.isdisjoint(stage.needs) and slots[stage.name] <= free:
                waiting.remove(stage)
                free -= slots[stage.name]
                heapq.heappush(ends, (now + seconds(stage), stage.name))
        if not ends:
            return now
        now, name = heapq.heappop(ends)
        free += slots[name]
        unfinished.remove(name)
