"""The device side of scoring: a model on a mesh, and one compiled program.

Choices
- A process scores with its own devices. Processes divide a corpus by shards and never wait for each
  other, so any of them may die, or start late.
- All batches have one shape, so there is one program. It is compiled before the first batch, so
  that its compilation time is measured separately, and kept in a cache on disk.
- On a CPU a batch is computed a few rows at a time. Their intermediate results stay in the cache,
  where those of a whole batch would be written to memory and read again. Every core is a device
  (`use_cores`); the devices share one copy of the parameters.
- Without mesh axes all devices hold the whole model and a part of the rows; `fsdp` splits the
  parameters, `tensor` every layer: see models/partitioning.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import checkpoints, flops, partitioning, weights
from models.compiler_options import scoring_options
from models.model import Model
from pruning.scores.model.scorer import Prepared, ScoreError
from pruning.store import progress
from pruning.store.parallel import available_cpus

_CPU_TOKENS = 1024  # tokens of a device at a time


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in the devices' memory.

    Attributes:
      digest: digest of the parameters, independent of the format they were read from.
    """

    model: Model
    params: Any
    mesh: jax.sharding.Mesh
    digest: str

    @property
    def parts(self) -> int:
        """Number of parts into which the rows of a batch are split over devices."""
        return math.prod(self.mesh.shape[axis] for axis in ("data", "fsdp"))

    def require_rows(self, batch_rows: int) -> None:
        """Raise ScoreError if the rows of a batch are not divisible among the devices."""
        if batch_rows % self.parts:
            raise ScoreError(
                f"batch_rows={batch_rows} does not divide over {self.parts} devices (data x "
                f"fsdp): give a multiple of {self.parts}."
            )


def use_cores(rows: int | None) -> None:
    """Make every CPU core a JAX device, up to a number that divides the rows of a batch, if given.

    One device of many cores leaves most of them idle in operations that are too small to be split.
    Call it before JAX starts. It has no effect later, or if the number of devices is set already
    (JAX_NUM_CPU_DEVICES, XLA_FLAGS).
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or jax.config.jax_num_cpu_devices >= 0:  # type: ignore[attr-defined]
        return
    fitting = max(n for n in range(1, available_cpus() + 1) if (rows or n) % n == 0)
    with contextlib.suppress(RuntimeError):  # JAX is initialized already
        jax.config.update("jax_num_cpu_devices", fitting)


def load(
    path: str,
    dtype: str,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    residual_dtype: str = "float32",
    attention: str = "auto",
    mlp_kernel: str = "auto",
    scan_layers: bool = True,
) -> Loaded:
    """Read a model for scoring onto this process's devices.

    Args:
      path: any argument of `models.weights.load`.
      dtype: "float32" or "bfloat16", of the parameters and the computation.
      fsdp, tensor: mesh axes; the remaining devices are data-parallel.
      residual_dtype, attention, mlp_kernel, scan_layers: see `models.config.RunConfig`.
    """
    devices = jax.local_devices()
    axes = {"data": -1, "fsdp": fsdp, "tensor": tensor}
    mesh = partitioning.make_mesh(axes, devices)
    shared = devices[0].platform == "cpu" and fsdp == tensor == 1
    onto = partitioning.make_mesh(axes, devices[:1]) if shared else mesh
    with progress.Phase(f"loading the model {path}"):
        model, params = weights.load(path, dtype=dtype, mesh=onto, scan_layers=scan_layers)
    settings: dict[str, Any] = {
        "dtype": dtype,
        "residual_dtype": residual_dtype,
        "attention": attention,
        "mlp_kernel": mlp_kernel,
    }
    model = Model(dataclasses.replace(model.config, **settings))
    digest = f"{checkpoints.fingerprints({'params': params})['params']:08x}"
    if shared:
        params = jax.tree.map(functools.partial(_on_all, mesh), params)
    return Loaded(model, params, mesh, digest)


def traced(
    step: Callable[[Any, Mapping[str, jax.Array]], jax.Array],
    params: Any,
    mesh: jax.sharding.Mesh,
    shapes: Mapping[str, tuple[int, ...]],
) -> Any:
    """Return a scorer's step, traced for a mesh and one shape of batch (`jax.stages.Traced`).

    Args:
      params: arrays, or `jax.ShapeDtypeStruct` with shardings without devices.
      shapes: shapes of the batch's int32 arrays, by feature.
    """
    sharding = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
        for name, shape in shapes.items()
    }
    with partitioning.use(mesh):
        return jax.jit(step, out_shardings=sharding).trace(params, batch)


class Step:
    """A scorer's step, compiled for one shape of batch."""

    def __init__(
        self,
        prepared: Prepared,
        loaded: Loaded,
        shapes: Mapping[str, tuple[int, ...]],
        options: Mapping[str, str | int | bool] | None = None,
    ):
        """Compile the program.

        Args:
          shapes: shapes of the batch's int32 arrays, by feature.
          options: options of XLA's compiler, in addition to `scoring_options`.

        Raises:
          ScoreError: the rows are not divisible among the devices.
        """
        mesh, parts = loaded.mesh, loaded.parts
        self._sharding = partitioning.batch_sharding(mesh)
        self._rows = next(iter(shapes.values()))[0]
        loaded.require_rows(self._rows)
        self._params, call = loaded.params, prepared.step
        if mesh.devices.flat[0].platform == "cpu":
            self._params = jax.tree_util.tree_map_with_path(_bits, loaded.params)
            dtypes = jax.tree.map(lambda leaf: leaf.dtype, loaded.params)

            def call(params, batch):
                return prepared.step(jax.tree.map(_values, params, dtypes), batch)

            each, longest = self._rows // parts, max(shape[1] for shape in shapes.values())
            fitting = min(each, max(1, _CPU_TOKENS // longest))
            self._rows = parts * max(n for n in range(1, fitting + 1) if each % n == 0)
        shapes = {name: (self._rows, *shape[1:]) for name, shape in shapes.items()}
        started = time.perf_counter()
        with progress.Phase("compiling the scorer"):
            program = traced(call, self._params, mesh, shapes).lower()
            self._call = program.compile(scoring_options(mesh, loaded.model.config, options or {}))
        self.compile_seconds = time.perf_counter() - started
        peak = flops.peak_flops(mesh.devices.flat[0])
        self.peak_flops = None if peak is None else peak * mesh.size

    def __call__(self, rows: Mapping[str, np.ndarray]) -> jax.Array:
        """Start the computation without waiting for it: float32 [rows, positions, ...]."""
        count = len(next(iter(rows.values())))
        answers: list[jax.Array] = []
        for first in range(0, count, self._rows):
            some = {name: values[first : first + self._rows] for name, values in rows.items()}
            if answers and not any(values.any() for values in some.values()):
                answers.append(jnp.zeros_like(answers[0]))  # empty rows of a shard's last batch
            else:
                answers.append(self._call(self._params, jax.device_put(some, self._sharding)))
        return answers[0] if len(answers) == 1 else jnp.concatenate(answers)


def _on_all(mesh: jax.sharding.Mesh, leaf: jax.Array) -> jax.Array:
    """Return a CPU's array on all CPU devices of a mesh, in the same memory."""
    host = np.asarray(leaf)
    shards = [jax.device_put(host, device, may_alias=True) for device in mesh.devices.flat]
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, shards)


def _bits(path: Any, leaf: jax.Array) -> jax.Array:
    """Return stacked bfloat16 layers as integers in the same memory, others unchanged.

    A program on a CPU slices layers as integers, see models/layers.py. With bfloat16 inputs it
    would first convert all of them, at every call.
    """
    if leaf.dtype != jnp.bfloat16 or "layers" not in (key.key for key in path):
        return leaf
    shards = [
        jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device, may_alias=True)
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _values(leaf: jax.Array, dtype: Any) -> jax.Array:
    """Return the inverse of `_bits`, inside the program."""
    return leaf if leaf.dtype == dtype else jax.lax.bitcast_convert_type(leaf, dtype)
