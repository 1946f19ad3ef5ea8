"""XLA's options by platform, for programs on more than one device.

- On GPUs the gathers of FSDP's parameters are pipelined: those of the next layer of a scan start
  while the current one computes. By default a layer's first products wait for them. Compiled for
  eight H100 (T5 large, six layers of each kind, docs/gpu.md), 0.06 GB of gathers then overlap with
  nothing instead of 0.31 GB. Pipelined reduce-scatters increased exposed communication. The
  latency-hiding scheduler, which MaxText's settings for GPUs turn on, is XLA's default.
- On TPUs and CPUs there are none. docs/tpu.md lists options that help some TPU programs.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax

Option = str | int | bool

BY_PLATFORM: dict[str, dict[str, Option]] = {
    "gpu": {"xla_gpu_enable_pipelined_all_gather": True},
}


def compiler_options(mesh: jax.sharding.Mesh, given: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options of the mesh's platform, overridden by the `given` ones."""
    if mesh.size == 1:
        return dict(given)
    return BY_PLATFORM.get(mesh.devices.flat[0].platform, {}) | dict(given)
