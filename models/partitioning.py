"""Sharding of every array: a device mesh, and rules from logical axes to mesh axes.

- A model names the axes of its parameters ("embed", "heads", ...) and of a few activations; one
  table, `RULES`, maps each name to the mesh axes that it is split over. Another parallelism is
  another mesh, not another model.
- The mesh has three axes. `data` holds copies, `fsdp` holds slices of the parameters and of the
  batch, `tensor` splits heads, the feed-forward width and the vocabulary.
- TPU slices that are joined by a network only divide the outer part of `data`, whose one
  communication is the sum of gradients, once a step.
- Norms, dropout and the residual stream between two products are not split by `tensor`. They can be
  split along the length instead: `RULES | SEQUENCE` divides their memory by `tensor` and replaces
  an all-reduce by a reduce-scatter and an all-gather of the same bytes.
- The mesh axes are of type Auto: the compiler propagates shardings, and `constrain` pins the few
  activations where it would otherwise choose badly.
- A dimension that its mesh axes do not divide stays whole, which is reported once. Vectors (norm
  scales, biases, factored optimizer rows) stay whole on purpose: splitting 4 kB saves nothing and
  costs a gather at each use.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.errors import ModelError

Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

MESH_AXES = ("data", "fsdp", "tensor")

RULES: Rules = {
    # Parameters.
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("tensor",),
    "layers": (),
    "relpos_heads": (),
    "relpos_buckets": (),
    "positions": (),
    "head_dim": (),
    "sentence": (),
    "gate": (),
    # Activations.
    "batch": ("data", "fsdp"),
    "length": (),
}

# Added to the rules: the length takes the mesh axes that no other dimension of an activation has.
SEQUENCE: Rules = {"length": ("tensor",)}


class MeshError(ValueError):
    """A mesh that does not fit the devices, or a batch that does not fit the mesh."""


_log = logging.getLogger(__name__)
# The rules that `constrain` applies. A user context is part of jit's cache key, so that a function
# traced under one table is traced anew under another.
_active_rules = jax.make_user_context(None)


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh over all devices of all processes.

    Args:
        axes: sizes of `data`, `fsdp` and `tensor`; -1, at most once, stands for the quotient of the
            number of devices and the other sizes. By default `data` is -1 and the others 1.
        devices: the devices to use; all of them (`jax.devices()`) by default.

    Where the devices are of several TPU slices, each slice is a block of its own along `data`.

    Raises:
        MeshError: an unknown axis, two -1, sizes whose product is not the number of devices, or a
            size of `data` that the number of slices does not divide.
    """
    axes = dict(axes or {})
    if unknown := sorted(set(axes) - set(MESH_AXES)):
        raise MeshError(f"unknown mesh axes {unknown}; the mesh has {list(MESH_AXES)}")
    sizes = {name: axes.get(name, -1 if name == "data" else 1) for name in MESH_AXES}
    devices = list(jax.devices() if devices is None else devices)
    given = math.prod(size for size in sizes.values() if size != -1)
    wild = [name for name, size in sizes.items() if size == -1]
    if len(wild) > 1 or given < 1 or len(devices) % given or (not wild and given != len(devices)):
        raise MeshError(
            f"mesh {sizes} does not fill {len(devices)} devices: the product must be their number, "
            "or one axis -1 to fill it"
        )
    sizes |= {name: len(devices) // given for name in wild}
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, types, devices=devices)
    if sizes["data"] % slices:
        raise MeshError(
            f"mesh {sizes}: `data` must be a multiple of the {slices} slices, so that `fsdp` and "
            "`tensor` stay within one"
        )
    within = tuple((sizes | {"data": sizes["data"] // slices}).values())
    grid = mesh_utils.create_hybrid_device_mesh(
        within, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, MESH_AXES, axis_types=types)


def override(rules: Rules, changes: Rules) -> Rules:
    """Return `rules` with some of them replaced: `override(RULES, SEQUENCE)`.

    Raises:
        ValueError: an axis that no model has or no mesh has; or "batch", by which batches are read.
    """
    for name, target in changes.items():
        if name not in rules or name == "batch":
            known = sorted(set(rules) - {"batch"})
            raise ModelError(f"no rule for {name!r} to replace; there are: {', '.join(known)}")
        if unknown := sorted(set(target) - set(MESH_AXES)):
            raise ModelError(f"rule for {name!r}: the mesh has no axes {unknown}")
    return {**rules, **{name: tuple(target) for name, target in changes.items()}}


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[Mesh]:
    """Let `constrain` apply `mesh` and `rules` inside functions that are traced in the context."""
    frozen = tuple(sorted((name, tuple(target)) for name, target in rules.items()))
    with jax.set_mesh(mesh), _active_rules(frozen):
        yield mesh


def sharding_of(
    axes: Axes, mesh: Mesh, rules: Rules = RULES, shape: Sequence[int] | None = None
) -> NamedSharding:
    """Return the sharding of an array whose dimensions have the logical names `axes`.

    Each mesh axis splits one dimension, the first whose rule has it. So in an activation's
    ("batch", "length", "embed"), "embed" is whole, because `fsdp` is taken by "batch". Only
    "length" comes after heads and features wherever it is.

    Args:
        axes: one name per dimension; None is never split.
        shape: where given, a dimension that its mesh axes do not divide stays whole, which is
            reported once.

    Raises:
        ValueError: a name without a rule.

    >>> sharding_of(("embed", "mlp"), mesh).spec
    PartitionSpec('fsdp', 'tensor')
    """
    return NamedSharding(mesh, _partition_spec(axes, mesh, rules, shape))


def shardings(shapes: Any, axes: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Return the shardings of a tree of parameters, or of optimizer state shaped like them.

    Args:
        shapes: tree of arrays or `jax.ShapeDtypeStruct`.
        axes: the same tree with a tuple of logical names at each leaf.
    """

    def leaf(array: Any, names: Axes) -> NamedSharding:
        if sum(name != "layers" for name in names) < 2:
            return NamedSharding(
                mesh, PartitionSpec()
            )  # Vectors stay whole; see the module's head.
        return sharding_of(names, mesh, rules, array.shape)

    return jax.tree.map(leaf, shapes, axes)


def param_shardings(model: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Return the shardings of `model`'s parameters: a tree like `model.init`'s."""
    return shardings(model.shapes(), model.logical_axes(), mesh, rules)


def batch_sharding(mesh: Mesh, rules: Rules = RULES) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`, other dimensions whole."""
    return sharding_of(("batch",), mesh, rules)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Pin the sharding of an activation inside a jitted function; do nothing outside of `use`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or _active_rules.value is None:
        return x
    spec = _partition_spec(axes, mesh, dict(_active_rules.value), x.shape)
    return jax.lax.with_sharding_constraint(x, spec)


def platform() -> str:
    """Return the platform of the mesh's devices, attached or not; without a mesh, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Return the chip that `platform` refers to: "TPU v6 lite", "NVIDIA H100 80GB HBM3", "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.devices()[0] if device is None else device).device_kind


def parts(name: str) -> int:
    """Return the number of pieces of the logical axis `name` inside of `use`; 1 outside."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or _active_rules.value is None:
        return 1
    return math.prod(mesh.shape.get(axis, 1) for axis in dict(_active_rules.value)[name])


def per_shard(
    function: Callable[..., Any],
    arrays: Mapping[str, tuple[jax.Array | None, Axes]],
    result: Axes,
    result_shape: Sequence[int],
    *,
    summed: tuple[str, ...] = (),
) -> Any:
    """Run function(**arrays) on each device's own pieces, where the compiler cannot split it.

    Pieces are cut by the rules of `use`, so each row of the batch and each head must be computed
    independently. Gradients of arrays that several devices share are summed. Outside of `use` this
    is a plain call.

    Args:
        arrays: for each argument an array and one logical name for each of its dimensions; where
            the array is None, the argument is omitted.
        result, result_shape: names and shape of the one array that `function` returns.
        summed: logical axes of arguments over whose pieces `function` returns partial sums.
    """
    given = {name: (array, axes) for name, (array, axes) in arrays.items() if array is not None}
    values = [array for array, _ in given.values()]

    def call(*values: jax.Array) -> Any:
        return function(**dict(zip(given, values, strict=True)))

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or _active_rules.value is None:
        return call(*values)
    rules = dict(_active_rules.value)
    specs = tuple(_partition_spec(axes, mesh, rules, array.shape) for array, axes in given.values())
    out = _partition_spec(result, mesh, rules, result_shape)
    pieces = {
        axis
        for spec, (_, axes) in zip(specs, given.values(), strict=True)
        for target, name in zip(spec, axes, strict=False)  # a spec omits trailing whole dimensions
        if target is not None and name in summed
        for axis in ((target,) if isinstance(target, str) else target)
    }

    def call_and_add(*values: jax.Array) -> Any:
        partial = call(*values)
        return jax.lax.psum(partial, tuple(sorted(pieces))) if pieces else partial

    return jax.shard_map(call_and_add, in_specs=specs, out_specs=out, check_vma=False)(*values)


def batch_reader(mesh: Mesh) -> tuple[int, int]:
    """Return (index, count): the part of each global batch that this process reads.

    Without tensor parallelism across processes this is (process index, process count). Processes
    that hold the same rows get the same index.
    """
    sharding = batch_sharding(mesh)
    rows = _row_slots(mesh)
    slots: dict[int, set[int]] = {}
    placed: Mapping[Any, Any] = sharding.devices_indices_map((rows,))
    for device, (row, *_) in placed.items():
        slots.setdefault(device.process_index, set()).add(row.start or 0)
    parts = sorted({tuple(sorted(held)) for held in slots.values()})
    flat = [slot for part in parts for slot in part]
    if len(flat) != rows or len(set(map(len, parts))) != 1:
        raise MeshError(
            f"processes share batch rows unevenly under mesh {dict(mesh.shape)}: choose a size of "
            "`tensor` that divides the number of devices of a process, or a multiple of it"
        )
    return parts.index(tuple(sorted(slots[jax.process_index()]))), len(parts)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Put this process's rows of a batch on its devices, as part of the global batch.

    Args:
        batch: arrays [rows of this process, ...], the same number on every process.

    Returns:
        Arrays [rows of all processes, ...] under `batch_sharding`.

    Raises:
        MeshError: rows that the mesh does not divide.

    NOTE: where a process's devices are not adjacent along the mesh (some accelerator topologies),
    its rows are not adjacent in the global batch. The set of rows is the same, and so is every sum
    over it, up to rounding.
    """
    _, readers = batch_reader(mesh)
    slots = _row_slots(mesh)
    sharding = batch_sharding(mesh)

    def put(name: str, local: np.ndarray) -> jax.Array:
        rows = len(local) * readers
        if rows % slots:
            raise MeshError(
                f"{name}: a global batch of {rows} rows does not divide over {slots} devices "
                f"(data x fsdp of mesh {dict(mesh.shape)})"
            )
        return jax.make_array_from_process_local_data(sharding, local, (rows, *local.shape[1:]))

    return {name: put(name, np.asarray(local)) for name, local in batch.items()}


def _row_slots(mesh: Mesh) -> int:
    """Return the number of pieces of a batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def _partition_spec(
    axes: Axes, mesh: Any, rules: Rules, shape: Sequence[int] | None
) -> PartitionSpec:
    taken: set[str] = set()
    spec: list[tuple[str, ...] | str | None] = [None] * len(axes)
    for dimension, name in sorted(enumerate(axes), key=lambda item: item[1] == "length"):
        if name is not None and name not in rules:
            raise ModelError(f"no rule for the logical axis {name!r}; known: {sorted(rules)}")
        wanted = rules[name] if name is not None else ()
        target = tuple(a for a in wanted if mesh.shape.get(a, 1) > 1 and a not in taken)
        parts = math.prod(mesh.shape[a] for a in target)
        if shape is not None and shape[dimension] % parts:
            _report_whole(name, shape[dimension], target, parts)
            target = ()
        taken.update(target)
        spec[dimension] = target[0] if len(target) == 1 else target or None
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


@functools.cache
def _report_whole(name: str, size: int, target: tuple[str, ...], parts: int) -> None:
    _log.warning("axis %s of size %d stays whole: %d (%s) does not divide it", name, size, parts,
                 " x ".join(target))  # fmt: skip
