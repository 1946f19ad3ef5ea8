"""Loop between reader and device: packed batches out, answers back, scores in order."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.scores import pipeline
from pruning.scores.model import chunk_scores
from pruning.scores.model.batches import Batch, Reader
from pruning.scores.model.chunk_scores import Ask
from pruning.scores.model.scoring_meter import ScoringMeter
from pruning.store.manifest import Counts

_AHEAD = 4  # largest number of batches waiting for the device
_IN_FLIGHT = 2  # largest number of batches on the device


@dataclasses.dataclass(frozen=True)
class Part:
    """Scores of a chunk of documents, in their order.

    Attributes:
      shard, last: index of the shard, and whether the chunk is its last.
      table: rows of the score set.
      counts: counts for the manifest.
      measured: seconds and sizes.
    """

    shard: int
    last: bool
    table: pa.Table
    counts: Counts
    measured: Mapping[str, float]


def scored(
    reader: Reader, shards: Sequence[int], ask: Ask, meter: ScoringMeter
) -> Generator[Part, None, None]:
    """Yield the scores of some shards, in order, while a few batches are on the device.

    Args:
      ask: packed rows -> answers; a `device.Step` or any other callable.
    """

    def land(batch: Batch, answers: Any) -> Iterator[Part]:
        started = time.perf_counter()
        values = None if answers is None else np.asarray(answers)  # blocks until the device is done
        meter.waited(time.perf_counter() - started)
        meter.batch(batch)
        first = 0
        for chunk, count in batch.parts:
            if count:
                assert values is not None  # a batch with rows has answers
                chunk.answers.append(values[first : first + count])
                first += count
            if chunk.complete:
                table, counts = chunk_scores.scores_of(chunk, reader, ask)
                yield Part(chunk.shard, chunk.last, table, counts, meter.chunk(chunk))

    flying: collections.deque[tuple[Batch, Any]] = collections.deque()
    with pipeline.ahead(reader.batches(shards), _AHEAD) as batches:
        for batch in batches:
            flying.append((batch, None if batch.rows is None else ask(batch.rows)))
            if len(flying) > _IN_FLIGHT:
                yield from land(*flying.popleft())
        while flying:
            yield from land(*flying.popleft())
