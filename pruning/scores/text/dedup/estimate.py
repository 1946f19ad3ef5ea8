"""Cost of `dedup`, estimated from a sample of the documents before it starts."""

from __future__ import annotations

import time

import numpy as np

from pruning.scores.quantities import bytes_in_words
from pruning.scores.text.dedup import minhash
from pruning.scores.text.dedup.library import Library
from pruning.scores.text.dedup.minhash import MinHash
from pruning.scores.text.hashing import Features
from pruning.store.progress import duration

_SAMPLE = 2000  # documents
_SORTED = 1 << 20  # records sorted for the measurement
_RECORD = 16  # bytes


def lines(
    library: Library,
    settings: MinHash | None,
    min_jaccard: float | None,
    buckets: int,
    processes: int,
) -> str:
    """Measure a sample and return the estimate as text.

    Args:
      settings: None compares equal texts alone.
      processes: number of processes that share the work.
    """
    documents = library.documents
    per_document, sampled = _signing(library, settings)
    records = documents * (1 + (settings.bands if settings else 0))
    seconds = documents * per_document + records * _sorting()
    if settings is not None and min_jaccard is not None:
        seconds += documents * per_document  # upper bound: as if all were candidates
    largest = max(records // buckets, max(library.sizes, default=0) * (records // documents))
    return "\n".join(
        [
            f"{documents:,} documents in {len(library.units):,} "
            f"units of reading, {buckets:,} buckets of sorting; measured on {sampled:,} documents",
            f"time: {duration(seconds / processes)} in {processes} processes "
            f"({seconds / 3600:.2f} CPU-hours), {documents / max(seconds, 1e-9):,.0f} documents/s "
            "and core",
            f"intermediate files: {bytes_in_words(records * _RECORD)} written once and read once, "
            "and the pairs of duplicates",
            f"memory: about {bytes_in_words(largest * _RECORD * 6)} for a process beside its own, "
            "and 50 bytes for each document that has a duplicate, in one process",
        ]
    )


def _signing(library: Library, settings: MinHash | None) -> tuple[float, int]:
    """Return seconds per document to read, hash and sign, and the number measured."""
    seen = 0
    started = time.process_time()
    texts = list(library.corpora.values())[-1]
    for shard in range(texts.corpus.num_shards):
        if settings is None:
            seen += len(texts.corpus.columns(shard, ["text_hash"]))
        else:
            rows = texts.rows(shard)[: _SAMPLE - seen]
            for batch in texts.read(shard, rows, Features()):
                if not seen:  # tables are built once
                    minhash.shingles(batch[:1], settings.n)
                    started = time.process_time()
                grams, offsets = minhash.shingles(batch, settings.n)
                some = offsets[1:] > offsets[:-1]
                bounds = np.append(offsets[:-1][some], offsets[-1])
                minhash.band_keys(minhash.signatures(grams, bounds, settings), settings)
                seen += len(batch)
        if seen >= _SAMPLE:
            break
    return (time.process_time() - started) / max(seen, 1), seen


def _sorting() -> float:
    """Measure the seconds to write, read and sort a record."""
    keys = np.random.default_rng(0).integers(0, 1 << 63, _SORTED)
    started = time.process_time()
    order = np.argsort(keys)
    keys[order].tobytes()
    # Twice: partitioned into buckets, and sorted within one.
    return 2 * (time.process_time() - started) / _SORTED
