"""Bounds of a configuration that came from a file: types, signs and sizes.

A configuration of a billion layers would otherwise take the time to name them all, before the
tensors show that it is wrong.
"""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

from models.errors import ModelError

MAX_LAYERS = 1024  # the deepest published models have 128
MAX_EXPERTS = 4096  # of a layer; the most published are 512
MAX_NUMBER = 2**40  # beyond any length, width or id

_SIZES = (
    *("vocab_size", "d_model", "d_ff", "d_kv", "num_heads", "num_kv_heads", "head_dim"),
    *("max_length", "relpos_buckets", "num_layers", "num_encoder_layers", "count", "chosen"),
    *("size", "rows", "max_distance", "max_tokens", "embedding_size"),
)

Config = TypeVar("Config")


def checked(config: Config) -> Config:
    """Return the configuration, after a check of every field against its declared type.

    Raises:
        ModelError: a field of another type, not finite, too small, or too large.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        if typing.get_origin(kind) is typing.ClassVar:
            continue
        value = getattr(config, name)
        union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        allowed = typing.get_args(kind) if union else (kind,)
        if not any(_is(value, one) for one in allowed):
            shown = " or ".join(getattr(one, "__name__", str(one)) for one in allowed)
            raise ModelError(f"{name} is {_short(value)}, where {shown} is expected")
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name, value)
        for part in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(part):
                checked(part)
    return config


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value is of a declared type; an integer is a float, a boolean neither."""
    kind = typing.get_origin(kind) or kind
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _check_number(name: str, value: float) -> None:
    if not math.isfinite(value) or abs(value) > MAX_NUMBER:
        raise ModelError(f"{name}={_short(value)} is out of bounds")
    if isinstance(value, int) and value < (1 if name in _SIZES else 0):
        raise ModelError(f"{name}={value} is too small")
    if name == "count" and value > MAX_EXPERTS:
        raise ModelError(f"{_short(value)} experts are over the limit of {MAX_EXPERTS}")
    if name.startswith("num_") and name.endswith("layers") and value > MAX_LAYERS:
        raise ModelError(f"{name}={_short(value)} is over the limit of {MAX_LAYERS} layers")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
