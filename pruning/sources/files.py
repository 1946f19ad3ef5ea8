"""Input files: finding them, telling them apart, unpacking them, cutting them into lines.

Choices
- The end of a compressed file is checked: a plain stream reader takes a cut .zst for a whole one.
- A line longer than `LONGEST_LINE` is rejected without being held in memory.
- A fingerprint reads at most 16 MiB of a file: all of a small one, evenly spaced blocks of a large
  one. In compressed files and Parquet no edit hides from that; an edit in place of a large plain
  file, of equal length and between the blocks, does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, cast

import xxhash
from etils import epath

from pruning.sources.document import Fingerprint, Meter, SourceError, TruncatedFile

LONGEST_LINE = 1 << 28  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8
_FINGERPRINT_BLOCKS = 16
_BLOCK = 1 << 20
_GZIP = 31  # tells zlib to expect gzip's header and to check its checksum
_READ = 1 << 17  # small, since a compressed block may unfold to a thousand times its size


def expand(paths: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """The files that paths, directories and glob patterns stand for, sorted, each once.

    Args:
      paths: a directory stands for every file below it that has one of the suffixes; hidden files
        and those that begin with "_" are left out.
      suffixes: such as ".jsonl.gz".

    Raises:
      SourceError: a path stands for no file.
    """
    if not paths:
        raise SourceError("the source has no paths: set them to files, directories or patterns.")
    found: set[str] = set()
    for given in paths:
        path = epath.Path(given).expanduser()
        if any(character in os.fspath(path) for character in "*?["):
            matches = [file for file in _glob(path) if file.is_file()]
        elif path.is_dir():
            matches = [file for file in _below(path) if file.name.endswith(tuple(suffixes))]
        else:
            matches = [path] if path.exists() else []
        if not matches:
            raise SourceError(
                f"{given} stands for no file: give a file, a pattern in quotes, or a directory "
                f"that holds {', '.join(suffixes)}."
            )
        found.update(map(os.fspath, matches))
    return sorted(found)


def _below(directory: epath.Path) -> Iterator[epath.Path]:
    """All files in a directory and the directories in it, but for hidden and private ones."""
    for child in directory.iterdir():
        if child.name[0] in "._":
            continue
        if child.is_dir():
            yield from _below(child)
        else:
            yield child


def _glob(pattern: epath.Path) -> Iterator[epath.Path]:
    """Matches of a pattern: from the last directory that has no wildcard in its name on."""
    parts = pattern.parts
    if "**" in parts:
        raise SourceError(f"{pattern}: ** is not known here; a directory stands for all below it.")
    first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    root = epath.Path(*parts[:first]) if first else epath.Path(".")
    return root.glob("/".join(parts[first:]))


def fingerprint(file: str) -> Fingerprint:
    """Size and xxh3-64 of the file, or of 16 evenly spaced MiB of a larger one."""
    with opened(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        hasher = xxhash.xxh3_64()
        if size <= _FINGERPRINT_BLOCKS * _BLOCK:
            while block := stream.read(_BLOCK):
                hasher.update(block)
        else:
            for i in range(_FINGERPRINT_BLOCKS):
                stream.seek(i * (size - _BLOCK) // (_FINGERPRINT_BLOCKS - 1))
                hasher.update(stream.read(_BLOCK))
    return Fingerprint(size, hasher.hexdigest())


def opened(file: str) -> BinaryIO:
    """Opens for reading bytes, local or remote.

    Raises:
      SourceError: naming the file, when it cannot be opened.
    """
    try:
        return epath.Path(file).open("rb")
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror or error}).") from error


def chunks(file: str, meter: Meter) -> Iterator[bytes]:
    """The content in pieces, unpacked when the name ends in .gz or .zst.

    Raises:
      TruncatedFile: a compressed file ends in the middle.
      SourceError: it is damaged, or is not compressed as its name says.
    """
    with opened(file) as stream:
        pieces = _metered(stream, meter)
        if file.endswith(".gz"):
            from isal import isal_zlib  # zlib's interface in less than half of zlib's time

            damage = cast("type[Exception]", isal_zlib.error)  # its stubs say an instance
            yield from _unpacked(file, pieces, lambda: isal_zlib.decompressobj(_GZIP), damage)
        elif file.endswith(".zst"):
            import zstandard

            decompressor = zstandard.ZstdDecompressor()
            yield from _unpacked(file, pieces, decompressor.decompressobj, zstandard.ZstdError)
        else:
            yield from pieces


def _metered(stream: BinaryIO, meter: Meter) -> Iterator[bytes]:
    while piece := stream.read(_READ):
        meter(len(piece))
        yield piece


def _unpacked(
    file: str,
    pieces: Iterator[bytes],
    new_decoder: Callable[[], Any],
    damage: type[Exception],
) -> Iterator[bytes]:
    """Both formats may hold several members, one after another; each must be whole."""
    decoder = None
    unpacked = 0
    for piece in pieces:
        while piece:
            if decoder is None:
                piece = piece.lstrip(b"\0")  # padding may stand between gzip members
                if not piece:
                    break
                decoder = new_decoder()
            try:
                data = decoder.decompress(piece)
            except damage as error:
                raise SourceError(
                    f"{file} is damaged after {unpacked:,} unpacked bytes ({error}): fetch it "
                    "again, or rename it if it is not compressed."
                ) from error
            piece = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
            unpacked += len(data)
            yield data
    if decoder is not None:
        raise TruncatedFile(
            f"{file} is cut off: its compressed data ends in the middle, after {unpacked:,} "
            "unpacked bytes"
        )


def lines(file: str, meter: Meter) -> Iterator[bytes | None]:
    """The lines without their ends (LF or CR LF) and without a byte order mark at the start.

    None stands for a line that is longer than `LONGEST_LINE`. Nothing follows a last line end.
    """
    held: list[bytes] = []  # pieces of a line whose end has not come yet
    length = 0
    first = True
    for chunk in chunks(file, meter):
        for i, piece in enumerate(chunk.split(b"\n")):
            if i:  # a line end stood before this piece
                yield _line(held, length, first)
                held, length, first = [], 0, False
            length += len(piece)
            if length <= LONGEST_LINE:
                held.append(piece)
            else:
                held.clear()
    if length:
        yield _line(held, length, first)


def _line(held: list[bytes], length: int, first: bool) -> bytes | None:
    if length > LONGEST_LINE:
        return None
    line = b"".join(held)
    return (line.removeprefix(BYTE_ORDER_MARK) if first else line).removesuffix(b"\r")
