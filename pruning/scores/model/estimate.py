"""Costs of scoring: estimated before a run, measured after it.

    python -m pruning score --gin_file=... --gin.Score.dry_run=True

Choices
- The estimate truncates and packs documents of the corpus's real lengths with the code of the
  scorer and of the engine. The documents are a sample, evenly spread over the corpus.
- There are two counts of FLOPs. *Useful* FLOPs are those that the plain model needs for the tokens
  of each window alone; shares of peak based on them are comparable with published ones and are
  proportional to throughput. *Executed* FLOPs (`done_flops`) are those that the program computes:
  with padding and attention over whole rows, without the products that absorbed cross-attention
  avoids.
- Accelerator-hours are executed FLOPs divided by the peak times an efficiency, a setting: 0.5 until
  a run has measured one.
- After a run the same lines are printed with measured figures (`Measured`) beside the estimates.
  Sums are added over workers; rates and shares are computed from the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from models import flops, packing
from models.config import ModelConfig
from models.packing import offsets_of
from pruning.scores.model.platform_defaults import ESTIMATED, choose_row_length
from pruning.scores.model.scorer import Documents, Prepared, ScoreError
from pruning.store.progress import duration

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus

CHIPS = {  # common names -> names in `models.flops`
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "A100": "NVIDIA A100",
    "H100": "NVIDIA H100",
}
SAMPLE_SHARDS = 8
SAMPLE_DOCUMENTS = 4096
_TRIED_WINDOWS = 4096  # windows packed for every candidate row length at the start


# --------------------------------------------------------------------------------------------------
# FLOPs


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of a scorer's step, as a function of lengths.

    Attributes:
      config: configuration of the model.
      sides: sides of the scorer's windows.
      absorbs: as in `Prepared`.
    """

    config: ModelConfig
    sides: tuple[str, ...]
    absorbs: bool = False

    @classmethod
    def of_scorer(cls, config: ModelConfig, prepared: Prepared) -> Costs:
        return cls(config, prepared.sides, prepared.absorbs)

    def of(self, lengths: np.ndarray) -> float:
        """Return the plain FLOPs of windows, or of rows, each computed by itself.

        Args:
          lengths: integers [n, sides].
        """
        first = np.asarray(lengths, np.float64).reshape(-1, len(self.sides))
        second = first[:, 1] if len(self.sides) > 1 else np.zeros(len(first))
        first = first[:, 0]
        # `forward_flops` is a polynomial of second degree in the lengths, with these terms.
        one, two = self._row(1, 0), self._row(2, 0)
        other, others, both = self._row(0, 1), self._row(0, 2), self._row(1, 1)
        quadratic, other_quadratic = (two - 2 * one) / 2, (others - 2 * other) / 2
        mixed = both - one - other
        return float(
            np.sum((one - quadratic) * first + quadratic * first**2)
            + np.sum((other - other_quadratic) * second + other_quadratic * second**2)
            + mixed * np.sum(first * second)
        )

    def executed(self, row_lengths: Sequence[int]) -> float:
        """Return the FLOPs that the program executes for one row, padding included."""
        lengths = dict(zip(self.sides, row_lengths, strict=True))
        # Without a decoder no keys and values of cross-attention are computed.
        absorb = "decoder" not in lengths
        if self.absorbs:
            absorb = flops.absorbs_cross_attention(self.config, lengths["decoder"])
        return self._row(*row_lengths, absorb=absorb)

    def _row(self, *row_lengths: int, absorb: bool = False) -> float:
        lengths = dict(zip(self.sides, row_lengths, strict=False))
        shapes = {
            "encoder_input_tokens": (1, lengths.get("encoder", 0)),
            "decoder_input_tokens": (1, lengths.get("decoder", 0)),
        }
        if "answer" in lengths:
            shapes["answer_segment_ids"] = (1, lengths["answer"])
        return flops.forward_flops(self.config, shapes, absorb=absorb)


# --------------------------------------------------------------------------------------------------
# Rows


def sample_lengths(corpus: Corpus) -> np.ndarray:
    """Return token counts of at most SAMPLE_DOCUMENTS documents, evenly spread over the corpus.

    A function of the corpus alone, so that all workers and restarts of a run get the same int64
    array.
    """
    count = min(corpus.num_shards, SAMPLE_SHARDS)
    shards = np.unique(np.linspace(0, corpus.num_shards - 1, count).astype(int))
    each = SAMPLE_DOCUMENTS // len(shards)
    parts = []
    for shard in shards.tolist():
        documents = corpus.documents(shard)
        rows = np.unique(np.linspace(0, documents - 1, min(each, documents)).astype(int))
        parts.append(corpus.lengths_of(shard, rows))
    return np.concatenate(parts).astype(np.int64)


def windows_of(prepared: Prepared, lengths: np.ndarray) -> np.ndarray:
    """Return the lengths of the windows of documents of these lengths, int64 [windows, sides]."""
    if prepared.pretend is not None:
        return prepared.windows(prepared.pretend(lengths)).lengths
    # Lengths of windows do not depend on the ids.
    tokens = np.full(int(lengths.sum()), 3, np.int32)
    return prepared.windows(Documents(tokens, offsets_of(lengths))).lengths


def choose_row_lengths(
    prepared: Prepared,
    costs: Costs,
    windows: np.ndarray,
    row_length: int | None,
    platform: str = ESTIMATED,
) -> tuple[int, ...]:
    """Return the row lengths per side: `row_length` for the side with the most tokens.

    That of the other side is the one of a dozen candidates for which these windows take the fewest
    FLOPs.

    Args:
      windows: integers [windows, sides], such as `windows_of` a sample.
      row_length: positions of a row; None for the default of `platform`.

    Raises:
      ScoreError: `row_length` is shorter than the longest window.
    """
    windows = windows[:: len(windows) // _TRIED_WINDOWS + 1]
    main = int(np.argmax(windows.sum(axis=0))) if len(windows) else 0
    row_length = choose_row_length(row_length, prepared.longest[main], platform)
    if row_length < prepared.longest[main]:
        raise ScoreError(
            f"row_length={row_length} is shorter than the longest window, "
            f"{prepared.longest[main]} tokens: give longer rows or shorter windows."
        )
    if len(prepared.sides) == 1:
        return (row_length,)
    least = prepared.longest[1 - main]
    per_row = windows.sum(axis=0) / max(windows[:, main].sum(), 1) * row_length
    best, lowest = None, np.inf
    for slack in (0.75, 0.9, 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0):
        other = int(np.ceil(per_row[1 - main] * slack)) + 1
        other = max(least, -(-other // 8) * 8 if other >= 64 else other)
        row_lengths = (row_length, other) if main == 0 else (other, row_length)
        rows = packing.pack(windows, row_lengths).num_rows
        total = rows * costs.of(np.array([row_lengths]))
        if total < lowest:
            best, lowest = row_lengths, total
    assert best is not None
    return best


# --------------------------------------------------------------------------------------------------
# The estimate


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated costs of a scoring run.

    Attributes:
      documents, windows, rows: numbers of these.
      tokens: tokens on both sides, after truncation and with those that the scorer adds.
      padding: share of empty positions in the rows.
      row_lengths: row lengths by side.
      useful_flops: FLOPs of the plain model, see the module's docstring.
      done_flops: executed FLOPs.
      efficiency: share of peak assumed for the hours, by executed FLOPs.
    """

    documents: int
    windows: int
    rows: int
    tokens: int
    padding: float
    row_lengths: dict[str, int]
    useful_flops: float
    done_flops: float
    efficiency: float

    def hours(self, chip: str) -> float:
        """Return the accelerator-hours on one of CHIPS."""
        return self.done_flops / (flops.PEAK_FLOPS[CHIPS[chip]] * self.efficiency) / 3600

    def __str__(self) -> str:
        rows = ", ".join(f"{length:,} {side}" for side, length in self.row_lengths.items())
        hours = "".join(f"\n  {chip:<5} {_hours(self.hours(chip)):>12} h" for chip in CHIPS)
        return (
            f"documents      {self.documents:,}\n"
            f"windows        {self.windows:,} in {self.rows:,} rows of {rows} positions\n"
            f"tokens         {self.tokens:,} after packing; {100 * self.padding:.1f}% padding\n"
            f"FLOPs          {self.useful_flops:.3g} by the plain model, "
            f"{self.done_flops:.3g} executed\n"
            f"accelerator-hours at {100 * self.efficiency:.0f}% of the bf16 peak:{hours}"
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measured costs of a scoring run, summed over its workers.

    Attributes:
      documents, windows, rows, tokens, useful_flops, done_flops: as in `Estimate`, but `done_flops`
        includes the empty rows in the last batch of every shard.
      positions: positions of all rows, these included.
      seconds: seconds of scoring.
      device_seconds: seconds of scoring times the devices of each worker.
      potential_flops: FLOPs of those devices in that time at their peak; None if a peak is unknown.
      start_seconds: seconds of loading the model, including restarts.
      compile_seconds: seconds of compilation, including restarts.
    """

    documents: int
    windows: int
    rows: int
    tokens: int
    positions: int
    useful_flops: float
    done_flops: float
    seconds: float
    device_seconds: float
    potential_flops: float | None
    start_seconds: float
    compile_seconds: float

    @classmethod
    def of(cls, sums: Mapping[str, Any]) -> Measured:
        """Return the costs in the content of measured.json.

        Raises:
          KeyError: the content was not written by a scoring run of this version.
        """
        known = sums["device_seconds"] > 0 and sums["unknown_peak_seconds"] == 0
        return cls(
            **{name: round(sums[name]) for name in ("documents", "windows", "rows", "positions")},
            tokens=round(sums["model_tokens"]),
            potential_flops=sums["potential_flops"] if known else None,
            **{
                name: sums[name]
                for name in (
                    "useful_flops", "done_flops", "seconds", "device_seconds", "start_seconds",
                    "compile_seconds",
                )
            },
        )  # fmt: skip

    @property
    def padding(self) -> float:
        """Share of empty positions in the rows."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    @property
    def flops_per_second(self) -> float:
        """Useful FLOP/s per device."""
        return self.useful_flops / self.device_seconds if self.device_seconds else 0.0

    @property
    def share_of_peak(self) -> float | None:
        """Share of the bf16 peak by useful FLOPs."""
        return self.useful_flops / self.potential_flops if self.potential_flops else None

    @property
    def executed_share_of_peak(self) -> float | None:
        """Share of the bf16 peak by executed FLOPs."""
        return self.done_flops / self.potential_flops if self.potential_flops else None

    def derived(self) -> dict[str, float]:
        """Return the rates and shares that measured.json holds beside the sums."""
        values = {
            "padding": self.padding,
            "flops_per_device_second": self.flops_per_second,
            "accelerator_hours": self.device_seconds / 3600,
        }
        for name in ("share_of_peak", "executed_share_of_peak"):
            if (share := getattr(self, name)) is not None:
                values[name] = share
        return values

    def lines(self, estimated: Estimate | None = None) -> list[str]:
        """Return the lines of a dry run with measured figures, beside those of `estimated`."""

        def beside(value: str) -> str:
            return f" (estimated {value})" if estimated is not None else ""

        e = estimated
        plain, executed = self.share_of_peak, self.executed_share_of_peak
        shares = ""
        if plain is not None and executed is not None:
            shares = (
                f", {100 * plain:.0f}% of the bf16 peak by the plain model, "
                f"{100 * executed:.0f}% executed"
            )
        rate = f"{self.flops_per_second / 1e12:.3g} TFLOP/s a device"
        rows = beside(f"{e.rows:,}" if e else "")
        tokens = beside(f"{e.tokens:,}" if e else "")
        padding = beside(f"{100 * e.padding:.1f}%" if e else "")
        useful, done = (
            beside(f"{value:.3g}") for value in ((e.useful_flops, e.done_flops) if e else (0, 0))
        )
        return [
            f"documents      {self.documents:,}",
            f"windows        {self.windows:,} in {self.rows:,} rows{rows}",
            f"tokens         {self.tokens:,}{tokens} after packing; "
            f"{100 * self.padding:.1f}% padding{padding}",
            f"FLOPs          {self.useful_flops:.3g} by the plain model{useful}, "
            f"{self.done_flops:.3g} executed{done}",
            f"device-seconds {self.device_seconds:,.1f}; {rate}{shares}",
            f"accelerator-hours {_hours(self.device_seconds / 3600)} h, measured",
            f"in addition    {duration(self.start_seconds)} to load the model and "
            f"{duration(self.compile_seconds)} to compile",
        ]


def estimate(
    prepared: Prepared,
    config: ModelConfig,
    lengths: np.ndarray,
    documents: int,
    row_length: int | None,
    efficiency: float,
) -> Estimate:
    """Return the costs of scoring all documents, estimated from a sample.

    Args:
      prepared: the scorer, prepared for the model and the vocabulary.
      config: configuration of the model.
      lengths: token counts of the sample.
      documents: number of all documents.
      row_length, efficiency: as in `ScoreConfig`.
    """
    costs = Costs.of_scorer(config, prepared)
    windows = windows_of(prepared, lengths)
    row_lengths = choose_row_lengths(prepared, costs, windows, row_length)
    rows = packing.pack(windows, row_lengths).num_rows
    scale = documents / max(len(lengths), 1)
    positions = rows * sum(row_lengths)
    return Estimate(
        documents=documents,
        windows=round(len(windows) * scale),
        rows=round(rows * scale),
        tokens=round(int(windows.sum()) * scale),
        padding=1 - windows.sum() / positions if positions else 0.0,
        row_lengths=dict(zip(prepared.sides, row_lengths, strict=True)),
        useful_flops=costs.of(windows) * scale,
        done_flops=rows * costs.executed(row_lengths) * scale,
        efficiency=efficiency,
    )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
