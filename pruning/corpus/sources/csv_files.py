"""CSV and TSV files: one document per row, after a header row.

Choices
- A quoted field may hold line ends, so rows are read by the csv module, not line by line. Bytes
  that are not UTF-8 pass through it as surrogates, and only their row is rejected.
- A quote that is never closed would turn the rest of the file into one field. A field longer than
  `_LONGEST_FIELD` is therefore an error, with a message that says so.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from pruning.corpus.sources import files
from pruning.corpus.sources.document import (
    Document,
    ReadCallback,
    Reject,
    SourceError,
    invalid_utf8,
)

SUFFIXES = tuple(f"{kind}{packed}" for kind in (".csv", ".tsv") for packed in ("", ".gz", ".zst"))

_LONGEST_FIELD = 1 << 26  # characters


@dataclasses.dataclass(frozen=True)
class CsvSource(files.FileSource):
    """CSV or TSV files in UTF-8: plain, .gz or .zst. The first row names the columns.

    Attributes:
      paths: files, directories or patterns.
      text_field: name of the column with the text.
      delimiter: character between fields; None for a tab in .tsv files and a comma in others.
      quoted: a field in double quotes may hold delimiters and line ends. If False, quotes are
        ordinary characters.
    """

    suffixes: ClassVar[Sequence[str]] = SUFFIXES

    paths: tuple[str, ...] = ()
    text_field: str = "text"
    delimiter: str | None = None
    quoted: bool = True

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        csv.field_size_limit(_LONGEST_FIELD)
        rows = csv.reader(
            _lines(file, on_read),
            delimiter=self.delimiter or ("\t" if ".tsv" in file.rpartition("/")[2] else ","),
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
        )
        try:
            if (first := next(rows, None)) is None:
                return
            names = self._names(file, first)
            for row in _with_runs(rows):
                if isinstance(row, int):
                    yield _BLANK._replace(rows=row)
                else:
                    yield self._document(names, row)
        except csv.Error as error:
            raise SourceError(
                f"{file}, line {rows.line_num}: {error}. If a field begins with a quote that is "
                "never closed, set CsvSource.quoted=False."
            ) from error

    def _names(self, file: str, names: list[str]) -> list[str]:
        if self.text_field not in names:
            raise SourceError(
                f"{file} has no column {self.text_field!r}; its first row has: {', '.join(names)}. "
                "Set CsvSource.text_field to the column that holds the text."
            )
        if twice := {name for name in names if names.count(name) > 1}:
            raise SourceError(f"{file} names the column {min(twice)!r} twice in its first row.")
        return names

    def _document(self, names: list[str], row: list[str]) -> Document | Reject:
        if len(row) != len(names):
            return Reject(
                "wrong_number_of_fields",
                f"it has {len(row)} fields, the first row {len(names)}. Quote fields that hold "
                "the delimiter",
            )
        record = dict(zip(names, row, strict=True))
        text = record[self.text_field]
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an invalid byte that was decoded as a surrogate
            return invalid_utf8(error)
        # Empty fields count as absent. Invalid bytes in other fields are replaced.
        known = {
            name: value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            for name, value in record.items()
            if value and name != self.text_field
        }
        return Document(text, {**known, self.text_field: text})


_BLANK = Reject("blank_line", "the line is blank", malformed=False)


def _with_runs(rows: Iterator[list[str]]) -> Iterator[list[str] | int]:
    """Yield the rows, but a run of blank rows as their number."""
    number = 0
    try:
        for row in rows:
            if not row:
                number += 1
                continue
            if number:
                yield number
                number = 0
            yield row
    except files.TruncatedFile:
        if number:
            yield number
        raise
    if number:
        yield number


def _lines(file: str, on_read: ReadCallback) -> Iterator[str]:
    """Yield lines with their ends; bytes that are not UTF-8 as surrogates."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    held: list[str] = []  # pieces of an incomplete line
    length = 0
    first = True
    for chunk in files.chunks(file, on_read):
        text = decoder.decode(chunk)
        if first and text:
            text = text.removeprefix("\ufeff")
            first = False
        *ended, rest = text.split("\n")
        for line in ended:
            yield "".join([*held, line, "\n"])
            held, length = [], 0
        held.append(rest)
        length += len(rest)
        if length > _LONGEST_FIELD:
            raise SourceError(
                f"{file} has a line of over {_LONGEST_FIELD:,} characters: it is no CSV file."
            )
    held.append(decoder.decode(b"", True))
    if last := "".join(held):
        yield last
