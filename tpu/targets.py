"""Targets of compilation by name: TPU slices and machines with GPUs."""

from __future__ import annotations

from tpu.chips import CHIPS, Topology, TopologyError
from tpu.gpus import GPUS, Machine


def parse(name: str) -> Topology | Machine:
    """Return the target called `name`, such as "v5e:16x16" or "h100:8".

    Raises:
      TopologyError: there is no such target.
    """
    kind = name.partition(":")[0]
    if kind not in GPUS:
        if kind not in CHIPS:
            raise TopologyError(
                f"{name!r}: no chip {kind!r} among {', '.join([*CHIPS, *GPUS])}; write CHIP:SHAPE, "
                "such as v5e:16x16, v5p:4x4x4, v6e:2x4 or h100:8"
            )
        return Topology.parse(name)
    try:
        return Machine.parse(name)
    except ValueError as error:
        raise TopologyError(str(error)) from error
