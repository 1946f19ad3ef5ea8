"""Text files: one document per file, or per line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pruning.corpus.sources import files
from pruning.corpus.sources.document import (
    EMPTY,
    Document,
    ReadCallback,
    Reject,
    invalid_utf8,
)

SUFFIXES = tuple(
    f".{kind}{packed}" for kind in ("txt", "md", "rst", "text") for packed in ("", ".gz", ".zst")
)


@dataclasses.dataclass(frozen=True)
class TextSource(files.FileSource):
    """UTF-8 text files: plain, .gz or .zst.

    Attributes:
      paths: files, directories or patterns. A pattern matches files of any suffix.
      document: "file" or "line". For many small files, each a document, set
        `Ingest.files_per_shard`.
    """

    suffixes: ClassVar[Sequence[str]] = SUFFIXES

    paths: tuple[str, ...] = ()
    document: Literal["file", "line"] = "file"

    def read(
        self, file: str, fields: Sequence[str], on_read: ReadCallback
    ) -> Iterator[Document | Reject]:
        if self.document == "line":
            for line in files.runs(file, on_read):
                if isinstance(line, files.Blank):
                    yield EMPTY._replace(n_bytes=len(line.line), rows=line.number)
                else:
                    yield _document(line)
        elif content := files.whole(file, on_read):
            yield _document(content)


def _document(content: bytes | int) -> Document | Reject:
    if isinstance(content, int):
        return Reject(
            "line_too_long",
            f"the text is longer than {files.LONGEST_LINE:,} bytes. Cut it",
            n_bytes=content,
        )
    try:
        return Document(content.decode(), {})
    except UnicodeDecodeError as error:
        return invalid_utf8(error)._replace(n_bytes=len(content))
