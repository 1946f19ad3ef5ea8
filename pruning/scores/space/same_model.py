"""Check that two score sets of embeddings come from one model with the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pruning.store.manifest import ArtifactError


def require_same_model(
    one: str, config_of_one: Mapping[str, Any], other: str, config_of_other: Mapping[str, Any]
) -> None:
    """Raise ArtifactError if two configurations name different models or scorers.

    Compared is what both say of them.

    Args:
      one, other: paths, for the message.
      config_of_one, config_of_other: configurations of the score sets' manifests.
    """
    for name in ("model", "scorer"):
        values = config_of_one.get(name), config_of_other.get(name)
        if None not in values and values[0] != values[1]:
            raise ArtifactError(
                f"{one} and {other} are of embeddings of different models or settings "
                f"({name}: {values[0]} and {values[1]}): embed both with the same."
            )
