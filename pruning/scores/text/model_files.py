"""Model files of text scores: opened once per process, known by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path


class ModelFileError(ValueError):
    """A model file is missing, or is no model of its kind."""


def digest(path: str, what: str) -> str:
    """Return the SHA-256 of a local file.

    Args:
      path: of the file.
      what: it is, for the message.

    Raises:
      ModelFileError: there is none.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelFileError(
            f"{path} is not there: give the {what} as a file on a local disk, which its library "
            "needs."
        )
    hasher = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def magic(path: str, size: int) -> bytes:
    """Return the first bytes of a file."""
    with Path(path).open("rb") as content:
        return content.read(size)
