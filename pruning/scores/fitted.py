"""A model that is fitted once in the life of a score set.

A fit may differ in its last bits between processes, by their number of threads for example. A
stage that was interrupted while it scored goes on with the model of its first shards.
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
    """Return a stored model and its description from `fit`, which a restart does not call again."""
    described = Parts(build, "description", 1)
    stored = Parts(build, "model", 1, beside=(described,))
    if stored.missing():
        model, description = fit()
        described.write(0, json.dumps(description).encode())
        stored.write(0, model.to_bytes())
    return stored.read(0), json.loads(described.read(0))
