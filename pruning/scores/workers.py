"""Settings that divide a stage among processes, checked where they are set."""

from __future__ import annotations


def require_worker(worker: int | None, workers: int | None) -> None:
    """Raise ValueError unless `worker` counts from 0 and is below `workers`; None is left open."""
    if workers is not None and workers < 1:
        raise ValueError(f"workers is at least 1, not {workers}.")
    if worker is not None and worker < 0:
        raise ValueError(f"worker counts from 0: it cannot be {worker}.")
    if worker is not None and workers is not None and worker >= workers:
        raise ValueError(
            f"worker counts from 0 to workers - 1 = {workers - 1}: it cannot be {worker}. An array "
            "job that counts from 1 gives its index less 1."
        )
    if worker and workers is None:
        raise ValueError(f"worker={worker} needs workers, the number of processes.")


def worker_of(worker: int | None, workers: int | None) -> tuple[int, int]:
    """Return the index of this process and the number of processes.

    What is None is taken from `jax.distributed`. A process that joined no others is process 0 of 1;
    JAX is then not started, for a stage chooses its devices after it asked this.

    Raises:
      ValueError: the index is not below the number.
    """
    import jax

    joined = jax.distributed.is_initialized()
    index, number = (jax.process_index(), jax.process_count()) if joined else (0, 1)
    index = index if worker is None else worker
    number = number if workers is None else workers
    require_worker(index, number)
    return index, number
