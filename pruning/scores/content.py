"""Hashes of the contents of documents, by which copies are known."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash


def content_hashes(documents: pa.Array, first: int | None = None) -> np.ndarray:
    """Return a 64-bit hash of each document's content, int64 [documents].

    Args:
      documents: strings, or lists of token ids. Equal documents have equal hashes.
      first: of lists, how many ids count; None for all.
    """
    if pa.types.is_string(documents.type) or pa.types.is_large_string(documents.type):
        kind = np.int32 if pa.types.is_string(documents.type) else np.int64
        offsets = np.frombuffer(documents.buffers()[1], kind)
        width = 1
        content = memoryview(documents.buffers()[2] or b"")
    else:
        offsets = documents.offsets.to_numpy()
        values = documents.values.to_numpy()
        width = values.itemsize
        content = np.ascontiguousarray(values).data.cast("B")
        ends = offsets[1:] if first is None else np.minimum(offsets[1:], offsets[:-1] + first)
        return _hashes(content, offsets[:-1] * width, ends * width)
    begin = documents.offset
    offsets = offsets[begin : begin + len(documents) + 1]
    return _hashes(content, offsets[:-1], offsets[1:])


def _hashes(content: memoryview, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    digest = xxhash.xxh3_64_intdigest
    places = zip(begins.tolist(), ends.tolist(), strict=True)
    found = [digest(content[a:b]) for a, b in places]
    return np.array(found, np.uint64).view(np.int64)
