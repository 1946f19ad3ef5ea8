"""Flax's msgpack files, indexed without loading them.

T5X keeps its checkpoint index in such a file, and before it wrote TensorStore directories it kept
the whole checkpoint in one, optimizer state included. Flax's own reader unpacks all of it into
host memory; this one walks over the file and notes the position of each array.

Flax packs an array as extension type 1: shape, type name, bytes. Arrays of over 1 GiB are cut
into several and stored as a dictionary that says so.
"""

import math
import struct
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np
from etils import epath

from models.errors import ModelError, reading
from models.weights.stored import FileTensor

# Bounds of what is read. An index of T5-XXL's 1,800 arrays and slots holds 50,000 values.
MAX_VALUES = 1_000_000
MAX_DEPTH = 64
MAX_TEXT_BYTES = 1 << 20

_ARRAY, _SCALAR = 1, 3  # extension types of flax.serialization

# First byte -> (struct format) of the fixed-size values, and of the length of the sized ones.
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
            0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip
_STRINGS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_BINARIES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_ARRAYS = {0xDC: ">H", 0xDD: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}


def read_file(path: epath.Path) -> Any:
    """Return the tree in a msgpack file: dictionaries, with a `FileTensor` for each array.

    Raises:
        ModelError: the file is not msgpack as Flax writes it, or is over the bounds.
    """
    with reading(path), path.open("rb") as file:
        try:
            return _join_chunks(_Walker(path, file).value())
        except ModelError:
            raise
        except (
            *(struct.error, IndexError, KeyError, TypeError, ValueError, AttributeError),
            *(OverflowError, UnicodeDecodeError),
        ) as error:
            raise ModelError(
                f"{path} is not a Flax msgpack file, or was cut off ({error}): copy or download it "
                "again"
            ) from error


class _Walker:
    """A reader of values, one after the other."""

    def __init__(self, path: epath.Path, file: BinaryIO):
        self.path, self.file = path, file
        self.count = 0
        self.depth = 0

    def value(self) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ModelError(
                f"{self.path} holds more than {MAX_VALUES:,} values, too many for a checkpoint"
            )
        head = self.file.read(1)[0]
        if head <= 0x7F:
            return head
        if head >= 0xE0:
            return head - 0x100
        if head <= 0x8F:
            return self._map(head & 0x0F)
        if head <= 0x9F:
            return self._list(head & 0x0F)
        if head <= 0xBF:
            return self._text(head & 0x1F)
        if head in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[head]
        if head in _NUMBERS:
            return self._number(_NUMBERS[head])
        if head in _STRINGS:
            return self._text(self._number(_STRINGS[head]))
        if head in _BINARIES:
            return self._skip(self._number(_BINARIES[head]))
        if head in _ARRAYS:
            return self._list(self._number(_ARRAYS[head]))
        if head in _MAPS:
            return self._map(self._number(_MAPS[head]))
        if head in _EXTENSIONS:
            return self._extension(self._number(_EXTENSIONS[head]))
        if 0xD4 <= head <= 0xD8:
            return self._extension(1 << (head - 0xD4))
        raise ValueError(f"byte {head:#x} at {self.file.tell() - 1}")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def _text(self, length: int) -> str:
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"a text of {length:,} bytes")
        return self.file.read(length).decode()

    def _list(self, length: int) -> list[Any]:
        self._enter()
        values = [self.value() for _ in range(length)]
        self.depth -= 1
        return values

    def _map(self, length: int) -> dict[Any, Any]:
        self._enter()
        values = {self.value(): self.value() for _ in range(length)}
        self.depth -= 1
        return values

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")

    def _skip(self, size: int) -> tuple[int, int]:
        """Return the (offset, bytes) of binary content, which stays in the file."""
        offset = self.file.tell()
        self.file.seek(offset + size)
        return offset, size

    def _extension(self, size: int) -> Any:
        code = self._number(">b")
        if code not in (_ARRAY, _SCALAR):
            self._skip(size)
            return None
        shape, dtype, region = self.value()
        tensor = FileTensor(self.path, tuple(shape), _dtype(dtype), (region,))
        _check_size(tensor)
        return tensor


def _dtype(name: str) -> np.dtype:
    return np.dtype(jnp.bfloat16) if name == "bfloat16" else np.dtype(name)


def _check_size(tensor: FileTensor) -> None:
    expected = math.prod(tensor.shape) * tensor.dtype.itemsize
    if any(n < 0 for n in tensor.shape) or expected != sum(size for _, size in tensor.regions):
        raise ValueError(f"an array {tensor.shape} in {tensor.regions} bytes")


def _join_chunks(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "__msgpack_chunked_array__" in tree:
        shape = tuple(tree["shape"][str(i)] for i in range(len(tree["shape"])))
        chunks = [tree["chunks"][str(i)] for i in range(len(tree["chunks"]))]
        regions = tuple(region for chunk in chunks for region in chunk.regions)
        tensor = FileTensor(chunks[0].path, shape, chunks[0].dtype, regions)
        _check_size(tensor)
        return tensor
    return {key: _join_chunks(value) for key, value in tree.items()}
