"""Checks of a study's judge: its exam, if trained here, and the share of documents it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from pruning.store.artifact import load_artifact
from pruning.store.manifest import MANIFEST

YES, NO = "ask_llm_yes", "ask_llm_no"  # columns
_POOR = 0.6  # share of right answers; guessing gives half
_SILENT = 0.1  # share of documents that are not answered, above which scores say little


def exam(judge: str) -> float | None:
    """Return the share of the judge's held-out examples that it answers rightly.

    Its targets are the answer and EOS. EOS is always right after a little training.

    Returns:
      None for a judge that was not trained here.
    """
    file = epath.Path(judge) / "metrics.jsonl"
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    exams = [line["accuracy"] for line in lines if line["kind"] == "eval"]
    return max(2 * exams[-1] - 1, 0.0) if exams else None


def caveats(judge: str) -> Iterator[str]:
    """Yield what a report has to say of the judge: where it is from, and its exam."""
    if (right := exam(judge)) is None:
        yield f"The judge, {judge}, is used as it was published: it was not tested on this corpus."
        return
    yield (
        "The judge was trained here to tell intact text from damaged text. It judges form, not "
        "truth or harm. Published weights take its place with another Study.judge."
    )
    yield _examined(right)


def lines(places: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on the judge of a study, and on the scores that it gave, as far as they exist."""
    judge = places["models"].get("judge")
    if judge is not None and (right := exam(judge)) is not None:
        yield f"judge: {_examined(right)}"
    for path in places["stages"].values():
        if not (epath.Path(path) / MANIFEST).exists():
            continue
        scores = load_artifact(path)
        columns = scores.manifest.summary.get("columns", {})
        if scores.manifest.kind == "scores" and {YES, NO} <= columns.keys():
            yield f"{path}: {_answered(scores)}"


def _examined(right: float) -> str:
    """Return the result of the exam in words. right: share of right answers."""
    verdict = "; do not read its selections as a verdict on Ask-LLM" if right < _POOR else ""
    return (
        f"Of documents that it had not seen, half of them damaged, the judge told {right:.0%} "
        f"rightly; guessing gives about half{verdict}."
    )


def _answered(scores: Any) -> str:
    """Return how many documents the judge answers by neither yes nor no."""
    parts = [scores.read(k, [YES, NO]) for k in range(scores.num_shards)]
    answered = np.concatenate(
        [np.exp(part[YES].to_numpy()) + np.exp(part[NO].to_numpy()) for part in parts]
    )
    answered = answered[~np.isnan(answered)]
    silent = float(np.mean(answered < 0.5)) if len(answered) else 1.0
    words = (
        f"{len(answered):,} documents; P(yes) + P(no) is below one half for {silent:.1%} of them"
    )
    if silent > _SILENT:
        words += ": the judge hardly answers, so its scores say little. Train it longer"
    return words
