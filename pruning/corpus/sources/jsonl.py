"""JSON lines, plain or compressed: one object per line.

msgspec parses in less than half of the standard library's time. It is stricter: a line that it
refuses is passed to the standard library, which decides and gives the error message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec

from pruning.corpus.sources import files
from pruning.corpus.sources.document import (
    Document,
    ReadCallback,
    Reject,
    from_record,
    invalid_utf8,
)

# Suffixes in directories. A plain .json is seldom JSON lines; C4's files are .json.gz.
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")


@dataclasses.dataclass(frozen=True)
class JsonlSource(files.FileSource):
    """Files of JSON lines: plain, .gz or .zst.

    Attributes:
      paths: files, directories, or patterns such as "c4/c4-train.*.json.gz".
      text_field: name of the field that holds the text; dotted when it is nested.
    """

    suffixes: ClassVar[Sequence[str]] = SUFFIXES

    paths: tuple[str, ...] = ()
    text_field: str = "text"

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        for line in files.runs(file, on_read):
            if isinstance(line, files.Blank):
                yield _BLANK._replace(n_bytes=len(line.line), rows=line.number)
                continue
            item = _parsed(line, self.text_field)
            if item.__class__ is Reject:
                item = item._replace(n_bytes=files.length_of(line))
            yield item


_BLANK = Reject("blank_line", "the line is blank", malformed=False)
_parse = msgspec.json.Decoder().decode


def _parsed(line: bytes | int, text_field: str) -> Document | Reject:
    if isinstance(line, int):
        return Reject(
            "line_too_long",
            f"it is longer than {files.LONGEST_LINE:,} bytes. Each line must hold one object",
        )
    if not line or line.isspace():
        return _BLANK
    try:
        record = _parse(line)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        record = None
    if record.__class__ is dict:
        return from_record(record, text_field, "JsonlSource.text_field")
    try:
        record = json.loads(line.decode())  # json.loads on bytes would accept surrogates
    except UnicodeDecodeError as error:
        return invalid_utf8(error)
    except (ValueError, RecursionError) as error:
        return Reject("invalid_json", f"it is not JSON ({error}). Each line must hold one object")
    if not isinstance(record, dict):
        return Reject(
            "not_an_object",
            f"it holds a JSON {type(record).__name__}. Each line must hold one object",
        )
    return from_record(record, text_field, "JsonlSource.text_field")
