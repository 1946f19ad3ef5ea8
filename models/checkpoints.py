"""Checkpoints of a training run, by Orbax: asynchronous, atomic, sharded, and verified when read.

    run/
      winnow_model.json         the model's configuration, so that a run can be loaded as a model
      checkpoints/
        1000/params/...         parameters and optimizer state are items of their own, so that
        1000/opt_state/...      loading a model reads the parameters alone
        1000/facts/...          {"step", "fingerprint"}

- A checkpoint exists once Orbax has committed it, with every byte written. Later damage is found
  when the checkpoint is read: the fingerprint of each item, a position-weighted sum of all its bits
  modulo 2^32, is stored with it. (Orbax alone reads a flipped bit without an error.) It is computed
  on the devices and does not depend on the mesh.
- Restoring takes the newest whole checkpoint and logs the damaged ones that it skipped. It deletes
  none: they are replaced when training reaches their step again.
- Arrays are read straight into the requested shardings, independent of the mesh and hosts that
  wrote them. They are stored in chunks of at most `CHUNK_BYTES`, so that a part can be read alone.
- A save that fails, as on a full disk, is an error of one line that names the directory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from etils import epath
from jax.experimental import multihost_utils

from models import json_file
from models.errors import ModelError, first_line, reading

MODEL_FILE = "winnow_model.json"
DIRECTORY = "checkpoints"
CHUNK_BYTES = 4 << 20

_DIGESTS = "digests"  # in MODEL_FILE, beside the fields of the configuration
_CONFIG_DIGEST = "config"

_NEXT_LEAF = 0x9E3779B1  # the factor between leaves in a fingerprint
_CACHED_BYTES = 1 << 20  # computed at a time, so that it stays in the processor's cache

_log = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


class NoCheckpoint(ModelError):
    """A run without any whole checkpoint to read."""


class CheckpointError(ModelError):
    """A checkpoint that cannot be written."""


@dataclasses.dataclass(frozen=True)
class Retention:
    """Rules of the checkpoints to keep; a checkpoint is kept if any of them names it.

    Attributes:
      last: the number of newest checkpoints.
      every: checkpoints whose step is a multiple of it; 0 for none.
      best: the number of checkpoints with the lowest values of `metric`.
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
        self._quiet = _WithoutRepeatedErrors()
        with self._writing():
            self._manager = _manager(self.run, retention, writes=True)

    def __enter__(self) -> Checkpoints:
        self._quiet.__enter__()  # threads of Orbax log errors at any time
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            with self._writing():
                self._manager.close()  # waits for pending writes
        except CheckpointError:
            if kind is None:  # else the error that ends the context is the one to report
                raise
        finally:
            self._quiet.__exit__()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Re-raise an error of writing as a CheckpointError."""
        try:
            yield
        # NOTE: a failed write surfaces as an exception of Orbax, TensorStore or the system.
        except Exception as error:
            self._quiet.stays = True
            # Writes that were not begun are collected at any time, even as the interpreter ends.
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            raise CheckpointError(
                f"cannot write a checkpoint to {self.run / DIRECTORY} ({_cause(error)}): free "
                "space or correct the path, and run the same command again; it continues from the "
                "newest whole checkpoint"
            ) from error

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, params: Any, opt_state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begin to save. On return the arrays may be donated; they are written in the background.

        An earlier save that is still being written is waited for, and its error is raised here.

        Raises:
            CheckpointError: a checkpoint cannot be written.
        """
        import orbax.checkpoint as ocp

        prints = fingerprints({"params": params, "opt_state": opt_state})
        items = ocp.args.Composite(
            params=_save(params),
            opt_state=_save(opt_state),
            facts=ocp.args.JsonSave({"step": step, "fingerprint": prints}),
        )
        with self._writing():
            if step in self._manager.all_steps():
                self._manager.delete(step)  # it can only be one that `restore` found damaged
            metrics = dict(metrics) if metrics else None
            self._manager.save(step, args=items, metrics=metrics, force=True)

    def wait(self) -> None:
        """Wait until all saves are on disk.

        Raises:
            CheckpointError: a checkpoint cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def restore(self, params: Any, opt_state: Any) -> tuple[int, Any, Any] | None:
        """Return (step, params, opt_state) of the newest whole checkpoint; None without any.

        Args:
            params, opt_state: trees of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            NoCheckpoint: there are checkpoints, and all are damaged.
        """
        if not self.steps():
            return None
        wanted = {"params": params, "opt_state": opt_state}
        step, items = _newest_whole(self._manager, functools.partial(_read, self._manager, wanted))
        return step, items["params"], items["opt_state"]


def restore_params(run: epath.PathLike, shapes: Any, step: int | None = None) -> tuple[int, Any]:
    """Return the parameters of a training run.

    Args:
        run: the run's directory.
        shapes: tree of `jax.ShapeDtypeStruct`, as `Model.shapes()`; arrays get their shardings, or
            are put on the default device.
        step: of the checkpoint; the newest whole one by default.

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
    """Return the result of `load` for the parameters of a run's newest whole checkpoint.

    This is for readers that split the arrays while they read (`models.weights`).

    Args:
        load: given the directory of the parameters, as Orbax stores them, returns its result and
            each leaf's sum of `fingerprint_part`s over all it read, in the order of the leaves.
        step: of the checkpoint; the newest whole one by default.

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


def write_config(
    directory: epath.PathLike, config: Mapping[str, Any], files: Sequence[str] = ()
) -> None:
    """Write a model configuration (`config.to_dict()`) as `winnow_model.json`, atomically.

    With it are written a digest of the configuration, and one of each of `files`, which are small
    and beside it.
    """
    directory = epath.Path(directory)
    digests = {name: _digest((directory / name).read_bytes()) for name in files}
    content = {**config, _DIGESTS: {_CONFIG_DIGEST: _config_digest(config), **digests}}
    path = directory / MODEL_FILE
    temporary = path.with_name(f".{MODEL_FILE}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def read_config(directory: epath.PathLike) -> dict[str, Any]:
    """Return the configuration that `write_config` wrote, for `models.config.from_dict`.

    Raises:
        ModelError: the file is damaged.
    """
    config, digests = _read_config(epath.Path(directory))
    if digests and digests.get(_CONFIG_DIGEST) != _config_digest(config):
        raise ModelError(
            f"{_damaged(epath.Path(directory) / MODEL_FILE)}; if it was edited on purpose, remove "
            f"its field {_DIGESTS!r}"
        )
    return config


def check_files(directory: epath.PathLike) -> None:
    """Check the files whose digests `write_config` stored.

    Raises:
        ModelNotFound: one is missing.
        ModelError: one is damaged.
    """
    directory = epath.Path(directory)
    _, digests = _read_config(directory)
    for name, digest in digests.items():
        if name == _CONFIG_DIGEST:
            continue
        with reading(directory / name):
            content = (directory / name).read_bytes()
        if _digest(content) != digest:
            raise _damaged(directory / name)


def _read_config(directory: epath.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (configuration, digests); files of before November 2026 have no digests."""
    config = json_file.read_object(directory / MODEL_FILE)
    digests = config.pop(_DIGESTS, {})
    if not isinstance(digests, dict) or any("/" in name for name in digests):
        raise _damaged(directory / MODEL_FILE)
    return config, digests


def _config_digest(config: Mapping[str, Any]) -> str:
    return _digest(json.dumps(config, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)


def _damaged(path: epath.Path) -> ModelError:
    return ModelError(
        f"{path} is damaged: its content differs from the digest stored with it. Copy "
        f"{path.parent} again, or remove it and run the command that wrote it again"
    )


def fingerprints(trees: Mapping[str, Any]) -> dict[str, int]:
    """Return for each tree a number that changes when any bit of its arrays changes or moves.

    It is the same on every mesh.
    """
    return {name: int(value) for name, value in _fingerprints(dict(trees)).items()}


@jax.jit
def _fingerprints(trees: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: _fingerprint(jax.tree.leaves(tree)) for name, tree in trees.items()}


def _fingerprint(leaves: list[jax.Array]) -> jax.Array:
    # Integer sums wrap and commute, so the result depends on no sharding or order of summation.
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
        place = place * jnp.uint32(0x01000193) + 2 * iota  # stays odd, so that each bit counts
    return jnp.sum(bits * place, dtype=jnp.uint32)


def fingerprint_part(part: np.ndarray, start: Sequence[int]) -> int:
    """Return the share in the fingerprint of a part of a leaf that begins at index `start`.

    The leaf's own is the sum over its parts, modulo 2^32. It is computed on the host.
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
    """Return the fingerprint of a tree from the sums of its leaves."""
    total = 0
    for leaf_sum in sums:
        total = (total * _NEXT_LEAF + int(leaf_sum)) % 2**32
    return total


@contextlib.contextmanager
def _reading(run: epath.PathLike) -> Iterator[Any]:
    """Provide the manager of a run's checkpoints, for reading."""
    run = epath.Path(run)
    if not (run / DIRECTORY).exists():
        raise NoCheckpoint(f"{run} holds no {DIRECTORY}/: it is not a training run")
    with _WithoutRepeatedErrors():
        manager = _manager(run, Retention(), writes=False)
        try:
            yield manager
        finally:
            manager.close()


class _WithoutRepeatedErrors:
    """A context without the tracebacks of errors that Orbax also raises.

    Orbax and asyncio log them, and TensorStore prints for every other write that its event loop is
    closed. After a failed write the context stays: threads still print while the process ends.
    """

    def __init__(self) -> None:
        # NOTE: absl's own logger class, which names the caller's file, has to come first.
        import absl.logging  # noqa: F401

        self._loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
        self.stays = False

    def __enter__(self) -> _WithoutRepeatedErrors:
        self._previous = sys.unraisablehook
        sys.unraisablehook = self._hook
        for logger in self._loggers:
            logger.addFilter(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        if self.stays:
            return
        sys.unraisablehook = self._previous
        for logger in self._loggers:
            logger.removeFilter(self._keep)

    def _hook(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self._previous(unraisable)

    @staticmethod
    def _keep(record: logging.LogRecord) -> bool:
        orbax = record.levelno >= logging.ERROR and "orbax" in record.pathname
        return not (orbax or "exception was never retrieved" in record.getMessage())


def _cause(error: Exception) -> str:
    """Return the system's reason in an error of Orbax or TensorStore, or its first line."""
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)
    reasons = [os.strerror(code) for code in known]
    return next((reason for reason in reasons if reason in str(error)), _problem(error))


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
        cleanup_tmp_directories=writes,  # left by killed processes
        create=writes,
        save_root_metadata=writes,
        enable_async_checkpointing=writes,
    )
    names = ("params", "opt_state", "facts")
    return ocp.CheckpointManager((run / DIRECTORY).resolve(), item_names=names, options=options)


def _newest_whole(
    manager: Any, read: Callable[[int], tuple[Any, str | None]], only: int | None = None
) -> tuple[int, Any]:
    """Return (step, items) of the newest checkpoint that is readable and has its fingerprint.

    `read(step)` returns (items, None), or (anything, a description of the damage).
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
        f"{manager.directory} holds no whole checkpoint ({'; '.join(failures) or 'it is empty'}). "
        "Copy the run again, or remove its directory and train again with the same command"
    )


def _read(manager: Any, wanted: Mapping[str, Any], step: int) -> tuple[dict[str, Any], str | None]:
    """Return (items, None), or ({}, a description of the damage)."""
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
    # A damaged file can raise almost any exception of Orbax, TensorStore or json.
    except Exception as error:
        return {}, _problem(error)
    return items, None


def _problem(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _everywhere(share: int) -> int:
    """Return the sum over all processes, modulo 2^32."""
    if jax.process_count() == 1:
        return share
    shares = multihost_utils.process_allgather(np.asarray(share, np.uint32))
    return int(shares.sum(dtype=np.uint32))


def _anywhere(condition: bool) -> bool:
    """Return whether the condition holds on any process, the same on every process."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.asarray(condition)).any())
