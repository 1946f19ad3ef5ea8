"""T5X checkpoints in: TensorStore directories, those of Orbax, and single msgpack files.

    checkpoint_1000000/
      checkpoint                                  msgpack: a tree of TensorStore specs, or arrays
      target.encoder.layers_0.mlp.wo.kernel/      a zarr array for each parameter
      state.param_states. ... .v_row/             and for each optimizer slot

    checkpoint_1000000/                           as T5X writes through Orbax
      state/_METADATA, state/checkpoint           Orbax's index, see `orbax_arrays`
      state/manifest.ocdbt, state/d/              the same arrays in one database
      dataset/                                    not read

- A checkpoint holds no configuration. Everything but the relative bias's distance limit (128 in
  every published model) and the activation (tanh-GELU when gated, else ReLU) follows from its
  shapes.
- Layers are either numbered, or scanned: `encoder/encoder/...` with the layers on axis 1. The
  network that can scan has a relative bias in every layer, also where its layers are numbered.
  Attention kernels are [d_model, heads * d_kv], or with heads and d_kv apart; both occur in each
  layout.
- The tensors under `target/` must be the model's exactly. Those under `state/` are the
  optimizer's: counted and reported, never loaded.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from models.config import T5Config
from models.errors import ModelError, ModelNotFound, reading
from models.model import Model
from models.weights import flax_msgpack, limits, orbax_arrays, transfer
from models.weights.stored import Index, StoredTensor, ZarrTensor, kvstore
from models.weights.transfer import Source, Stored

INDEX = "checkpoint"
_ORBAX_ITEM = "state"
_INDEXES = (
    *(INDEX, orbax_arrays.METADATA),
    *(f"{_ORBAX_ITEM}/{INDEX}", f"{_ORBAX_ITEM}/{orbax_arrays.METADATA}"),
)


def find(path: epath.PathLike) -> epath.Path | None:
    """Return the index file of a checkpoint, of the newest one in a run's directory, or None.

    Both `checkpoint_<step>/` directories and `checkpoint_<step>` files are found.
    """
    path = epath.Path(path)
    if path.is_file():
        return path if re.fullmatch(r"(.*\.)?checkpoint(_\d+)?", path.name) else None
    if not path.is_dir():
        return None
    for name in _INDEXES:
        if (path / name).is_file():
            return path / name
    steps = {
        int(match[1]): child
        for child in path.iterdir()
        if (match := re.fullmatch(r"checkpoint_(\d+)", child.name))
    }
    return find(steps[max(steps)]) if steps else None


def read(path: epath.PathLike) -> Stored:
    """Return a checkpoint's model, from its index only. Optimizer slots are counted in the notes.

    Raises:
        ModelNotFound: there is none at `path`.
        ModelError: not T5X, or a T5X checkpoint of a kind that is not supported.
    """
    index = find(path)
    if index is None:
        raise ModelNotFound(f"{path} holds no T5X checkpoint: no file named {INDEX!r}")
    leaves = _orbax(index) if orbax_arrays.is_tree(index.parent) else _native(index)
    step = leaves.pop("state/step", None)
    unknown = [name for name in leaves if not name.startswith(("target/", "state/"))]
    if unknown or not leaves:
        raise ModelError(
            f"{index} is not the index of a T5X checkpoint; it holds {unknown[:8] or 'nothing'}"
        )
    slots = sum(name.startswith("state/") for name in leaves)
    parameters = {name[7:]: leaf for name, leaf in leaves.items() if name.startswith("target/")}
    if wrong := [name for name, leaf in parameters.items() if not hasattr(leaf, "copy_to")]:
        raise ModelError(f"{index}: {wrong[:8]} are no arrays: copy or download it again")
    tensors = _named(parameters)
    scanned = any(name.startswith("encoder/encoder/") for name in tensors)
    config = infer_config(tensors, str(index))
    notes = {"step": None if step is None else _scalar(step), "optimizer slots, not loaded": slots}
    return Stored(config, _sources(config, scanned), tensors, str(index), notes)


def infer_config(tensors: Mapping[str, StoredTensor], origin: str) -> T5Config:
    """Return the configuration that the names and shapes of a checkpoint's tensors imply.

    Raises:
        ModelError: the names are not those of an encoder-decoder, or of an encoder.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    scanned = "encoder/encoder/mlp/wo/kernel" in shapes
    layer = "encoder/encoder" if scanned else "encoder/layers_0"
    per_layer = "encoder/relpos_bias/rel_embedding" not in shapes
    bias = f"{layer if per_layer else 'encoder'}/relpos_bias/rel_embedding"
    gated = f"{layer}/mlp/wi_0/kernel" in shapes
    head = shapes.get("projection_layer/kernel")
    try:
        vocab_size, d_model = shapes["token_embedder/embedding"]
        num_heads, buckets = shapes[bias][0], shapes[bias][-1]
        d_ff = shapes[f"{layer}/mlp/{'wi_0' if gated else 'wi'}/kernel"][-1]
        joined = shapes[f"{layer}/attention/query/kernel"][-1]
        config = T5Config(
            vocab_size=vocab_size,
            d_model=d_model,
            d_kv=joined // num_heads,
            d_ff=d_ff,
            num_heads=num_heads,
            num_encoder_layers=_count_layers("encoder", shapes),
            num_decoder_layers=_count_layers("decoder", shapes),
            activation="gelu" if gated else "relu",
            gated=gated,
            tie_embeddings="decoder/logits_dense/kernel" not in shapes,
            relpos_buckets=buckets,
            relpos_per_layer=per_layer,
            sentence_head=head[-1] if head else None,
        )
        return limits.checked(config)
    except KeyError as error:
        raise ModelError(
            f"{origin} holds no target/{error.args[0]}: it is not a T5 encoder-decoder, "
            "nor an encoder, as T5X names them"
        ) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ModelError(f"{origin} holds tensors of shapes that no T5 has ({error})") from error


def _sources(config: T5Config, scanned: bool) -> dict[str, Source]:
    """Return the tensor of each parameter; but for scanned layers, T5X's names are the same."""
    model = Model(dataclasses.replace(config, scan_layers=scanned))
    return {
        path: Source(
            re.sub(r"^(\w+)/layers/", r"\1/\1/", path),
            layers_axis=1 if scanned and "/layers/" in path else None,
        )
        for path in transfer.flatten(model.shapes())
    }


def _count_layers(stack: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if f"{stack}/{stack}/mlp/wo/kernel" in shapes:
        return shapes[f"{stack}/{stack}/mlp/wo/kernel"][1]
    numbers = [re.match(rf"{stack}/layers_(\d+)/", name) for name in shapes]
    return max((int(match[1]) + 1 for match in numbers if match), default=0)


# --------------------------------------------------------------------------------------------------
# The index


def _native(index: epath.Path) -> dict[str, Any]:
    """Return the leaves, by name, of an index that T5X or an early release of Orbax wrote."""
    with reading(index), index.open("rb") as file:
        if file.read(22) == b"model_checkpoint_path:":
            raise ModelError(
                f"{index.parent} is a TensorFlow checkpoint; use the T5X conversion that was "
                "published of it, or t5x.scripts.convert_tf_checkpoint"
            )
    tree = flax_msgpack.read_file(index)
    tree = tree.get("optimizer", tree) if isinstance(tree, dict) else {}
    leaves = dict(_leaves(tree, index, ()))
    return _orbax(index) if any(isinstance(leaf, str) for leaf in leaves.values()) else leaves


def _orbax(index: epath.Path) -> dict[str, Any]:
    """Return the leaves of a tree that T5X wrote through Orbax. Optimizer slots are not opened."""

    def wanted(path: str) -> bool:
        return path.startswith("target/") or path == "state/step"

    found = orbax_arrays.tensors(index.parent, wanted)
    return dict.fromkeys(orbax_arrays.names(index.parent)) | found


def _leaves(tree: Any, index: epath.Path, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the tree's arrays by name. None and empty nodes are skipped."""
    if isinstance(tree, dict) and {"driver", "kvstore", "metadata"} <= tree.keys():
        yield "/".join(path), _zarr(tree, index, "/".join(path))
    elif isinstance(tree, dict):
        for name, child in tree.items():
            yield from _leaves(child, index, (*path, str(name)))
    elif tree is not None:
        yield "/".join(path), tree


def _zarr(spec: dict[str, Any], index: epath.Path, name: str) -> ZarrTensor:
    """Return the array of a TensorStore spec, whose path is relative to the checkpoint.

    The spec's own driver and bucket say where the checkpoint was written, not where it is now.
    """
    if spec["driver"] != "zarr":
        raise ModelError(f"{index}: {name} is kept as {spec['driver']!r}; only zarr is read")
    try:
        where = spec["kvstore"].get("path") or spec["path"]
        shape = tuple(int(n) for n in spec["metadata"]["shape"])
        outside = where.startswith("/") or ".." in where.split("/")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{index}: the entry of {name} is damaged ({error!r}): copy or download it again"
        ) from error
    if outside:
        raise ModelError(f"{index}: the array of {name} is in {where!r}, outside of the checkpoint")
    return ZarrTensor(shape, kvstore(index.parent / where))


def _named(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the model's tensors under the names and in the ranks that `_sources` expects."""
    # A dual encoder has its embedding inside the encoder.
    if "token_embedder/embedding" not in tensors and "encoder/token_embedder/embedding" in tensors:
        tensors["token_embedder/embedding"] = tensors.pop("encoder/token_embedder/embedding")
    for name, tensor in tensors.items():
        match = re.search(r"attention/(query|key|value|out)/kernel$", name)
        rank = 2 if "/layers_" in name else 3  # joined; one more when heads and d_kv are apart
        if match and len(tensor.shape) == rank + 1:
            axes = (0, rank - 1) if match[1] == "out" else (rank - 1, rank)
            tensors[name] = _JoinedHeads(tensor, *axes)
    return tensors


def _scalar(value: Any) -> int:
    if isinstance(value, int):
        return value
    out = np.zeros((), np.int64)
    value.copy_to(out, ())
    return int(out)


@dataclasses.dataclass(frozen=True)
class _JoinedHeads:
    """An attention kernel whose heads and d_kv are two axes, joined to one in the heads' place."""

    inner: StoredTensor
    heads_axis: int
    dim_axis: int

    @property
    def dtype(self) -> np.dtype:
        return self.inner.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.inner.shape)
        shape[self.heads_axis] *= shape.pop(self.dim_axis)
        return tuple(shape)

    @property
    def grain(self) -> tuple[int, ...]:
        grain = list(self.inner.grain)
        del grain[self.dim_axis]
        grain[self.heads_axis] *= self.inner.shape[self.dim_axis]  # whole heads
        return tuple(grain)

    def copy_to(self, out: np.ndarray, index: Index) -> None:
        axis, width = self.heads_axis, self.inner.shape[self.dim_axis]
        wanted = index[axis]
        first, last = wanted.start // width, -(-wanted.stop // width)
        if (first * width, last * width) != (wanted.start, wanted.stop):
            # The range begins or ends inside a head: read whole heads, and cut.
            around = slice(first * width, last * width)
            whole = np.empty(
                (*out.shape[:axis], around.stop - around.start, *out.shape[axis + 1 :]), out.dtype
            )
            self.copy_to(whole, (*index[:axis], around, *index[axis + 1 :]))
            cut = slice(wanted.start - around.start, wanted.stop - around.start)
            out[...] = whole[(slice(None),) * axis + (cut,)]
            return
        split = out.reshape(*out.shape[:axis], last - first, width, *out.shape[axis + 1 :])
        inner = [*index[:axis], slice(first, last), *index[axis + 1 :]]
        inner.insert(self.dim_axis, slice(0, width))
        self.inner.copy_to(np.moveaxis(split, axis + 1, self.dim_axis), tuple(inner))
