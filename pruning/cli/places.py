"""Places that settings name: local paths and object storage, checked before any is opened."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pruning.cli.values import ConfigurationError
from pruning.store.settings import ADDRESS

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://\S*")
_SCHEMES = ("gs", "s3")
# Packages that reach object storage and the hub: their errors have classes of their own.
_CLIENTS = (
    *("tensorflow", "fsspec", "gcsfs", "s3fs", "aiohttp", "botocore", "aiobotocore", "google"),
    *("requests", "urllib3", "httpx", "httpx2", "huggingface_hub"),
)


def require_places(configuration: Any, name: str) -> None:
    """Check all texts of a nested dataclass as `require_place` does, except addresses."""
    for inner, text in _texts(configuration, name):
        require_place(text, inner)


def require_place(text: str, name: str) -> None:
    """Raise ConfigurationError if a text is a place that cannot be reached from here.

    Args:
      text: a path, or any other text, which passes.
      name: of the setting.
    """
    if "\0" in text:
        raise ConfigurationError(f"{name} holds a null character: {text!r}.")
    found = _URL.fullmatch(text)
    if found and found[1].lower() not in _SCHEMES:
        raise ConfigurationError(
            f"{name} is {text!r}: places are local paths, gs:// or s3://. Copy or download it "
            "first; a name on the Hugging Face hub is written owner/name."
        )


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.metadata.get(ADDRESS):
                continue
            inner = getattr(value, field.name)
            nested = dataclasses.is_dataclass(inner)
            yield from _texts(inner, type(inner).__name__ if nested else f"{name}.{field.name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _texts(item, f"{name}[{i}]")


def storage_words(error: BaseException) -> str | None:
    """Return a line for an error of a client of object storage; None for any other error."""
    package = type(error).__module__.partition(".")[0]
    if package not in _CLIENTS:
        return None
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return (
        f"storage cannot be read or written ({type(error).__name__}: {first}): check the address, "
        "the network and your credentials"
    )
