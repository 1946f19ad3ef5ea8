"""Hardware data of TPU chips and slices, used by the cost estimates and by the launcher.

- `flops_per_cycle` counts bf16 operations, two per multiply-add, of all matrix units of one JAX
  device: v5e has four units of 128 x 128, v5p eight (two cores that form one device), v6e two of
  256 x 256. The clock follows from the peak in the data sheet.
- `hbm` is the memory available to a program, as the compiler reports it when a program does not fit
  ("of 15.75G hbm"). The data sheets list 16, 95 and 32 GB.
- Sources: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of the Cloud TPU documentation, read in
  November 2026, for peaks, memory, bandwidth, hosts, topologies and accelerator types.
"""

from __future__ import annotations

import dataclasses
import math

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Attributes:
      peak: bf16 FLOP/s per chip.
      flops_per_cycle: bf16 FLOPs per chip and clock cycle.
      hbm: bytes available to a program.
      bandwidth: HBM bandwidth in bytes/s.
      links: bytes/s that a chip sends to its neighbors, over all links, in one direction.
      best_product: share of peak that the compiler's cycle estimate gives for a bf16 product of
        8192 x 8192 x 8192. It bounds every estimate made here (docs/log.md).
      dimensions: number of dimensions of a topology.
      chips_per_host: chips per host in slices of more than one host.
      accelerator: prefix of the accelerator type in the Cloud TPU API.
      cores_in_name: units that the number in an accelerator type counts per chip.
      gke: value of the node label cloud.google.com/gke-tpu-accelerator.
      machine: prefix of the GKE machine type; "-<chips>t" follows.
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
    machine: str
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
        machine="ct5lp-hightpu",
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
        machine="ct5p-hightpu",
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
        machine="ct6e-standard",
        runtime="v2-alpha-tpuv6e",
    ),
}


_PLANAR = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e and v6e
_BELOW_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # v5p; larger slices are whole cubes of 4x4x4
_MOST_CHIPS = 6144  # of a v5p slice


class TopologyError(ValueError):
    """A topology that does not exist."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: the chip and the shape of its grid, such as "v5e:16x16" or "v5p:4x4x4"."""

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Return the topology called `name`.

        Raises:
          TopologyError: no such chip or no slice of this shape; the message lists those that exist.
        """
        kind, _, grid = name.partition(":")
        example = "write CHIP:SHAPE, such as v5e:16x16, v5p:4x4x4 or v6e:2x4"
        if kind not in CHIPS:
            raise TopologyError(f"{name!r}: no chip {kind!r} among {', '.join(CHIPS)}; {example}")
        sides = grid.split("x")
        if len(sides) != CHIPS[kind].dimensions or not all(s.isdecimal() and int(s) for s in sides):
            raise TopologyError(
                f"{name!r}: a {kind} topology has {CHIPS[kind].dimensions} sides; {example}"
            )
        found = cls(kind, tuple(map(int, sides)))
        found._check()
        return found

    def _check(self) -> None:
        """Raise TopologyError unless the cloud offers slices of this shape."""
        if self.chip.dimensions == 2:
            exists, known = self.grid in _PLANAR, ", ".join(_PLANAR)
        else:
            cubes = all(side % 4 == 0 for side in self.shape) and self.chips <= _MOST_CHIPS
            ascending = self.shape == tuple(sorted(self.shape))
            exists = self.grid in _BELOW_A_CUBE or (cubes and ascending)
            known = (
                f"{', '.join(_BELOW_A_CUBE)}, and sides that are multiples of 4 in ascending "
                f"order, up to {_MOST_CHIPS:,} chips"
            )
        if not exists:
            raise TopologyError(f"{str(self)!r}: no such {self.kind} slice; there are {known}")

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
        """Number of machines; 1 if all chips are on one."""
        chips_of_one = 8 if self.chip.dimensions == 2 else 4
        return 1 if self.chips <= chips_of_one else self.chips // self.chip.chips_per_host

    @property
    def chips_of_a_host(self) -> int:
        return self.chips // self.hosts

    @property
    def accelerator_type(self) -> str:
        """Name of the slice in the Cloud TPU API: v5litepod-256, v5p-128, v6e-256."""
        return f"{self.chip.accelerator}-{self.chips * self.chip.cores_in_name}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.grid}"
