"""What scoring costs: before anything runs, and while it does.

    python -m pruning score --gin_file=... --gin.Score.dry_run=True

Choices
- The estimate cuts and packs documents of the corpus's real lengths with the scorer's and the
  engine's own code. Only which documents are looked at is a sample: evenly spread over the corpus.
- Two counts of FLOPs. *Useful* is what the tokens need: every window attends to itself. *Done* is
  what the program computes: padding, and attention over whole rows, are in it. Shares of peak are
  of useful FLOPs over time.
- Accelerator-hours are useful FLOPs over peak times an efficiency, which is the user's to give:
  0.5 until a run has measured one.
- After a run the same lines are said of what was measured (`Measured`), the estimate beside them.
  What workers measured adds up: rates and shares are formed from the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from models import flops
from models.config import ModelConfig
from pruning.progress import duration
from pruning.scorers import Documents, Prepared, ScoreError
from pruning.scoring import packing
from pruning.scoring.packing import offsets_of

if TYPE_CHECKING:
    from pruning.corpus import Corpus

CHIPS = {  # as people name them -> as `models.flops` does
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "A100": "NVIDIA A100",
    "H100": "NVIDIA H100",
}
SAMPLE_SHARDS = 8
SAMPLE_DOCUMENTS = 4096
_TRIED_WINDOWS = 4096  # packed a dozen times, at every start


# --------------------------------------------------------------------------------------------------
# FLOPs


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of a scorer's step, as a function of lengths.

    Attributes:
      config: the model's.
      sides: of the scorer's windows.
    """

    config: ModelConfig
    sides: tuple[str, ...]

    def of(self, lengths: np.ndarray) -> float:
        """FLOPs of windows, or of rows, that are computed each by itself.

        Args:
          lengths: integers [n, sides].
        """
        first = np.asarray(lengths, np.float64).reshape(-1, len(self.sides))
        second = first[:, 1] if len(self.sides) > 1 else np.zeros(len(first))
        first = first[:, 0]
        # `forward_flops` is a polynomial of second degree in the lengths; these are its terms.
        one, two = self._row(1, 0), self._row(2, 0)
        other, others, both = self._row(0, 1), self._row(0, 2), self._row(1, 1)
        quadratic, other_quadratic = (two - 2 * one) / 2, (others - 2 * other) / 2
        mixed = both - one - other
        return float(
            np.sum((one - quadratic) * first + quadratic * first**2)
            + np.sum((other - other_quadratic) * second + other_quadratic * second**2)
            + mixed * np.sum(first * second)
        )

    def _row(self, first: int, second: int) -> float:
        shapes = dict(zip(self.sides, (first, second), strict=False))
        encoder, decoder = shapes.get("encoder", 0), shapes.get("decoder", 0)
        total = flops.forward_flops(
            self.config,
            {"encoder_input_tokens": (1, encoder), "decoder_input_tokens": (1, decoder)},
        )
        if "answer" in self.sides:  # logits at the answers only
            head = 2 * self.config.d_model * self.config.vocab_size
            total += head * (shapes["answer"] - decoder)
        return total


# --------------------------------------------------------------------------------------------------
# Rows


def sample_lengths(corpus: Corpus) -> np.ndarray:
    """Token counts of documents spread evenly over the corpus, int64, at most SAMPLE_DOCUMENTS.

    A function of the corpus alone: the workers of a run, and its restarts, see the same.
    """
    count = min(corpus.num_shards, SAMPLE_SHARDS)
    shards = np.unique(np.linspace(0, corpus.num_shards - 1, count).astype(int))
    each = SAMPLE_DOCUMENTS // len(shards)
    parts = []
    for shard in shards.tolist():
        lengths = corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()
        rows = np.unique(np.linspace(0, len(lengths) - 1, min(each, len(lengths))).astype(int))
        parts.append(lengths[rows])
    return np.concatenate(parts).astype(np.int64)


def windows_of(prepared: Prepared, lengths: np.ndarray) -> np.ndarray:
    """Lengths of the windows that documents of these lengths give, int64 [windows, sides]."""
    # The ids do not matter; what they are is not looked at before the device.
    tokens = np.full(int(lengths.sum()), 3, np.int32)
    return prepared.windows(Documents(tokens, offsets_of(lengths))).lengths


def choose_row_lengths(
    prepared: Prepared, costs: Costs, windows: np.ndarray, row_length: int
) -> tuple[int, ...]:
    """Row lengths per side: `row_length` for the side with most tokens, and one to suit it.

    The other side's is the one among a dozen for which these windows take the fewest FLOPs.

    Args:
      windows: integers [windows, sides], such as `windows_of` a sample.

    Raises:
      ScoreError: rows would be shorter than a window may be.
    """
    windows = windows[:: len(windows) // _TRIED_WINDOWS + 1]
    main = int(np.argmax(windows.sum(axis=0))) if len(windows) else 0
    if row_length < prepared.longest[main]:
        raise ScoreError(
            f"row_length={row_length} is shorter than a window, which may take "
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
    """What a scoring run would take.

    Attributes:
      documents, windows, rows: how many.
      tokens: real ones, on both sides, after cutting and with what the scorer adds.
      padding: share of the rows' positions that are empty.
      row_lengths: per side.
      useful_flops, done_flops: see the module's head.
      efficiency: share of peak that the hours are reckoned with.
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
        """Accelerator-hours on one of CHIPS."""
        return self.useful_flops / (flops.PEAK_FLOPS[CHIPS[chip]] * self.efficiency) / 3600

    def __str__(self) -> str:
        rows = ", ".join(f"{length:,} {side}" for side, length in self.row_lengths.items())
        hours = "".join(f"\n  {chip:<5} {_hours(self.hours(chip)):>12} h" for chip in CHIPS)
        return (
            f"documents      {self.documents:,}\n"
            f"windows        {self.windows:,} in {self.rows:,} rows of {rows} positions\n"
            f"tokens         {self.tokens:,} after packing; {100 * self.padding:.1f}% padding\n"
            f"FLOPs          {self.useful_flops:.3g} useful, {self.done_flops:.3g} done\n"
            f"accelerator-hours at {100 * self.efficiency:.0f}% of the bf16 peak:{hours}"
        )


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a scoring run took: the sums that its workers wrote down, and what follows from them.

    Attributes:
      documents, windows, rows, tokens, useful_flops, done_flops: as in `Estimate`, but `done_flops`
        includes the rows that stayed empty in the last batch of every shard.
      positions: of all rows, those included.
      seconds: of scoring, summed over workers.
      device_seconds: the same, times each worker's devices.
      potential_flops: what those devices could have computed in that time at their peak; None
        where the peak of one is not known.
      start_seconds: reading and placing the model, over workers and their restarts.
      compile_seconds: likewise.
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
        """From the content of measured.json.

        Raises:
          KeyError: it was not written by a scoring run of this version.
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
        """Share of the rows' positions that were empty."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    @property
    def flops_per_second(self) -> float:
        """Useful ones, per device."""
        return self.useful_flops / self.device_seconds if self.device_seconds else 0.0

    @property
    def share_of_peak(self) -> float | None:
        return self.useful_flops / self.potential_flops if self.potential_flops else None

    def derived(self) -> dict[str, float]:
        """For measured.json, beside the sums."""
        values = {
            "padding": self.padding,
            "flops_per_device_second": self.flops_per_second,
            "accelerator_hours": self.device_seconds / 3600,
        }
        if self.share_of_peak is not None:
            values["share_of_peak"] = self.share_of_peak
        return values

    def lines(self, estimated: Estimate | None = None) -> list[str]:
        """The lines of the dry run, measured; `estimated` is said beside them."""

        def beside(value: str) -> str:
            return f" (estimated {value})" if estimated is not None else ""

        e = estimated
        share = self.share_of_peak
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
            f"FLOPs          {self.useful_flops:.3g} useful{useful}, "
            f"{self.done_flops:.3g} done{done}",
            f"device-seconds {self.device_seconds:,.1f}; {rate}"
            + (f", {100 * share:.0f}% of the bf16 peak" if share is not None else ""),
            f"accelerator-hours {_hours(self.device_seconds / 3600)} h, measured",
            f"apart from that {duration(self.start_seconds)} to start and "
            f"{duration(self.compile_seconds)} to compile",
        ]


def estimate(
    prepared: Prepared,
    config: ModelConfig,
    lengths: np.ndarray,
    documents: int,
    row_length: int,
    efficiency: float,
) -> Estimate:
    """Estimates from a sample.

    Args:
      prepared: the scorer, for the model and the vocabulary in question.
      config: the model's.
      lengths: token counts of some documents.
      documents: how many there are in all.
      row_length, efficiency: as in `ScoreConfig`.
    """
    costs = Costs(config, prepared.sides)
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
        done_flops=rows * costs.of(np.array([row_lengths])) * scale,
        efficiency=efficiency,
    )


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
