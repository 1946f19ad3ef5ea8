"""Interface of sources: one document or one reject for every row of a file, in order.

Choices
- No row is skipped silently: the n-th item that `read` yields is row n of the file, except that
  one reject may stand for several rows in succession. Counting them counts the rows, and several
  workers can divide one file by row number.
- Text is kept unchanged, to the byte. A row without valid text (invalid UTF-8, a record without a
  text) is rejected with a reason; a damaged file is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class SourceError(ValueError):
    """Error in the input. The message has the file, the row if there is one, and a fix."""


class TruncatedFile(SourceError):
    """Error for a file that ends in the middle; the rows before that point are complete."""


class Document(NamedTuple):
    """A text and the fields of its record (which may be nested)."""

    text: str
    fields: Mapping[str, Any]


class Reject(NamedTuple):
    """A row that is not a document.

    Attributes:
      reason: short name under which it is counted, "invalid_utf8".
      detail: a sentence that says what is wrong with this row and how to correct it.
      malformed: True if it counts against the share of bad rows that a corpus may have. A blank
        line does not.
      n_bytes: size of the row, as far as known.
      rows: number of successive rows that it stands for, all of this size.
    """

    reason: str
    detail: str
    malformed: bool = True
    n_bytes: int = 0
    rows: int = 1


EMPTY = Reject("empty", "the text is empty", malformed=False)


class Fingerprint(NamedTuple):
    """Fingerprint of an input file's content; equal content has equal fingerprints."""

    n_bytes: int
    checksum: str


ReadCallback = Callable[[int], None]
"""Called with the number of bytes read from the input, for the progress line."""


@runtime_checkable
class Source(Protocol):
    """Interface of a source. Implementations are frozen dataclasses, so that gin can build them."""

    def files(self) -> list[str]:
        """Return the pieces that can be read separately, in a fixed order; at least one.

        Raises:
          SourceError: there are no files.
        """

    def fingerprint(self, file: str) -> Fingerprint:
        """Return a fingerprint of the content of `file`, without reading all of a large file."""

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        """Return the rows of `file`, in order.

        Args:
          file: one of `files()`.
          fields: dotted names of the requested fields beside the text; more may be returned.
          on_read: called with the number of bytes taken from the input.

        Raises:
          SourceError: the file is damaged, missing or of another format.
          TruncatedFile: the file ends in the middle.
        """


def lookup(fields: Mapping[str, Any], name: str) -> str | None:
    """Return the field of a dotted name as a string; None when it is absent or null.

    Strings are unchanged. Lists and records become JSON, numbers their usual notation.
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
    """Return a document from a record that holds the text under a dotted name.

    Args:
      where: the setting that the message says to change, "JsonlSource.text_field".
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
    """Return the reject for bytes that are not UTF-8 or code points that UTF-8 cannot hold."""
    return Reject("invalid_utf8", f"it is not UTF-8 ({error}). Convert the file to UTF-8")
