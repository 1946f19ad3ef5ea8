"""Runs stages as processes, several at a time, and stops with them.

Choices
- A process per stage: its memory comes back, a crash is contained, and the user can run any of the
  command lines alone.
- The longest chain of stages goes first, so that the last hour is not one long training alone.
- Under a launcher every process can be given stages of its own, by patterns of their names, over
  one shared directory. What needs stages of others that are not there yet is left undone.
- After a failure nothing new starts, and what runs may finish: another cell's hours are not lost.
- A process that was told to stop from outside (it exits with 75, as launchers know it) is started
  again and goes on.
- Ctrl-C reaches the scheduler alone, which asks its children to end. When it is itself killed
  outright, the kernel kills them (on Linux, which can be told so; elsewhere they finish their
  stage, and the next run finds it finished).
- Time left is that of the simulated rest of the schedule. Cost hints are corrected by what the
  finished stages of the same sort have taken; the first of its sort says itself how long it needs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.stages import (
    Note,
    Records,
    Stage,
    StudyError,
    checksum,
    key_of,
    ordered,
    seconds_left,
    urgency,
)
from models.runtime import RESTART
from pruning import progress

GRACE = 20.0  # seconds between the request to end and SIGKILL
_POLL = 0.1
_SHOW_EVERY = 0.5
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class StageFailed(RuntimeError):
    """A stage's process failed; the message shows the end of its log and the command."""


@dataclasses.dataclass
class Running:
    """A stage's process."""

    stage: Stage
    key: str  # of what it was started with: a gin file may be edited while it runs
    process: subprocess.Popen
    started: float
    progress_file: Path

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def progress(self) -> dict[str, Any]:
        """What the process last said of itself (pruning/progress.py); {} before it did."""
        try:
            return json.loads(self.progress_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}


class Scheduler:
    """Brings stages to their end.

    Args:
      stages: in any order.
      records: where logs and notes go.
      workers: how many slots there are.
      environment: added to the processes' environment.
      only: patterns of names, as in a shell; other stages are left to others. None: all.

    Raises:
      StudyError: the stages do not fit together, or a pattern fits none.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        records: Records,
        workers: int = 1,
        environment: Mapping[str, str] | None = None,
        only: Sequence[str] | None = None,
    ):
        self.stages = ordered(stages)
        self.ours = {stage.name for stage in self.stages}
        if only is not None:
            self.ours = {name for part in only for name in fnmatch.filter(self.ours, part)}
            for part in only:
                if not fnmatch.filter(self.ours, part):
                    raise StudyError(f"no stage is called like {part!r}.")
        self.records = records
        self.workers = workers
        self.environment = dict(environment or {})
        self.running: list[Running] = []
        self.failures: list[str] = []
        self.ran: list[str] = []
        self._by_name = {stage.name: stage for stage in self.stages}
        self._notes: dict[str, Note] = {}  # of the finished stages
        self._find_finished()

    def run(
        self,
        show: Callable[[Scheduler], None] = lambda scheduler: None,
        say: Callable[[str], None] = print,
    ) -> list[str]:
        """Runs what is not finished, and returns the names of the stages that had to be run.

        Args:
          show: called twice a second, to draw the state.
          say: called with a line when something happened.

        Raises:
          StageFailed: a process failed, or left no result.
          KeyboardInterrupt: SIGINT or SIGTERM came; the children have been ended.
        """
        self.records.directory.mkdir(parents=True, exist_ok=True)
        shown = 0.0
        with _interruptions() as came:
            try:
                self._start_what_can_be()
                while self.running:
                    if came:
                        raise KeyboardInterrupt
                    if time.monotonic() - shown >= _SHOW_EVERY:
                        show(self)
                        shown = time.monotonic()
                    time.sleep(_POLL)
                    if self._collect(say):
                        self._find_finished()
                        self._start_what_can_be()
            finally:
                self._end_children()
        show(self)
        if self.failures:
            raise StageFailed("\n".join(self.failures))
        return self.ran

    def is_finished(self, stage: Stage) -> bool:
        return stage.name in self._notes

    @property
    def unfinished(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.name not in self._notes]

    @property
    def left(self) -> list[Stage]:
        """What is unfinished and ours to run."""
        return [stage for stage in self.unfinished if stage.name in self.ours]

    def expected_seconds(self, stage: Stage) -> float:
        """What a stage took, or will take: its hint, corrected by what finished stages took."""
        if note := self._notes.get(stage.name):
            return note.seconds
        known = [other for other in self.stages if other.name in self._notes]
        alike = [other for other in known if other.sort == stage.sort] or known
        hinted = sum(other.cost for other in alike)
        taken = sum(self._notes[other.name].seconds for other in alike)
        return stage.cost * (taken / hinted if hinted else 1.0)

    def remaining_seconds(self, item: Running) -> float:
        """What a running stage still needs: as its like took, else as it says itself."""
        expected = self.expected_seconds(item.stage) - item.seconds
        told = item.progress().get("seconds_left")
        has_like = any(self._by_name[name].sort == item.stage.sort for name in self._notes)
        if told is None or (has_like and expected > 0):
            return max(expected, 1.0)
        return told

    def seconds_left(self) -> float:
        """Until everything is finished."""
        left = {item.stage.name: self.remaining_seconds(item) for item in self.running}
        return seconds_left(self.left, self.expected_seconds, left, self.workers)

    def share_done(self) -> float:
        """The part of the work that is done, in [0, 1], by expected seconds."""
        total = sum(
            self.expected_seconds(stage) for stage in self.stages if stage.name in self.ours
        )
        undone = sum(map(self.expected_seconds, self.left))
        for item in self.running:
            undone -= max(self.expected_seconds(item.stage) - self.remaining_seconds(item), 0.0)
        return 1.0 - undone / total if total else 1.0

    def _needs(self, stage: Stage) -> list[Stage]:
        return [self._by_name[name] for name in stage.needs]

    def _find_finished(self) -> None:
        """Takes in what is finished; the stages are in order, so that one pass finds it all."""
        active = {item.stage.name for item in self.running}
        for stage in self.unfinished:
            met = self._notes.keys() >= set(stage.needs)
            if met and stage.name not in active:
                note = self.records.current(stage, self._needs(stage))
                if note is not None:
                    self._notes[stage.name] = note

    def _start_what_can_be(self) -> None:
        if self.failures:
            return
        active = {item.stage.name for item in self.running}
        free = self.workers - sum(self._slots(item.stage) for item in self.running)
        first = urgency(self.unfinished, self.expected_seconds)
        for stage in sorted(self.left, key=lambda stage: -first[stage.name]):
            ready = stage.name not in active and self._notes.keys() >= set(stage.needs)
            if ready and self._slots(stage) <= free:
                free -= self._slots(stage)
                self.running.append(self._start(stage))
                self.ran.append(stage.name)

    def _slots(self, stage: Stage) -> int:
        return min(stage.slots, self.workers)

    def _start(self, stage: Stage) -> Running:
        progress_file = self.records.progress(stage).absolute()
        log = self.records.log(stage)
        log.parent.mkdir(parents=True, exist_ok=True)
        progress_file.unlink(missing_ok=True)
        python = stage.argv[0] == "python"
        argv = [sys.executable, *stage.argv[1:]] if python else list(stage.argv)
        environment = self.environment | {"WINNOW_PROGRESS_FILE": str(progress_file)}
        parent = os.getpid()
        with log.open("ab") as sink:
            sink.write(f"$ {stage.command}\n".encode())
            sink.flush()
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,  # out of Ctrl-C's reach, and to be ended as a group
                preexec_fn=lambda: _die_with(parent),
            )
        key = key_of(stage, self._needs(stage))
        return Running(stage, key, process, time.monotonic(), progress_file)

    def _collect(self, say: Callable[[str], None]) -> bool:
        """Takes in the processes that have ended; says whether there were any."""
        ended = [(item, usage) for item in self.running if (usage := _reap(item.process))]
        for item, usage in ended:
            self.running.remove(item)
            item.progress_file.unlink(missing_ok=True)
            stage, seconds = item.stage, item.seconds
            if item.process.returncode == RESTART:
                say(f"{stage.name} was stopped from outside; it goes on where it stood")
                continue
            if item.process.returncode != 0 or not Path(stage.result).exists():
                self.failures.append(_failure(item, self.records.log(stage)))
                say(self.failures[-1])
                continue
            note = Note(
                command=stage.command,
                key=item.key,
                result=checksum(stage.result),
                seconds=round(seconds, 3),
                cpu_seconds=round(usage.ru_utime + usage.ru_stime, 3),
                peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            )
            self.records.write(stage, note)
            say(f"{stage.name} finished in {progress.duration(seconds)}")
        return bool(ended)

    def _end_children(self) -> None:
        """Asks the processes and their own children to end, and kills those that do not."""
        for item in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(item.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for item in self.running:
            try:
                item.process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                os.killpg(item.process.pid, signal.SIGKILL)
                item.process.wait()
            item.progress_file.unlink(missing_ok=True)
        self.running.clear()


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies. Runs between fork and exec."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)


def _reap(process: subprocess.Popen) -> Any:
    """The resource usage of a process that has ended; None while it runs."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM in a list instead of raising wherever the program happens to be.

    An exception out of a signal handler is lost when it falls into a destructor or between fork and
    exec; the loop looks at the list ten times a second.
    """
    came: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [
        signal.signal(number, lambda number, frame: came.append(number)) for number in signals
    ]
    try:
        yield came
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


def _failure(item: Running, log: Path, lines: int = 15) -> str:
    code = item.process.returncode
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        how += ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    elif code > 0:
        how = f"failed with exit status {code}"
    else:
        how = f"ended well but left no {item.stage.result}"
    tail = log.read_text(errors="replace").splitlines()[-lines:]
    return (
        f"{item.stage.name} {how}. Its log ends:\n"
        + "".join(f"    {line}\n" for line in tail)
        + f"  log:     {log}\n  command: {item.stage.command}"
    )
