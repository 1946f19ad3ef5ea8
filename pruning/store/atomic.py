"""Atomic writes: files that appear complete or not at all, hashed as they are written."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from pruning.store.block_hasher import BlockHasher


class HashingFile(io.RawIOBase):
    """A file that forwards and hashes writes, so that the checksum needs no second pass."""

    def __init__(self, path: epath.Path, file: Any):
        self._path = path
        self._file = file
        self._hasher = hashlib.sha256()
        self.blocks = BlockHasher()
        self._position = 0
        self._discarded = False

    @property
    def name(self) -> str:
        """Final name of the file."""
        return self._path.name

    def discard(self) -> None:
        self._discarded = True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self._discarded:
            with _naming(self._path):
                self._file.write(view)
        self._hasher.update(view)
        self.blocks.update(view)
        self._position += view.nbytes
        return view.nbytes

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Re-raise an OSError with the path and a suggested fix."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror or error}). Nothing half-written is left: make "
            "room or give another output, and run the same command again",
        ) from error


@contextlib.contextmanager
def atomic_file(path: epath.PathLike, *, first_wins: bool = False) -> Iterator[HashingFile]:
    """Open a binary file for writing; it appears under its name when the block succeeds.

    Args:
      first_wins: leave a file that has appeared under this name meanwhile as it is. Exact where
        the file system has hard links; elsewhere, as on object storage, two files that appear at
        the same moment may replace one another.

    Raises:
      OSError: the file cannot be written (full disk, no permission); the message has the path and
        a suggested fix.
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _naming(path):
            file = temporary.open("wb")
        try:
            sink = HashingFile(path, file)
            yield sink
            with _naming(path):
                file.flush()
                with contextlib.suppress(AttributeError, io.UnsupportedOperation):
                    os.fsync(file.fileno())
        finally:
            with _naming(path):
                file.close()
        with _naming(path):
            if first_wins:
                _place_first(temporary, path)
            else:
                temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _place_first(temporary: epath.Path, path: epath.Path) -> None:
    """Give a file its name, or remove it if the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # no hard links
        if not path.exists():
            temporary.replace(path)
    temporary.unlink(missing_ok=True)


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Write a small file atomically."""
    with atomic_file(path) as sink:
        sink.write(content)


def write_text(path: epath.PathLike, text: str) -> None:
    """Write a small text file atomically."""
    write_bytes(path, text.encode())


def entries(path: epath.PathLike, prefix: str, suffix: str = "") -> list[epath.Path]:
    """Return the entries of a directory whose names begin and end so, sorted; none without it.

    NOTE: `glob` takes the name of the directory itself for a pattern: of "runs/a*" it would give
    the files of "runs/ab" too.
    """
    path = epath.Path(path)
    if not path.is_dir():
        return []
    found = [
        entry
        for entry in path.iterdir()
        if entry.name.startswith(prefix) and entry.name.endswith(suffix)
    ]
    return sorted(found)


def clear_temporary(path: epath.PathLike) -> None:
    """Remove temporary files of killed processes. Call only when no other process is writing."""
    for file in entries(path, ".", ".tmp"):
        file.unlink(missing_ok=True)


def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
