"""Digests of shards: recorded as a shard is written, compared when byte ranges of it are read.

    corpus/
      data-00000-of-00016.parquet
      data-00000-of-00016.parquet.xxh3

Choices
- A block is one write of the Parquet writer, a page with its header, extended to at least 512
  bytes. A column of a row group is a few blocks, so it is checked without reading its neighbors.
- XXH3 of 64 bits detects damage, not forgery. SHA-256 of whole files, which the manifest has too,
  takes 15 times as long (58 ms against 3.7 for 86 MB on one core) and cannot check a part.
- The digest of the file of digests is in the manifest's row of the shard. A shard that was replaced
  together with its digests is detected, and so are missing digests.
- Shards of earlier versions have no digests; they are marked in the manifest and read unchecked.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from etils import epath

from pruning.store.block_hasher import MAGIC, checksum
from pruning.store.manifest import ArtifactError, ShardRecord

_SUFFIX = ".xxh3"


def file_of(directory: epath.Path, shard_file: str) -> epath.Path:
    """Return the path of the digests of one data file of an artifact."""
    return directory / f"{shard_file}{_SUFFIX}"


@dataclasses.dataclass(frozen=True, eq=False)
class Digests:
    """The digests of one data file.

    Attributes:
      path: path of the data file.
      ends: end of every block, in bytes.
      sums: XXH3 of every block.
      columns: top-level column of every chunk of a row group; empty for formats other than Parquet.
      chunks: uint32 [row groups, chunks, 2], first block and one past the last.
    """

    path: epath.Path
    ends: list[int]
    sums: list[int]
    columns: list[str]
    chunks: np.ndarray

    @property
    def size(self) -> int:
        return self.ends[-1] if self.ends else 0

    def start(self, block: int) -> int:
        return self.ends[block - 1] if block else 0

    @functools.cached_property
    def footer(self) -> int:
        """First block of what follows the last row group."""
        return max(int(self.chunks[..., 1].max(initial=0)) - 1, 0)

    def block_at(self, position: int) -> int:
        """Return the index of the block that contains a byte."""
        return bisect.bisect_right(self.ends, position)

    def wanted(self, groups: Sequence[int], columns: Sequence[str] | None) -> list[int]:
        """Return the blocks of some columns (None: all) of some row groups, ascending."""
        of = [i for i, name in enumerate(self.columns) if columns is None or name in columns]
        blocks: list[int] = []
        end = 0  # neighboring chunks may share a block
        for group in sorted(groups):
            bounds = self._bounds[group]
            for chunk in of:
                first, last = bounds[chunk]
                blocks.extend(range(max(first, end), last))
                end = max(end, last)
        return blocks

    @functools.cached_property
    def _bounds(self) -> list[list[list[int]]]:
        """The chunks as lists: single look-ups in arrays take 10 times as long."""
        return self.chunks.tolist()

    def check(self, blocks: Iterable[int], content: memoryview, offset: int = 0) -> None:
        """Raise ArtifactError unless these blocks match their digests.

        Args:
          content: bytes of the file from `offset` on.
        """
        digest, ends, sums = xxhash.xxh3_64_intdigest, self.ends, self.sums
        for block in blocks:
            start = ends[block - 1] if block else 0
            if digest(content[start - offset : ends[block] - offset]) != sums[block]:
                raise self.damaged(self._place(block))

    def check_size(self, size: int) -> None:
        """Raise ArtifactError unless the file has its recorded size."""
        if size != self.size:
            raise self.damaged(f"it holds {size:,} bytes, {self.size:,} were written")

    def damaged(self, reason: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is damaged, or belongs to another shard or corpus: {reason}. Delete this "
            f"file and run the command that made {self.path.parent} again: it makes it anew."
        )

    def _place(self, block: int) -> str:
        where = f"bytes {self.start(block):,} to {self.ends[block]:,}"
        inside = (self.chunks[..., 0] <= block) & (block < self.chunks[..., 1])
        found = np.argwhere(inside).tolist()
        names = [f"column {self.columns[i]} of row group {group}" for group, i in found]
        return f"{where} ({', '.join(names)}) have changed" if names else f"{where} have changed"


def digests_of(directory: epath.Path, shard: ShardRecord) -> Digests | None:
    """Return the digests of a data file; None for earlier versions, which recorded none.

    Raises:
      ArtifactError: the digests are missing or damaged.
    """
    return _load(str(directory), shard.file, shard.blocks) if shard.blocks else None


def is_whole(directory: epath.Path, shard: ShardRecord) -> bool:
    """Return whether a data file and its digests exist with their recorded size.

    Object storage publishes an object only when it is complete, so its size is not requested.
    """
    path = directory / shard.file
    try:
        digests = _read(str(directory), shard.file, shard.blocks) if shard.blocks else None
        if digests is None or "://" in str(path):
            return path.exists()
        return path.stat().length == digests.size
    except (FileNotFoundError, ArtifactError):
        return False


def _read(directory: str, name: str, expected: str) -> Digests:
    path = f"{directory}/{name}"
    file = path + _SUFFIX
    again = (
        f"Delete {path} and run the command that made {directory} again: it makes both files anew."
    )
    try:
        content = _content(file)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing, so {name} cannot be checked. {again}") from None
    if checksum(content) != expected:
        raise ArtifactError(f"{file} is damaged, or belongs to another shard. {again}")
    head, _, body = content.removeprefix(MAGIC).partition(b"\n")
    described = json.loads(head)
    blocks, columns = described["blocks"], described["columns"]
    ends = np.frombuffer(body, "<u8", blocks)
    sums = np.frombuffer(body, "<u8", blocks, 8 * blocks)
    chunks = np.frombuffer(body, "<u4", offset=16 * blocks)
    return Digests(
        epath.Path(path),
        ends.tolist(),
        sums.tolist(),
        columns,
        chunks.reshape(described["row_groups"], len(columns), 2),
    )


def _content(file: str) -> bytes:
    if "://" in file:
        return epath.Path(file).read_bytes()
    with open(file, "rb") as opened:  # noqa: PTH123  a path object costs as much as the reading
        return opened.read()


_load = functools.lru_cache(1024)(_read)
