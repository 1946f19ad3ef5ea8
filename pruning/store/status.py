"""Progress of unfinished work, read from its directory alone while it runs.

    python -m pruning status runs/c4/ask_llm

Choices
- Workers are not contacted. Their shards, records and heartbeats (heartbeat.py) are enough, on a
  local disk or on object storage, also after all workers have ended.
- A shard is done when its record exists; running while its worker's heartbeat is recent; failed
  when its worker recorded an error; stopped when its worker was interrupted or terminated; lost
  when its worker's heartbeat is old; waiting otherwise.
- Time left is the longest estimate of the workers, where they report one. Otherwise it is the mean
  time of the finished shards, times the number of remaining shards, divided by the running workers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath

from models.terminal import escaped
from pruning.store import heartbeat
from pruning.store.artifact import is_finished, load_artifact, measured
from pruning.store.atomic import entries
from pruning.store.build import read_plan
from pruning.store.manifest import UNFINISHED, ArtifactError, size_in_words
from pruning.store.progress import duration

_THREADS = 32  # bound by latency of object storage, not by CPU
_SHOWN = 8  # largest number of workers or shards listed per state


@dataclasses.dataclass(frozen=True)
class Worker:
    """The latest state of the worker on a shard.

    Attributes:
      shard: index of the shard.
      state: "running", "failed", "stopped" or "lost".
      who: worker, host and process, as far as known.
      phase: the current operation.
      seconds_ago: age of the heartbeat.
      progress: done, total, unit, rate, seconds_left, as far as reported.
      error: message of the error that ended it.
    """

    shard: int
    state: str
    who: str
    phase: str
    seconds_ago: float
    progress: Mapping[str, Any]
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Status:
    """State of an unfinished artifact.

    Attributes:
      kind: kind of artifact; num_shards: number of its shards.
      done: number of finished shards; rows, tokens: numbers in those.
      workers: workers that are or were processing a shard.
      waiting: shards that no worker has started.
      parts: numbers of finished and of all intermediate results, by name.
      seconds: from the start of the first shard to the end of the last finished one.
      seconds_left: estimate; None when unknown.
    """

    kind: str
    num_shards: int
    done: int
    rows: int
    tokens: int
    workers: Sequence[Worker]
    waiting: Sequence[int]
    parts: Mapping[str, tuple[int, int]]
    seconds: float
    seconds_left: float | None

    def of(self, state: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == state]


def look(path: epath.PathLike, now: float | None = None) -> Status:
    """Return the state of an unfinished artifact.

    Args:
      now: reference time of ages, in seconds since 1970; None for the current time.

    Raises:
      ArtifactError: `path` holds no unfinished work.
    """
    path = epath.Path(path)
    now = time.time() if now is None else now
    inside = path / UNFINISHED
    try:
        plan = read_plan(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} holds no unfinished work.") from None
    names = [entry.name for entry in inside.iterdir()]
    with ThreadPoolExecutor(_THREADS) as pool:
        records = _read_all(pool, [inside / name for name in names if _is(name, "data-")])
        signs = _read_all(pool, [inside / name for name in names if _is(name, "worker-")])
    total = plan["shards"]
    done = {
        shard for record in records if (shard := _shard_of(record["shard"]["file"])) is not None
    }
    workers = [_worker(sign, now) for sign in signs if sign["shard"] not in done]
    workers += _without_signs(path, done | {worker.shard for worker in workers}, now)
    workers.sort(key=lambda worker: worker.shard)
    touched = done | {worker.shard for worker in workers}
    timed = [r for r in records if r.get("began") is not None and r.get("ended") is not None]
    return Status(
        kind=plan["kind"],
        num_shards=total,
        done=len(done),
        rows=sum(record["shard"]["rows"] for record in records),
        tokens=sum(record["shard"]["tokens"] for record in records),
        workers=workers,
        waiting=[shard for shard in range(total) if shard not in touched],
        parts=_parts(names),
        seconds=max((r["ended"] for r in timed), default=0.0)
        - min((r["began"] for r in timed), default=0.0),
        seconds_left=_seconds_left(workers, total - len(done), timed, now),
    )


def _is(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name.endswith(".json")


def _shard_of(file: str) -> int | None:
    """Return the shard in the name of a data file; None for a name of another form."""
    number = re.match(r"\.?data-(\d{1,18})-", file)
    return int(number[1]) if number else None


def _read(path: epath.Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None when it is missing, incomplete or of another kind."""
    try:
        if "://" not in os.fspath(path) and not Path(path).is_file():  # reading a pipe could block
            return None
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"data-": _RECORD, "worker-": _SIGN}
    kind = next(kind for prefix, kind in kinds.items() if path.name.startswith(prefix))
    return value if _fits(value, kind) else None


_NUMBER = (int, float)
_LARGEST = 1e18  # of a number in a file; sums and products of larger ones overflow
# Keys and their types; a name that ends in "?" may be absent or None.
_RECORD: dict[str, Any] = {
    "shard": {"file": str, "rows": int, "tokens": int},
    "began?": _NUMBER,
    "ended?": _NUMBER,
}
_SIGN: dict[str, Any] = {
    "shard": int,
    "seen": _NUMBER,
    "every": _NUMBER,
    "host": str,
    "process": int,
    "phase?": str,
    "error?": str,
    "progress?": {
        "done?": _NUMBER,
        "total?": _NUMBER,
        "unit?": str,
        "rate?": _NUMBER,
        "seconds_left?": _NUMBER,
    },
}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a JSON value has the types of `_RECORD` or `_SIGN`: files may be damaged."""
    if not isinstance(kind, dict):
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        return not isinstance(value, int | float) or abs(value) <= _LARGEST  # False for NaN
    if not isinstance(value, dict):
        return False
    for name, inner in kind.items():
        found = value.get(name.removesuffix("?"))
        if not (found is None and name.endswith("?")) and not _fits(found, inner):
            return False
    return True


def _read_all(pool: ThreadPoolExecutor, paths: Sequence[epath.Path]) -> list[dict[str, Any]]:
    return [content for content in pool.map(_read, paths) if content is not None]


def _worker(sign: Mapping[str, Any], now: float) -> Worker:
    ago = max(now - sign["seen"], 0.0)
    state = "lost" if ago > heartbeat.SILENT * sign["every"] else "running"
    state = "stopped" if sign.get("stopped") else state
    number = "" if sign.get("worker") is None else f"worker {sign['worker']}, "
    return Worker(
        shard=sign["shard"],
        state="failed" if "error" in sign else state,
        who=f"{number}{sign['host']}, process {sign['process']}",
        phase=sign.get("phase") or "works",
        seconds_ago=ago,
        progress=sign.get("progress") or {},
        error=sign.get("error"),
    )


def _without_signs(path: epath.Path, known: set[int], now: float) -> list[Worker]:
    """Return shards that have a temporary file and no heartbeat."""
    found: dict[int, Worker] = {}
    for file in entries(path, ".data-", ".tmp"):
        try:
            stat = file.stat()
        except OSError:  # it was just renamed
            continue
        shard, ago = _shard_of(file.name), max(now - stat.mtime, 0.0)
        if shard is None or shard in known:
            continue
        if shard in found and found[shard].seconds_ago <= ago:
            continue
        state = "lost" if ago > heartbeat.SILENT * heartbeat.EVERY else "running"
        wrote = {"done": stat.length, "unit": "bytes"}
        found[shard] = Worker(shard, state, "a process", "writes", ago, wrote)
    return list(found.values())


def _parts(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Count intermediate files: `sketch-00003-of-00064.part` -> sketch: (present, 64)."""
    parts: dict[str, tuple[int, int]] = {}
    for name in names:
        if part := re.fullmatch(r"([^.].*)-\d+-of-(\d+)\.part", name):
            parts[part[1]] = (parts.get(part[1], (0, 0))[0] + 1, int(part[2]))
    return dict(sorted(parts.items()))


def _seconds_left(
    workers: Sequence[Worker], shards: int, timed: Sequence[Mapping[str, Any]], now: float
) -> float | None:
    at_work = [worker for worker in workers if worker.state == "running"]
    if not at_work:
        return None
    # A worker reports the time left for all of its shards, or for none.
    reported = [worker.progress.get("seconds_left") for worker in at_work]
    expected = [seconds for seconds in reported if seconds is not None]
    if len(expected) == len(at_work):
        return max(expected)
    if not timed:
        return None
    each = sum(record["ended"] - record["began"] for record in timed) / len(timed)
    return each * shards / len(at_work)


# --------------------------------------------------------------------------------------------------
# Text


def lines(path: epath.PathLike, now: float | None = None) -> Iterator[str]:
    """Yield the state of an artifact, line by line.

    Raises:
      ArtifactError: there is no artifact, finished or not.
    """
    path = epath.Path(path)
    if is_finished(path):
        yield from _finished(path)
    elif (path / UNFINISHED / "plan.json").exists():
        yield from _unfinished(path, look(path, now))
    else:
        load_artifact(path)  # raises the specific error


def _finished(path: epath.Path) -> Iterator[str]:
    manifest = load_artifact(path).manifest
    yield f"{path}: {manifest.kind}, finished: {manifest.size} in {len(manifest.shards)} shards"
    found = measured(path)
    if isinstance(found.get("cost"), list):
        yield from (f"  {line}" for line in found["cost"])
    elif isinstance(found.get("seconds"), int | float):
        yield f"  took {duration(found['seconds'])} of work"


def _unfinished(path: epath.Path, status: Status) -> Iterator[str]:
    states = ("running", "failed", "stopped", "lost")
    running, failed, stopped, lost = (status.of(state) for state in states)
    numbers = {
        "done": status.done,
        "running": len(running),
        "failed": len(failed),
        "stopped": len(stopped),
        "lost": len(lost),
        "waiting": len(status.waiting),
    }
    rare = ("stopped", "lost")
    told = ", ".join(f"{n:,} {name}" for name, n in numbers.items() if n or name not in rare)
    yield f"{path}: {status.kind}, unfinished: {told}, of {status.num_shards:,} shards"
    for name, (count, total) in status.parts.items():
        yield f"  {name}: {count:,} of {total:,} parts"
    if status.rows:
        yield f"  so far {size_in_words(status.rows, status.tokens)}"
    yield from _rate(status)
    for state, workers in zip(states, (running, failed, stopped, lost), strict=True):
        for worker in workers[:_SHOWN]:
            yield f"  shard {worker.shard:,} {state}: {_words(worker)}"
        if len(workers) > _SHOWN:
            yield f"  ... {len(workers) - _SHOWN:,} more {state}"
    if not running:
        yield "  no process works on it: run the command that makes it again, it will go on"
    elif idle := [*failed, *stopped, *lost]:
        again = ", ".join(str(worker.shard) for worker in idle[:_SHOWN])
        yield f"  shards {again} wait until their worker's command is run again"


def rates(status: Status) -> dict[str, float]:
    """Return unit -> units per second of all running workers, as far as known."""
    found: dict[str, float] = {}
    running = status.of("running")
    for worker in running:
        if rate := worker.progress.get("rate"):
            unit = worker.progress.get("unit") or "units"
            found[unit] = found.get(unit, 0.0) + rate
    if not found and running and status.seconds > 0:
        found = {"rows": status.rows / status.seconds}
    return found


def _rate(status: Status) -> Iterator[str]:
    parts = [f"{rate:,.0f} {unit}/s" for unit, rate in rates(status).items()]
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if parts:
        yield f"  {', '.join(parts)}"


def _words(worker: Worker) -> str:
    ago = f"{duration(worker.seconds_ago)} ago"
    words = [f"{worker.who} {worker.phase}"]
    progress, unit = worker.progress, worker.progress.get("unit") or "units"
    if progress.get("done") is not None:
        total = f" of {progress['total']:,}" if progress.get("total") else ""
        words.append(f"{progress['done']:,}{total} {unit}")
    if progress.get("rate"):
        words.append(f"{progress['rate']:,.0f} {unit}/s")
    if worker.state == "failed":
        return f"{worker.who}, {ago}: {escaped(worker.error or '')}"
    if worker.state == "stopped":
        return f"{worker.who} was told to end, {ago}"
    words.append(f"last heard of {ago}" if worker.state == "lost" else f"seen {ago}")
    return ", ".join(words)
