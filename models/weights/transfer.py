"""From stored tensors to a model's parameters, and back.

Every format is a mapping from the model's parameters to the tensors that hold them (`Source`),
written for unrolled layers. This module does the rest, for all formats alike:

- The key sets must match exactly, both ways, and every shape. A tensor that no parameter claims
  is as much an error as one that is missing: converters have written decoder weights under
  encoder names, and nobody saw it.
- A parameter is read in pieces of at most `PIECE_BYTES`, cut where its file is read cheaply. Each
  is put together in its final form (transposed, stacked, cast) on the host, written into the array
  on its devices, and let go. So the host never holds a parameter, let alone the model.
- Stacked layers are read layer by layer into the stack, and written from it layer by layer. What
  a file keeps as a stack is read as one, and taken apart on the devices where layers are wanted.
"""

import ctypes
import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from models import partitioning
from models.config import ModelConfig
from models.model import Model
from models.weights.safetensors_file import Pending
from models.weights.stored import Index, StoredTensor

Params = dict[str, Any]
Observer = Callable[[str, tuple[int, ...], np.ndarray], None]

PIECE_BYTES = 16 << 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter is kept.

    Attributes:
        tensor: name of the stored tensor.
        transposed: the tensor is [out, in]; kernels here are [in, out].
        part: (k, n): the parameter is the k-th of n equal parts of the tensor's last axis, as in
            GPT-2's joint projection of query, key and value.
        layers_axis: the parameter is a whole stack, kept with its layers on this axis: 1 as T5X
            scans, 0 in a training run of Winnow's. None: one layer's, or not a layer's.
    """

    tensor: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    layers_axis: int | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the tensor of a parameter of this shape must have."""
        if self.transposed:
            shape = shape[::-1]
        if self.layers_axis == 1:
            shape = (shape[1], shape[0], *shape[2:])
        return (*shape[:-1], shape[-1] * self.part[1]) if shape else shape

    def fill(self, block: np.ndarray, index: Index, tensors: Mapping[str, StoredTensor]) -> None:
        """Write `parameter[index]` into `block`."""
        tensor = tensors[self.tensor]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{self.tensor} holds {tensor.dtype}, which is no floating-point type")
        if self.transposed:
            block, index = block.T, index[::-1]
        if self.layers_axis == 1:
            block, index = np.moveaxis(block, 0, 1), (index[1], index[0], *index[2:])
        k, n = self.part
        if n > 1:
            first = k * tensor.shape[-1] // n
            index = (*index[:-1], slice(first + index[-1].start, first + index[-1].stop))
        tensor.copy_to(block, index)

    def grain(self, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """The tensor's `grain`, in the parameter's axes."""
        grain = tensors[self.tensor].grain
        if self.layers_axis == 1:
            grain = (grain[1], grain[0], *grain[2:])
        return grain[::-1] if self.transposed else grain


Sources = Mapping[str, Source]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model on disk that was looked into, not loaded.

    Attributes:
        config: its configuration, given or inferred.
        sources: for each parameter its tensor: for each layer's under its unrolled name, or for a
            whole stack under its own where the tensor is one.
        tensors: all that the files hold for the model, less what is known to be redundant.
        origin: its name, for messages.
        notes: what else there is to know, to show.
    """

    config: ModelConfig
    sources: Sources
    tensors: Mapping[str, StoredTensor]
    origin: str
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        """Whether layers are kept as stacks."""
        return any(source.layers_axis is not None for source in self.sources.values())

    def check(self) -> None:
        """Raise ValueError unless the tensors are exactly the model's, in name and in shape."""
        _check(_claims(self, Model(dataclasses.replace(self.config, scan_layers=True))), self)


def flatten(tree: Params) -> dict[str, Any]:
    """{"encoder/layers/attention/query/kernel": leaf, ...}"""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def unrolled_paths(path: str, shape: Sequence[int]) -> list[str]:
    """The name of each layer's part of a stacked parameter; of any other, its own name.

    >>> unrolled_paths("encoder/layers/mlp/wo/kernel", (2, 1024, 512))
    ['encoder/layers_0/mlp/wo/kernel', 'encoder/layers_1/mlp/wo/kernel']
    """
    head, stacked, tail = path.partition("layers/")
    return [f"{head}layers_{i}/{tail}" for i in range(shape[0])] if stacked else [path]


# --------------------------------------------------------------------------------------------------
# In


class _Claim(NamedTuple):
    """What one parameter is read from: one tensor, or one for each layer of a stack."""

    shape: tuple[int, ...]
    by_layer: bool
    sources: list[Source]

    def expected(self) -> dict[str, tuple[int, ...]]:
        piece = self.shape[1:] if self.by_layer else self.shape
        return {source.tensor: source.stored_shape(piece) for source in self.sources}

    def read(
        self,
        block: np.ndarray,
        index: Index,
        tensors: Mapping[str, StoredTensor],
        observe: Observer | None = None,
    ) -> None:
        """Write `parameter[index]` into `block`."""
        layers = [(block, self.sources[0])]
        if self.by_layer:
            layers = list(zip(block, self.sources[index[0]], strict=True))
            index = index[1:]
        for part, source in layers:
            source.fill(part, index, tensors)
            if observe is not None:
                observe(source.tensor, tuple(s.start for s in index), part)

    def pieces(
        self, index: Index, itemsize: int, tensors: Mapping[str, StoredTensor]
    ) -> Iterator[Index]:
        """`index` in parts of at most `PIECE_BYTES`, if the tensors can be read in such parts."""
        lengths = [s.stop - s.start for s in index]
        size = math.prod(lengths) * itemsize
        if size <= PIECE_BYTES:
            yield index
        elif self.by_layer and lengths[0] > 1:
            for rows in _cut(index[0], 1, PIECE_BYTES * lengths[0] // size):
                yield from self.pieces((rows, *index[1:]), itemsize, tensors)
        else:
            grain = self.sources[0].grain(tensors)
            grain = (1, *grain) if self.by_layer else grain
            axis = max(range(len(index)), key=lambda a: -(-lengths[a] // grain[a]))
            for part in _cut(index[axis], grain[axis], PIECE_BYTES * lengths[axis] // size):
                yield (*index[:axis], part, *index[axis + 1 :])


def _cut(whole: slice, grain: int, limit: int) -> Iterator[slice]:
    """Nearly equal parts of at most `limit`, or of one grain, that begin at multiples of it."""
    length = whole.stop - whole.start
    count = -(-length // max(limit, 1))
    step = max(grain, -(-length // count) // grain * grain)
    edges = range(whole.start // grain * grain, whole.stop, step)
    for start in edges:
        yield slice(max(start, whole.start), min(start + step, whole.stop))


def load(
    stored: Stored,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: partitioning.Rules | None = None,
    scan_layers: bool = True,
    observe: Observer | None = None,
) -> tuple[Model, Params]:
    """Read a model's parameters into device arrays; see `models.weights.load`.

    `observe(tensor, start, values)` sees everything that is read once, in float32 and before it is
    cast; over all processes together, where several load.

    Raises:
        ValueError: key sets or shapes that do not match.
    """
    dtype = np.dtype(dtype or jnp.float32)
    model = Model(dataclasses.replace(stored.config, scan_layers=scan_layers))
    reader = Model(dataclasses.replace(model.config, scan_layers=True)) if stored.stacked else model
    claims = _claims(stored, reader)
    _check(claims, stored)
    placed = {} if mesh is None else flatten(shardings(model, mesh, rules))
    for note, value in stored.notes.items():
        _log.info("%s: %s: %s", stored.origin, note, value)
    total = sum(math.prod(claim.shape) for claim in claims.values()) * dtype.itemsize
    report = _Progress(stored.origin, total)
    host_dtype = dtype if observe is None else np.dtype(np.float32)
    flat: dict[str, jax.Array] = {}
    staging = _Staging()
    for path, claim in claims.items():

        def read(index: Index, first: bool, claim: _Claim = claim) -> np.ndarray:
            block = staging.block([s.stop - s.start for s in index], host_dtype)
            claim.read(block, index, stored.tensors, observe if first else None)
            return block

        pieces = functools.partial(
            claim.pieces, itemsize=host_dtype.itemsize, tensors=stored.tensors
        )
        names = [path] if reader == model else unrolled_paths(path, claim.shape)
        layers = None if names == [path] else len(names)
        shape = claim.shape if layers is None else claim.shape[1:]
        arrays = place(shape, layers, dtype, placed.get(names[0]), pieces, read)
        _return_freed_memory()
        flat |= zip(names, arrays, strict=True)
        report(sum(array.nbytes for array in arrays))
    return model, unflatten(flat)


def _return_freed_memory() -> None:
    """Lets the system have what was freed; glibc keeps up to a third of all that was read."""
    if (trim := getattr(_c_library(), "malloc_trim", None)) is not None:
        trim(ctypes.c_size_t(0))


@functools.cache
def _c_library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if os.name == "posix" else None


def lazily(stored: Stored, dtype: Any) -> Params:
    """The parameters of the unrolled model, each read when NumPy asks for it and then let go.

    For writing them elsewhere without holding the model.

    Raises:
        ValueError: key sets or shapes that do not match.
    """
    claims = _claims(stored, Model(dataclasses.replace(stored.config, scan_layers=False)))
    _check(claims, stored)
    return unflatten(
        {path: _Lazy(claim, np.dtype(dtype), stored.tensors) for path, claim in claims.items()}
    )


@dataclasses.dataclass(frozen=True)
class _Lazy:
    claim: _Claim
    dtype: np.dtype
    tensors: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.claim.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        block = np.empty(self.shape, dtype or self.dtype)
        self.claim.read(block, tuple(slice(0, n) for n in self.shape), self.tensors)
        return block


class _Staging:
    """One buffer on the host that every piece passes through.

    Blocks of their own would be freed to the allocator, which gives little of them back.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def block(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Of this shape, with arbitrary contents, until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if size > self._bytes.size:
            self._bytes = np.empty(0, np.uint8)
            self._bytes = np.empty(size, np.uint8)
        return self._bytes[:size].view(dtype).reshape(shape)


def place(
    shape: tuple[int, ...],
    layers: int | None,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    pieces: Callable[[Index], Iterator[Index]],
    read: Callable[[Index, bool], np.ndarray],
) -> list[jax.Array]:
    """An array on its devices, of which each distinct shard is read once, piece by piece.

    Args:
        shape, sharding: the array's; no sharding for the default device.
        layers: as many arrays of that shape, which `read` gives as one stack. None: one array.
        pieces: cuts a shard's slices, which have both bounds, into those to read at a time.
        read: the values at such slices, given whether this is the first of the processes to read
            them; they are copied before the next call.
    """
    if sharding is None:
        index = tuple(slice(0, n) for n in shape)
        return [shards[0] for shards in _shards(index, layers, dtype, [None], pieces, read, True)]
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays: list[list[jax.Array]] = [[] for _ in range(layers or 1)]
    here = jax.process_index()
    for bounds, devices in holders.items():
        local = [device for device in devices if device.process_index == here]
        if local:
            first = min(devices, key=lambda device: device.id) in local
            index = tuple(slice(*pair) for pair in bounds)
            found = _shards(index, layers, dtype, local, pieces, read, first)
            for array, shards in zip(arrays, found, strict=True):
                array += shards
    return [jax.make_array_from_single_device_arrays(shape, sharding, shards) for shards in arrays]


def _shards(index, layers, dtype, devices, pieces, read, first) -> list[list[jax.Array]]:
    """For each layer its part of an array at `index`, on each of the devices."""
    stack = index if layers is None else (slice(0, layers), *index)
    shape = tuple(s.stop - s.start for s in index)
    shards: list[list[jax.Array]] = [[] for _ in range(layers or 1)]
    for piece in pieces(stack):
        block = read(piece, first)
        rows, part = slice(0, 1), piece
        if layers is None:
            block = block[None]
        else:
            rows, part = piece[0], piece[1:]
        start = tuple(np.int32(p.start - s.start) for p, s in zip(part, index, strict=True))
        for layer, values in zip(range(rows.start, rows.stop), block, strict=True):
            moved = [_moved(values, device) for device in devices]
            if part == index:
                shards[layer] = [array.astype(dtype) for array in moved]
                continue
            if not shards[layer]:
                shards[layer] = [jnp.zeros(shape, dtype, device=device) for device in devices]
            both = zip(shards[layer], moved, strict=True)
            shards[layer] = [_write(array, values, start) for array, values in both]
        jax.block_until_ready(shards)  # copies are asynchronous, and the block is used again
    return shards


def _moved(values: np.ndarray, device: jax.Device | None) -> jax.Array:
    """The values on a device, in memory of its own."""
    array = jax.device_put(values, device)
    # NOTE: on a CPU an array may be the very memory that it was made from, if that is aligned.
    on_host = next(iter(array.devices())).platform == "cpu"
    if on_host and array.unsafe_buffer_pointer() == values.ctypes.data:
        array = jax.device_put(values.copy(), device)
    return array


@functools.partial(jax.jit, donate_argnums=0)
def _write(array: jax.Array, part: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, part.astype(array.dtype), start)


def shardings(model: Model, mesh: jax.sharding.Mesh, rules: partitioning.Rules | None) -> Any:
    """Those of the model's parameters, under the house rules unless others are given."""
    return partitioning.param_shardings(model, mesh, partitioning.RULES if rules is None else rules)


def _claims(stored: Stored, model: Model) -> dict[str, _Claim]:
    claims = {}
    for path, leaf in flatten(model.shapes()).items():
        by_layer = path not in stored.sources
        names = unrolled_paths(path, leaf.shape) if by_layer else [path]
        claims[path] = _Claim(leaf.shape, by_layer, [stored.sources[name] for name in names])
    return claims


def _check(claims: Mapping[str, _Claim], stored: Stored) -> None:
    tensors = stored.tensors
    expected: dict[str, tuple[int, ...]] = {}
    for claim in claims.values():
        expected |= claim.expected()
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"unexpected: {_some(unexpected)}")
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, the model wants {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ][:8]
    if problems:
        raise ValueError(
            f"{stored.origin} does not fit the model that its configuration describes:\n  "
            + "\n  ".join(problems)
        )


class _Progress:
    """A log line every ten seconds; nothing for what loads faster."""

    def __init__(self, origin: str, total: int):
        self.origin, self.total, self.done = origin, total, 0
        self.started = self.reported = time.monotonic()

    def __call__(self, nbytes: int) -> None:
        self.done += nbytes
        now = time.monotonic()
        if now - self.reported > 10:
            self.reported = now
            left = (self.total - self.done) * (now - self.started) / self.done
            gigabytes = f"{self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
            _log.info("%s: %s read, %.0f s left", self.origin, gigabytes, left)


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --------------------------------------------------------------------------------------------------
# Out


def pending(params: Params, sources: Sources) -> dict[str, Pending]:
    """The tensors that `sources` makes of the parameters, each fetched when it is written.

    Raises:
        ValueError: parameters and sources name different things, or a parameter is spread over
            several processes.
    """
    layers: dict[str, tuple[Any, int | None]] = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ValueError(
                f"{path} is spread over several processes; save a checkpoint and convert it in one"
            )
        names = unrolled_paths(path, leaf.shape)
        stacked = names != [path]
        layers |= {name: (leaf, i if stacked else None) for i, name in enumerate(names)}
    if odd := sorted(layers.keys() ^ sources.keys()):
        raise ValueError(f"parameters do not fit their configuration: {_some(odd)}")
    parts: dict[str, list[tuple[Source, Any, int | None]]] = {}
    for name, source in sources.items():
        parts.setdefault(source.tensor, []).append((source, *layers[name]))
    return {
        tensor: _tensor(sorted(group, key=lambda p: p[0].part)) for tensor, group in parts.items()
    }


def _tensor(group: list[tuple[Source, Any, int | None]]) -> Pending:
    source, leaf, layer = group[0]
    shape = source.stored_shape(leaf.shape if layer is None else leaf.shape[1:])

    def fetch() -> np.ndarray:
        arrays = [_fetch(leaf, layer) for _, leaf, layer in group]
        arrays = [array.T if source.transposed else array for array in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    return Pending(shape, np.dtype(leaf.dtype), fetch)


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of a stack, on the host."""
    if layer is None:
        return np.asarray(leaf)
    # The index is an argument, or every layer would be a program of its own.
    return np.asarray(_layer(leaf, layer) if isinstance(leaf, jax.Array) else leaf[layer])


_layer = jax.jit(lambda leaf, layer: leaf[layer])
