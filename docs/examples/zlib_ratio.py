"""A text score of one's own: the share of a text's bytes that zlib leaves; low is repetitive."""

from __future__ import annotations

import dataclasses
import zlib
from typing import ClassVar

import gin
import numpy as np
import pyarrow as pa

from pruning.scores.score_set import Column


@gin.configurable(module="zlib_ratio")
@dataclasses.dataclass(frozen=True)
class ZlibRatio:
    """Settings: zlib's `level`, 1 to 9."""

    columns: ClassVar = {"zlib_ratio": Column(pa.float32(), "compressed bytes over bytes")}

    level: int = 6

    def __call__(self, texts: pa.Array) -> dict[str, np.ndarray]:
        ratios = [
            len(zlib.compress(raw, self.level)) / len(raw) if raw else np.nan
            for raw in (text.encode() for text in texts.to_pylist())
        ]
        return {"zlib_ratio": np.asarray(ratios, np.float64)}
