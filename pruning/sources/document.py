"""What a source yields: for every row of a file, in order, one document or one reject.

Choices
- Nothing is skipped in silence: the n-th item that `read` yields is row n of the file, so counting
  the items counts the rows, and several workers can share one file by the row's number.
- Text is kept as it came, to the byte. What is no text at all (invalid UTF-8, a record without a
  text) is rejected with a reason; a damaged file is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class SourceError(ValueError):
    """Input cannot be read. The message names the file, the row if there is one, and the mend."""


class TruncatedFile(SourceError):
    """A file ends in the middle: what was read before is whole."""


class Document(NamedTuple):
    """One text and the fields of the record that it came in (which may be nested)."""

    text: str
    fields: Mapping[str, Any]


class Reject(NamedTuple):
    """A row that is no document.

    Attributes:
      reason: a word to count it under, "invalid_utf8".
      detail: a sentence that says what is wrong with this row and how to mend it.
      malformed: whether it counts against the share of bad rows that a corpus may have. A blank
        line does not.
    """

    reason: str
    detail: str
    malformed: bool = True


class Fingerprint(NamedTuple):
    """What tells one state of an input file from another; equal for equal content."""

    n_bytes: int
    checksum: str


Meter = Callable[[int], None]
"""Is told how many bytes of the input have been taken, for the progress line."""


class Source(Protocol):
    """Where documents come from. A frozen dataclass, so that gin can make it."""

    def files(self) -> list[str]:
        """The pieces that can be read one by one, always in the same order; at least one.

        Raises:
          SourceError: nothing is there.
        """

    def fingerprint(self, file: str) -> Fingerprint:
        """Of the content of `file`, without reading all of a large one."""

    def read(self, file: str, fields: Sequence[str], meter: Meter) -> Iterator[Document | Reject]:
        """The rows of `file`, in order.

        Args:
          file: one of `files()`.
          fields: dotted names of the fields that are wanted beside the text; others may come too.
          meter: told of the bytes taken from the input.

        Raises:
          SourceError: the file is damaged, missing or of another format.
          TruncatedFile: it ends in the middle.
        """


def lookup(fields: Mapping[str, Any], name: str) -> str | None:
    """The field of a dotted name as a string, as it came: None when it is absent or null.

    Lists and records come out as JSON, numbers in their usual notation.
    """
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or (value := value.get(key)) is None:
            return None
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False, default=_plain)
    return value


def _plain(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def from_record(record: Mapping[str, Any], text_field: str, where: str) -> Document | Reject:
    """A document from a record that holds the text under a dotted name.

    Args:
      where: "JsonlSource.text_field", the setting that the message tells to change.
    """
    value: Any = record
    if "." not in text_field:
        value = record.get(text_field)
    else:
        for key in text_field.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
    if value.__class__ is str:
        return Document(value, record)
    if value is None:
        has = ", ".join(sorted(map(str, record))) or "nothing"
        return Reject(
            "no_text",
            f"it has no text under {text_field!r}; it has: {has}. Set {where} to the field",
        )
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            return invalid_utf8(error)
    if not isinstance(value, str):
        return Reject(
            "text_not_a_string",
            f"{text_field!r} holds {type(value).__name__}, not a string. Set {where} to the text",
        )
    return Document(value, record)


def invalid_utf8(error: UnicodeError) -> Reject:
    """Counts bytes that are not UTF-8, and code points that cannot be written as UTF-8."""
    return Reject("invalid_utf8", f"it is not UTF-8 ({error}). Convert the file to UTF-8")
