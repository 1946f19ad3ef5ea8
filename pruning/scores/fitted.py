"""A model fitted once per score set.

Two fits to the same data may differ in their last bits, for example by the number of threads. All
shards are therefore scored with one model: a restarted stage reads the stored model, and of two
processes that fit at the same time, the second reads the model of the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pruning.store.build import Build
from pruning.store.intermediate import Parts


class Model(Protocol):
    """A model that can be stored."""

    def to_bytes(self) -> bytes: ...


def fit_once(
    build: Build, fit: Callable[[], tuple[Model, Mapping[str, Any]]]
) -> tuple[bytes, dict[str, Any]]:
    """Return the stored model and its description; call `fit` and store its result if absent."""
    stored = Parts(build, "fitted", 1)  # a line of JSON, then the model
    if stored.missing():
        model, description = fit()
        content = json.dumps(description).encode() + b"\n" + model.to_bytes()
        stored.write(0, content, first_wins=True)
    described, _, content = stored.read(0).partition(b"\n")
    return content, json.loads(described)
