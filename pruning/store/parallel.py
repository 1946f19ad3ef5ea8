"""Shards over processes or a cluster: the runners of the stages that need no accelerator.

    run_shards(partial(ingest_shard, plan), build.pending(), workers=8, on_report=show)

    python -m pruning ingest --runner=beam --beam_pipeline_options=runner=DataflowRunner,project=...

Choices
- The work is a pure function of a shard's index that writes its own result atomically. Only numbers
  for the progress line are returned. The bytes do not depend on the runner, and a shard that a
  cluster runs twice is written twice with the same content.
- The command line sets the runner once per process (`using`); stages do not depend on it. Local
  processes are the default; Apache Beam (Dataflow, Flink, Spark) is an extra.

Local processes
- A worker requests a shard when it is idle, so one long shard does not delay the others.
- Processes are spawned, not forked: a fork copies the locks of threads that it does not copy.
- The death of a worker, for instance by lack of memory, raises an error instead of blocking. A
  worker exits when its parent dies.

Beam
- Input and output must be reachable from every worker. Only the pickled plan of the stage is sent.
  Reports are returned as Beam's counters.
- An error of the work is re-raised with its own class where the runner forwards its message, as the
  DirectRunner does. Beam first retries failed work, by its runner's own rules.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

Report = Callable[[int, int], None]
"""Told from within the work, as often as it likes: (amount, documents) since the last report."""

Work = Callable[[int, Report], None]


RUNNERS = ("local", "beam")


def require_processes(workers: int) -> None:
    """Raise ValueError for a negative number of local processes; 0 is one per CPU."""
    if workers < 0:
        raise ValueError(f"workers is 0, for one process per CPU, or positive: not {workers}.")


class WorkerDied(RuntimeError):
    """Error for a process that ended in the middle of a shard."""


class BeamError(RuntimeError):
    """Error for a Beam pipeline that could not be run, or failed."""


_runner: str = RUNNERS[0]
_beam_options: tuple[str, ...] = ()


@contextlib.contextmanager
def using(runner: str, beam_options: str = "") -> Iterator[None]:
    """Set the runner of `run_shards` within the block.

    Args:
      runner: one of RUNNERS.
      beam_options: Beam's pipeline options, "name=value,flag,name=value".
    """
    global _runner, _beam_options
    before = _runner, _beam_options
    given = (option.strip().removeprefix("--") for option in beam_options.split(","))
    _runner, _beam_options = runner, tuple(f"--{option}" for option in given if option)
    try:
        yield
    finally:
        _runner, _beam_options = before


def run_shards(work: Work, shards: Sequence[int], workers: int, on_report: Report) -> None:
    """Call `work(shard, report)` for every shard, in `workers` processes or on Beam.

    Args:
      work: a function at the top of a module, or a `functools.partial` of one.
      shards: indices, processed in this order.
      workers: number of local processes; 0 for one per CPU. With 1 worker, or 1 shard, everything
        runs in this process.
      on_report: called in this process with each report of the work.

    Raises:
      WorkerDied: a process was killed. Errors of the work itself are re-raised here.
      BeamError: the pipeline failed for another reason.
    """
    if _runner == "beam":
        if shards:
            _run_on_beam(work, shards, on_report)
        return
    workers = min(workers or available_cpus(), len(shards))
    if workers <= 1:
        for shard in shards:
            work(shard, on_report)
        return
    context = multiprocessing.get_context("spawn")
    processes: dict[Any, Any] = {}  # parent's end of the pipe -> process
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
    """Return the number of CPUs that this process may use (containers and `taskset` limit it)."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not available on every system
        return os.cpu_count() or 1


def _serve(pipe: connection.Connection, work: Work) -> None:
    """Run a worker process: take a shard, process it, report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent terminates workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs cleanup and reports the stop
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
    """Return the error itself where it can be pickled, otherwise its message."""
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


# --------------------------------------------------------------------------------------------------
# Beam

_LOOK_EVERY = 10_000  # milliseconds between two polls of the counters
_SPACE = "winnow"  # namespace of the counters
_MARK = "winnow-error:"
_MARKED = re.compile(re.escape(_MARK) + r"([0-9a-f]+):end")


def _run_on_beam(work: Work, shards: Sequence[int], on_report: Report) -> None:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.runner import PipelineState
    except ImportError as error:
        raise BeamError(
            f"--runner=beam needs Apache Beam ({error}): install winnow-lm[beam]."
        ) from error

    pipeline = beam.Pipeline(options=PipelineOptions(list(_beam_options)))
    (
        pipeline
        | "Shards" >> beam.Create(list(shards))
        | "Spread" >> beam.Reshuffle()
        | "Work" >> beam.Map(_on_worker, pickle.dumps(work))
    )
    told = {"amount": 0, "documents": 0}

    def report(result: object) -> None:
        now = dict(told)
        for counter in result.metrics().query()["counters"]:  # type: ignore[attr-defined]
            name = counter.key.metric.name
            if counter.key.metric.namespace == _SPACE and name in now:
                now[name] = max(now[name], counter.result or 0)
        if now != told:
            on_report(now["amount"] - told["amount"], now["documents"] - told["documents"])
            told.update(now)

    try:
        result = pipeline.run()
        state = result.state
        while not PipelineState.is_terminal(state):
            state = result.wait_until_finish(duration=_LOOK_EVERY) or result.state
            report(result)
        report(result)
    except Exception as error:
        raise _as_raised(error) from error
    if state != PipelineState.DONE:
        raise BeamError(
            f"the Beam pipeline ended as {state}: its runner's log says why. Run the same command "
            "again, it will go on."
        )


def _on_worker(shard: int, pickled: bytes) -> int:
    """Process one shard on a Beam worker."""
    from apache_beam.metrics import Metrics

    amount, documents = (Metrics.counter(_SPACE, name) for name in ("amount", "documents"))

    def report(more: int, more_documents: int) -> None:
        amount.inc(more)
        documents.inc(more_documents)

    work: Work = pickle.loads(pickled)
    try:
        work(shard, report)
    except Exception as error:
        # NOTE: runners forward at most an error's message, so the class is encoded in it.
        of = {"module": type(error).__module__, "name": type(error).__qualname__}
        args = error.args if all(isinstance(arg, str) for arg in error.args) else (str(error),)
        said = {"message": str(error), "args": args, "errno": getattr(error, "errno", None)}
        words = json.dumps(of | said)
        raise RuntimeError(f"{error} {_MARK}{words.encode().hex()}:end") from error
    return shard


def _as_raised(error: Exception) -> Exception:
    """Return the error that the work raised, decoded from the runner's message."""
    if not (found := _MARKED.search(str(error))):
        return BeamError(f"the Beam pipeline failed: {error}")
    said = json.loads(bytes.fromhex(found[1]))
    # Only built-in errors and those of this project; others are reported as text.
    if said["module"] == "builtins" or said["module"].split(".")[0] in ("pruning", "models"):
        kind = getattr(importlib.import_module(said["module"]), said["name"], None)
        if isinstance(kind, type) and issubclass(kind, OSError) and said["errno"] is not None:
            return kind(said["errno"], said["message"])
        if isinstance(kind, type) and issubclass(kind, Exception):
            with contextlib.suppress(Exception):
                return kind(*said["args"])
    return BeamError(f"{said['name']}: {said['message']}")
