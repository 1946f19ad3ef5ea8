"""Tables of other libraries: pandas, Polars, Arrow, and datasets of Hugging Face.

Columns come out as Arrow arrays; rows and columns go back into a table of the same kind. A table is
known by the module of its class, so that no library is imported which the user has not imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

Table = TypeVar("Table")


def arrow(table: Any, names: Collection[str] | None = None) -> pa.Table:
    """Return columns of a table as an Arrow table.

    Args:
      names: those to take, as far as the table has them; None for all.

    Raises:
      TypeError: the table is of another kind, or a column cannot be an Arrow array.
    """
    kind = _kind(table)
    chosen = [name for name in columns(table) if names is None or name in names]
    if kind == "datasets":
        return table.select_columns(chosen).with_format("arrow")[:]
    if kind == "pandas":
        arrays = [pa.Array.from_pandas(table[name]) for name in chosen]
        return pa.table(dict(zip(chosen, map(_plain, arrays), strict=True)))
    if kind == "polars":
        table = table.select(chosen).to_arrow()
    return table.select(chosen)


def columns(table: Any) -> list[str]:
    """Return the names of a table's columns."""
    return list(table.column_names if _kind(table) in ("pyarrow", "datasets") else table.columns)


def taken(table: Table, rows: np.ndarray) -> Table:
    """Return a table of the same kind with the rows of these numbers, int64 [n], in this order."""
    frame: Any = table
    kind = _kind(frame)
    if kind == "pandas":
        return frame.iloc[rows]
    if kind == "polars":
        return frame[rows]
    if kind == "datasets":
        return frame.select(rows)
    return frame.take(rows)


def with_columns(table: Table, added: Mapping[str, pa.ChunkedArray]) -> Table:
    """Return a table of the same kind with more columns.

    Raises:
      ValueError: the table has a column of one of these names.
    """
    frame: Any = table
    kind = _kind(frame)
    if twice := [name for name in added if name in columns(frame)]:
        raise ValueError(f"the table has a column {twice[0]!r} already: rename or drop it.")
    if kind == "pandas":
        return frame.assign(
            **{name: _series(frame, values) for name, values in pa.table(added).to_pandas().items()}
        )
    if kind == "polars":
        import polars

        return frame.with_columns(polars.from_arrow(pa.table(added)))
    if kind == "datasets":
        import datasets

        return datasets.concatenate_datasets([frame, datasets.Dataset(pa.table(added))], axis=1)
    for name, values in added.items():
        frame = frame.append_column(name, values)
    return frame


def _series(table: Any, values: Any) -> Sequence[Any]:
    """Return a column with the index of the table that it is added to."""
    return values.set_axis(table.index)


def _plain(array: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return an array whose categories are decoded."""
    kind = array.type
    return array.cast(kind.value_type) if pa.types.is_dictionary(kind) else array


_KINDS = {
    "pandas": "DataFrame",
    "polars": "DataFrame",
    "pyarrow": "Table",
    "datasets": "Dataset",
}


def _kind(table: Any) -> str:
    for cls in type(table).__mro__:
        package = cls.__module__.partition(".")[0]
        if _KINDS.get(package) == cls.__name__:
            return package
    raise TypeError(
        f"{type(table).__name__} is no table: give a pandas or Polars DataFrame, an Arrow table, "
        "or a Dataset of the library datasets."
    )
