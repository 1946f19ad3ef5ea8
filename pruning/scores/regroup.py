"""Records that change from one division of the work to another, such as from shards to clusters.

A pass writes a file per part of its work, each with a bucket for every part of the next pass, which
reads its bucket from all files. Memory is bounded by one bucket, whatever the size of the whole.
The files are parts of unfinished work: whole or absent, shared by processes and hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from pruning.store import shuffle
from pruning.store.intermediate import Parts


@dataclasses.dataclass(frozen=True)
class Regrouped:
    """Files of records by bucket.

    Attributes:
      parts: the files.
      dtype: of the records.
      buckets: how many buckets each file has.
    """

    parts: Parts
    dtype: np.dtype
    buckets: int

    def write(self, part: int, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write a file from batches of records [n] and their buckets, integers [n]."""
        with self.parts.opened(part) as sink:
            grouped = shuffle.Grouped(sink, self.dtype, self.buckets)
            for records, bucket in batches:
                grouped.add(records, bucket)
            grouped.finish()

    def read_each(self, bucket: int) -> Iterator[np.ndarray]:
        """Yield the records of a bucket, file by file; raise ArtifactError if one is damaged."""
        for part in range(self.parts.count):
            yield self.parts.read_bucket(part, self.dtype, bucket)

    def read(self, bucket: int) -> np.ndarray:
        """Return the records of a bucket, in the order of the files."""
        return np.concatenate([np.zeros(0, self.dtype), *self.read_each(bucket)])
