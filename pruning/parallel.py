"""Shards over local processes: the runner of the stages that need no accelerator.

    run_shards(partial(ingest_shard, plan), build.pending(), workers=8, on_report=show)

Choices
- The work is one function of a shard's number that writes its own result: nothing but numbers for
  the progress line comes back. Another launcher (Beam, Slurm arrays) can map the same function.
- A worker asks for a shard when it is free, so one long shard holds up nobody.
- Processes are spawned, not forked: a fork copies the locks of threads that it does not copy.
- A worker that dies, of lack of memory for instance, is an error and not an endless wait; a worker
  whose parent dies ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

Report = Callable[[int, int], None]
"""Told from within the work, as often as it likes: (amount, documents) since the last report."""

Work = Callable[[int, Report], None]


class WorkerDied(RuntimeError):
    """A process ended in the middle of a shard."""


def run_shards(work: Work, shards: Sequence[int], workers: int, on_report: Report) -> None:
    """Calls `work(shard, report)` for every shard, in `workers` processes.

    Args:
      work: a function at the top of a module, or a `functools.partial` of one.
      shards: their numbers, taken in this order.
      workers: 0 for one per CPU; with 1, or one shard, all happens in this process.
      on_report: is called in this process with what the work reports.

    Raises:
      WorkerDied: a process was killed. What the work itself raises is raised here.
    """
    workers = min(workers or available_cpus(), len(shards))
    if workers <= 1:
        for shard in shards:
            work(shard, on_report)
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Any] = {}  # our end of the pipe -> process
    waiting = deque(shards)
    running: dict[Any, int] = {}
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work), daemon=True)
            process.start()
            theirs.close()
            processes[ours] = process
        while processes:
            ready: list[Any] = connection.wait(list(processes))
            for pipe in ready:
                kind: str
                value: Any
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    process = processes.pop(pipe)
                    process.join()
                    if pipe in running or process.exitcode:
                        raise WorkerDied(_obituary(running.get(pipe), process.exitcode)) from None
                    continue
                if kind == "report":
                    on_report(*value)
                elif kind == "error":
                    raise value
                else:  # "free"
                    running.pop(pipe, None)
                    if waiting:
                        running[pipe] = waiting.popleft()
                        pipe.send(running[pipe])
                    else:
                        pipe.send(None)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.join()


def available_cpus() -> int:
    """CPUs that this process may use, which a container or `taskset` may have made fewer."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _serve(pipe: connection.Connection, work: Work) -> None:
    """The life of a worker: ask, work, report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        while True:
            pipe.send(("free", None))
            if (shard := pipe.recv()) is None:
                return
            work(shard, lambda *report: pipe.send(("report", report)))
    except Exception as error:
        pipe.send(("error", _portable(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the pipe, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _obituary(shard: int | None, exitcode: int | None) -> str:
    code = exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    where = "at its start" if shard is None else f"in shard {shard}"
    return (
        f"a worker {how} {where}. With signal 9 the machine was likely out of memory: use fewer "
        "workers. Run the same command again, it will go on."
    )
