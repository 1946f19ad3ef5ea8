"""Numbers in columns of strings, the form in which a corpus and many files hold their metadata."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def parsed(column: pa.Array) -> np.ndarray:
    """Return strings, numbers or booleans as float64 [n]; NaN for null and for other text.

    Strings are read as Python's `float` reads them, "true" and "false" as 1 and 0.

    Raises:
      TypeError: the column is of another type, such as a list.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if pa.types.is_boolean(kind):
        column, kind = column.cast(pa.int8()), pa.int8()
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise TypeError(f"{kind} is no number")
    try:
        return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:  # some are not numbers: parse each separately
        coded = column.dictionary_encode()
        meanings = np.array([_number(text) for text in coded.dictionary.to_pylist()] + [np.nan])
        codes = coded.indices.fill_null(len(meanings) - 1)
        return meanings[codes.to_numpy(zero_copy_only=False)]


def _number(text: str) -> float:
    words = {"true": 1.0, "false": 0.0}
    try:
        return words[text] if text in words else float(text)
    except ValueError:
        return np.nan
