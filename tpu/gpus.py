"""Hardware data of NVIDIA GPUs, used by the cost estimates and to compile without a GPU.

- `peak`, `bandwidth` and `links` are from the vendor's data sheets (H100 SXM, H200, A100 80GB SXM,
  B200), read in November 2026; bf16 without sparsity.
- The fields of the chip (cores, clock, memories) describe it to XLA's compiler, with the values of
  GpuTargetConfigProto that XLA reports on such a GPU.
- `product`, `kernel`, `stream` and `link_share` are assumptions, not measurements: the shares of
  peak and of bandwidth that a large product, an attention kernel, a pass over memory and a
  collective reach. They limit the accuracy of every estimate.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU model.

    Attributes:
      kind: `device_kind` of the device in JAX.
      capability: compute capability, (major, minor).
      peak: bf16 FLOP/s.
      hbm: bytes of memory.
      bandwidth: memory bandwidth in bytes/s.
      links: bytes/s that a GPU sends to the others of its machine, in one direction.
      cores, fpus, clock: multiprocessors, float32 units of each, and GHz.
      shared: bytes of shared memory of a multiprocessor; a block can have 1 KiB less.
      l2: bytes of the second-level cache.
      product, kernel: shares of peak that a product and an attention kernel are assumed to reach.
      stream: share of the bandwidth that a pass over memory is assumed to reach.
      link_share: share of `links` that a collective is assumed to reach.
    """

    kind: str
    capability: tuple[int, int]
    peak: float
    hbm: int
    bandwidth: float
    links: float
    cores: int
    fpus: int
    clock: float
    shared: int
    l2: int
    product: float
    kernel: float
    stream: float = 0.85
    link_share: float = 0.8

    @property
    def best_product(self) -> float:
        """Share of peak of a large product."""
        return self.product

    def target_config(self) -> str:
        """Return the text of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared}
  threads_per_core_limit: 2048
  core_count: {self.cores}
  fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(self.bandwidth)}
  l2_cache_size: {self.l2}
  clock_rate_ghz: {self.clock}
  device_memory_size: {self.hbm}
  shared_memory_per_block_optin: {self.shared - 1024}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.kind}"
"""


_HOPPER = Gpu(
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    peak=989e12,
    hbm=84_929_347_584,
    bandwidth=3.352e12,
    links=450e9,
    cores=132,
    fpus=128,
    clock=1.98,
    shared=233_472,
    l2=52_428_800,
    product=0.70,
    kernel=0.35,
)
GPUS = {
    "h100": _HOPPER,
    "h200": dataclasses.replace(_HOPPER, kind="NVIDIA H200", hbm=150_754_820_096, bandwidth=4.8e12),
    "a100": Gpu(
        kind="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        peak=312e12,
        hbm=85_094_825_984,
        bandwidth=2.039e12,
        links=300e9,
        cores=108,
        fpus=64,
        clock=1.41,
        shared=167_936,
        l2=41_943_040,
        product=0.75,
        kernel=0.45,
    ),
    "b200": Gpu(
        kind="NVIDIA B200",
        capability=(10, 0),
        peak=2250e12,
        hbm=191_501_303_808,
        bandwidth=8.0e12,
        links=900e9,
        cores=148,
        fpus=128,
        clock=1.965,
        shared=233_472,
        l2=132_644_864,
        product=0.65,
        kernel=0.25,
    ),
}
_MOST = 8  # largest number of GPUs of a machine; links between machines differ


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs of one machine, such as "h100:8"."""

    kind: str
    chips: int

    @classmethod
    def parse(cls, name: str) -> Machine:
        """Return the machine called `name`.

        Raises:
          ValueError: there is no such GPU or number of GPUs.
        """
        kind, _, count = name.partition(":")
        if kind not in GPUS or not count.isdecimal() or not 1 <= int(count) <= _MOST:
            raise ValueError(
                f"{name!r}: write GPU:COUNT, such as h100:8; GPUs {', '.join(GPUS)}, "
                f"up to {_MOST} of a machine"
            )
        return cls(kind, int(count))

    @property
    def chip(self) -> Gpu:
        return GPUS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}:{self.chips}"
