"""Progress of long work: a bar on a terminal, lines in a log, a small file for a parent process.

    with progress.track("score", total=364_000_000, unit="documents") as task:
        task.advance(4096, tokens=1_800_000, share_of_peak=0.61)

Choices
- The rate is measured from the first advance, so that compilation does not distort the time left.
  Work found done at the start (`initial`) counts as done, but not towards the rate.
- A log gets a line every `LOG_EVERY` seconds and one at the end, without carriage returns. If the
  first part of the work takes over a second, a line says what has begun.
- With WINNOW_PROGRESS_FILE set, the state is written there as JSON, replaced atomically. A study
  uses this to show the progress bars of its child processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.terminal import escaped, say

LOG_EVERY = 10.0  # seconds between lines in a log
_ANNOUNCED_AFTER = 1.0  # seconds
_REDRAW_EVERY = 0.25


class Task:
    """Progress of one long operation. Made by `track`."""

    def __init__(self, name: str, total: int | None, unit: str, initial: int = 0):
        self.name = name
        self.total = total
        self.unit = unit
        self.done = initial
        self.fields: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None
        self._started = time.monotonic()
        self._shown = self._logged = 0.0
        self._file = os.environ.get("WINNOW_PROGRESS_FILE")
        self._bar = _bar(self) if sys.stderr.isatty() and not self._file else None
        self._timer = threading.Timer(_ANNOUNCED_AFTER, self._announce)
        self._timer.daemon = True
        self._timer.start()

    def advance(self, amount: int = 1, **fields: Any) -> None:
        """Add to the amount done; `fields` (tokens per second, loss, ...) are shown beside it."""
        now = time.monotonic()
        self.done += amount
        self.fields.update(fields)
        if self._first is None:
            self._first = (now, self.done)
        if now - self._shown >= _REDRAW_EVERY:
            self._shown = now
            self._show(now)

    @property
    def rate(self) -> float | None:
        """Units per second since the first advance; None before the second."""
        if self._first is None or self.done == self._first[1]:
            return None
        return (self.done - self._first[1]) / max(time.monotonic() - self._first[0], 1e-9)

    @property
    def seconds_left(self) -> float | None:
        if self.total is None or not self.rate:
            return None
        return max(self.total - self.done, 0) / self.rate

    def line(self) -> str:
        """Return the state in one plain line."""
        parts = [f"{self.name}: {self.done:,}"]
        if self.total is not None:
            share = 100 * self.done / self.total if self.total else 100
            parts[0] += f" of {self.total:,} {self.unit} ({share:.0f}%)"
        else:
            parts[0] += f" {self.unit}"
        if self.rate:
            parts.append(f"{_number(self.rate)} {self.unit}/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        return ", ".join(parts + self.details())

    def details(self) -> list[str]:
        return [f"{name.replace('_', ' ')} {_number(value)}" for name, value in self.fields.items()]

    def _show(self, now: float) -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self.done,
                total=self.total,
                details=escaped(
                    ", ".join(
                        ([f"{_number(self.rate)} {self.unit}/s"] if self.rate else [])
                        + self.details()
                    )
                ),
                left=f"{duration(self.seconds_left)} left" if self.seconds_left is not None else "",
            )
        elif self._file:
            self._write_file(self._file)
        if self._bar is None and now - self._logged >= LOG_EVERY:
            self._logged = now
            say(self.line(), error=True)

    def _announce(self) -> None:
        """Write a line if the first part of the work takes longer than a second."""
        if self._bar is None and not self._logged:
            self._logged = time.monotonic()
            say(self.line(), error=True)

    def _write_file(self, file: str) -> None:
        state = {
            "name": self.name,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "rate": self.rate,
            "seconds_left": self.seconds_left,
            "fields": {name: _plain(value) for name, value in self.fields.items()},
        }
        temporary = Path(f"{file}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):  # a lost progress report must not stop the work
            temporary.write_text(json.dumps(state))
            temporary.replace(file)

    def stop(self) -> None:
        """End the display where the work has failed."""
        self._timer.cancel()
        if self._bar is not None:
            self._bar.stop()

    def finish(self) -> None:
        self._timer.cancel()
        now = time.monotonic()
        self._logged = now  # the line below replaces a regular one
        self._show(now)
        if self._bar is not None:
            self._bar.stop()
        else:
            took = duration(now - self._started)
            say(f"{self.line()}; took {took}", error=True)


@contextlib.contextmanager
def track(name: str, total: int | None, unit: str, initial: int = 0) -> Iterator[Task]:
    """Show the progress of the block.

    Args:
      name: name of the work, in a word or two.
      total: total amount; None when unknown.
      unit: plural noun, "documents", "steps", "shards".
      initial: amount already done at the start.
    """
    task = Task(name, total, unit, initial)
    try:
        yield task
    except BaseException:
        task.stop()
        raise
    task.finish()


class Phase:
    """A part of the work without a count, such as loading a model, announced if it takes long.

        with progress.Phase("score: loading google/flan-t5-xl"):
            ...

    A line is printed when a second has passed, and another at the end; nothing for shorter phases.
    """

    def __init__(self, text: str):
        self._text = text
        self._announced = False
        self._started = time.monotonic()
        self._timer = threading.Timer(_ANNOUNCED_AFTER, self._announce)
        self._timer.daemon = True
        self._timer.start()

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._timer.cancel()
        if self._announced:
            say(f"{self._text}: took {duration(time.monotonic() - self._started)}", error=True)

    def _announce(self) -> None:
        self._announced = True
        say(f"{self._text} ...", error=True)


def duration(seconds: float) -> str:
    """Return a duration as text: 8 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _bar(task: Task) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bar = Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(escaped(task.unit), markup=False),
        TextColumn("{task.fields[left]}", style="cyan", markup=False),
        TextColumn("{task.fields[details]}", style="dim", markup=False),
        console=Console(stderr=True),
    )
    bar.add_task(escaped(task.name), total=task.total, completed=task.done, details="", left="")
    bar.start()
    return bar


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | bool) or value is None else float(value)


def _number(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
