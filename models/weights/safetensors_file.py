"""safetensors files, read tensor by tensor and written as a stream.

A file is eight bytes that give the length of a JSON header, the header (for each tensor its type,
shape and byte range), and the bytes. The format is read and written here rather than through the
`safetensors` package because that package wants every tensor of a file in memory before it writes
the first, and reads local files only; a test compares the two.

- A directory of weights is one file, or several of at most `MAX_FILE_BYTES` and an index that
  says which tensor is where: the layout and names that the Hugging Face hub uses.
- Files are written under a temporary name and renamed; digests are written beside each (`digests`),
  and the index comes last.
- Headers and indexes are bounded in size, and an index names files of its own directory only.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from models import json_file
from models.errors import ModelError, ModelNotFound, reading
from models.weights.digests import DigestingWriter, Digests, read_digests
from models.weights.stored import FileTensor, StoredTensor

MAX_FILE_BYTES = 5 * 10**9
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bounds of what is read. DeepSeek-V3, with 91,000 tensors, has an index of 9 MB.
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 1 << 18

_NUMPY_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in _NUMPY_TYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Pending(NamedTuple):
    """A tensor to be written: fetched to the host only when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# --------------------------------------------------------------------------------------------------
# In


def read_file(path: epath.Path) -> dict[str, FileTensor]:
    """Return the tensors of one file, by name; only the header is read.

    Raises:
        ModelError: not a safetensors file, a type that NumPy lacks, byte ranges that disagree with
            the shapes or with the file's length, or a header over the bounds.
    """
    digests = read_digests(path)
    with reading(path), path.open("rb") as file:
        size = path.stat().length
        if digests is not None:
            digests.check_size(size)
        header_bytes = int.from_bytes(_read(file, digests, 0, min(8, size)), "little")
        if size < 8 or header_bytes > size - 8:
            raise ModelError(
                f"{path} is not a safetensors file, or was cut off: copy or download it again"
            )
        if header_bytes > MAX_HEADER_BYTES:
            raise ModelError(
                f"{path} has a header of {header_bytes:,} bytes, over the limit of "
                f"{MAX_HEADER_BYTES:,}: split its tensors over several files"
            )
        content = _read(file, digests, 8, 8 + header_bytes)
    header = json_file.parse_object(content, f"the safetensors header of {path}")
    header.pop("__metadata__", None)
    _check_count(len(header), path)
    start = 8 + header_bytes
    return {name: _tensor(path, name, header[name], start, size, digests) for name in header}


def _read(file: Any, digests: Digests | None, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of an open file, checked where it has digests."""
    if digests is not None:
        return bytes(digests.read(file, start, stop))
    file.seek(start)
    return file.read(stop - start)


def _tensor(
    path: epath.Path, name: str, entry: Any, start: int, size: int, digests: Digests | None
) -> FileTensor:
    """Return a tensor of a header's entry.

    Args:
        start: the offset in the file to which the entry's offsets are relative.
        size: of the file in bytes.
    """
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (first, last, *shape))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ModelError(
            f"{path}: the header's entry of tensor {name!r} is not one of safetensors: copy or "
            "download the file again"
        )
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ModelError(
            f"{path}: tensor {name!r} has the unsupported type {kind}; supported: "
            f"{', '.join(_DTYPES)}"
        )
    nbytes = math.prod(shape) * _DTYPES[kind].itemsize
    if last - first != nbytes or start + last > size:
        raise ModelError(
            f"{path}: tensor {name!r} ({kind} {shape}) does not fit bytes {first} to {last} of a "
            f"file of {size}; it was cut off: copy or download it again"
        )
    return FileTensor(path, shape, _DTYPES[kind], ((start + first, nbytes),), digests)


def _check_count(count: int, path: epath.Path) -> None:
    if count > MAX_TENSORS:
        raise ModelError(f"{path} names {count:,} tensors; the limit is {MAX_TENSORS:,}")


def read_directory(directory: epath.Path) -> dict[str, StoredTensor]:
    """Return the tensors of a directory of one or several files, by name.

    Raises:
        ModelNotFound: no weights, or a file that the index names is missing.
        ModelError: the index and the files disagree, or one of them is damaged.
    """
    if not (directory / INDEX).exists():
        if not (directory / SINGLE).exists():
            raise ModelNotFound(
                f"{directory} holds neither {SINGLE} nor {INDEX}: copy or download them"
            )
        return dict(read_file(directory / SINGLE))
    located = _read_index(directory / INDEX)
    tensors: dict[str, StoredTensor] = {}
    for file_name in sorted(set(located.values())):
        if not (directory / file_name).exists():
            raise ModelNotFound(
                f"{directory / file_name} is missing, although {INDEX} names it: copy or download "
                "it"
            )
        found = read_file(directory / file_name)
        listed = {name for name, file in located.items() if file == file_name}
        if odd := sorted(listed ^ set(found)):
            raise ModelError(
                f"{directory / file_name} and {INDEX} disagree about {odd[:5]} ({len(odd)} "
                "tensors): they are of two models; copy or download both again"
            )
        tensors.update(found)
    return tensors


def _read_index(path: epath.Path) -> dict[str, str]:
    """Return the file name of each tensor, as an index states it.

    Raises:
        ModelError: not an index, or one that names a file outside of its directory.
    """
    located = json_file.read_object(path, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(located, dict) or not all(isinstance(file, str) for file in located.values()):
        raise ModelError(
            f"{path} has no weight_map of tensors to file names: copy or download it again"
        )
    _check_count(len(located), path)
    for file in set(located.values()):
        if not re.fullmatch(r"[^/\\\0]+", file) or file in (".", ".."):
            raise ModelError(
                f"{path} names the file {file[:100]!r}, which is not in its own directory: put all "
                "files of a model into one directory, and name them without a path"
            )
    return located


# --------------------------------------------------------------------------------------------------
# Out


def write_file(path: epath.Path, tensors: Mapping[str, Pending]) -> None:
    """Write one file and its digests; the host holds one tensor at a time."""
    # Larger items first, as the reference does, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        writer = DigestingWriter(file)
        writer.write(_header(order, tensors))
        for name in order:
            array = np.asarray(tensors[name].fetch(), order="C")
            if (array.shape, array.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise AssertionError(f"{name}: announced {tensors[name][:2]}, came {array.shape}")
            writer.write(array.reshape(-1).view(np.uint8).data)
    writer.save(path)
    temporary.replace(path)


def _header(order: list[str], tensors: Mapping[str, Pending]) -> bytes:
    """Return what precedes the tensors in a file that holds them in this order."""
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
    return len(text).to_bytes(8, "little") + text


def write_directory(
    directory: epath.Path, tensors: Mapping[str, Pending], max_file_bytes: int = MAX_FILE_BYTES
) -> list[epath.Path]:
    """Write one file, or several with an index where they would exceed `max_file_bytes`.

    A tensor is never cut: one that is larger than the limit has a file to itself.

    Returns:
        the files of tensors.
    """
    groups = list(_group(tensors, max_file_bytes))
    if len(groups) == 1:
        write_file(directory / SINGLE, tensors)
        return [directory / SINGLE]
    located: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file_name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(directory / file_name, {name: tensors[name] for name in names})
        located |= dict.fromkeys(names, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(located.items()))}
    json_file.write(directory / INDEX, index)
    return [directory / name for name in sorted(set(located.values()))]


def _group(tensors: Mapping[str, Pending], limit: int) -> Iterator[list[str]]:
    """Yield names in natural order (layer 2 before 10), cut where a file would exceed `limit`."""
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
