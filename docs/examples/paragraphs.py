"""A source of one's own: every paragraph of a text file is a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import gin

from pruning.corpus.sources import document, files


@gin.configurable(module="paragraphs")
@dataclasses.dataclass(frozen=True)
class Paragraphs:
    """Settings: `paths`, UTF-8 files, directories or patterns; blank lines part paragraphs."""

    paths: tuple[str, ...] = ()

    def files(self) -> list[str]:
        return files.expand(self.paths, (".txt", ".txt.gz"))

    def fingerprint(self, file: str) -> document.Fingerprint:
        return files.fingerprint(file)

    def read(
        self, file: str, fields: Sequence[str], on_read: document.ReadCallback
    ) -> Iterator[document.Document | document.Reject]:
        for paragraph in b"".join(files.chunks(file, on_read)).split(b"\n\n"):
            try:
                yield document.Document(paragraph.decode(), {})
            except UnicodeDecodeError as error:
                yield document.invalid_utf8(error)
