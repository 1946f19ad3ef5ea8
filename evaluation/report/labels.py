"""Comparison of scores with labels: separation of good documents, and dependence on length.

Choices
- One of the report's own scores is the label: a column of the corpus, an imported file or a judge's
  answers. Documents without a label or without the score are left out.
- The document's length and a random score are included as baselines.
- Within fifths of the length, a score cannot gain from length. An area that falls to 0.5 there was
  due to length alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pruning.scores.intervals import Interval, auc_interval, spearman_interval
from pruning.store import randomness
from pruning.store.randomness import Stream

RANDOM = "random"

_TOPS = (0.01, 0.05, 0.1, 0.2)
_FIFTHS = 5


def compare(
    columns: Mapping[str, np.ndarray],
    label: str,
    good_from: float,
    length: str,
    doc_ids: np.ndarray,
    seed: int,
) -> list[dict[str, Any]]:
    """Return a table with a row for every score but the label, the length and a random score last.

    Args:
      columns: name -> float64 [documents], higher is better, NaN for missing values.
      label: name of the column that is the ground truth.
      good_from: least value of the label of a good document.
      length: name of the column of lengths.
      doc_ids: int64 [documents].
      seed: seed of the random score.
    """
    truth, lengths = columns[label], columns[length]
    others = {name: values for name, values in columns.items() if name not in (label, length)}
    others[length] = lengths
    others[RANDOM] = randomness.uniform(Stream.LABEL_TIE, seed, doc_ids)
    found = []
    for name, values in others.items():
        known = ~np.isnan(truth) & ~np.isnan(values)
        good = truth[known] >= good_from
        found.append(
            {
                "name": name,
                "documents": int(known.sum()),
                "good": int(good.sum()),
                "auc": _area(values[known], good),
                "spearman": _shown(spearman_interval(values[known], truth[known])),
                "precision": _precisions(values[known], good, doc_ids[known], seed),
                "within_length": _within_length(values[known], good, lengths[known]),
            }
        )
    return found


def _area(values: np.ndarray, good: np.ndarray) -> dict[str, float] | None:
    return _shown(auc_interval(values[good], values[~good]))


def _shown(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _precisions(
    values: np.ndarray, good: np.ndarray, doc_ids: np.ndarray, seed: int
) -> list[dict[str, float | int]]:
    """Return the share of good documents among the highest scores; ties are broken by hashes."""
    ties = randomness.hashed(Stream.LABEL_TIE, seed, doc_ids)
    order = np.lexsort((ties, -values))
    found = []
    for share in _TOPS:
        count = round(share * len(values))
        if count:
            precision = float(good[order[:count]].mean())
            found.append({"share": share, "documents": count, "precision": precision})
    return found


def _within_length(
    values: np.ndarray, good: np.ndarray, lengths: np.ndarray
) -> list[dict[str, Any]]:
    """Return the area within each fifth of the documents by length, the shortest first."""
    order = np.argsort(lengths, kind="stable")
    return [
        {
            "from_tokens": int(lengths[members].min(initial=np.inf)) if len(members) else None,
            "to_tokens": int(lengths[members].max(initial=0)) if len(members) else None,
            "documents": len(members),
            "good": int(good[members].sum()),
            "auc": _area(values[members], good[members]),
        }
        for members in np.array_split(order, _FIFTHS)
    ]


def rows(table: Sequence[Mapping[str, Any]]) -> list[Sequence[Any]]:
    """Return the table for a CSV file: a row per score, with columns for areas and precisions."""
    head = ["score", "documents", "good", "auc", "auc_low", "auc_high", "spearman"]
    head += [f"precision_at_{share:g}" for share in _TOPS]
    head += [f"auc_fifth_{number}" for number in range(1, _FIFTHS + 1)]
    found: list[Sequence[Any]] = [head]
    for row in table:
        area = row["auc"] or {}
        at = {one["share"]: one["precision"] for one in row["precision"]}
        found.append(
            [
                *(row["name"], row["documents"], row["good"]),
                *(area.get("value"), area.get("low"), area.get("high")),
                (row["spearman"] or {}).get("value"),
                *(at.get(share) for share in _TOPS),
                *((one["auc"] or {}).get("value") for one in row["within_length"]),
            ]
        )
    return found
