"""Row length, batch and dtype of scoring where none are given, by the platform of the devices.

- A batch has a number of tokens *per device*, so that a host of eight chips computes eight times
  the rows of a host of one. On TPUs few tokens are best: they stay close to the matrix units
  (docs/tpu.md: 8 rows of 512 a chip); with sharded parameters twice as many, because each gather
  then serves more of them. On GPUs the products of 16 rows of 1,024 reach their full speed
  (docs/gpu.md). On CPUs a batch only amortizes the host's work; a device computes a few rows of it
  at a time (device.py).
- Rows are shorter on CPUs, whose attention computes the pairs of different documents too.
- CPUs without bfloat16 instructions convert bfloat16 operands in every product and are slower with
  it than with float32 (docs/log.md).
- Row length and dtype change the last digits of scores. A run that continues therefore keeps those
  that it began with, on whatever platform it continues; its batch follows the platform.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"}  # "bf16" is ARM's
_MULTIPLE = 128  # of a row length that follows the longest window


@dataclasses.dataclass(frozen=True)
class Platform:
    """Defaults of a platform.

    Attributes:
      row_length: positions of a packed row.
      tokens: tokens of a batch per device.
      sharded_tokens: the same if the parameters are sharded.
    """

    row_length: int
    tokens: int
    sharded_tokens: int


PLATFORMS = {
    "cpu": Platform(row_length=512, tokens=4096, sharded_tokens=4096),
    "tpu": Platform(row_length=1024, tokens=4096, sharded_tokens=8192),
    "gpu": Platform(row_length=1024, tokens=16_384, sharded_tokens=16_384),
}
# Of a dry run, which reports accelerator-hours: those of the accelerators.
ESTIMATED = "tpu"


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Return whether this machine's CPU has instructions for bfloat16; False if it is unknown."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BFLOAT16_FLAGS.isdisjoint(flags.partition(":")[2].split())


def choose_dtype(given: str | None, begun: Mapping[str, Any] | None, platform: str) -> str:
    """Return `given`, or else the dtype of the run that continues, or else the platform's.

    Args:
      begun: configuration of the run that the output directory holds, or None.
      platform: "cpu", "gpu" or "tpu".
    """
    if given is not None:
        return given
    if begun is not None and begun.get("dtype") in ("float32", "bfloat16"):
        return begun["dtype"]
    return "float32" if platform == "cpu" and not cpu_has_bfloat16() else "bfloat16"


def choose_row_length(given: int | None, longest: int, platform: str) -> int:
    """Return `given`, or else the platform's row length, or a longer one that a window needs.

    Args:
      longest: number of tokens of the longest window.
    """
    usual = PLATFORMS[platform].row_length
    if given is not None:
        return given
    return usual if longest <= usual else -(-longest // _MULTIPLE) * _MULTIPLE


def begun_row_lengths(
    begun: Mapping[str, Any] | None, sides: Sequence[str]
) -> tuple[int, ...] | None:
    """Return the row lengths of the run that continues; None if there is none of these sides."""
    recorded = (begun or {}).get("row_lengths", {})
    return tuple(recorded[side] for side in sides) if set(recorded) == set(sides) else None


def choose_batch_rows(
    given: int | None, row_length: int, platform: str, axes: Mapping[str, int]
) -> int:
    """Return `given`, or else as many rows as have the platform's tokens per device.

    Args:
      row_length: positions of the longer side of a row.
      axes: sizes of the mesh axes data, fsdp and tensor. The result is a multiple of data * fsdp.
    """
    if given is not None:
        return given
    parts, devices_of_a_part = axes["data"] * axes["fsdp"], axes["tensor"]
    defaults = PLATFORMS[platform]
    sharded = axes["fsdp"] * axes["tensor"] > 1
    tokens = defaults.sharded_tokens if sharded else defaults.tokens
    return parts * max(1, tokens * devices_of_a_part // row_length)
