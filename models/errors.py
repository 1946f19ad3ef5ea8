"""Errors of models that a user can cause: their messages are one line and say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from etils import epath

from models.terminal import escaped


class ModelError(ValueError):
    """A model, or a part of one, that is missing, damaged, unsupported or too large."""

    def __init__(self, message: str):
        one_line = " ".join(line.strip() for line in message.splitlines())
        super().__init__(escaped(one_line))


class ModelNotFound(ModelError, FileNotFoundError):
    """A model, or a file of one, that does not exist."""


@contextlib.contextmanager
def reading(path: epath.PathLike) -> Iterator[None]:
    """Re-raise an OSError of reading `path` as a ModelError with the path and its cause."""
    try:
        yield
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelNotFound(f"{path} does not exist: copy or download it again") from error
    except IsADirectoryError as error:
        raise ModelError(
            f"{path} is a directory, and a file is expected there: remove it, and copy or download "
            "the file again"
        ) from error
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror or first_line(error)}): check its permissions "
            "and the disk or network it is on"
        ) from error


def first_line(error: BaseException, limit: int = 300) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__
