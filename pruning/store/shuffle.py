"""Records grouped by an integer on disk: intermediate files of an external join or sort.

A file holds runs, and a run holds its records bucket by bucket. The footer has the offset of each
bucket of each run, so that one bucket of a thousand files is read without the others.

    with atomic_file(path) as sink:
        grouped = Grouped(sink, DTYPE, buckets)
        grouped.add(records, bucket_of)        # any number of times
        grouped.finish()
    records = read(path, DTYPE, bucket)

Choices
- Memory holds `RUN` bytes of records, whatever the size of the input.
- Every section and the footer have a checksum, compared on reading: a changed offset would make a
  bucket empty. The footer's checksum covers the file's name, so that swapped files are detected.
"""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import xxhash
from etils import epath

from pruning.store.manifest import ArtifactError

RUN = 1 << 24  # bytes of records buffered before a write

_MAGIC = 0x57494E4E53484632
_TAIL = 4  # 64-bit integers: runs, buckets, magic, checksum of the footer before it


class Grouped:
    """Writer of one file.

    Args:
      sink: a binary file with a `name`.
      dtype: dtype of the records.
      buckets: number of buckets.
    """

    def __init__(self, sink: Any, dtype: np.dtype, buckets: int):
        self._sink = sink
        self._dtype = dtype
        self._buckets = buckets
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._count = 0
        self._offsets: list[np.ndarray] = []
        self._checksums: list[np.ndarray] = []
        self._position = 0

    def add(self, records: np.ndarray, bucket: np.ndarray) -> None:
        """Append records.

        Args:
          records: [n], of the file's dtype.
          bucket: integers [n], from 0 to `buckets` - 1.
        """
        most = max(RUN // self._dtype.itemsize, 1)
        for start in range(0, len(records), most):
            part = slice(start, start + most)
            self._held.append((records[part], bucket[part]))
            self._count += len(records[part])
            if self._count >= most:
                self._flush()

    def _flush(self) -> None:
        if not self._count:
            return
        records = np.concatenate([held for held, _ in self._held])
        bucket = np.concatenate([of for _, of in self._held])
        self._held, self._count = [], 0
        records = records[np.argsort(bucket, kind="stable")]
        counts = np.bincount(bucket, minlength=self._buckets)
        offsets = self._position + np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        content = memoryview(records.tobytes())
        self._sink.write(content)
        places = ((offsets - self._position) * self._dtype.itemsize).tolist()
        digests = [xxhash.xxh3_64_intdigest(content[a:b]) for a, b in itertools.pairwise(places)]
        self._offsets.append(offsets)
        self._checksums.append(np.array(digests, np.uint64))
        self._position += len(records)

    def finish(self) -> None:
        """Write the buffered records and the footer."""
        self._flush()
        shape = np.array([len(self._offsets), self._buckets, _MAGIC], np.int64)
        footer = b"".join(table.tobytes() for table in (*self._offsets, *self._checksums, shape))
        self._sink.write(footer)
        self._sink.write(_checksum(footer, self._sink.name))


def _checksum(footer: bytes, name: str) -> bytes:
    return xxhash.xxh3_64_intdigest(footer + name.encode()).to_bytes(8, "little")


def read(path: epath.Path, dtype: np.dtype, bucket: int) -> np.ndarray:
    """Return the records of one bucket of a file, in the order in which they were added.

    Raises:
      ArtifactError: the file is missing, truncated, damaged, or was swapped with another file.
    """
    damaged = f"{path} is damaged: delete it and run the same command again."
    if not path.exists():
        raise ArtifactError(f"{path} is missing: run the same command again, it will go on.")
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size < 8 * _TAIL:
            raise ArtifactError(damaged)
        file.seek(size - 8 * _TAIL)
        tail = file.read(8 * _TAIL)
        runs, buckets, magic = np.frombuffer(tail[:-8], np.int64).tolist()
        footer = 8 * (runs * (2 * buckets + 1) + _TAIL)
        if magic != _MAGIC or min(runs, buckets) < 0 or footer > size or bucket >= buckets:
            raise ArtifactError(damaged)
        file.seek(size - footer)
        tables = file.read(footer - 8 * _TAIL)
        if tail[-8:] != _checksum(tables + tail[:-8], path.name):
            raise ArtifactError(damaged)
        split = 8 * runs * (buckets + 1)
        offsets = np.frombuffer(tables[:split], np.int64).reshape(runs, buckets + 1)
        checksums = np.frombuffer(tables[split:], np.uint64).reshape(runs, buckets)
        parts = [np.zeros(0, dtype)]
        for run in range(runs):
            begin, end = offsets[run, bucket : bucket + 2].tolist()
            if begin == end:
                continue
            file.seek(begin * dtype.itemsize)
            content = file.read((end - begin) * dtype.itemsize)
            if xxhash.xxh3_64_intdigest(content) != int(checksums[run, bucket]):
                raise ArtifactError(damaged)
            parts.append(np.frombuffer(content, dtype))
    return np.concatenate(parts)
