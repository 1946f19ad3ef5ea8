"""Measurements of a scoring run: tokens, FLOPs and seconds, by batch and by chunk.

Choices
- The progress line's tokens and share of peak count real tokens, not padding.
- Every sum is recorded with the next chunk, so that the sums of workers and of restarted runs add
  up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning.store import progress

if TYPE_CHECKING:
    from pruning.scores.model.batches import Batch, Chunk, Reader
    from pruning.scores.model.estimate import Costs


class ScoringMeter:
    """Sums of the work done, for the progress line and for measured.json.

    Args:
      reader: the reader of the batches and chunks.
      costs: FLOPs by length; None counts none.
      task: the progress line.
      devices: number of devices that share a batch.
      peak_flops: peak FLOP/s of all devices together, if known.
      once: seconds by name, recorded with the first chunk.
    """

    def __init__(
        self,
        reader: Reader,
        costs: Costs | None = None,
        task: progress.Task | None = None,
        devices: int = 1,
        peak_flops: float | None = None,
        once: Mapping[str, float] | None = None,
    ):
        rows, lengths = reader.batch_rows, reader.row_lengths
        self._batch_positions = rows * sum(lengths)
        self._batch_flops = 0.0 if costs is None else rows * costs.executed(lengths)
        self._costs = costs
        self._task = task
        self._devices = devices
        self._peak = peak_flops
        self._started = self._last = time.perf_counter()
        self._since: dict[str, float] = {}  # measurements since the last chunk
        self._add(**{"start_seconds": 0.0, "compile_seconds": 0.0} | dict(once or {}))
        self._tokens = 0
        self._flops = 0.0

    def _add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._since[name] = self._since.get(name, 0.0) + amount

    def progress(self) -> dict[str, Any]:
        """Return the state of the progress line, for the heartbeat file."""
        if self._task is None:
            return {}
        names = ("done", "total", "unit", "rate", "seconds_left")
        return {name: getattr(self._task, name) for name in names}

    def waited(self, seconds: float) -> None:
        """Add time spent waiting for the device."""
        self._add(device_wait_seconds=seconds)

    def batch(self, batch: Batch) -> None:
        """Add a batch whose answers have arrived."""
        if batch.rows is not None:
            segments = (v for name, v in batch.rows.items() if name.endswith("_segment_ids"))
            self._tokens += sum(int(np.count_nonzero(values)) for values in segments)
            self._add(positions=float(self._batch_positions), done_flops=self._batch_flops)
        if self._task is None:
            return
        seconds = time.perf_counter() - self._started
        fields: dict[str, Any] = {"tokens_per_second": self._tokens / seconds}
        if self._peak is not None:
            fields["share_of_peak"] = self._flops / seconds / self._peak
        self._task.advance(batch.documents, **fields)

    def chunk(self, chunk: Chunk) -> dict[str, float]:
        """Add a finished chunk; return the measurements since the last one, by name."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        lengths = chunk.windows.lengths
        useful = 0.0 if self._costs is None else self._costs.of(lengths)
        self._flops += useful
        # NOTE: names with value zero are included, because sums over workers need all of them.
        self._add(
            seconds=seconds,
            device_seconds=seconds * self._devices,
            device_wait_seconds=0.0,
            potential_flops=seconds * (self._peak or 0.0),
            unknown_peak_seconds=0.0 if self._peak else seconds,
            documents=float(len(chunk.documents)),
            windows=float(len(lengths)),
            model_tokens=float(lengths.sum()),
            rows=float(chunk.packing.num_rows),
            useful_flops=useful,
            positions=0.0,
            done_flops=0.0,
        )
        measured, self._since = self._since, {}
        return measured
