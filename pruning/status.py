"""How far a piece of work is: read from its directory alone, by anybody, while it goes on.

    python -m pruning status runs/c4/ask_llm

Choices
- Nothing is asked of the workers: their shards, their records and the signs of life that they leave
  (heartbeat.py) say all, on a local disk or on object storage, and also when nobody runs any more.
- A shard is done when its record is there; running while its worker was heard of lately; failed
  when its worker left an error; lost when its worker fell silent; waiting otherwise.
- Time left is what the slowest worker expects, where workers say what they expect. Else it is what
  the shards done so far took, for the shards that are left, shared among those at work.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from pruning import artefact, heartbeat
from pruning.artefact import MEASURED, UNFINISHED, ArtefactError, is_finished
from pruning.inspect import escaped
from pruning.progress import duration

_THREADS = 32  # they mostly wait, on object storage
_SILENT = 4  # signs of life that may be missing before a worker counts as lost
_SHOWN = 8  # workers or shards of one sort that are listed


@dataclasses.dataclass(frozen=True)
class Worker:
    """The last word on a shard in hand.

    Attributes:
      shard: which.
      state: "running", "failed" or "lost".
      who: worker, host and process, as far as known.
      phase: what it was doing.
      seconds_ago: since it was heard of.
      progress: done, total, unit, rate, seconds_left, as far as it told.
      error: what it failed with.
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
    """How far an artefact in the making is.

    Attributes:
      kind: of artefact; num_shards: how many there will be.
      done: how many shards are there; rows, tokens: in those.
      workers: who has or had a shard in hand.
      waiting: shards that nobody has touched.
      parts: name -> how many, of intermediate results, and of how many.
      seconds: from the start of the first shard to the end of the last one that is done.
      seconds_left: None where nobody can tell.
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
    """Looks at an unfinished artefact.

    Args:
      now: the time, in seconds since 1970, that ages are reckoned from; None for the clock's.

    Raises:
      ArtefactError: there is nothing unfinished in `path`.
    """
    path = epath.Path(path)
    now = time.time() if now is None else now
    inside = path / UNFINISHED
    try:
        plan = json.loads((inside / "plan.json").read_text())
    except FileNotFoundError:
        raise ArtefactError(f"{path} holds no unfinished work.") from None
    names = [entry.name for entry in inside.iterdir()]
    with ThreadPoolExecutor(_THREADS) as pool:
        records = _read_all(pool, [inside / name for name in names if _is(name, "data-")])
        signs = _read_all(pool, [inside / name for name in names if _is(name, "worker-")])
    total = plan["shards"]
    done = {_shard_of(record["shard"]["file"]) for record in records}
    workers = [_worker(sign, now) for sign in signs if sign["shard"] not in done]
    workers += _without_signs(path, done | {worker.shard for worker in workers}, now)
    workers.sort(key=lambda worker: worker.shard)
    touched = done | {worker.shard for worker in workers}
    timed = [record for record in records if "ended" in record]
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


def _shard_of(file: str) -> int:
    return int(file.lstrip(".").split("-")[1])


def _read(path: epath.Path) -> dict[str, Any] | None:
    """None when it is gone meanwhile, or is just being written where that is not atomic."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _read_all(pool: ThreadPoolExecutor, paths: Sequence[epath.Path]) -> list[dict[str, Any]]:
    return [content for content in pool.map(_read, paths) if content is not None]


def _worker(sign: Mapping[str, Any], now: float) -> Worker:
    ago = max(now - sign["seen"], 0.0)
    state = "lost" if ago > _SILENT * sign["every"] else "running"
    number = "" if sign.get("worker") is None else f"worker {sign['worker']}, "
    return Worker(
        shard=sign["shard"],
        state="failed" if "error" in sign else state,
        who=f"{number}{sign['host']}, process {sign['process']}",
        phase=sign.get("phase", "works"),
        seconds_ago=ago,
        progress=sign.get("progress", {}),
        error=sign.get("error"),
    )


def _without_signs(path: epath.Path, known: set[int], now: float) -> list[Worker]:
    """Shards of which there is a file under its temporary name and nothing else."""
    found: dict[int, Worker] = {}
    for file in path.glob(".data-*.tmp"):
        try:
            stat = file.stat()
        except OSError:  # it has just got its name
            continue
        shard, ago = _shard_of(file.name), max(now - stat.mtime, 0.0)
        if shard in known or (shard in found and found[shard].seconds_ago <= ago):
            continue
        state = "lost" if ago > _SILENT * heartbeat.EVERY else "running"
        wrote = {"done": stat.length, "unit": "bytes"}
        found[shard] = Worker(shard, state, "a process", "writes", ago, wrote)
    return list(found.values())


def _parts(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """`sketch-00003-of-00064.part` -> sketch: (how many, 64)."""
    parts: dict[str, tuple[int, int]] = {}
    for name in names:
        if name.endswith(".part") and not name.startswith("."):
            what, _, _, count = name.removesuffix(".part").rsplit("-", 3)
            parts[what] = (parts.get(what, (0, 0))[0] + 1, int(count))
    return dict(sorted(parts.items()))


def _seconds_left(
    workers: Sequence[Worker], shards: int, timed: Sequence[Mapping[str, Any]], now: float
) -> float | None:
    at_work = [worker for worker in workers if worker.state == "running"]
    if not at_work:
        return None
    # A worker has said what is left of all its shards, or of none.
    told = [worker.progress.get("seconds_left") for worker in at_work]
    expected = [seconds for seconds in told if seconds is not None]
    if len(expected) == len(at_work):
        return max(expected)
    if not timed:
        return None
    each = sum(record["ended"] - record["began"] for record in timed) / len(timed)
    return each * shards / len(at_work)


# --------------------------------------------------------------------------------------------------
# In words


def lines(path: epath.PathLike, now: float | None = None) -> Iterator[str]:
    """What there is to say, line by line.

    Raises:
      ArtefactError: there is no artefact, finished or not.
    """
    path = epath.Path(path)
    if is_finished(path):
        yield from _finished(path)
    elif (path / UNFINISHED / "plan.json").exists():
        yield from _unfinished(path, look(path, now))
    else:
        artefact.load(path)  # says what is wrong


def _finished(path: epath.Path) -> Iterator[str]:
    manifest = artefact.load(path).manifest
    yield f"{path}: {manifest.kind}, finished: {manifest.size} in {len(manifest.shards)} shards"
    try:
        measured = json.loads((path / MEASURED).read_text())
    except FileNotFoundError:
        return
    if "cost" in measured:
        yield from (f"  {line}" for line in measured["cost"])
    elif "seconds" in measured:
        yield f"  took {duration(measured['seconds'])} of work"


def _unfinished(path: epath.Path, status: Status) -> Iterator[str]:
    running, failed, lost = (status.of(state) for state in ("running", "failed", "lost"))
    numbers = {
        "done": status.done,
        "running": len(running),
        "failed": len(failed),
        "lost": len(lost),
        "waiting": len(status.waiting),
    }
    told = ", ".join(f"{n:,} {name}" for name, n in numbers.items() if n or name != "lost")
    yield f"{path}: {status.kind}, unfinished: {told}, of {status.num_shards:,} shards"
    for name, (count, total) in status.parts.items():
        yield f"  {name}: {count:,} of {total:,} parts"
    if status.rows:
        yield f"  so far {artefact.size_in_words(status.rows, status.tokens)}"
    yield from _rate(status, running)
    for state, workers in (("running", running), ("lost", lost), ("failed", failed)):
        for worker in workers[:_SHOWN]:
            yield f"  shard {worker.shard:,} {state}: {_words(worker)}"
        if len(workers) > _SHOWN:
            yield f"  ... {len(workers) - _SHOWN:,} more {state}"
    if not running:
        yield "  nobody is at work: run the command that makes it again, it will go on"
    elif failed or lost:
        again = ", ".join(str(worker.shard) for worker in [*failed, *lost][:_SHOWN])
        yield f"  shards {again} wait until their worker's command is run again"


def _rate(status: Status, running: Sequence[Worker]) -> Iterator[str]:
    rates: dict[str, float] = {}
    for worker in running:
        if rate := worker.progress.get("rate"):
            unit = worker.progress["unit"]
            rates[unit] = rates.get(unit, 0.0) + rate
    if not rates and running and status.seconds > 0:
        rates = {"rows": status.rows / status.seconds}
    parts = [f"{rate:,.0f} {unit}/s" for unit, rate in rates.items()]
    if status.seconds_left is not None:
        parts.append(f"{duration(status.seconds_left)} left")
    if parts:
        yield f"  {', '.join(parts)}"


def _words(worker: Worker) -> str:
    ago = f"{duration(worker.seconds_ago)} ago"
    told = [f"{worker.who} {worker.phase}"]
    progress = worker.progress
    if "done" in progress:
        of = f" of {progress['total']:,}" if progress.get("total") else ""
        told.append(f"{progress['done']:,}{of} {progress['unit']}")
    if progress.get("rate"):
        told.append(f"{progress['rate']:,.0f} {progress['unit']}/s")
    if worker.state == "failed":
        return f"{worker.who}, {ago}: {escaped(worker.error or '')}"
    told.append(f"last heard of {ago}" if worker.state == "lost" else f"seen {ago}")
    return ", ".join(told)
