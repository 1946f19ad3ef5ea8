"""JSON lines, plain or compressed: one object per line.

msgspec parses in less than half of the standard library's time. It is the stricter of the two: a
line that it refuses is given to the standard library, which decides and says what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

import msgspec

from pruning.sources import files
from pruning.sources.document import (
    Document,
    Fingerprint,
    Meter,
    Reject,
    from_record,
    invalid_utf8,
)

# What is taken from a directory. A plain .json is seldom JSON lines; C4's files are .json.gz.
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")


@dataclasses.dataclass(frozen=True)
class JsonlSource:
    """Files of JSON lines: plain, .gz or .zst.

    Attributes:
      paths: files, directories, or patterns such as "c4/c4-train.*.json.gz".
      text_field: name of the field that holds the text; dotted when it is nested.
    """

    paths: tuple[str, ...] = ()
    text_field: str = "text"

    def files(self) -> list[str]:
        return files.expand(self.paths, SUFFIXES)

    def fingerprint(self, file: str) -> Fingerprint:
        return files.fingerprint(file)

    def read(self, file: str, fields: Sequence[str], meter: Meter) -> Iterator[Document | Reject]:
        for line in files.lines(file, meter):
            yield _parsed(line, self.text_field)


_parse = msgspec.json.Decoder().decode


def _parsed(line: bytes | None, text_field: str) -> Document | Reject:
    if line is None:
        return Reject(
            "line_too_long",
            f"it is longer than {files.LONGEST_LINE:,} bytes. Each line must hold one object",
        )
    if not line or line.isspace():
        return Reject("blank_line", "the line is blank", malformed=False)
    try:
        record = _parse(line)
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        record = None
    if record.__class__ is dict:
        return from_record(record, text_field, "JsonlSource.text_field")
    try:
        record = json.loads(line.decode())  # not left to json.loads, which lets surrogates pass
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
