"""Histograms of scores: of all documents, by what a selection kept, by source and by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

ALL, KEPT, DROPPED = "all", "kept", "dropped"

_BINS = 40
_OUTER = 0.005  # share of the documents beyond the bins on each side; they count in the outer bins
_SOURCES = 8
_LENGTHS = (0, 128, 512, 2048)  # tokens, where groups of lengths begin


class Probability(NamedTuple):
    """A score as a probability.

    Attributes:
      name: of the probability, "P(yes)".
      of: the probability of a score's values, float64 [documents].
    """

    name: str
    of: Callable[[np.ndarray], np.ndarray]


# Values of scores (pruning/scores/terms.py) that are logarithms of probabilities or of odds.
PROBABILITIES: Mapping[str, Probability] = {
    "ask_llm": Probability("P(yes)", np.exp),
    "column:ask_llm_yes": Probability("P(yes)", np.exp),
    "ask_llm_ratio": Probability("P(yes) / (P(yes) + P(no))", lambda odds: 1 / (1 + np.exp(-odds))),
}


def groups(
    kept: np.ndarray | None, source: np.ndarray | None, n_tokens: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the groups that are told apart, name -> bool [documents].

    Args:
      kept: bool [documents]; None without a selection.
      source: strings [documents]; the most frequent are groups. None without such a column.
      n_tokens: [documents], lengths.
    """
    found: dict[str, np.ndarray] = {ALL: np.ones(len(n_tokens), bool)}
    if kept is not None:
        found |= {KEPT: kept, DROPPED: ~kept}
    if source is not None:
        names, counts = np.unique(source, return_counts=True)
        for i in np.argsort(-counts, kind="stable")[:_SOURCES]:
            found[f"source: {names[i]}"] = source == names[i]
    for low, high in zip(_LENGTHS, (*_LENGTHS[1:], None), strict=True):
        inside = n_tokens >= low if high is None else (n_tokens >= low) & (n_tokens < high)
        if inside.any() and not inside.all():
            words = f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
            found[f"length: {words} tokens"] = inside
    return found


def histogram(
    values: np.ndarray,
    members: Mapping[str, np.ndarray],
    bounds: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return counts in equal bins, for each group over the same bins.

    Args:
      values: float64 [documents], NaN where there is none.
      members: name -> bool [documents].
      bounds: ends of the bins; None for those of the values, outliers apart.

    Returns:
      `edges` [bins + 1], and per group its name, documents, mean, and `counts` [bins].
    """
    known = ~np.isnan(values)
    some = values[known]
    ends = np.quantile(some, [_OUTER, 1 - _OUTER]) if len(some) else (0.0, 1.0)
    low, high = bounds or (float(ends[0]), float(ends[1]))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    found = []
    for name, inside in members.items():
        own = values[known & inside]
        counts, _ = np.histogram(np.clip(own, low, high), edges)
        mean = float(own.mean()) if len(own) else None
        found.append({"name": name, "documents": len(own), "mean": mean, "counts": counts.tolist()})
    return {"edges": edges.tolist(), "groups": found}
