"""XLA's options by platform and program.

- On GPUs the gathers of FSDP's parameters are pipelined: those of the next layer of a scan start
  while the current one computes. By default a layer's first products wait for them. Compiled for
  eight H100 (T5 large, six layers of each kind, docs/gpu.md), 0.06 GB of gathers then overlap with
  nothing instead of 0.31 GB. Pipelined reduce-scatters increased exposed communication. The
  latency-hiding scheduler, which MaxText's settings for GPUs turn on, is XLA's default.
- On TPUs, scoring by decoder-only models lets one operation use 64 MiB of on-chip memory. The
  products of a gated MLP then take no longer with the norm and the gate that XLA fuses into them:
  66.8 to 83.8% of peak for Llama 3 8B on v5e (docs/tpu.md). Training and unrolled layers do not,
  because every layer takes XLA minutes more to compile. Gathers of sharded parameters are not split
  into parts that alternate with parts of a product.
- docs/tpu.md lists options that help other TPU programs.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

from models.config import ModelConfig

Option = str | int | bool

BY_PLATFORM: dict[str, dict[str, Option]] = {
    "gpu": {"xla_gpu_enable_pipelined_all_gather": True},
}
# Of programs that score with scanned layers of a decoder-only model on these chips.
DECODER_ONLY_SCORING: dict[str, Option] = {
    "xla_tpu_scoped_vmem_limit_kib": 64 * 1024,
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
_CHIPS = ("TPU v5 lite", "TPU v5", "TPU v6 lite")


def compiler_options(mesh: jax.sharding.Mesh, given: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options of the mesh's platform, overridden by the `given` ones."""
    if mesh.size == 1:
        return dict(given)
    return BY_PLATFORM.get(mesh.devices.flat[0].platform, {}) | dict(given)


def scoring_options(
    mesh: jax.sharding.Mesh, config: ModelConfig, given: Mapping[str, Option]
) -> dict[str, Option]:
    """Return the options of a program that scores, overridden by the `given` ones."""
    kind = mesh.devices.flat[0].device_kind
    tuned = kind in _CHIPS and config.scan_layers and not config.has_encoder
    return compiler_options(mesh, (DECODER_ONLY_SCORING if tuned else {}) | dict(given))
