"""Rows as tf.train.Example messages, for TFRecord and ArrayRecord files, without TensorFlow.

    example({"doc_id": 7, "text": "chaff", "nll": 2.5})  ->  the serialized message

Choices
- The message is three nested maps of protocol-buffer fields, written in a page of code. Importing
  TensorFlow would take longer than many exports.
- Integers are int64_list (an unsigned one over 2**63 becomes negative, with the same bits), numbers
  float_list, strings bytes_list in UTF-8. A null is a missing feature.
- Features are written in the order of their names: the same row gives the same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

# Field numbers and wire type 2 (length-delimited) of feature.proto and example.proto, as tag bytes.
_FEATURES = _FEATURE_MAP = _KEY = _BYTES_LIST = _VALUES = b"\x0a"  # field 1
_VALUE = _FLOAT_LIST = b"\x12"  # field 2
_INT64_LIST = b"\x1a"  # field 3

_UNSIGNED = (1 << 64) - 1


class ExampleError(TypeError):
    """A value cannot be stored in a tf.train.Example."""


def example(row: Mapping[str, Any]) -> bytes:
    """Return a row as a serialized tf.train.Example.

    Args:
      row: name -> None, a bool, an int, a float, a str, bytes, or a list of one of these.

    Raises:
      ExampleError: another type, or a list of several.
    """
    features = b"".join(
        _delimited(
            _FEATURE_MAP,
            _delimited(_KEY, name.encode()) + _delimited(_VALUE, _feature(name, value)),
        )
        for name, value in sorted(row.items())
        if value is not None
    )
    return _delimited(_FEATURES, features)


def _feature(name: str, value: Any) -> bytes:
    values = value if isinstance(value, list) else [value]
    if all(isinstance(item, bool | int) for item in values):
        packed = b"".join(_varint(int(item) & _UNSIGNED) for item in values)
        return _delimited(_INT64_LIST, _delimited(_VALUES, packed) if values else b"")
    if all(isinstance(item, float | int) for item in values):
        return _delimited(_FLOAT_LIST, _delimited(_VALUES, _floats(values)))
    if all(isinstance(item, str | bytes) for item in values):
        encoded = (item.encode() if isinstance(item, str) else item for item in values)
        return _delimited(_BYTES_LIST, b"".join(_delimited(_VALUES, item) for item in encoded))
    kinds = sorted({type(item).__name__ for item in values})
    raise ExampleError(f"{name}: a tf.train.Example cannot hold {' and '.join(kinds)}.")


def _floats(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def _delimited(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    parts = bytearray()
    while value >= 0x80:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
