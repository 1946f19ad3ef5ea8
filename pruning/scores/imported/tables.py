"""Files of scores: Parquet, JSON lines, CSV and TSV as batches of keys and numbers.

Choices
- A batch is columnar: a million rows of Parquet or CSV take a second.
- A value that is not a number, or a row that cannot be read, is an error with file and row. Scores
  are written by programs, and a partially read file would give a wrong ranking.
- A null key or value is counted and is not an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import xxhash

from pruning.corpus.sources import files
from pruning.corpus.sources.document import Fingerprint, ReadCallback, SourceError
from pruning.scores import numbers
from pruning.store.randomness import mix

_ROWS = 1 << 16
_BYTES = 1 << 22  # block size of the CSV parser; a row must fit

_JSON = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")
_TEXT = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv") for packed in ("", ".gz", ".zst"))
SUFFIXES = (".parquet", *_JSON, *_TEXT)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of a file.

    Attributes:
      first: number of the first row, from 0.
      keys: pa.Array [n], strings or integers, null for rows without a key.
      values: float64 [n, columns], NaN for null.
    """

    first: int
    keys: pa.Array
    values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Tables:
    """Files with a key and numbers in every row.

    Attributes:
      paths: files, directories or patterns.
      key: name of the key's column; dotted when it is nested.
      columns: names of the numeric columns, likewise.
    """

    paths: tuple[str, ...]
    key: str
    columns: tuple[str, ...]

    def files(self) -> list[str]:
        """Return the files, sorted."""
        found = files.expand(self.paths, SUFFIXES)
        for file in found:
            if not file.endswith(SUFFIXES):
                raise SourceError(
                    f"{file} is of no known kind: its name has to end in {', '.join(SUFFIXES)}."
                )
        return found

    def fingerprint(self, file: str) -> Fingerprint:
        return files.fingerprint(file)

    def read(self, file: str, on_read: ReadCallback) -> Iterator[Batch]:
        """Yield all rows of a file, in order.

        Raises:
          SourceError: a column is missing, or a row cannot be read.
        """
        names = (self.key, *self.columns)
        if file.endswith(".parquet"):
            batches = _parquet(file, names, on_read)
        elif file.endswith(_JSON):
            batches = _json(file, names, on_read)
        else:
            batches = _csv(file, names, on_read)
        first = 0
        for keys, *columns in batches:
            values = np.empty((len(keys), len(columns)))
            for j, (name, column) in enumerate(zip(self.columns, columns, strict=True)):
                values[:, j] = _numbers(column, f"{file}, column {name!r}", first)
            yield Batch(first, keys, values)
            first += len(keys)


def _numbers(column: pa.Array, where: str, first: int) -> np.ndarray:
    try:
        found = numbers.parsed(column)
    except TypeError as error:
        raise SourceError(f"{where}: {error}. Name a column of numbers.") from error
    unread = np.isnan(found) & pc.is_valid(column).to_numpy(zero_copy_only=False)
    if unread.any():
        for row in np.flatnonzero(unread).tolist():
            value = column[row].as_py()
            if isinstance(value, str) and value.strip().lower() not in ("", "nan", "null", "none"):
                raise SourceError(
                    f"{where}, row {first + row + 1}: {value[:40]!r} is no number. Correct the "
                    "file, or name a column of numbers."
                )
    return found


def _absent(file: str, missing: str, present: Sequence[str]) -> SourceError:
    return SourceError(f"{file} has no column {missing!r}; it has: {', '.join(present)}.")


def _parquet(file: str, names: Sequence[str], on_read: ReadCallback) -> Iterator[list[pa.Array]]:
    tops = [name.split(".")[0] for name in names]
    with files.opened(file) as stream:
        try:
            parquet = pq.ParquetFile(stream)
            present = parquet.schema_arrow.names
            for top in tops:
                if top not in present:
                    raise _absent(file, top, present)
            total = max(parquet.metadata.num_rows, 1)
            size, rows = stream.seek(0, 2), 0
            for batch in parquet.iter_batches(_ROWS, columns=list(dict.fromkeys(tops))):
                yield [_field(batch, name, file) for name in names]
                told = size * rows // total
                rows += batch.num_rows
                on_read(size * rows // total - told)
        except (pa.ArrowException, OSError) as error:
            raise SourceError(
                f"{file} is not a whole Parquet file ({error}): fetch or write it again."
            ) from error


def _field(batch: pa.RecordBatch, name: str, file: str) -> pa.Array:
    top, *inner = name.split(".")
    column = batch.column(top)
    for part in inner:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
            raise SourceError(f"{file}: {name!r} does not lead to a column of numbers.")
        column = pc.struct_field(column, part)
    return column


def _csv(file: str, names: Sequence[str], on_read: ReadCallback) -> Iterator[list[pa.Array]]:
    stream = pa.PythonFile(_Pieces(files.chunks(file, on_read)), "r")
    delimiter = "\t" if ".tsv" in file.rpartition("/")[2] else ","
    try:
        reader = pacsv.open_csv(
            stream,
            pacsv.ReadOptions(use_threads=False, block_size=_BYTES),
            pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            # Read as strings: a key of digits must keep its zeros, and a value that is not a
            # number must be reported with its row.
            pacsv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=list(dict.fromkeys(names)),
                strings_can_be_null=True,
                null_values=["", "null", "NULL", "None", "NaN", "nan"],
                quoted_strings_can_be_null=False,
            ),
        )
        for batch in reader:
            yield [batch.column(name) for name in names]
    except KeyError as error:
        raise SourceError(f"{file} has no such column: {error}.") from error
    except pa.ArrowException as error:
        raise SourceError(
            f"{file} cannot be read ({error}): the first row names the columns, and every row has "
            "as many."
        ) from error


class _Pieces:
    """File-like object over pieces of bytes."""

    closed = False

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces = pieces
        self._left = b""

    def read(self, size: int = -1) -> bytes:
        found = [self._left]
        held = len(self._left)
        while size < 0 or held < size:
            piece = next(self._pieces, None)
            if piece is None:
                break
            found.append(piece)
            held += len(piece)
        content = b"".join(found)
        if size < 0:
            size = len(content)
        self._left = content[size:]
        return content[:size]

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def _json(file: str, names: Sequence[str], on_read: ReadCallback) -> Iterator[list[pa.Array]]:
    decode = msgspec.json.Decoder().decode
    paths = [name.split(".") for name in names]
    columns: list[list[Any]] = [[] for _ in names]
    for row, line in enumerate(files.lines(file, on_read), 1):
        if isinstance(line, int):
            raise SourceError(f"{file}, row {row}: it is longer than {files.LONGEST_LINE:,} bytes.")
        record = None
        if line.strip():
            try:
                record = decode(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(
                    f"{file}, row {row}: it is not JSON ({error}). Each line must hold one object."
                ) from error
            if not isinstance(record, dict):
                raise SourceError(f"{file}, row {row}: it holds no JSON object.")
        for column, path in zip(columns, paths, strict=True):
            value = record
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            column.append(value)
        if len(columns[0]) == _ROWS:
            yield [_array(column, file, name) for column, name in zip(columns, names, strict=True)]
            columns = [[] for _ in names]
    if columns[0]:
        yield [_array(column, file, name) for column, name in zip(columns, names, strict=True)]


def _array(values: list[Any], file: str, name: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # mixed types: as strings
        for value in values:
            if isinstance(value, list | dict):
                raise SourceError(
                    f"{file}: {name!r} holds {type(value).__name__}, not a string or number."
                ) from None
        return pa.array([None if value is None else str(value) for value in values], pa.string())


# --------------------------------------------------------------------------------------------------
# Keys


def key_hashes(keys: pa.Array, integers: bool, where: str, first: int) -> np.ndarray:
    """Return 128-bit hashes of keys, uint64 [n, 2]; zeros for null keys.

    Args:
      keys: strings or integers [n].
      integers: True if keys are integers; strings of digits are then parsed.
      where: file, for the message.
      first: number of the first row.
    """
    found = np.zeros((len(keys), 2), np.uint64)
    there = pc.is_valid(keys).to_numpy(zero_copy_only=False)
    if integers:
        found[there, 1] = _integers(keys, where, first)[there]
        found[:, 0] = mix(found[:, 1])
        return found
    strings = _strings(keys, where)
    digest = xxhash.xxh3_128_digest
    encoded = strings.cast(pa.large_binary()).to_pylist()
    content = b"".join(bytes(16) if key is None else digest(key) for key in encoded)
    return np.frombuffer(content, np.uint64).reshape(-1, 2)


def text_hashes(texts: pa.Array, where: str) -> pa.Array:
    """Return the corpus's hash of every text, uint64 [n]; null for null texts."""
    digest = xxhash.xxh3_64_intdigest
    encoded = _strings(texts, where).cast(pa.large_binary()).to_pylist()
    return pa.array([None if text is None else digest(text) for text in encoded], pa.uint64())


def _strings(keys: pa.Array, where: str) -> pa.Array:
    kind = keys.type
    if pa.types.is_dictionary(kind):
        keys, kind = keys.cast(kind.value_type), kind.value_type
    if pa.types.is_null(kind):
        return keys.cast(pa.large_string())
    if pa.types.is_integer(kind):
        return keys.cast(pa.large_string())
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise SourceError(f"{where}: keys are {kind}, not strings or whole numbers.")
    return keys.cast(pa.large_string())


def _integers(keys: pa.Array, where: str, first: int) -> np.ndarray:
    kind = keys.type
    try:
        if pa.types.is_unsigned_integer(kind):
            return keys.cast(pa.uint64()).fill_null(0).to_numpy()
        if not pa.types.is_integer(kind) and not pa.types.is_null(kind):
            text = _strings(keys, where)
            with_sign = pc.any(pc.starts_with(text, "-")).as_py()
            keys = text.cast(pa.int64() if with_sign else pa.uint64())
            if not with_sign:
                return keys.fill_null(0).to_numpy()
        return keys.cast(pa.int64()).fill_null(0).to_numpy().view(np.uint64)
    except pa.ArrowInvalid as error:
        raise SourceError(
            f"{where}, after row {first}: keys have to be whole numbers ({error})."
        ) from error
