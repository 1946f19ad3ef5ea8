"""What a process at work leaves beside the shards, so that others can see how it does.

    unfinished/worker-00003-of-00016.json    shard 3 is in somebody's hands, or was when they failed

Choices
- One small file per shard in hand, replaced every few seconds and gone when the shard is done: a
  worker that is started again on the same shard writes over what its forerunner left, so that what
  lies there is always the last word on that shard.
- A thread writes it: a worker that compiles for minutes, or that waits for its disk, is not taken
  for dead. Whether it gets anywhere is told by what the file says of its progress.
- A shard that is done within a second never gets a file: cheap shards cost nothing.
- An error stays in the file. A process that is killed says nothing more, and its file grows old.
- A file that cannot be written must not stop the work: it is left out.
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

EVERY = 5.0  # seconds between two signs of life
EVERY_REMOTE = 30.0  # on object storage, where each is a request that somebody pays for
_FIRST = 1.0  # seconds before the first
_LONGEST_ERROR = 2000  # characters


def file_of(unfinished: epath.Path, shard: int, num_shards: int) -> epath.Path:
    """Where the sign of life of whoever has a shard in hand stands."""
    return unfinished / f"worker-{shard:05d}-of-{num_shards:05d}.json"


class Heartbeat:
    """The signs of life of one process in one directory.

    with Heartbeat(unfinished, 16, worker="3 of 8") as beat:
        beat.on(3, "compiles")
        beat.on(3, "scores", lambda: {"done": 4_000, "total": 9_000, "unit": "documents"})
        beat.off(3)

    An error that ends the block is left in the files of the shards then in hand.
    """

    def __init__(self, unfinished: epath.PathLike, num_shards: int, worker: str | None = None):
        """Args: worker: which of how many it is, "3 of 8", where the launcher decides that."""
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
        # NOTE: not joined: it may be waiting for a disk that hangs. The lock keeps it from writing
        # after this.
        if isinstance(error, Exception):
            self.failed(error)
        with self._lock:
            for shard in list(self._in_hand):
                self._forget(shard)

    def on(
        self, shard: int, phase: str, progress: Callable[[], Mapping[str, Any]] | None = None
    ) -> None:
        """The shard is in hand.

        Args:
          phase: a verb, "compiles", "scores".
          progress: is called from the thread: done, total, unit, rate, seconds_left, or some of
            them.
        """
        with self._lock:
            state = self._in_hand.setdefault(shard, {"shard": shard, "since": time.time()})
            state["phase"] = phase
            if progress is not None:
                self._progress[shard] = progress

    def off(self, shard: int) -> None:
        """The shard is done, or given back."""
        with self._lock:
            self._forget(shard)

    def failed(self, error: Exception) -> None:
        """Leaves the error where the shards in hand are looked for."""
        words = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
        with self._lock:
            for shard in list(self._in_hand):
                self._write(shard, error=words)
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
        with contextlib.suppress(Exception):  # what the work does meanwhile may be half-changed
            if shard in self._progress:
                state["progress"] = dict(self._progress[shard]())
        path = file_of(self._directory, shard, self._num_shards)
        with contextlib.suppress(OSError):
            if self._remote:  # an object appears whole or not at all
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
        with contextlib.suppress(OSError):  # perhaps a forerunner's
            file_of(self._directory, shard, self._num_shards).unlink(missing_ok=True)
