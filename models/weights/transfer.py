"""Transfer of stored tensors to a model's parameters, and back.

Every format is a mapping from the model's parameters to the tensors that hold them (`Source`),
written for unrolled layers. This module does the rest, for all formats alike:

- The key sets must match exactly, both ways, and every shape. A tensor that no parameter claims
  is an error, as a missing one is: converters have written decoder weights under encoder names
  without notice.
- A parameter is read in pieces of at most `PIECE_BYTES`, cut where its file is read cheaply. Each
  is put together in its final form (transposed, stacked, cast) on the host, written into the array
  on its devices, and released. So the host never holds a parameter, let alone the model.
- Stacked layers are read layer by layer into the stack, and written from it layer by layer. A stack
  in a file is read as one, and split on the devices where unrolled layers are requested.
- float16 is refused where a value exceeds its range.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from models import host_memory, partitioning
from models.config import ModelConfig
from models.errors import ModelError
from models.model import Model
from models.weights.safetensors_file import Pending
from models.weights.stored import Index, StoredTensor

Params = dict[str, Any]
Observer = Callable[[str, tuple[int, ...], np.ndarray], None]

PIECE_BYTES = 16 << 20
# Bytes of parameters after which freed memory is returned: returning it takes about 8 ms in a
# large process, so not after every small tensor.
_FREED_BYTES = PIECE_BYTES

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """The part of a longer last axis that belongs to one parameter, as in joint projections.

    The axis consists of `groups` equal blocks; in each, the parameter has as many consecutive
    entries, from `start` on. Of query, key and value the k-th is, with d outputs each,
    Part(k * d, 3 * d) in GPT-2, and Part(k * head_dim, 3 * d, heads) in GPT-NeoX.

    Attributes:
        start: index in a block of the parameter's first entry.
        total: length of the whole axis.
        groups: number of blocks.
    """

    start: int
    total: int
    groups: int = 1

    def ranges(self, own: int, wanted: slice) -> Iterator[tuple[slice, slice]]:
        """Yield (range relative to `wanted`, range of the whole axis) for each block touched.

        Args:
            own: length of the parameter's axis.
            wanted: a range of it.
        """
        width, block = own // self.groups, self.total // self.groups
        for group in range(wanted.start // width, -(-wanted.stop // width)):
            first, last = max(wanted.start, group * width), min(wanted.stop, (group + 1) * width)
            shift = group * (block - width) + self.start
            inside = slice(first - wanted.start, last - wanted.start)
            yield inside, slice(first + shift, last + shift)


@dataclasses.dataclass(frozen=True)
class Source:
    """The place of one parameter in a file.

    Attributes:
        tensor: name of the stored tensor.
        transposed: the tensor is [out, in]; kernels here are [in, out].
        part: the parameter is a part of the tensor, along the parameter's last axis.
        layers_axis: the parameter is a whole stack, stored with its layers on this axis: 1 in
            scanned T5X checkpoints, 0 in training runs. None: one layer's, or not a layer's.
    """

    tensor: str
    transposed: bool = False
    part: Part | None = None
    layers_axis: int | None = None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the tensor of a parameter of this shape must have."""
        if self.part is not None:
            shape = (*shape[:-1], self.part.total)
        if self.transposed:
            shape = shape[::-1]
        if self.layers_axis == 1:
            shape = (shape[1], shape[0], *shape[2:])
        return shape

    def fill(
        self,
        block: np.ndarray,
        index: Index,
        shape: tuple[int, ...],
        tensors: Mapping[str, StoredTensor],
    ) -> None:
        """Write `parameter[index]` into `block`; `shape` is the parameter's."""
        tensor = tensors[self.tensor]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ModelError(
                f"{self.tensor} holds {tensor.dtype}, which is no floating-point type: quantized "
                "weights are not supported"
            )
        if self.part is None:
            self._copy(tensor, block, index)
            return
        for inside, whole in self.part.ranges(shape[-1], index[-1]):
            self._copy(tensor, block[..., inside], (*index[:-1], whole))

    def _copy(self, tensor: StoredTensor, block: np.ndarray, index: Index) -> None:
        """Write a range of the tensor, given in the parameter's axes, into `block`."""
        if self.transposed:
            block, index = block.T, index[::-1]
        if self.layers_axis == 1:
            block, index = np.moveaxis(block, 0, 1), (index[1], index[0], *index[2:])
        tensor.copy_to(block, index)

    def grain(self, tensors: Mapping[str, StoredTensor]) -> tuple[int, ...]:
        """Return the tensor's `grain`, in the parameter's axes."""
        grain = tensors[self.tensor].grain
        if self.layers_axis == 1:
            grain = (grain[1], grain[0], *grain[2:])
        return grain[::-1] if self.transposed else grain


Sources = Mapping[str, Source]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model on disk, known from headers and indexes, and not loaded.

    Attributes:
        config: its configuration, given or inferred.
        sources: the tensor of each parameter: under the unrolled name of each layer's, or under the
            stack's own name where the tensor is a whole stack.
        tensors: all tensors of the files, less those that are known to be redundant.
        origin: its name, for messages.
        notes: other facts to show to the user.
    """

    config: ModelConfig
    sources: Sources
    tensors: Mapping[str, StoredTensor]
    origin: str
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stacked(self) -> bool:
        """True where the file holds layers as stacks."""
        return any(source.layers_axis is not None for source in self.sources.values())

    def check(self) -> None:
        """Raise ModelError unless the tensors are exactly the model's, in name and in shape."""
        _check(_claims(self, Model(dataclasses.replace(self.config, scan_layers=True))), self)


def flatten(tree: Params) -> dict[str, Any]:
    """Return a flat dictionary: {"encoder/layers/attention/query/kernel": leaf, ...}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Return the nested dictionary that `flatten` flattened."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")


def expert_paths(path: str, shape: Sequence[int]) -> list[str]:
    """Return the names of the experts' parts of an unrolled parameter, or its own name.

    >>> expert_paths("decoder/layers_0/mlp/experts/wo/kernel", (2, 48, 32))
    ['decoder/layers_0/mlp/experts_0/wo/kernel', 'decoder/layers_0/mlp/experts_1/wo/kernel']
    """
    head, stacked, tail = path.partition("/experts/")
    return [f"{head}/experts_{i}/{tail}" for i in range(shape[0])] if stacked else [path]


def stored_paths(path: str, shape: Sequence[int], stored: Collection[str]) -> tuple[list[str], int]:
    """Return the names among `stored` under which a parameter is stored.

    It is stored whole, layer by layer, or expert by expert in every layer.

    Returns:
        Names in the order of the entries, and the number of leading axes that count them.
    """
    if path in stored:
        return [path], 0
    layers = unrolled_paths(path, shape)
    depth = int(layers != [path])
    if layers[0] in stored:
        return layers, depth
    experts = [name for layer in layers for name in expert_paths(layer, shape[depth:])]
    return (experts, depth + 1) if len(experts) > len(layers) else (layers, depth)


def unrolled_paths(path: str, shape: Sequence[int]) -> list[str]:
    """Return the names of a stacked parameter's layers, or the own name of any other parameter.

    >>> unrolled_paths("encoder/layers/mlp/wo/kernel", (2, 1024, 512))
    ['encoder/layers_0/mlp/wo/kernel', 'encoder/layers_1/mlp/wo/kernel']
    """
    head, stacked, tail = path.partition("layers/")
    return [f"{head}layers_{i}/{tail}" for i in range(shape[0])] if stacked else [path]


# --------------------------------------------------------------------------------------------------
# In


class _Claim(NamedTuple):
    """A parameter and its sources: one tensor, or one for each entry of a stack.

    `stacked` leading axes count the sources: of layers, of experts, or of both.
    """

    shape: tuple[int, ...]
    stacked: int
    sources: list[Source]

    def expected(self) -> dict[str, tuple[int, ...]]:
        piece = self.shape[self.stacked :]
        return {source.tensor: source.stored_shape(piece) for source in self.sources}

    def read(
        self,
        block: np.ndarray,
        index: Index,
        tensors: Mapping[str, StoredTensor],
        observe: Observer | None = None,
    ) -> None:
        """Write `parameter[index]` into `block`."""
        stack, index = index[: self.stacked], index[self.stacked :]
        counts, shape = self.shape[: self.stacked], self.shape[self.stacked :]
        numbers = np.arange(math.prod(counts)).reshape(counts)[stack]
        for place, number in np.ndenumerate(numbers):
            source, part = self.sources[number], block[place]
            with np.errstate(over="ignore"):  # float16: see _check_range
                source.fill(part, index, shape, tensors)
            if observe is not None:
                observe(source.tensor, tuple(s.start for s in index), part)

    def pieces(
        self, index: Index, itemsize: int, tensors: Mapping[str, StoredTensor]
    ) -> Iterator[Index]:
        """Yield parts of `index` of at most `PIECE_BYTES`, or of the smallest that can be read."""
        lengths = [s.stop - s.start for s in index]
        size = math.prod(lengths) * itemsize
        if size <= PIECE_BYTES:
            yield index
        elif (axis := next((a for a in range(self.stacked) if lengths[a] > 1), -1)) >= 0:
            for rows in _cut(index[axis], 1, PIECE_BYTES * lengths[axis] // size):
                inner = (*index[:axis], rows, *index[axis + 1 :])
                yield from self.pieces(inner, itemsize, tensors)
        else:
            grain = (1,) * self.stacked + self.sources[0].grain(tensors)
            axis = max(range(len(index)), key=lambda a: -(-lengths[a] // grain[a]))
            for part in _cut(index[axis], grain[axis], PIECE_BYTES * lengths[axis] // size):
                yield (*index[:axis], part, *index[axis + 1 :])


def _cut(whole: slice, grain: int, limit: int) -> Iterator[slice]:
    """Yield nearly equal parts of at most `limit`, or of one grain, from multiples of the grain."""
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

    `observe(tensor, start, values)` is called once for everything that is read, in float32 before
    the cast; where several processes load, once over all of them together.

    Raises:
        ModelError: key sets or shapes that do not match, or values beyond the range of float16.
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
    unreturned = 0  # bytes read since freed memory was last returned
    for path, claim in claims.items():

        def read(index: Index, first: bool, claim: _Claim = claim) -> np.ndarray:
            block = staging.block([s.stop - s.start for s in index], host_dtype)
            claim.read(block, index, stored.tensors, observe if first else None)
            _check_range(block, dtype, claim)
            return block

        pieces = functools.partial(
            claim.pieces, itemsize=host_dtype.itemsize, tensors=stored.tensors
        )
        names = [path] if reader == model else unrolled_paths(path, claim.shape)
        layers = None if names == [path] else len(names)
        shape = claim.shape if layers is None else claim.shape[1:]
        arrays = place(shape, layers, dtype, placed.get(names[0]), pieces, read)
        size = sum(array.nbytes for array in arrays)
        unreturned += size
        if unreturned >= _FREED_BYTES:
            host_memory.return_freed()
            unreturned = 0
        flat |= zip(names, arrays, strict=True)
        report(size)
    return model, unflatten(flat)


def _check_range(block: np.ndarray, dtype: np.dtype, claim: _Claim) -> None:
    """Raise ModelError where a float16 parameter exceeds the range of its type."""
    if dtype == np.float16 and not (np.abs(block) <= np.finfo(np.float16).max).all():
        raise ModelError(
            f"{claim.sources[0].tensor} holds values beyond the range of float16 (65,504), or not "
            "finite: use bfloat16 or float32"
        )


def lazily(stored: Stored, dtype: Any) -> Params:
    """Return the unrolled model's parameters, each read when it is converted to a NumPy array.

    They can so be written elsewhere without holding the model.

    Raises:
        ModelError: key sets or shapes that do not match.
    """
    claims = _claims(stored, Model(dataclasses.replace(stored.config, scan_layers=False)))
    _check(claims, stored)
    return unflatten(
        {path: _Lazy(claim, np.dtype(dtype), stored.tensors) for path, claim in claims.items()}
    )


@dataclasses.dataclass(frozen=True)
class _Lazy:
    """A parameter that is read when it is converted to a NumPy array."""

    claim: _Claim
    dtype: np.dtype
    tensors: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.claim.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[()].astype(dtype or self.dtype, copy=False)

    def __getitem__(self, entry: tuple[int, ...]) -> np.ndarray:
        """Read an entry of the leading axes, or with () the whole."""
        shape = self.shape[len(entry) :]
        block = np.empty((1,) * len(entry) + shape, self.dtype)
        index = (*(slice(i, i + 1) for i in entry), *(slice(0, n) for n in shape))
        self.claim.read(block, index, self.tensors)
        _check_range(block, self.dtype, self.claim)
        return block.reshape(shape)


class _Staging:
    """A buffer on the host that every piece passes through.

    The allocator would return little of the memory of separate blocks to the system.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def block(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """Return an array with arbitrary contents, valid until the next call."""
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
    """Read arrays onto their devices; each distinct shard is read once, piece by piece.

    Args:
        shape, sharding: of one array; no sharding for the default device.
        layers: number of arrays of that shape, which `read` returns as one stack. None: one array.
        pieces: cuts a shard's slices, which have both bounds, into those to read at a time.
        read: returns the values at such slices, given whether this process is the first that
            reads them; they are copied before the next call.
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
    """Return for each layer its part of an array at `index`, on each of the devices."""
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
    """Return the values on a device, in memory that nothing else uses."""
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
    """Return the shardings of the model's parameters, under `partitioning.RULES` by default."""
    return partitioning.param_shardings(model, mesh, partitioning.RULES if rules is None else rules)


def _claims(stored: Stored, model: Model) -> dict[str, _Claim]:
    """Return the claim of each of the model's parameters."""
    claims = {}
    for path, leaf in flatten(model.shapes()).items():
        names, stacked = stored_paths(path, leaf.shape, stored.sources)
        claims[path] = _Claim(leaf.shape, stacked, [stored.sources[name] for name in names])
    return claims


def _check(claims: Mapping[str, _Claim], stored: Stored) -> None:
    """Raise ModelError unless the tensors are exactly those that the claims expect."""
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
        raise ModelError(
            f"{stored.origin} does not fit the model that its configuration describes: "
            + "; ".join(problems)
        )


class _Progress:
    """A log line every ten seconds; none for models that load faster."""

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
    """Return the tensors that hold the parameters, each fetched when it is written.

    Raises:
        ModelError: parameters and sources have different names, or a parameter is spread over
            several processes.
    """
    entries: dict[str, tuple[Any, tuple[int, ...]]] = {}
    for path, leaf in flatten(params).items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise ModelError(
                f"{path} is spread over several processes; save a checkpoint and convert it in one"
            )
        names, stacked = stored_paths(path, leaf.shape, sources)
        numbers = np.ndindex(*leaf.shape[:stacked])
        entries |= {name: (leaf, entry) for name, entry in zip(names, numbers, strict=True)}
    if odd := sorted(entries.keys() ^ sources.keys()):
        raise ModelError(f"parameters do not fit their configuration: {_some(odd)}")
    parts: dict[str, list[tuple[Source, Any, tuple[int, ...]]]] = {}
    for name, source in sources.items():
        parts.setdefault(source.tensor, []).append((source, *entries[name]))
    return {
        tensor: _tensor(sorted(group, key=lambda p: p[0].part or ()))
        for tensor, group in parts.items()
    }


def _tensor(group: list[tuple[Source, Any, tuple[int, ...]]]) -> Pending:
    """Return the tensor that holds a group of parameters side by side; mostly one."""
    source, leaf, entry = group[0]
    shape = source.stored_shape(leaf.shape[len(entry) :])

    def fetch() -> np.ndarray:
        whole = _joined([_fetch(leaf, entry) for _, leaf, entry in group], source.part)
        return whole.T if source.transposed else whole

    return Pending(shape, np.dtype(leaf.dtype), fetch)


def _joined(arrays: list[np.ndarray], part: Part | None) -> np.ndarray:
    """Return the parts of a tensor, in their order, as one array."""
    if part is None:
        return arrays[0]
    blocks = [array.reshape(*array.shape[:-1], part.groups, -1) for array in arrays]
    return np.concatenate(blocks, axis=-1).reshape(*arrays[0].shape[:-1], part.total)


def _fetch(leaf: Any, entry: tuple[int, ...]) -> np.ndarray:
    """Return a parameter, or an entry of its leading axes, on the host."""
    if not entry:
        return np.asarray(leaf)
    # The index is an argument, or every layer would be a program of its own.
    return np.asarray(_entry(leaf, entry) if isinstance(leaf, jax.Array) else leaf[entry])


_entry = jax.jit(lambda leaf, entry: leaf[entry])
