"""Heartbeats: files in the unfinished directory in which worker processes report their progress.

    unfinished/worker-00003-of-00016.json    a worker is processing shard 3, or failed on it

Choices
- There is one small file per shard in progress, replaced every few seconds and removed when the
  shard is done. A worker that restarts on the same shard overwrites it, so the file always holds
  the latest state of that shard.
- A thread writes it: a worker that compiles for minutes, or that waits for its disk, still counts
  as running. Progress is reported by the content of the file, not by its age.
- A shard that is done within a second never gets a file, so cheap shards cost nothing.
- An error stays in the file, and so does the state of a worker that was stopped (Ctrl-C, SIGTERM).
  The file of a killed process is no longer updated, and its age shows it.
- A failure to write a heartbeat is ignored, because it must not stop the work.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

EVERY = 5.0  # seconds between two heartbeats
EVERY_REMOTE = 30.0  # on object storage, where each heartbeat is a paid request
SILENT = 4  # missing heartbeats after which a worker counts as lost
_FIRST = 1.0  # seconds before the first
_LONGEST_ERROR = 2000  # characters


def file_of(unfinished: epath.Path, shard: int, num_shards: int) -> epath.Path:
    """Return the path of the heartbeat of the process that works on a shard."""
    return unfinished / f"worker-{shard:05d}-of-{num_shards:05d}.json"


def is_alive(file: epath.Path) -> bool:
    """Return whether the process of a heartbeat is running, as far as is known."""
    try:
        sign = json.loads(file.read_text())
        if "error" in sign or "stopped" in sign:
            return False
        if sign["host"] == socket.gethostname() and not _runs(sign["process"]):
            return False
        return time.time() - sign["seen"] <= SILENT * sign["every"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Heartbeat:
    """Periodic progress reports of one process in one directory.

    with Heartbeat(unfinished, 16, worker="3 of 8") as beat:
        beat.on(3, "compiles")
        beat.on(3, "scores", lambda: {"done": 4_000, "total": 9_000, "unit": "documents"})
        beat.off(3)

    An error that ends the block is written to the files of the shards in progress.
    """

    def __init__(self, unfinished: epath.PathLike, num_shards: int, worker: str | None = None):
        """Start without shards; `worker` is "3 of 8" where the launcher assigns numbers."""
        self._directory = epath.Path(unfinished)
        self._num_shards = num_shards
        self._remote = "://" in os.fspath(self._directory)
        self._every = EVERY_REMOTE if self._remote else EVERY
        self._who = {
            "worker": worker,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "every": self._every,
        }
        self._in_hand: dict[int, dict[str, Any]] = {}
        self._progress: dict[int, Callable[[], Mapping[str, Any]]] = {}
        self._written: set[int] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        # NOTE: not joined, since it may be blocked by a hanging disk. The lock keeps it from
        # writing after this point.
        if isinstance(error, Exception):
            self.failed(error)
        elif error is not None and not isinstance(error, GeneratorExit):
            self._last_word(stopped=True)
        with self._lock:
            for shard in list(self._in_hand):
                self._forget(shard)

    def on(
        self, shard: int, phase: str, progress: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """Mark a shard as in progress.

        Args:
          phase: a verb, "compiles", "scores".
          progress: called from the thread; returns done, total, unit, rate, seconds_left, or some
            of them.
        """
        with self._lock:
            state = self._in_hand.setdefault(shard, {"shard": shard, "since": time.time()})
            state["phase"] = phase
            if progress is not None:
                self._progress[shard] = progress

    def off(self, shard: int) -> None:
        """Mark a shard as done or abandoned."""
        with self._lock:
            self._forget(shard)

    def failed(self, error: Exception) -> None:
        """Record the error in the heartbeats of the shards in progress."""
        self._last_word(error=f"{type(error).__name__}: {error}"[:_LONGEST_ERROR])

    def _last_word(self, **word: Any) -> None:
        """Write a final state into the heartbeats of the shards in progress, and release them."""
        with self._lock:
            for shard in list(self._in_hand):
                self._write(shard, **word)
                self._in_hand.pop(shard)
                self._written.discard(shard)

    def _beat(self) -> None:
        wait = min(_FIRST, self._every)
        while not self._over.wait(wait):
            now = time.time()
            with self._lock:
                for shard, state in self._in_hand.items():
                    if not self._over.is_set() and now - state["since"] >= 0.9 * _FIRST:
                        self._write(shard)
            wait = self._every if self._written else _FIRST

    def _write(self, shard: int, **more: Any) -> None:
        state = self._who | self._in_hand[shard] | {"seen": time.time()} | more
        with contextlib.suppress(Exception):  # the worker may be changing its state concurrently
            if shard in self._progress:
                state["progress"] = dict(self._progress[shard]())
        path = file_of(self._directory, shard, self._num_shards)
        with contextlib.suppress(OSError):
            if self._remote:  # objects appear atomically
                path.write_text(json.dumps(state))
            else:
                temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
                temporary.write_text(json.dumps(state))
                temporary.replace(path)
            self._written.add(shard)

    def _forget(self, shard: int) -> None:
        self._in_hand.pop(shard, None)
        self._progress.pop(shard, None)
        self._written.discard(shard)
        with contextlib.suppress(OSError):  # possibly of an earlier worker
            file_of(self._directory, shard, self._num_shards).unlink(missing_ok=True)
