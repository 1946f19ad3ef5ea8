"""Start and stop of processes, common to training and scoring.

- Several processes join by `jax.distributed`. On TPU pods, Slurm and GKE the library finds its
  peers itself; elsewhere the coordinator's address, the number of processes and the index are given
  as flags or in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
- Compiled programs are cached on disk, keyed by program, compiler and flags: the second run of the
  same shape starts without compiling.
- On SIGUSR1 a process records its next steps for the profiler (`Profiler`).
- On SIGTERM a job stops at the next step. All its processes agree on the step, whichever of them
  got the signal. A stopped job exits with EX_TEMPFAIL (75), on which launchers restart it.
- Command lines import this module before they parse their arguments: jax is imported inside the
  functions only.
"""

from __future__ import annotations

import argparse
import os
import signal
from types import TracebackType

RESTART = 75  # EX_TEMPFAIL of sysexits.h: stopped on a signal, run the same command again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which the processes of a job find each other."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the job that the environment describes (TPU pod, Slurm, GKE, JAX_* variables)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; joins")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")


def join(arguments: argparse.Namespace) -> None:
    """Join the other processes, if there are any. Call it before any use of a device."""
    import jax

    if arguments.coordinator is not None:
        jax.distributed.initialize(arguments.coordinator, arguments.processes, arguments.process)
    elif arguments.distributed or "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize()


def cache_compilations(directory: str | os.PathLike | None) -> None:
    """Keep compiled programs in `directory` for this and later processes; None: do nothing."""
    import jax

    if directory is None:
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    # Small programs too: a study starts many processes that compile the same few dozen programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class StopSignal:
    """A flag that SIGTERM sets, on all processes of a job at the same step.

    with StopSignal() as stop:
        for step in range(...):
            ...
            if stop.requested(step):
                save and leave
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: object = None

    def __enter__(self) -> StopSignal:
        import jax

        # NOTE: with several processes, jax.distributed handles SIGTERM itself and notifies all of
        # them; another handler would replace its own.
        if jax.process_count() == 1:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)  # type: ignore[arg-type]

    def _receive(self, *_: object) -> None:
        self._received = True

    def requested(self, step: int) -> bool:
        """Return whether to stop, the same on every process. Call it at every step."""
        import jax
        from jax.experimental import multihost_utils

        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)


class Profiler:
    """A recorder of steps in `directory`/step_N, for TensorBoard's profile view.

    N is the first of the recorded steps: those of `steps`, and the next `ON_DEMAND` whenever the
    process gets SIGUSR1.

    with Profiler(directory, steps=(100, 105)) as profiler:
        for step in range(...):
            profiler.before(step)
            state = work(state)
            profiler.after(step + 1, state)
    """

    ON_DEMAND = 5

    def __init__(self, directory: str | os.PathLike, steps: tuple[int, int] | None = None) -> None:
        """Record the steps after the first of `steps`, up to and including its last."""
        self._directory = os.fspath(directory)
        self._steps = steps
        self._until: int | None = None  # the last step of the current recording
        self._asked = False
        self._previous: object = None

    def __enter__(self) -> Profiler:
        self._previous = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGUSR1, self._previous)  # type: ignore[arg-type]
        self._stop()

    def _ask(self, *_: object) -> None:
        self._asked = True

    def before(self, done: int) -> None:
        """Start a recording if one is due. Call it before each step; `done`: steps so far."""
        import jax

        if self._until is not None:
            return
        if self._steps is not None and self._steps[0] <= done < self._steps[1]:
            self._until = self._steps[1]
        elif self._asked:
            self._until = done + self.ON_DEMAND
        else:
            return
        self._asked = False
        jax.profiler.start_trace(f"{self._directory}/step_{done + 1}")

    def after(self, done: int, result: object) -> None:
        """Finish a recording if it is complete. Call it after each step with the step's arrays."""
        import jax

        if self._until is not None and done >= self._until:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        import jax

        if self._until is not None:
            self._until = None
            jax.profiler.stop_trace()
