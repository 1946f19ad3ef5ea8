"""Attention kernels by name, and the interface that they share.

A kernel is one file of this package, with its plain reference (`plain.dot_product_attention`) in
its test, and one line of `KERNELS`. It is imported when it is first used. A kernel outside this
repository is named by its import path, "package.module:KERNEL".
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import jax

    from models.kernels.segments import Branches
    from models.relative_bias import RelativePositionBias

KERNELS = {
    "xla": "models.kernels.plain:KERNEL",  # batched; the reference for all others
    "looped": "models.kernels.looped:KERNEL",  # one row and head at a time, for CPUs
    "pallas": "models.kernels.relative:KERNEL",  # for TPUs
    "pallas_interpret": "models.kernels.relative:INTERPRETED",  # its steps run in XLA, for tests
    "triton": "models.kernels.triton:KERNEL",  # for NVIDIA GPUs
    "triton_interpret": "models.kernels.triton:INTERPRETED",  # likewise, for tests
    "cudnn": "models.kernels.cudnn:KERNEL",  # NVIDIA's fused kernel
}

# Kernels that "auto" chooses from, per platform, each with the least number of queries x keys of a
# row from which on it is faster than "xla": the loop gains nothing while scores fit the cache, the
# programs of the TPU kernel have a fixed cost, those of the GPU kernel compute at least 64 x 64.
# On GPUs "cudnn" is not chosen: it reads mask and bias of every pair from memory and computes all
# pairs of a packed row, of which "triton" skips those of other documents (docs/gpu.md).
AUTO: dict[str, tuple[tuple[str, int], ...]] = {
    "cpu": (("looped", 256 * 256),),
    "gpu": (("triton", 64 * 64),),
    "tpu": (("pallas", 128 * 256),),
}


class Needs(NamedTuple):
    """Properties of an attention that decide which kernels can compute it."""

    queries: int
    keys: int
    head_dim: int
    dtype: str
    causal: bool = False
    window: bool = False
    softcap: bool = False
    dropout_per_query: bool = False  # each query drops keys of its own
    branches: bool = False  # texts of a segment share a beginning, see `segments.Branches`


class Dropout(NamedTuple):
    """Dropout of attention weights; none if `key` is None or `rate` 0.

    `broadcast` are the axes of [batch, heads, queries, keys] that share one draw.
    """

    rate: float = 0.0
    key: jax.Array | None = None
    broadcast: tuple[int, ...] = ()


class Operands(NamedTuple):
    """Operands and settings of one attention.

    Attributes:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim], of the same dtype.
      visible: which keys each query sees, as `Kernel.visibility` returns it.
      bias: added to the scaled scores, in the layout of `Kernel.bias`, or None.
      scale: factor of the scores.
      softcap: bound of the scores by tanh, or None.
      dropout: dropout of the weights.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    visible: Any
    bias: jax.Array | None
    scale: float
    softcap: float | None
    dropout: Dropout


class Kernel(Protocol):
    """An implementation of attention. Instances are hashable: static under `jax.jit`."""

    def unsupported(self, needs: Needs) -> str | None:
        """Return why the kernel cannot compute this attention ("has no window"), or None."""
        ...

    def visibility(
        self,
        query_segments: jax.Array,
        key_segments: jax.Array,
        *,
        causal: bool,
        window: int | None,
        branches: Branches | None = None,
    ) -> Any:
        """Return which keys each query sees, as a pytree that `attend` reads.

        Takes segment ids, int32 [batch, queries] and [batch, keys], 0 for padding. `branches` are
        given only to kernels that support them (`Needs.branches`).
        """
        ...

    def bias(self, relative: RelativePositionBias, queries: int, keys: int) -> jax.Array:
        """Return a relative position bias in the layout that `attend` reads."""
        ...

    def attend(self, operands: Operands) -> jax.Array:
        """Return softmax(scale * query key + bias) value.

        Returns [batch, queries, heads * head_dim] in query's dtype. What rematerialization may keep
        has the name "attention" (`jax.ad_checkpoint.checkpoint_name`).
        """
        ...


@functools.cache
def find(name: str) -> Kernel:
    """Return the kernel of this name or import path."""
    module, _, attribute = KERNELS.get(name, name).partition(":")
    return getattr(importlib.import_module(module), attribute)
