"""Description of a cascade: what was promised, found and spent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pruning.scores.model.estimate import Estimate
from pruning.selection.cascade.config import CascadeConfig
from pruning.selection.cascade.decide import Cascade, Outcome
from pruning.selection.cascade.documents import Documents


def prediction(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on what a plan expects."""
    for number, student in enumerate(found["students"], 1):
        agreement = "not defined"
        if student["spearman"] is not None:
            low, high = student["spearman_interval"]
            agreement = f"{student['spearman']:.3f} [{low:.3f}, {high:.3f}]"
        yield (
            f"student {number}: rank correlation with the judge {agreement} out of fold, from "
            f"{student['examples']:,} answers"
        )
    if found["everything"]:
        yield (
            f"predicted: this cheap score would leave hardly any of {found['documents']:,} "
            "documents unasked. Asking about everything is cheaper, and is what will be done."
        )
        return
    yield (
        f"predicted: the judge is asked about {found['asked']:,} of {found['documents']:,} "
        f"documents ({found['share']:.1%}), of which it has answered {found['asked_before']:,}"
    )


def summary(
    cascade: Cascade,
    outcome: Outcome,
    documents: Documents,
    predicted: Mapping[str, Any],
    config: CascadeConfig,
    actual: float | None,
) -> dict[str, Any]:
    """Return the summary for the manifest.

    Args:
      actual: share of the judge's own selection that is kept, where scores stand in for the judge.
    """
    answered, kept = int(outcome.answered.sum()), int(outcome.kept.sum())
    tokens = int(documents.n_tokens[outcome.kept].sum())
    weights = cascade.population.weights
    asked = {name.partition("-")[0]: 0 for name in cascade.asked}
    for name, count in cascade.asked.items():
        asked[name.partition("-")[0]] += count
    pool = documents.pool
    return {
        "strategy": {"class": "Cascade"},
        "pool": dict(pool),
        "kept": {"documents": kept, "tokens": tokens},
        "share": {
            "documents": kept / max(pool["documents"], 1),
            "tokens": tokens / max(pool["tokens"], 1),
        },
        "budget": {
            "unit": config.unit,
            "wanted": cascade.promise.budget,
            "kept": int(weights[outcome.kept].sum()),
        },
        "cascade": {
            "promised": {
                "share": config.share,
                "confidence": config.confidence,
                "unit": config.unit,
            },
            "found": {
                "certified": outcome.certified,
                "estimated": outcome.estimated,
                "actual": actual,
            },
            "asked": {
                "documents": answered,
                "of": len(documents),
                "share": answered / max(len(documents), 1),
                "tokens_share": float(documents.n_tokens[outcome.answered].sum(dtype=float))
                / max(pool["tokens"], 1),
                "everything": outcome.everything,
                **asked,
            },
            "predicted": predicted["asked"],
            "students": predicted["students"],
            "kept_unasked": int((outcome.kept & ~outcome.answered).sum()),
            "dropped_unasked": int((~outcome.kept & ~outcome.answered).sum()),
        },
    }


def costs(
    spent: Mapping[str, Mapping[str, float]],
    everything: Estimate | None,
    students: Sequence[Mapping[str, Any]],
    documents: Documents,
) -> dict[str, float]:
    """Return the costs for measured.json: FLOPs and seconds, and those of asking about everything.

    Args:
      spent: of `Rounds`.
      everything: estimate for the judge on all documents; None where a score set is in its place.
      students: as described by the stage.
    """
    found = {f"{who}_{key}": value for who, sums in spent.items() for key, value in sums.items()}
    read = [student["tokens"] or np.iinfo(np.int32).max for student in students]
    # One product and one sum for each token, bigram and single frequency.
    found["student_useful_flops"] = float(
        sum(6 * np.minimum(documents.n_tokens, most).sum(dtype=np.int64) for most in read)
    )
    if everything is not None:
        found["everything_useful_flops"] = everything.useful_flops
        found["everything_done_flops"] = everything.done_flops
    return found


def lines(found: Mapping[str, Any], measured: Mapping[str, float]) -> Iterator[str]:
    """Yield what was promised, found and spent.

    Args:
      found: summary of a cascade.
      measured: its costs.
    """
    promised, asked = found["promised"], found["asked"]
    yield (
        f"promised: {100 * promised['share']:g}% of the {promised['unit']} of the judge's own "
        f"selection, with a probability of {100 * promised['confidence']:g}%"
    )
    if asked["everything"]:
        yield "found: all of it, because the judge was asked about every document"
    else:
        certified = math.floor(1000 * found["found"]["certified"] + 1e-6) / 1000  # at least
        yield (
            f"found: at least {certified:.1%} at that confidence, "
            f"{found['found']['estimated']:.1%} as an estimate; {found['kept_unasked']:,} "
            f"documents kept and {found['dropped_unasked']:,} dropped without the judge"
        )
    if found["found"]["actual"] is not None:
        yield (
            f"in fact {found['found']['actual']:.1%}: the scores of all documents are known here"
        )
    parts = ", ".join(
        f"{asked[name]:,} {words}"
        for name, words in (
            ("teach", "to teach and plan"),
            ("certify", "to certify"),
            ("doubt", "in doubt"),
            ("unscored", "without a cheap score"),
            ("rest", "others"),
        )
        if asked.get(name)
    )
    yield (
        f"asked: {asked['documents']:,} of {asked['of']:,} documents ({asked['share']:.1%}): "
        f"{parts}; predicted {found['predicted']:,}"
    )
    if "everything_useful_flops" in measured:
        names = [name for name in measured if name.endswith("_useful_flops")]
        total = sum(measured[name] for name in names if not name.startswith("everything"))
        whole = measured["everything_useful_flops"]
        yield (
            f"spent: {total:.3g} FLOPs by the plain models, {total / whole:.1%} of asking the "
            f"judge about every document ({whole:.3g})"
        )
