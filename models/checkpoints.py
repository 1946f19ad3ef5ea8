"""Checkpoints of a training run, by Orbax: asynchronous, atomic, sharded, and verified when read.

    run/
      winnow_model.json         the model's configuration, so that a run can be loaded as a model
      checkpoints/
        1000/params/...         parameters and optimiser state are items of their own, so that
        1000/opt_state/...      loading a model reads the parameters alone
        1000/facts/...          {"step", "fingerprint"}

Choices
- A checkpoint counts once Orbax has committed it, with every byte written. What is truncated or
  damaged later is found when it is read: the fingerprint of each item, a position-weighted sum of
  all its bits modulo 2^32, is stored with it. (Orbax alone reads a flipped bit without complaint.)
  It is computed on the devices and does not depend on the mesh.
- Restoring takes the newest checkpoint that is whole and says which ones it passed over. It deletes
  none: they are replaced when training reaches their step again.
- Arrays are read straight into the shardings asked for, whatever mesh and hosts wrote them. They
  are stored in chunks of at most `CHUNK_BYTES`, so that a part of one can be read by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

MODEL_FILE = "winnow_model.json"
DIRECTORY = "checkpoints"
CHUNK_BYTES = 4 << 20

_NEXT_LEAF = 0x9E3779B1  # the factor between leaves in a fingerprint
_CACHED_BYTES = 1 << 20  # computed at a time, so that it stays in the processor's cache

_log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


class NoCheckpoint(ValueError):
    """There is no whole checkpoint to read."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept: those that any of these rules names.

    Attributes:
      last: the newest so many.
      every: those whose step is a multiple of it; 0 for none.
      best: so many with the lowest value of `metric`.
      metric: a name in the metrics given to `save`.
    """

    last: int = 2
    every: int = 0
    best: int = 0
    metric: str | None = None

    def __post_init__(self):
        if self.last < 1:
            raise ValueError("Retention.last must be at least 1: a run resumes from the newest")
        if bool(self.best) != (self.metric is not None):
            raise ValueError("Retention.best and Retention.metric go together")


class Checkpoints:
    """The checkpoints of one run, for writing and resuming. Every process makes one.

    Example:
        with Checkpoints(run, Retention(last=2, best=1, metric="c4/loss")) as checkpoints:
            step, params, opt_state = checkpoints.restore(shapes_of_params, shapes_of_opt_state)
            checkpoints.save(step, params, opt_state, metrics)
    """

    def __init__(self, run: epath.PathLike, retention: Retention = Retention()):
        self.run = epath.Path(run)
        self._manager = _manager(self.run, retention, writes=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for what is being written

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, params: Any, opt_state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begin to save. On return the arrays may be donated; they are written in the background.

        A save that is still being written is waited for; an error of an earlier one is raised here.
        """
        import orbax.checkpoint as ocp

        prints = fingerprints({"params": params, "opt_state": opt_state})
        if step in self._manager.all_steps():
            self._manager.delete(step)  # only a damaged one, passed over by restore, can be there
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=_save(params),
                opt_state=_save(opt_state),
                facts=ocp.args.JsonSave({"step": step, "fingerprint": prints}),
            ),
            metrics=dict(metrics) if metrics else None,
            force=True,
        )

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, params: Any, opt_state: Any) -> tuple[int, Any, Any] | None:
        """The newest whole checkpoint: (step, params, opt_state); None where there is none at all.

        Args:
            params, opt_state: trees of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            NoCheckpoint: there are checkpoints, and none is whole.
        """
        if not self.steps():
            return None
        wanted = {"params": params, "opt_state": opt_state}
        step, items = _newest_whole(self._manager, functools.partial(_read, self._manager, wanted))
        return step, items["params"], items["opt_state"]


def restore_params(run: epath.PathLike, shapes: Any, step: int | None = None) -> tuple[int, Any]:
    """The parameters of a training run.

    Args:
        run: the run's directory.
        shapes: tree of `jax.ShapeDtypeStruct`, as `Model.shapes()`; their shardings, where given,
            say where the arrays go.
        step: which checkpoint; the newest whole one by default.

    Returns:
        (step, params)

    Raises:
        NoCheckpoint: no whole checkpoint, or none of that step.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here),
        shapes,
    )
    with _reading(run) as manager:
        read = functools.partial(_read, manager, {"params": shapes})
        step, items = _newest_whole(manager, read, only=step)
    return step, items["params"]


def load_params(
    run: epath.PathLike,
    load: Callable[[epath.Path], tuple[Loaded, Sequence[int]]],
    step: int | None = None,
) -> Loaded:
    """What `load` makes of the parameters of a run's newest whole checkpoint.

    For readers that take the arrays apart while they read (`models.weights`).

    Args:
        load: given the directory of the parameters, as Orbax keeps them, returns its result and
            each leaf's sum of `fingerprint_part`s over all it read, in the order of the leaves.
        step: which checkpoint; the newest whole one by default.

    Raises:
        NoCheckpoint: no whole checkpoint, or none of that step.
    """
    import orbax.checkpoint as ocp

    with _reading(run) as manager:

        def read(step: int) -> tuple[Any, str | None]:
            loaded: Any = None
            saved: int | None = None
            problem: str | None = None
            own = 0
            try:
                arguments = ocp.args.Composite(facts=ocp.args.JsonRestore())
                saved = manager.restore(step, args=arguments)["facts"]["fingerprint"]["params"]
                loaded, sums = load(epath.Path(manager.directory) / str(step) / "params")
                own = _combined(sums)
            except Exception as error:  # as in _read
                problem = _problem(error)
            # Each process has summed what it read, and fingerprints of shares add up.
            if _everywhere(own) != saved and problem is None:
                problem = "the fingerprint of params differs from the one it was saved with"
            return loaded, problem

        return _newest_whole(manager, read, only=step)[1]


def write_config(directory: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Write a model configuration (`config.to_dict()`) as `winnow_model.json`, atomically."""
    path = epath.Path(directory) / MODEL_FILE
    temporary = path.with_name(f".{MODEL_FILE}.{os.getpid()}")
    temporary.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """What `write_config` wrote; `models.config.from_dict` makes a configuration of it."""
    return json.loads((epath.Path(directory) / MODEL_FILE).read_text())


def fingerprints(trees: Mapping[str, Any]) -> dict[str, int]:
    """For each tree a number that changes when any bit of any of its arrays changes or moves.

    The same on every mesh.
    """
    return {name: int(value) for name, value in _fingerprints(dict(trees)).items()}


@jax.jit
def _fingerprints(trees: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: _fingerprint(jax.tree.leaves(tree)) for name, tree in trees.items()}


def _fingerprint(leaves: list[jax.Array]) -> jax.Array:
    # Integer sums wrap and commute, so neither the sharding nor the order of summation shows.
    total = jnp.uint32(0)
    for leaf in leaves:
        total = total * jnp.uint32(_NEXT_LEAF) + _leaf_sum(leaf)
    return total


def _leaf_sum(leaf: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    place = jnp.uint32(1)
    for dimension in range(leaf.ndim):
        iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dimension)
        place = place * jnp.uint32(0x01000193) + 2 * iota  # stays odd: no bit is multiplied away
    return jnp.sum(bits * place, dtype=jnp.uint32)


def fingerprint_part(part: np.ndarray, start: Sequence[int]) -> int:
    """The share in the fingerprint of a part of a leaf that begins at index `start`.

    A leaf's own is the sum of its parts', modulo 2^32. On the host, where readers have the parts.
    """
    if part.nbytes > _CACHED_BYTES:
        axis = next(axis for axis, length in enumerate(part.shape) if length > 1)
        rows = max(1, part.shape[axis] * _CACHED_BYTES // part.nbytes)
        total = 0
        for first in range(0, part.shape[axis], rows):
            band = part[(slice(None),) * axis + (slice(first, first + rows),)]
            begin = [n + first if i == axis else n for i, n in enumerate(start)]
            total += fingerprint_part(band, begin)
        return total % 2**32
    bits = part.view(f"uint{8 * part.dtype.itemsize}").astype(np.uint32, copy=False)
    place = np.ones((1,) * part.ndim, np.uint32)
    for dimension, (first, length) in enumerate(zip(start, part.shape, strict=True)):
        along = [1] * part.ndim
        along[dimension] = length
        iota = np.arange(first, first + length, dtype=np.uint32).reshape(along)
        place = place * np.uint32(0x01000193) + 2 * iota
    return int(np.sum(bits * place, dtype=np.uint32))


def _combined(sums: Sequence[int]) -> int:
    """The fingerprint of a tree, of its leaves' sums."""
    total = 0
    for leaf_sum in sums:
        total = (total * _NEXT_LEAF + int(leaf_sum)) % 2**32
    return total


@contextlib.contextmanager
def _reading(run: epath.PathLike) -> Iterator[Any]:
    """The manager of a run's checkpoints, for reading."""
    run = epath.Path(run)
    if not (run / DIRECTORY).exists():
        raise NoCheckpoint(f"{run} holds no {DIRECTORY}/: it is not a training run")
    manager = _manager(run, Retention(), writes=False)
    try:
        yield manager
    finally:
        manager.close()


def _save(tree: Any) -> Any:
    import orbax.checkpoint as ocp

    in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    return ocp.args.StandardSave(tree, save_args=in_chunks)


def _manager(run: epath.Path, retention: Retention, writes: bool) -> Any:
    import orbax.checkpoint as ocp
    from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

    rules: list[Any] = [keep.LatestN(retention.last)]
    if retention.every:
        rules.append(keep.EveryNSteps(retention.every))

    def lowest(metrics: Mapping[str, float]) -> float:
        return -metrics[str(retention.metric)]  # the last of the ascending order are kept

    if retention.metric is not None:
        best = keep.BestN(
            get_metric_fn=lowest, n=retention.best, keep_checkpoints_without_metrics=False
        )
        rules.append(best)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(rules),
        best_fn=lowest if retention.metric is not None else None,
        cleanup_tmp_directories=writes,  # what killed processes left
        create=writes,
        save_root_metadata=writes,
        enable_async_checkpointing=writes,
    )
    names = ("params", "opt_state", "facts")
    return ocp.CheckpointManager((run / DIRECTORY).resolve(), item_names=names, options=options)


def _newest_whole(
    manager: Any, read: Callable[[int], tuple[Any, str | None]], only: int | None = None
) -> tuple[int, Any]:
    """(step, items) of the newest checkpoint that can be read and bears its fingerprint.

    `read(step)` returns (items, None), or (anything, what is wrong).
    """
    steps = sorted(manager.all_steps(), reverse=True)
    if only is not None and only not in steps:
        raise NoCheckpoint(f"{manager.directory} has no step {only}; it has {sorted(steps)}")
    failures: list[str] = []
    for step in steps if only is None else [only]:
        items, problem = read(step)
        if not _anywhere(problem is not None):
            if failures:
                _log.warning("continuing from the checkpoint of step %d", step)
            return step, items
        problem = problem or "another process could not read its part"
        failures.append(f"step {step}: {problem}")
        _log.warning("the checkpoint of step %d is not whole: %s", step, problem)
    raise NoCheckpoint(
        f"{manager.directory} holds no whole checkpoint:\n  "
        + "\n  ".join(failures or ["it is empty"])
    )


def _read(manager: Any, wanted: Mapping[str, Any], step: int) -> tuple[dict[str, Any], str | None]:
    """(items, None), or ({}, what is wrong)."""
    import orbax.checkpoint as ocp

    arguments = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
    try:
        found = manager.restore(
            step, args=ocp.args.Composite(facts=ocp.args.JsonRestore(), **arguments)
        )
        items = {name: found[name] for name in wanted}
        saved = found["facts"]["fingerprint"]
        for name, value in fingerprints(items).items():
            if value != saved[name]:
                return {}, f"the fingerprint of {name} differs from the one it was saved with"
    # A damaged file surfaces as almost any exception of Orbax, TensorStore or json.
    except Exception as error:
        return {}, _problem(error)
    return items, None


def _problem(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _everywhere(share: int) -> int:
    """The sum over all processes, modulo 2^32."""
    if jax.process_count() == 1:
        return share
    shares = multihost_utils.process_allgather(np.asarray(share, np.uint32))
    return int(shares.sum(dtype=np.uint32))


def _anywhere(condition: bool) -> bool:
    """Whether the condition holds on any process; every process gets the same answer."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).any())
