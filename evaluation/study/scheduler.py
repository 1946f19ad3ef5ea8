"""Scheduler of stages as concurrent processes.

Choices
- One process per stage: its memory is freed, a crash is contained, and any command line can be run
  alone.
- Stages on the longest chain go first, so the study does not end with one long training alone.
- Under a launcher every process can be given its own stages, by patterns of their names, over one
  shared directory. Stages that depend on unfinished stages of other processes are left undone.
- After a failure nothing new starts and running stages may finish, so no other work is lost.
- A process that was preempted (it exits with 75, the convention of launchers) is started again.
- Ctrl-C reaches the scheduler alone, which asks its children to end. When the scheduler is killed,
  the kernel kills them (Linux only; elsewhere they finish, and the next run finds them finished).
- The time left is that of a simulation of the remaining schedule. Cost hints are corrected by
  finished stages of the same sort; the first stage of a sort reports its own estimate.
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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.study.stages import (
    Note,
    Stage,
    StageDirectory,
    StudyError,
    checksum,
    key_of,
    ordered,
    seconds_left,
    urgency,
    with_needs,
)
from models import terminal
from models.runtime import RESTART
from pruning.cli.recipes import INSTALLED
from pruning.store import progress

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
        """Return the process's last progress report (pruning/store/progress.py); {} before it."""
        try:
            return json.loads(self.progress_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}


class Scheduler:
    """Runner of stages.

    Args:
      stages: in any order.
      records: directory of logs and notes.
      workers: number of slots.
      environment: added to the processes' environment.
      only: shell patterns of names; other stages are left to other processes. None: all.
      until: shell patterns of names; these stages are run, with all that they need. None: all.

    Raises:
      StudyError: the stages do not fit together, or a pattern matches none.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        records: StageDirectory,
        workers: int = 1,
        environment: Mapping[str, str] | None = None,
        only: Sequence[str] | None = None,
        until: Sequence[str] | None = None,
    ):
        self.stages = ordered(stages)
        self.ours = {stage.name for stage in self.stages}
        if until is not None:
            self.ours = with_needs(self.stages, _matching(self.ours, until))
        if only is not None:
            self.ours = _matching(self.ours, only)
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
        say: Callable[[str], None] = terminal.say,
    ) -> list[str]:
        """Run the unfinished stages and return their names.

        Args:
          show: called twice a second, to draw the state.
          say: called with a line when something happened.

        Raises:
          StageFailed: a process failed, or left no result.
          KeyboardInterrupt: SIGINT or SIGTERM came; the children have been ended.
        """
        self.records.directory.mkdir(parents=True, exist_ok=True)
        for name in self._notes:  # left behind by a scheduler that was killed
            self.records.progress(self._by_name[name]).unlink(missing_ok=True)
            self.records.failure(self._by_name[name]).unlink(missing_ok=True)
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
        """Unfinished stages that this process runs."""
        return [stage for stage in self.unfinished if stage.name in self.ours]

    def expected_seconds(self, stage: Stage) -> float:
        """Return a stage's measured or expected duration, its hint corrected by finished stages."""
        if note := self._notes.get(stage.name):
            return note.seconds
        known = [other for other in self.stages if other.name in self._notes]
        alike = [other for other in known if other.sort == stage.sort] or known
        hinted = sum(other.cost for other in alike)
        taken = sum(self._notes[other.name].seconds for other in alike)
        return stage.cost * (taken / hinted if hinted else 1.0)

    def remaining_seconds(self, item: Running) -> float:
        """Return a running stage's time left, from stages of its sort or its own estimate."""
        expected = self.expected_seconds(item.stage) - item.seconds
        told = item.progress().get("seconds_left")
        has_like = any(self._by_name[name].sort == item.stage.sort for name in self._notes)
        if told is None or (has_like and expected > 0):
            return max(expected, 1.0)
        return told

    def seconds_left(self) -> float:
        """Return the time until all stages are finished."""
        left = {item.stage.name: self.remaining_seconds(item) for item in self.running}
        return seconds_left(self.left, self.expected_seconds, left, self.workers)

    def share_done(self) -> float:
        """Return the share of the work done, in [0, 1], by expected seconds."""
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
        """Record finished stages; they are ordered, so one pass finds all."""
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
        self.records.failure(stage).unlink(missing_ok=True)
        progress_file.write_text("{}")
        argv = _executed(stage.argv)
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
        """Record processes that have ended; return whether there were any."""
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
                message = json.dumps({"message": self.failures[-1]})
                self.records.failure(stage).write_text(message)
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
        """Terminate the processes and their children, and kill those that do not end."""
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


def _matching(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that match a pattern.

    Raises:
      StudyError: a pattern matches none.
    """
    found = {part: fnmatch.filter(names, part) for part in patterns}
    for part, matching in found.items():
        if not matching:
            raise StudyError(f"no stage matches {part!r}.")
    return {name for matching in found.values() for name in matching}


def _executed(argv: Sequence[str]) -> list[str]:
    """Return a stage's command line as it is executed: by this interpreter, with our train.py.

    Modules are searched for in the current directory if and only if this process does so too:
    `winnow study` does not, so that a user's `models/` hides nothing from the stages either.
    """
    program, *arguments = argv
    if program != "python":
        return list(argv)
    here = {"", os.getcwd()}  # noqa: PTH109  as sys.path has it
    safe = [] if here & set(sys.path) else ["-P"]
    if arguments[0] == "train.py":
        arguments[0] = os.fspath(INSTALLED / "train.py")
    return [sys.executable, *safe, *arguments]


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent dies. Runs between fork and exec."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)


def _reap(process: subprocess.Popen) -> Any:
    """Return the resource usage of a process that has ended; None while it runs."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


@contextlib.contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of raising at an arbitrary point.

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
