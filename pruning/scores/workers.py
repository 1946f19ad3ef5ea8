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

    What is None is taken from `jax.distributed`.

    Raises:
      ValueError: the index is not below the number.
    """
    import jax

    index = jax.process_index() if worker is None else worker
    number = jax.process_count() if workers is None else workers
    require_worker(index, number)
    return index, number
