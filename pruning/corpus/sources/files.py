"""Input files: search, identification, decompression and splitting into lines.

Choices
- The end of a compressed file is checked: a plain stream reader accepts a truncated .zst.
- A line, or a file that is one document, longer than `LONGEST_LINE` is rejected without being held
  in memory, because a small compressed file can expand to any size. A run of equal blank lines is
  counted at once, for the same reason.
- An existing path is that file or directory, whatever characters its name has. Only otherwise are
  "*", "?" and "[" a pattern. A file that is found under several names, as through links, is read
  once. Files of a directory with other suffixes than the source's are counted by suffix.
- A fingerprint reads at most 16 MiB of a file: all of a small one, evenly spaced blocks of a large
  one. Edits of large local files between the blocks are detected by changes.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

import xxhash
from etils import epath

from pruning.corpus.sources.document import Fingerprint, ReadCallback, SourceError, TruncatedFile

LONGEST_LINE = 1 << 26  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # UTF-8
_FINGERPRINT_BLOCKS = 16
_BLOCK = 1 << 20
SAMPLED_FROM = _FINGERPRINT_BLOCKS * _BLOCK  # bytes: larger files are not fingerprinted as a whole
_GZIP = 31  # zlib's wbits: gzip's header and checksum
_READ = 1 << 17  # small, since a block may expand to a thousand times its size
_PIECE = 1 << 20  # bytes of unpacked data at a time: its lines take up to 9 times as much


@dataclasses.dataclass(frozen=True)
class Found:
    """Files that match some paths.

    Attributes:
      files: sorted, without duplicates.
      passed_over: suffix -> number of files in the directories with this suffix, not requested.
      repeated: number of names left out because they lead to a file with another name.
    """

    files: list[str]
    passed_over: Mapping[str, int]
    repeated: int

    def left_out(self) -> list[str]:
        """Return a sentence for each reason for which names were left out."""
        said = []
        if self.passed_over:
            kinds = ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(self.passed_over.items()))
            total = sum(self.passed_over.values())
            said.append(f"{total:,} files of other formats are passed over ({kinds})")
        if self.repeated:
            said.append(f"{self.repeated:,} further names of files that are read already, as links")
        return said


class FileSource:
    """Base of sources of files: their order, the files that are left out, and fingerprints.

    Attributes:
      suffixes: of the files that are read in directories.
      paths: files, directories or patterns.
    """

    suffixes: ClassVar[Sequence[str]]
    paths: tuple[str, ...]

    def files(self) -> list[str]:
        return expand(self.paths, self.suffixes)

    def left_out(self) -> list[str]:
        return find(self.paths, self.suffixes).left_out()

    def fingerprint(self, file: str) -> Fingerprint:
        return fingerprint(file)


def expand(paths: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    """Return the files that match paths, directories and glob patterns, sorted, without duplicates.

    Args:
      paths: a directory matches every file below it that has one of the suffixes; hidden files and
        those that begin with "_" are left out.
      suffixes: such as ".jsonl.gz".

    Raises:
      SourceError: a path matches no file.
    """
    return find(paths, suffixes).files


def find(paths: Sequence[str], suffixes: Sequence[str]) -> Found:
    """Find files as `expand` does, and count the names left out."""
    if not paths:
        raise SourceError("the source has no paths: set them to files, directories or patterns.")
    found: set[str] = set()
    passed_over: Counter[str] = Counter()
    for given in paths:
        if not given.strip():
            raise SourceError("a path of the source is empty: set it to a file or a directory.")
        path = epath.Path(given).expanduser()
        try:
            if path.is_dir():
                below = list(_below(path, set()))
                matches = [file for file in below if file.name.endswith(tuple(suffixes))]
                passed_over.update(map(_suffix, set(below).difference(matches)))
            elif path.exists():
                matches = [path] if _is_file(path) else []
            else:
                matches = [file for file in _glob(path) if _is_file(file)]
        except (OSError, ValueError) as error:  # such as a name that is too long or has a NUL
            raise SourceError(f"{given} cannot be looked for ({error}).") from error
        if not matches:
            raise SourceError(
                f"{given} stands for no file: give a file, a pattern in quotes, or a directory "
                f"that holds {', '.join(suffixes)}."
            )
        found.update(map(os.fspath, matches))
    files = _once(sorted(found))
    return Found(files, passed_over, len(found) - len(files))


def _suffix(file: epath.Path) -> str:
    return file.suffix or "without a suffix"


def _once(files: Sequence[str]) -> list[str]:
    """Return the files without duplicates under other names; links are left out first."""
    of: dict[Any, str] = {}
    for file in files:
        key = _identity(epath.Path(file)) or file
        if key not in of or _links(file) < _links(of[key]):
            of[key] = file
    return sorted(of.values())


def _links(file: str) -> int:
    path = Path(file)
    return sum(part.is_symlink() for part in (path, *path.parents))


def _identity(path: epath.Path) -> tuple[int, int] | None:
    """Return device and inode of a local file or directory; None if it is neither."""
    if "://" in os.fspath(path):
        return None
    try:
        status = Path(os.fspath(path)).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else None


def _is_file(path: epath.Path) -> bool:
    """Return whether the path is a file; False for pipes and devices, which epath calls files."""
    local = "://" not in os.fspath(path)
    return Path(os.fspath(path)).is_file() if local else path.is_file()


def _below(directory: epath.Path, seen: set[tuple[int, int]]) -> Iterator[epath.Path]:
    """Yield all files below a directory, except hidden and private ones.

    Args:
      seen: directories already entered; links may lead to one again, or form a cycle.
    """
    if (own := _identity(directory)) is not None:
        if own in seen:
            return
        seen.add(own)
    children = [child for child in directory.iterdir() if child.name[0] not in "._"]
    if own is not None:  # links last, so that files are found under their own names
        children.sort(key=lambda child: (Path(child).is_symlink(), child.name))
    for child in children:
        if child.is_dir():
            yield from _below(child, seen)
        elif _is_file(child) or not child.exists():  # a broken link is an error later
            yield child


def _glob(pattern: epath.Path) -> Iterator[epath.Path]:
    """Yield the matches of a pattern; a component that exists literally is not a pattern."""
    parts = pattern.parts
    if "**" in parts:
        raise SourceError(f"{pattern}: ** is not known here; a directory stands for all below it.")
    first = next((i for i, part in enumerate(parts) if _is_pattern(part)), len(parts))
    root = epath.Path(*parts[:first]) if first else epath.Path(".")
    return _matching(root, parts[first:])


def _is_pattern(part: str) -> bool:
    return any(character in part for character in "*?[")


def _matching(directory: epath.Path, parts: Sequence[str]) -> Iterator[epath.Path]:
    if not parts:
        yield directory
        return
    child = directory / parts[0]
    if not _is_pattern(parts[0]) or child.exists():
        if child.exists():
            yield from _matching(child, parts[1:])
    elif directory.is_dir():
        for entry in directory.iterdir():
            if fnmatch.fnmatchcase(entry.name, parts[0]):
                yield from _matching(entry, parts[1:])


def fingerprint(file: str) -> Fingerprint:
    """Return size and xxh3-64 of the file, or of 16 evenly spaced MiB of a larger one."""
    with opened(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        hasher = xxhash.xxh3_64()
        if size <= SAMPLED_FROM:
            while block := stream.read(_BLOCK):
                hasher.update(block)
        else:
            for i in range(_FINGERPRINT_BLOCKS):
                stream.seek(i * (size - _BLOCK) // (_FINGERPRINT_BLOCKS - 1))
                hasher.update(stream.read(_BLOCK))
    return Fingerprint(size, hasher.hexdigest())


def opened(file: str) -> BinaryIO:
    """Open a local or remote file for reading bytes.

    Raises:
      SourceError: the file cannot be opened; the message has its path.
    """
    try:
        return epath.Path(file).open("rb")
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror or error}).") from error


@contextlib.contextmanager
def unchanged(file: str, stream: BinaryIO) -> Iterator[None]:
    """Raise SourceError if a local file was modified within the block."""
    before = _written(stream)
    yield
    if _written(stream) != before:
        raise SourceError(
            f"{file} was changed while it was read: delete what was made of it, and run the "
            "command again when nothing writes to it."
        )


def _written(stream: BinaryIO) -> tuple[int, int] | None:
    """Return size and modification time of an open local file; None for a remote one."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, AttributeError):  # io.UnsupportedOperation is an OSError
        return None
    return status.st_size, status.st_mtime_ns


def chunks(file: str, on_read: ReadCallback) -> Iterator[bytes]:
    """Yield the content in pieces, decompressed when the name ends in .gz or .zst.

    Raises:
      TruncatedFile: a compressed file ends in the middle.
      SourceError: the file is damaged, or is not compressed as its name says.
    """
    with opened(file) as stream, unchanged(file, stream):
        pieces = _metered(stream, on_read)
        if file.endswith(".gz"):
            from isal import isal_zlib  # zlib's interface, more than twice as fast

            damage = cast("type[Exception]", isal_zlib.error)  # its stubs declare an instance
            yield from _unpacked(file, pieces, lambda: isal_zlib.decompressobj(_GZIP), damage)
        elif file.endswith(".zst"):
            import zstandard

            decompressor = zstandard.ZstdDecompressor()
            yield from _unpacked(file, pieces, decompressor.decompressobj, zstandard.ZstdError)
        else:
            yield from pieces


def _metered(stream: BinaryIO, on_read: ReadCallback) -> Iterator[bytes]:
    while piece := stream.read(_READ):
        on_read(len(piece))
        yield piece


def _unpacked(
    file: str,
    pieces: Iterator[bytes],
    new_decoder: Callable[[], Any],
    damage: type[Exception],
) -> Iterator[bytes]:
    """Yield decompressed pieces of a file of one or more members; each must be complete."""
    decoder = None
    unpacked = 0
    for piece in pieces:
        while piece:
            if decoder is None:
                piece = piece.lstrip(b"\0")  # padding between gzip members
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
            for start in range(0, len(data), _PIECE):
                yield data[start : start + _PIECE]
    if decoder is not None:
        raise TruncatedFile(
            f"{file} is cut off: its compressed data ends in the middle, after {unpacked:,} "
            "unpacked bytes"
        )


def whole(file: str, on_read: ReadCallback) -> bytes | int:
    """Return the content without a byte order mark; its length so far when it is too long."""
    held: list[bytes] = []
    length = 0
    for chunk in chunks(file, on_read):
        length += len(chunk)
        if length > LONGEST_LINE:
            return length
        held.append(chunk)
    return b"".join(held).removeprefix(BYTE_ORDER_MARK)


def lines(file: str, on_read: ReadCallback) -> Iterator[bytes | int]:
    """Yield the lines without their ends (LF or CR LF) and without a byte order mark at the start.

    A line longer than `LONGEST_LINE` is yielded as its length. No line follows a final line end.
    """
    for item in runs(file, on_read):
        if isinstance(item, Blank):
            yield from itertools.repeat(item.line, item.number)
        else:
            yield item


class Blank(NamedTuple):
    """A run of equal lines of whitespace, or without any character."""

    line: bytes
    number: int


def runs(file: str, on_read: ReadCallback) -> Iterator[Blank | bytes | int]:
    """Yield the lines as `lines` does, but a run of equal blank lines as one item."""
    held: list[bytes] = []  # pieces of an incomplete line
    length = 0
    first = True
    blank: bytes | None = None  # the line before, if it is blank, with its CR
    number = 0  # of such lines in a row
    try:
        for chunk in chunks(file, on_read):
            *ended, rest = chunk.split(b"\n")
            for piece in ended:
                if piece == blank and not length:
                    number += 1
                    continue
                if number:
                    yield _blank(blank, number)
                    blank, number = None, 0
                length = _hold(held, length, piece)
                line = _line(held, length, first)
                if line.__class__ is bytes and (not line or line.isspace()) and not first:
                    blank, number = b"".join(held), 1
                else:
                    yield line
                held, length, first = [], 0, False
            length = _hold(held, length, rest)
    except TruncatedFile:
        if number:
            yield _blank(blank, number)
        raise
    if number:
        yield _blank(blank, number)
    if length:
        yield _line(held, length, first)


def _blank(line: bytes | None, number: int) -> Blank:
    assert line is not None
    return Blank(line.removesuffix(b"\r"), number)


def _hold(held: list[bytes], length: int, piece: bytes) -> int:
    """Add a piece to a line of some length; return its new length. Too long a line is not kept."""
    length += len(piece)
    if length <= LONGEST_LINE:
        held.append(piece)
    else:
        held.clear()
    return length


def _line(held: list[bytes], length: int, first: bool) -> bytes | int:
    if length > LONGEST_LINE:
        return length
    line = b"".join(held)
    return (line.removeprefix(BYTE_ORDER_MARK) if first else line).removesuffix(b"\r")


def length_of(line: bytes | int) -> int:
    return line if isinstance(line, int) else len(line)
