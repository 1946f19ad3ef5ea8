"""Digests of a file's blocks, computed as it is written. The format is described in digests.py."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import xxhash

MAGIC = b"winnow-xxh3-1\n"

_LEAST = 512  # minimum bytes of a block, except the last


def checksum(content: bytes) -> str:
    """Return the XXH3 of some bytes, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(content)


class BlockHasher:
    """Incremental computation of one digest per block."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self._sums: list[int] = []
        self._end = 0
        self._held = 0
        self._current = xxhash.xxh3_64()

    def update(self, data: memoryview) -> None:
        """Add the bytes of one write."""
        self._current.update(data)
        self._end += data.nbytes
        self._held += data.nbytes
        if self._held >= _LEAST:
            self._close()

    def _close(self) -> None:
        self._ends.append(self._end)
        self._sums.append(self._current.intdigest())
        self._current = xxhash.xxh3_64()
        self._held = 0

    def to_bytes(self, metadata: pq.FileMetaData | None = None) -> bytes:
        """Return the content of the file of digests.

        Args:
          metadata: the footer of a Parquet file; None for other formats.
        """
        if self._held:
            self._close()
        ends = np.asarray(self._ends, np.uint64)
        columns: list[str] = []
        chunks = np.zeros((0, 0, 2), np.uint32)
        if metadata is not None:
            columns, bounds = _chunk_bounds(metadata)
            first = np.searchsorted(ends, bounds[..., 0], side="right")
            last = np.searchsorted(ends, bounds[..., 1], side="left") + 1
            last = np.where(bounds[..., 0] == bounds[..., 1], first, last)
            chunks = np.stack([first, last], -1).astype(np.uint32)
        head = json.dumps({"blocks": len(ends), "columns": columns, "row_groups": len(chunks)})
        return b"".join(
            [
                MAGIC,
                head.encode() + b"\n",
                ends.astype("<u8").tobytes(),
                np.asarray(self._sums, "<u8").tobytes(),
                chunks.astype("<u4").tobytes(),
            ]
        )


def _chunk_bounds(metadata: pq.FileMetaData) -> tuple[list[str], np.ndarray]:
    """Return column names, and the first and last byte of chunks, [groups, columns, 2]."""
    names = [metadata.schema.column(i).path.partition(".")[0] for i in range(metadata.num_columns)]
    bounds = np.zeros((metadata.num_row_groups, len(names), 2), np.uint64)
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for i in range(len(names)):
            chunk = row_group.column(i)
            pages = (chunk.dictionary_page_offset, chunk.data_page_offset)
            start = min((offset for offset in pages if offset), default=0)  # 0 without rows
            bounds[group, i] = start, start + chunk.total_compressed_size
    return names, bounds
