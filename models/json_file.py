"""JSON files of models: read with bounds and one-line errors, written atomically."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from models.errors import ModelError, first_line, reading

MAX_BYTES = 64 << 20  # a tokenizer.json of 260,000 pieces takes 35 MB


AGAIN = "copy or download it again"  # what to do about a damaged file of a model


def read_object(
    path: epath.Path, limit: int = MAX_BYTES, keys: Sequence[str] = (), mend: str = AGAIN
) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        keys: which it must have.
        mend: what to do about a damaged file.

    Raises:
        ModelError: no such file, not JSON, not an object, a key is missing, too deeply nested, or
            over `limit` bytes.
    """
    with reading(path):
        size = path.stat().length
        if size > limit:
            raise ModelError(f"{path} holds {size:,} bytes, over the limit of {limit:,}")
        content = path.read_bytes()
    value = parse_object(content, str(path), mend)
    if absent := [key for key in keys if key not in value]:
        raise ModelError(f"{path} has no {absent[0]!r}: {mend}")
    return value


def parse_object(content: bytes, origin: str, mend: str = AGAIN) -> dict[str, Any]:
    """Return the JSON object in `content`; `origin` names it in errors.

    Raises:
        ModelError: not JSON, not an object, or too deeply nested.
    """
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ModelError(f"{origin} is nested too deeply: {mend}") from error
    except ValueError as error:
        raise ModelError(f"{origin} is not JSON ({first_line(error)}): {mend}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{origin} holds {_kind(value)} where a JSON object is expected: {mend}")
    return value


def write(path: epath.Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file under a temporary name, and rename it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=indent) + "\n")
    temporary.replace(path)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
