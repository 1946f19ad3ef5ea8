"""Histograms of scores: of all documents, by what a selection kept, and by source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

ALL, KEPT, DROPPED = "all", "kept", "dropped"

_BINS = 40
_OUTER = 0.005  # share of the documents beyond the bins on each side; they count in the outer bins
_SOURCES = 8


def groups(kept: np.ndarray | None, source: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the groups that are told apart, name -> bool [documents].

    Args:
      kept: bool [documents]; None without a selection.
      source: strings [documents]; the most frequent are groups. None without such a column.
    """
    size = len(kept) if kept is not None else len(source) if source is not None else 0
    found: dict[str, np.ndarray] = {ALL: np.ones(size, bool)} if size else {}
    if kept is not None:
        found |= {KEPT: kept, DROPPED: ~kept}
    if source is not None:
        names, counts = np.unique(source, return_counts=True)
        for i in np.argsort(-counts, kind="stable")[:_SOURCES]:
            found[f"source: {names[i]}"] = source == names[i]
    return found


def histogram(values: np.ndarray, members: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return counts in equal bins, for each group over the same bins.

    Args:
      values: float64 [documents], NaN where there is none.
      members: name -> bool [documents].

    Returns:
      `edges` [bins + 1], and per group its name, documents, mean, and `counts` [bins].
    """
    known = ~np.isnan(values)
    some = values[known]
    low, high = np.quantile(some, [_OUTER, 1 - _OUTER]) if len(some) else (0.0, 1.0)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    found = []
    for name, inside in (members or {ALL: np.ones(len(values), bool)}).items():
        own = values[known & inside]
        counts, _ = np.histogram(np.clip(own, low, high), edges)
        mean = float(own.mean()) if len(own) else None
        found.append({"name": name, "documents": len(own), "mean": mean, "counts": counts.tolist()})
    return {"edges": edges.tolist(), "groups": found}
