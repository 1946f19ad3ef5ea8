"""safetensors files, read tensor by tensor and written as a stream.

A file is eight bytes that give the length of a JSON header, the header (for each tensor its type,
shape and byte range), and the bytes. The format is read and written here rather than through the
`safetensors` package because that package wants every tensor of a file in memory before it writes
the first, and reads local files only; a test holds the two against each other.

- A directory of weights is one file, or several of at most `MAX_FILE_BYTES` and an index that
  says which tensor is where: the layout and names that the Hugging Face hub uses.
- Files are written under a temporary name and renamed; the index comes last.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from models.weights.stored import FileTensor

MAX_FILE_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


class Pending(NamedTuple):
    """A tensor to be written: fetched to the host only when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_file(path: epath.Path) -> dict[str, FileTensor]:
    """The tensors of one file, by name; reads the header only.

    Raises:
        ValueError: not a safetensors file, a type that NumPy lacks, or byte ranges that disagree
            with the shapes or with the file's length.
    """
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is not a safetensors file, or was cut off; fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: the safetensors header is not JSON ({error})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: tensor {name!r} has the unsupported type {entry['dtype']}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        nbytes = math.prod(shape) * dtype.itemsize
        if stop - start != nbytes or start < 0 or 8 + length + stop > size:
            raise ValueError(
                f"{path}: tensor {name!r} ({entry['dtype']} {shape}) does not fit bytes {start} to "
                f"{stop} of a file of {size}; it was cut off, fetch it again"
            )
        tensors[name] = FileTensor(path, shape, dtype, ((8 + length + start, nbytes),))
    return tensors


def read_directory(directory: epath.Path) -> dict[str, FileTensor]:
    """The tensors of a directory of one or several files, by name.

    Raises:
        FileNotFoundError: no weights, or a file that the index names is missing.
        ValueError: the index and the files disagree.
    """
    if (directory / INDEX).exists():
        located = json.loads((directory / INDEX).read_text())["weight_map"]
    elif (directory / SINGLE).exists():
        return read_file(directory / SINGLE)
    else:
        raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}")
    tensors = {}
    for file_name in sorted(set(located.values())):
        if not (directory / file_name).exists():
            raise FileNotFoundError(
                f"{directory / file_name} is missing, although {INDEX} names it; download it"
            )
        found = read_file(directory / file_name)
        listed = {name for name, file in located.items() if file == file_name}
        if odd := sorted(listed ^ set(found)):
            raise ValueError(
                f"{directory / file_name} and {INDEX} disagree about {odd[:5]} ({len(odd)} tensors)"
            )
        tensors.update(found)
    return tensors


def write_file(path: epath.Path, tensors: Mapping[str, Pending]) -> None:
    """Write one file; the host holds one tensor at a time."""
    # Larger items first, as the reference does, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses others
    position = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            array = np.asarray(tensors[name].fetch(), order="C")
            if (array.shape, array.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise AssertionError(f"{name}: announced {tensors[name][:2]}, came {array.shape}")
            file.write(array.reshape(-1).view(np.uint8).data)
    temporary.replace(path)


def write_directory(
    directory: epath.Path, tensors: Mapping[str, Pending], max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write one file, or several with an index where they would exceed `max_file_bytes`.

    A tensor is never cut: one that is larger than the limit has a file to itself.
    """
    groups = list(_group(tensors, max_file_bytes))
    if len(groups) == 1:
        write_file(directory / SINGLE, tensors)
        return
    located = {}
    for number, names in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(directory / file_name, {name: tensors[name] for name in names})
        located |= dict.fromkeys(names, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))}
    temporary = directory / (INDEX + ".part")
    temporary.write_text(json.dumps(index, indent=2) + "\n")
    temporary.replace(directory / INDEX)


def _group(tensors: Mapping[str, Pending], limit: int) -> Iterator[list[str]]:
    """Names in natural order (layer 2 before layer 10), cut where a file would exceed `limit`."""
    names: list[str] = []
    size = 0
    for name in sorted(tensors, key=_natural):
        if names and size + tensors[name].nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensors[name].nbytes
    yield names


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
