"""Parquet files: one document per row.

Choices
- The text is read as bytes and decoded row by row, so that an invalid string rejects its row, not
  the batch.
- Only the requested columns are read, a bounded number of rows at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from pruning.corpus.sources import files
from pruning.corpus.sources.document import (
    Document,
    ReadCallback,
    Reject,
    SourceError,
    from_record,
)

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256


@dataclasses.dataclass(frozen=True)
class ParquetSource(files.FileSource):
    """Parquet files.

    Attributes:
      paths: files, directories or patterns.
      text_field: name of the column with the text, strings or bytes; dotted when it is nested.
    """

    suffixes: ClassVar[Sequence[str]] = (".parquet",)

    paths: tuple[str, ...] = ()
    text_field: str = "text"

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with files.opened(file) as stream, files.unchanged(file, stream):
            n_bytes = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            if n_bytes == 0:
                return
            try:
                parquet = pq.ParquetFile(stream)
                columns = self._columns(file, parquet.schema_arrow.names, fields)
                rows = taken = 0
                for batch in parquet.iter_batches(_ROWS, columns=columns):
                    yield from self._documents(batch)
                    rows += batch.num_rows
                    on_read(n_bytes * rows // parquet.metadata.num_rows - taken)
                    taken = n_bytes * rows // parquet.metadata.num_rows
            except (pa.ArrowException, OSError) as error:
                raise SourceError(
                    f"{file} is not a whole Parquet file ({error}): fetch or write it again."
                ) from error

    def _columns(self, file: str, present: list[str], fields: Sequence[str]) -> list[str]:
        column = self.text_field.split(".")[0]
        if column not in present:
            raise SourceError(
                f"{file} has no column {column!r}; it has: {', '.join(present)}. Set "
                "ParquetSource.text_field to the column that holds the text."
            )
        wanted = {column} | {name.split(".")[0] for name in fields}
        return [name for name in present if name in wanted]

    def _documents(self, batch: pa.RecordBatch) -> Iterator[Document | Reject]:
        columns = [column.cast(_as_bytes(column.type)).to_pylist() for column in batch.columns]
        for values in zip(*columns, strict=True):
            record = dict(zip(batch.schema.names, values, strict=True))
            yield from_record(record, self.text_field, "ParquetSource.text_field")


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the Arrow type with strings replaced by bytes, at any depth."""
    import pyarrow as pa

    types = pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pa.large_binary()
    if types.is_dictionary(kind):
        return _as_bytes(kind.value_type)
    if types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    return kind
