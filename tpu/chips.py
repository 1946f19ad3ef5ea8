"""What is known of the chips: the one table that estimates and launch scripts read.

- `flops_per_cycle` are bf16, all matrix units of what JAX calls one device: v5e has four of 128 x
  128, v5p twice that (two cores that run as one device), v6e two of 256 x 256; two operations per
  multiply-add. The clock follows from the data sheet's peak.
- `hbm` is what a program may use, as the compiler says when it refuses one ("of 15.75G hbm"); the
  data sheets say 16, 95 and 32 GB.
- Sources: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation, read in
  November 2026, for peaks, memory, bandwidth, hosts and the names of accelerator types.
"""

from __future__ import annotations

import dataclasses
import math

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    Attributes:
      peak: bf16 FLOP/s of a chip.
      flops_per_cycle: bf16 FLOPs of a chip in a cycle of its clock.
      hbm: bytes that a program may use.
      bandwidth: of that memory, bytes/s.
      links: bytes/s that a chip sends to its neighbours, over all links and one way.
      best_product: share of peak that the compiler's own cycles give for a bf16 product of 8192 x
        8192 x 8192: the ceiling of every estimate here (docs/log.md).
      dimensions: of a topology.
      chips_per_host: of slices of more than one host.
      accelerator: prefix of the accelerator type that the Cloud TPU API takes.
      cores_in_name: what that name counts for each chip.
      gke: node label cloud.google.com/gke-tpu-accelerator.
      runtime: software version of a TPU VM.
    """

    peak: float
    flops_per_cycle: int
    hbm: int
    bandwidth: float
    links: float
    best_product: float
    dimensions: int
    chips_per_host: int
    accelerator: str
    cores_in_name: int
    gke: str
    runtime: str

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.peak / self.flops_per_cycle


CHIPS = {
    "v5e": Chip(
        peak=197e12,
        flops_per_cycle=131_072,
        hbm=int(15.75 * GIB),
        bandwidth=819e9,
        links=200e9,
        best_product=0.878,
        dimensions=2,
        chips_per_host=4,
        accelerator="v5litepod",
        cores_in_name=1,
        gke="tpu-v5-lite-podslice",
        runtime="v2-alpha-tpuv5-lite",
    ),
    "v5p": Chip(
        peak=459e12,
        flops_per_cycle=262_144,
        hbm=int(95.74 * GIB),
        bandwidth=2765e9,
        links=600e9,
        best_product=0.902,
        dimensions=3,
        chips_per_host=4,
        accelerator="v5p",
        cores_in_name=2,
        gke="tpu-v5p-slice",
        runtime="v2-alpha-tpuv5",
    ),
    "v6e": Chip(
        peak=918e12,
        flops_per_cycle=524_288,
        hbm=int(31.25 * GIB),
        bandwidth=1640e9,
        links=400e9,
        best_product=0.704,
        dimensions=2,
        chips_per_host=4,
        accelerator="v6e",
        cores_in_name=1,
        gke="tpu-v6e-slice",
        runtime="v2-alpha-tpuv6e",
    ),
}


class TopologyError(ValueError):
    """No such TPU topology."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips and how they are wired: "v5e:16x16", "v5p:4x4x4"."""

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Raises TopologyError, saying what there is."""
        kind, _, grid = name.partition(":")
        example = "write CHIP:SHAPE, such as v5e:16x16, v5p:4x4x4 or v6e:2x4"
        if kind not in CHIPS:
            raise TopologyError(f"{name!r}: no chip {kind!r} among {', '.join(CHIPS)}; {example}")
        sides = grid.split("x")
        if len(sides) != CHIPS[kind].dimensions or not all(s.isdigit() and int(s) for s in sides):
            raise TopologyError(
                f"{name!r}: a {kind} topology has {CHIPS[kind].dimensions} sides; {example}"
            )
        return cls(kind, tuple(map(int, sides)))

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def grid(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def hosts(self) -> int:
        """How many machines a slice of several hosts has; 1 where all chips are on one."""
        chips_of_one = 8 if self.chip.dimensions == 2 else 4
        return 1 if self.chips <= chips_of_one else self.chips // self.chip.chips_per_host

    @property
    def accelerator_type(self) -> str:
        """As the Cloud TPU API names the slice: v5litepod-256, v5p-128, v6e-256."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.cores_in_name}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.grid}"
