"""An embedding score of one's own: one component of the vectors, such as a principal one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import gin
import jax
import pyarrow as pa

from pruning.scores.score_set import Column


@gin.configurable(module="axis")
@dataclasses.dataclass(frozen=True)
class Axis:
    """Settings: `component`, counted from 0; whitened embeddings have the principal ones first."""

    columns: ClassVar = {"axis": Column(pa.float32(), "a component of the embedding")}

    component: int = 0

    def __call__(self, vectors: jax.Array) -> dict[str, jax.Array]:
        return {"axis": vectors[..., self.component]}
