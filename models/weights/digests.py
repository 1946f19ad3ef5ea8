"""Digests of weight files: written beside each file, checked block by block while it is read.

    model.safetensors
    model.safetensors.digests      {"algorithm", "size", "block_bytes", "blocks"}

- A block is `BLOCK_BYTES` of the file, header included, and its digest is XXH3 of 64 bits. That
  finds damage, not forgery.
- A range is checked by reading the blocks that cover it, so any part of any tensor can be read by
  itself, by any process.
- A file without a `.digests` file beside it is read unchecked: files of other programs have none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, BinaryIO

import xxhash
from etils import epath

from models import json_file
from models.errors import ModelError, reading

SUFFIX = ".digests"
BLOCK_BYTES = 256 << 10

_ALGORITHM = "xxh3_64"


def digests_file(path: epath.Path) -> epath.Path:
    """Return the path of the digests of the file at `path`."""
    return path.with_name(path.name + SUFFIX)


class DigestingWriter:
    """A file that computes the digests of what is written to it.

    with path.open("wb") as file:
        writer = DigestingWriter(file)
        writer.write(...)
    writer.save(path)
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._size = 0
        self._blocks: list[str] = []
        self._current = xxhash.xxh3_64()

    def write(self, content: bytes | memoryview) -> None:
        """Write bytes."""
        self._file.write(content)
        view = memoryview(content)
        while len(view):
            room = BLOCK_BYTES - self._size % BLOCK_BYTES
            part, view = view[:room], view[room:]
            self._current.update(part)
            self._size += len(part)
            if self._size % BLOCK_BYTES == 0:
                self._blocks.append(self._current.hexdigest())
                self._current = xxhash.xxh3_64()

    def save(self, path: epath.Path) -> None:
        """Write the digests beside `path`, the name that the file will have."""
        blocks = list(self._blocks)
        if self._size % BLOCK_BYTES:
            blocks.append(self._current.hexdigest())
        digests = {
            "algorithm": _ALGORITHM,
            "size": self._size,
            "block_bytes": BLOCK_BYTES,
            "blocks": blocks,
        }
        json_file.write(digests_file(path), digests, indent=None)


def copy_with_digests(source: epath.Path, target: epath.Path) -> None:
    """Copy a file and write the digests of the copy."""
    with reading(source), source.open("rb") as file:
        content = file.read()
    with target.open("wb") as file:
        writer = DigestingWriter(file)
        writer.write(content)
    writer.save(target)


@dataclasses.dataclass(frozen=True)
class Digests:
    """The digests of a file at `path`.

    Attributes:
        size: of the file in bytes.
        block_bytes: of each block but the last.
        blocks: a digest for each.
    """

    path: epath.Path
    size: int
    block_bytes: int
    blocks: tuple[int, ...]

    def read(self, file: Any, start: int, stop: int) -> memoryview:
        """Return bytes [start, stop) of the open file, checked.

        Raises:
            ModelError: they are not those that were written.
        """
        first, last = start // self.block_bytes, -(-stop // self.block_bytes)
        offset = first * self.block_bytes
        file.seek(offset)
        content = memoryview(file.read(min(last * self.block_bytes, self.size) - offset))
        for block in range(first, last):
            begin = (block - first) * self.block_bytes
            part = content[begin : begin + self.block_bytes]
            if xxhash.xxh3_64_intdigest(part) != self.blocks[block]:
                raise self.damaged(f"bytes {block * self.block_bytes:,} and following differ")
        return content[start - offset : stop - offset]

    def check_all(self) -> bytes:
        """Return the whole content of the file, checked.

        Raises:
            ModelError: it is not what was written.
        """
        with reading(self.path), self.path.open("rb") as file:
            self.check_size(self.path.stat().length)
            return bytes(self.read(file, 0, self.size))

    def check_size(self, size: int) -> None:
        """Raise ModelError unless `size` is the number of bytes that were written."""
        if size != self.size:
            raise self.damaged(f"it holds {size:,} bytes, and {self.size:,} were written")

    def damaged(self, reason: str) -> ModelError:
        """Return the error of a file that differs from its digests."""
        return ModelError(
            f"{self.path} is damaged: {reason} ({digests_file(self.path).name}). Copy both files "
            f"again, or remove {self.path.parent} and run the command that wrote it again, such as "
            f"`python -m models convert --from SOURCE --to {self.path.parent} --format ...`; if "
            f"another program replaced the file on purpose, remove {digests_file(self.path).name}"
        )


def read_digests(path: epath.Path) -> Digests | None:
    """Return the digests of the file at `path`, or None where it has none.

    Raises:
        ModelError: the `.digests` file is damaged.
    """
    file = digests_file(path)
    if not file.exists():
        return None
    values = json_file.read_object(file)
    try:
        size, block_bytes, blocks = values["size"], values["block_bytes"], values["blocks"]
        numbers = tuple(int(block, 16) for block in blocks)
        whole = block_bytes > 0 and len(numbers) == -(-size // block_bytes)
        if values["algorithm"] != _ALGORITHM or not whole:
            raise ValueError("fields disagree")
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{file} is damaged ({error!r}): copy it again with {path.name}"
        ) from error
    return Digests(path, size, block_bytes, numbers)
