"""From stored tensors to a model's parameters, and back.

Every format is a mapping from the model's parameters to the tensors that hold them (`Source`),
written for unrolled layers. This module does the rest, for all formats alike:

- The key sets must match exactly, both ways, and every shape. A tensor that no parameter claims
  is as much an error as one that is missing: converters have written decoder weights under
  encoder names, and nobody saw it.
- A parameter is built in its final form (transposed, stacked, cast) in one block on the host,
  shard by shard, and put on its devices before the next one is read. So the host holds less than
  twice the largest parameter, whatever the size of the model.
- Stacked layers are read layer by layer into the stack, and written from it layer by layer.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
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

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter is kept.

    Attributes:
        tensor: name of the stored tensor.
        transposed: the tensor is [out, in]; kernels here are [in, out].
        part: (k, n): the parameter is the k-th of n equal parts of the tensor's last axis, as in
            GPT-2's joint projection of query, key and value.
        scanned: the parameter is a whole stack, kept with the layers on axis 1, as T5X scans.
    """

    tensor: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    scanned: bool = False

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the tensor of a parameter of this shape must have."""
        if self.transposed:
            shape = shape[::-1]
        if self.scanned:
            shape = (shape[1], shape[0], *shape[2:])
        return (*shape[:-1], shape[-1] * self.part[1]) if shape else shape

    def fill(self, block: np.ndarray, index: Index, tensors: Mapping[str, StoredTensor]) -> None:
        """Write `parameter[index]` into `block`."""
        tensor = tensors[self.tensor]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{self.tensor} holds {tensor.dtype}, which is no floating-point type")
        if self.transposed:
            block, index = block.T, index[::-1]
        if self.scanned:
            block, index = np.moveaxis(block, 0, 1), (index[1], index[0], *index[2:])
        k, n = self.part
        if n > 1:
            first = k * tensor.shape[-1] // n
            index = (*index[:-1], slice(first + index[-1].start, first + index[-1].stop))
        tensor.copy_to(block, index)


Sources = Mapping[str, Source]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A model on disk that was looked into, not loaded.

    Attributes:
        config: its configuration, given or inferred.
        sources: for each parameter its tensor: for each layer's under its unrolled name, or for a
            whole stack under its own where the tensor is `scanned`.
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
    def scanned(self) -> bool:
        return any(source.scanned for source in self.sources.values())

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
        self, index: Index, dtype: np.dtype, tensors: Mapping[str, StoredTensor]
    ) -> np.ndarray:
        block = np.empty([s.stop - s.start for s in index], dtype)
        if not self.by_layer:
            self.sources[0].fill(block, index, tensors)
            return block
        for row, source in enumerate(self.sources[index[0]]):
            source.fill(block[row], index[1:], tensors)
        return block


def load(
    stored: Stored,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: partitioning.Rules | None = None,
    scan_layers: bool = True,
) -> tuple[Model, Params]:
    """Read a model's parameters into device arrays; see `models.weights.load`.

    Raises:
        ValueError: key sets or shapes that do not match.
    """
    dtype = np.dtype(dtype or jnp.float32)
    model = Model(dataclasses.replace(stored.config, scan_layers=scan_layers))
    # A scanned tensor is read once, as the stack that it is, and taken apart on the devices.
    reader = Model(dataclasses.replace(model.config, scan_layers=True)) if stored.scanned else model
    claims = _claims(stored, reader)
    _check(claims, stored)
    placed = {} if mesh is None else flatten(shardings(reader, mesh, rules))
    for note, value in stored.notes.items():
        _log.info("%s: %s: %s", stored.origin, note, value)
    total = sum(math.prod(claim.shape) for claim in claims.values()) * dtype.itemsize
    report = _Progress(stored.origin, total)
    flat = {}
    for path, claim in claims.items():
        read = functools.partial(claim.read, dtype=dtype, tensors=stored.tensors)
        flat[path] = place(claim.shape, placed.get(path), read)
        report(flat[path].nbytes)
    if reader != model:
        flat = _unstack(flat, {} if mesh is None else flatten(shardings(model, mesh, rules)))
    return model, unflatten(flat)


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
        index = tuple(slice(0, n) for n in self.shape)
        return self.claim.read(index, np.dtype(dtype or self.dtype), self.tensors)


def place(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding | None,
    read: Callable[[Index], np.ndarray],
) -> jax.Array:
    """An array on its devices, of which each distinct shard is read once and then let go.

    `read` gets slices with both bounds. Without a sharding the array lies on the default device.
    """
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read(tuple(slice(0, n) for n in shape))))
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    for bounds, devices in holders.items():
        block = read(tuple(slice(*pair) for pair in bounds))
        shards += [jax.device_put(block, device) for device in devices]
        jax.block_until_ready(shards)  # copies are asynchronous: do not let the blocks pile up
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def shardings(model: Model, mesh: jax.sharding.Mesh, rules: partitioning.Rules | None) -> Any:
    """Those of the model's parameters, under the house rules unless others are given."""
    return partitioning.param_shardings(model, mesh, partitioning.RULES if rules is None else rules)


def _unstack(flat: dict[str, jax.Array], placed: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Stacks taken apart, on their devices; empties `flat`, so that one stack is held twice."""
    unrolled = {}
    for path in list(flat):
        leaf = flat.pop(path)
        names = unrolled_paths(path, leaf.shape)
        pieces = [leaf] if names == [path] else [leaf[i] for i in range(len(names))]
        for name, piece in zip(names, pieces, strict=True):
            unrolled[name] = jax.device_put(piece, placed.get(name))
        jax.block_until_ready(pieces)
    return unrolled


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
