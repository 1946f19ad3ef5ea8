"""Detection of edits of large local input files, between runs and while they are read.

Fingerprints (files.py) read all of a file of at most 16 MiB, and blocks of a larger one. Of a
larger local file, the digest of all its bytes is kept in the record of every shard that was made
from it: it is computed right after the shard was read, when the file is in the page cache.

Choices
- Shards of one file must agree on its digest: otherwise it was edited between them.
- When a run is resumed, or run again after its end, a file with another time of modification is
  read and compared. A copy of the file is the same file. An edit that restores the time of
  modification is not detected.
- Objects of object storage are not compared: they are replaced as a whole, and reading them again
  costs as much as ingesting them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from pruning.corpus.sources.document import Source, SourceError
from pruning.corpus.sources.files import SAMPLED_FROM, FileSource

_BLOCK = 1 << 22


class Stamp(NamedTuple):
    """Size in bytes, and time of modification in nanoseconds."""

    size: int
    mtime: int


def stamps(source: Source, files: Iterable[str]) -> dict[str, Stamp]:
    """Return the stamps of those files of a source that are local and large."""
    if not isinstance(source, FileSource):
        return {}
    found = {file: _stamp(file) for file in files if "://" not in file}
    return {file: stamp for file, stamp in found.items() if stamp.size > SAMPLED_FROM}


def read(before: Mapping[str, Stamp], names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the digests of files that were just read, for the record of a shard.

    Args:
      before: their stamps before they were read.
      names: path -> name in the configuration.

    Raises:
      SourceError: a file was changed since.
    """
    made = {
        names[file]: {"xxh3": _digest(file), "mtime": stamp.mtime} for file, stamp in before.items()
    }
    for file, stamp in before.items():
        if _stamp(file) != stamp:
            raise SourceError(
                f"{file} was changed while it was read: run the command again when nothing writes "
                "to it."
            )
    return made


def together(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return name -> digest of the large files that all shards were made from.

    Raises:
      SourceError: shards were made from different contents of one file.
    """
    digests: dict[str, str] = {}
    for record in records:
        for name, seen in record.get("read", {}).items():
            if digests.setdefault(name, seen["xxh3"]) != seen["xxh3"]:
                raise _edited(name, "between the shards that were made from it")
    return digests


def require_unchanged(
    records: Iterable[Mapping[str, Any] | None], files: Mapping[str, str], output: str
) -> None:
    """Raise SourceError if a file is no longer what finished shards were made from.

    Args:
      records: of the shards; None for those that are missing.
      files: name -> path, of the large local files.
    """
    seen: dict[str, dict[str, Any]] = {}
    for record in records:
        seen.update({} if record is None else record.get("read", {}))
    for name, path in files.items():
        if name in seen and _stamp(path).mtime != seen[name]["mtime"]:
            _require_same(path, seen[name]["xxh3"], output)


def require_as_made(digests: Mapping[str, str], files: Mapping[str, str], output: str) -> None:
    """Raise SourceError if a file was edited after a finished artifact was made from it.

    Args:
      digests: as of `together`.
      files: name -> path, of the large local files.
    """
    made = _stamp(f"{output}/manifest.json").mtime if "://" not in output else 0
    for name, path in files.items():
        if name in digests and _stamp(path).mtime > made:
            _require_same(path, digests[name], output)


def _require_same(path: str, digest: str, output: str) -> None:
    if _digest(path) != digest:
        raise _edited(path, f"after {output} was begun with it", output)


def _edited(file: str, when: str, output: str = "the output") -> SourceError:
    return SourceError(
        f"{file} was edited {when}: put the file back, or delete {output} and run the command "
        "again."
    )


def _stamp(file: str) -> Stamp:
    try:
        status = Path(file).stat()
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror or error}).") from error
    return Stamp(status.st_size, status.st_mtime_ns)


def _digest(file: str) -> str:
    hasher = xxhash.xxh3_64()
    try:
        with Path(file).open("rb") as stream:
            while block := stream.read(_BLOCK):
                hasher.update(block)
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror or error}).") from error
    return hasher.hexdigest()
