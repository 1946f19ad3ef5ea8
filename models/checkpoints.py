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
- Arrays are read straight into the shardings asked for, whatever mesh and hosts wrote them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

MODEL_FILE = "winnow_model.json"
DIRECTORY = "checkpoints"

_log = logging.getLogger(__name__)


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
                params=ocp.args.StandardSave(params),
                opt_state=ocp.args.StandardSave(opt_state),
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
        step, items = _newest_whole(self._manager, {"params": params, "opt_state": opt_state})
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
    run = epath.Path(run)
    if not (run / DIRECTORY).exists():
        raise NoCheckpoint(f"{run} holds no {DIRECTORY}/: it is not a training run")
    manager = _manager(run, Retention(), writes=False)
    try:
        step, items = _newest_whole(manager, {"params": shapes}, only=step)
    finally:
        manager.close()
    return step, items["params"]


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
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.uint32(1)
        for dimension in range(leaf.ndim):
            iota = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, dimension)
            place = (
                place * jnp.uint32(0x01000193) + 2 * iota
            )  # stays odd: no bit is multiplied away
        total = total * jnp.uint32(0x9E3779B1) + jnp.sum(bits * place, dtype=jnp.uint32)
    return total


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
    manager: Any, wanted: Mapping[str, Any], only: int | None = None
) -> tuple[int, dict[str, Any]]:
    """(step, items) of the newest checkpoint that can be read and bears its fingerprint."""
    steps = sorted(manager.all_steps(), reverse=True)
    if only is not None and only not in steps:
        raise NoCheckpoint(f"{manager.directory} has no step {only}; it has {sorted(steps)}")
    failures: list[str] = []
    for step in steps if only is None else [only]:
        items, problem = _read(manager, step, wanted)
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


def _read(manager: Any, step: int, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
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
        return {}, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    return items, None


def _anywhere(condition: bool) -> bool:
    """Whether the condition holds on any process; every process gets the same answer."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).any())
