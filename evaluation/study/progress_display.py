"""Progress display of a scheduler: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from evaluation.study.scheduler import Running, Scheduler
from models import terminal
from models.terminal import escaped
from pruning.store import progress

_LINE_EVERY = 30.0  # seconds between lines in a log

Show = Callable[[Scheduler], None]
Say = Callable[[str], None]


@contextlib.contextmanager
def display(name: str) -> Iterator[tuple[Show, Say]]:
    """Return the callbacks of `Scheduler.run`: one draws the state, one prints a line."""
    if sys.stderr.isatty():
        from rich.console import Console

        bars = _Bars(name, Console(stderr=True))
        with bars.live:
            yield bars.show, bars.say
    else:
        lines = _Lines(name)
        yield lines.show, lines.say


def summary(scheduler: Scheduler) -> str:
    """Return the numbers of finished stages and the time left."""
    all_stages = len(scheduler.ours)
    done = all_stages - len(scheduler.left)
    if done == all_stages:
        return f"all {all_stages} stages finished"
    left = progress.duration(scheduler.seconds_left())
    return f"{done} of {all_stages} stages finished, about {left} left"


class _Lines:
    def __init__(self, name: str):
        self.name = name
        self._seen: set[str] = set()
        self._last = float("-inf")

    def say(self, text: str) -> None:
        terminal.say(f"{self.name}: {text}", error=True)

    def show(self, scheduler: Scheduler) -> None:
        for item in scheduler.running:
            if item.stage.name not in self._seen:
                self._seen.add(item.stage.name)
                self.say(f"{item.stage.name} started: {item.stage.command}")
        if time.monotonic() - self._last >= _LINE_EVERY or not scheduler.left:
            self._last = time.monotonic()
            doing = "".join(f"; {item.stage.name}{_how_far(item)}" for item in scheduler.running)
            self.say(summary(scheduler) + doing)


class _Bars:
    def __init__(self, name: str, console: Any):
        from rich.progress import BarColumn, Progress, TextColumn

        self.live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[words]}", style="dim", markup=False),
            console=console,
            refresh_per_second=4,
        )
        self._all = self.live.add_task(escaped(name), total=1.0, words="")
        self._bars: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self.live.console.print(terminal.escaped_lines(text), markup=False, highlight=False)

    def show(self, scheduler: Scheduler) -> None:
        self.live.update(self._all, completed=scheduler.share_done(), words=summary(scheduler))
        running = {item.stage.name: item for item in scheduler.running}
        for name in self._bars.keys() - running.keys():
            self.live.remove_task(self._bars.pop(name))
        for name, item in running.items():
            if name not in self._bars:
                self._bars[name] = self.live.add_task(escaped(name), total=None, words="")
            told = item.progress()
            self.live.update(
                self._bars[name],
                total=told.get("total"),
                completed=told.get("done", 0),
                words=escaped(_words(item, told)),
            )


def _how_far(item: Running) -> str:
    told = item.progress()
    return f" {100 * told['done'] / told['total']:.0f}%" if told.get("total") else ""


def _words(item: Running, told: dict[str, Any]) -> str:
    if not told:
        return f"starting, {progress.duration(item.seconds)}"
    of = f" of {told['total']:,}" if told.get("total") is not None else ""
    parts = [f"{told['name']}: {told['done']:,}{of} {told['unit']}"]
    if told.get("seconds_left") is not None:
        parts.append(f"{progress.duration(told['seconds_left'])} left")
    if "loss" in told.get("fields", {}):
        parts.append(f"loss {told['fields']['loss']:.3f}")
    return ", ".join(parts)
