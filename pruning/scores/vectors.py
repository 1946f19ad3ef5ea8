"""Columns of vectors in score sets, and their storage in Parquet.

A vector is stored as the bytes of its numbers, little-endian, in a column of fixed-size binary
whose field metadata has their dtype (`VECTOR`); null where a document has none. To read in NumPy:

    np.frombuffer(b"".join(column.drop_null().to_pylist()), dtype).reshape(-1, width)

Choices
- Parquet has no type for vectors. A list column stores two levels beside every number, and 16-bit
  floats one by one: lists are read at 300,000 vectors of width 768 per CPU second, plain bytes at
  3.8 million.
- Vectors are not compressed: zstd saves 9% on such numbers and reads at an eighth of the speed.
- Score sets of earlier versions hold lists of fixed size; `numbers` reads both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from pruning.store.build import encoding_of_numbers

VECTOR = b"vector"  # in the field's metadata: the dtype of the numbers


def is_vector(field: pa.Field) -> bool:
    """Return whether a column holds vectors of one length, as bytes or as lists."""
    return VECTOR in (field.metadata or {}) or pa.types.is_fixed_size_list(field.type)


def shape_of(field: pa.Field) -> tuple[np.dtype, int]:
    """Return the dtype and the length of a column's vectors."""
    if pa.types.is_fixed_size_list(field.type):
        return np.dtype(field.type.value_type.to_pandas_dtype()), field.type.list_size
    dtype = np.dtype(field.metadata[VECTOR].decode())
    return dtype, field.type.byte_width // dtype.itemsize


def stored_field(name: str, kind: pa.DataType) -> pa.Field:
    """Return the field of a column: bytes for lists of fixed size, any other type unchanged."""
    if not pa.types.is_fixed_size_list(kind):
        return pa.field(name, kind)
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    width = dtype.itemsize * kind.list_size
    return pa.field(name, pa.binary(width), metadata={VECTOR: dtype.name.encode()})


def encoding_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the Parquet settings of a score set."""
    vectors = [field.name for field in schema if VECTOR in (field.metadata or {})]
    settings = encoding_of_numbers(schema)
    if not vectors:
        return settings
    compression = {name: "none" if name in vectors else "zstd" for name in schema.names}
    statistics = [name for name in schema.names if name not in vectors]
    return settings | {"compression": compression, "write_statistics": statistics}


def stored(values: np.ndarray, present: np.ndarray, dtype: np.dtype) -> pa.Array:
    """Return vectors in the form that Parquet stores.

    Args:
      values: [n, width].
      present: bool [n]; the others are null.
    """
    content = np.ascontiguousarray(values, dtype.newbyteorder("<"))
    content[~present] = 0
    mask = np.packbits(present, bitorder="little")
    buffers = [pa.py_buffer(mask), pa.py_buffer(content)]
    kind = pa.binary(content.shape[1] * dtype.itemsize)
    return pa.Array.from_buffers(kind, len(content), buffers)


def numbers(array: pa.Array, field: pa.Field) -> np.ndarray:
    """Return the vectors of an array, [n, width]; those of nulls are arbitrary."""
    dtype, width = shape_of(field)
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    content = np.frombuffer(array.buffers()[1], dtype.newbyteorder("<"))
    return content.reshape(-1, width)[array.offset : array.offset + len(array)]


def as_lists(array: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
    """Return a column of vectors as lists of fixed size; NaN for nulls."""
    dtype, width = shape_of(field)
    kind = list_type(field)
    chunks = []
    for chunk in array.chunks:
        values = numbers(chunk, field).astype(dtype)
        values[chunk.is_null().to_numpy(zero_copy_only=False)] = np.nan
        chunks.append(pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width))
    return pa.chunked_array(chunks, kind)


def list_type(field: pa.Field) -> pa.DataType:
    """Return the list type of a column of vectors."""
    dtype, width = shape_of(field)
    return pa.list_(pa.from_numpy_dtype(dtype), width)
