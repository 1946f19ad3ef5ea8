"""Text files: every file a document, or every line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from pruning.sources import files
from pruning.sources.document import Document, Fingerprint, Meter, Reject, invalid_utf8

SUFFIXES = tuple(
    f".{kind}{packed}" for kind in ("txt", "md", "rst", "text") for packed in ("", ".gz", ".zst")
)


@dataclasses.dataclass(frozen=True)
class TextSource:
    """UTF-8 text files: plain, .gz or .zst.

    Attributes:
      paths: files, directories or patterns. A pattern takes files of any name.
      document: "file" or "line". Many small files, each a document, want `Ingest.files_per_shard`.
    """

    paths: tuple[str, ...] = ()
    document: Literal["file", "line"] = "file"

    def files(self) -> list[str]:
        return files.expand(self.paths, SUFFIXES)

    def fingerprint(self, file: str) -> Fingerprint:
        return files.fingerprint(file)

    def read(self, file: str, fields: Sequence[str], meter: Meter) -> Iterator[Document | Reject]:
        if self.document == "line":
            for line in files.lines(file, meter):
                yield _document(line)
        elif content := b"".join(files.chunks(file, meter)):
            yield _document(content.removeprefix(files.BYTE_ORDER_MARK))


def _document(content: bytes | None) -> Document | Reject:
    if content is None:
        return Reject(
            "line_too_long", f"the line is longer than {files.LONGEST_LINE:,} bytes. Cut it"
        )
    try:
        return Document(content.decode(), {})
    except UnicodeDecodeError as error:
        return invalid_utf8(error)
