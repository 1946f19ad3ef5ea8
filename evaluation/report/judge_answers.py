"""Answers of judges: the probability of each answer, of none of them, and two ways to rank.

Choices
- Questions are read from the score set: a rubric's from its manifest, Ask-LLM's from its columns.
- Answers are listed in the order of descending weight, yes before no.
- For a question with two answers, documents may be ranked by the probability of the first or by its
  share of both. The rankings agree as far as the judge answers the question at all, so both and
  their agreement are shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.statistics import rank_agreement
from pruning.scores.terms import SCORED, Combination, Term, read_scores
from pruning.store.artifact import Artifact

_ASK_LLM = {"yes": "ask_llm_yes", "no": "ask_llm_no"}
_NOT_ANSWERED = 0.5  # above it, a reply most probably is none of the answers


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question of a score set.

    Attributes:
      name: name of the question.
      answers: name of an answer -> column of its natural-log probability.
      expected: column of the expected weight, or None.
    """

    name: str
    answers: Mapping[str, str]
    expected: str | None = None

    @property
    def columns(self) -> list[str]:
        """Columns to read."""
        return [*self.answers.values(), *([self.expected] if self.expected else [])]


def questions_of(scores: Artifact) -> list[Asked]:
    """Return the questions whose answers a score set holds."""
    summary = scores.manifest.summary
    if "questions" in summary:
        found = []
        for name, question in summary["questions"].items():
            answers = sorted(question["weights"], key=question["weights"].get, reverse=True)
            columns = {answer: f"{name}_{answer}" for answer in answers}
            found.append(Asked(name, columns, f"{name}_expected"))
        return found
    if set(_ASK_LLM.values()) <= set(summary.get("columns", ())):
        return [Asked("ask_llm", _ASK_LLM)]
    return []


class Answers:
    """Answers to all questions of some score sets, gathered shard by shard.

    Args:
      sets: score sets by name; a set with several names counts under the first.
    """

    def __init__(self, sets: Mapping[str, Artifact]):
        first: dict[str, str] = {}
        for name, one in sets.items():
            first.setdefault(str(one.path), name)
        self._sets = {name: sets[name] for name in first.values()}
        self._parts: dict[str, list[tuple[Asked, dict[str, list[np.ndarray]]]]] = {
            name: [(asked, {column: [] for column in asked.columns}) for asked in questions_of(one)]
            for name, one in self._sets.items()
        }

    def add(self, corpus: Artifact, shard: int, doc_ids: np.ndarray, chosen: np.ndarray) -> None:
        """Read the documents `chosen`, bool, of a corpus shard with these ids, int64."""
        for name, questions in self._parts.items():
            for _, columns in questions:
                for column, parts in columns.items():
                    term = Combination((Term(f"column:{column}"),))
                    read = read_scores(term, corpus, {"scores": self._sets[name]}, shard, doc_ids)
                    parts.append(np.where(read.reason == SCORED, read.score, np.nan)[chosen])

    def described(
        self, doc_ids: np.ndarray, top: float, seed: int
    ) -> dict[str, list[dict[str, Any]]]:
        """Return, for every score set, the description of its questions, see `described`."""
        return {
            name: [
                described(
                    asked,
                    {column: np.concatenate(parts) for column, parts in columns.items()},
                    doc_ids,
                    top,
                    seed,
                )
                for asked, columns in questions
            ]
            for name, questions in self._parts.items()
            if questions
        }


def described(
    asked: Asked, columns: Mapping[str, np.ndarray], doc_ids: np.ndarray, top: float, seed: int
) -> dict[str, Any]:
    """Return the description of a question in the report, as JSON values.

    Args:
      columns: float64 [documents] each, NaN for missing scores.
      doc_ids: int64 [documents].
      top: share of the documents that counts as the top.
      seed: seed for breaking ties.
    """
    logs = np.stack([columns[column] for column in asked.answers.values()], axis=1)
    some = np.isfinite(logs).all(axis=1)
    probabilities = np.exp(logs[some])
    none = np.maximum(1 - probabilities.sum(axis=1), 0.0)
    expected = None if asked.expected is None else columns[asked.expected][some]
    found: dict[str, Any] = {
        "name": asked.name,
        "documents": int(some.sum()),
        "answers": {name: _mean(probabilities[:, i]) for i, name in enumerate(asked.answers)},
        "none": _mean(none),
        "not_answered": _mean((none > _NOT_ANSWERED).astype(np.float64)),
        "expected": None if expected is None else _mean(expected),
        "rankings": None,
    }
    if len(asked.answers) == 2:
        found["rankings"] = _rankings(list(asked.answers), logs[some], doc_ids[some], top, seed)
    return found


def _rankings(
    names: list[str], logs: np.ndarray, doc_ids: np.ndarray, top: float, seed: int
) -> dict[str, Any]:
    """Compare P(first) with P(first) / (P(first) + P(second))."""
    ratio = -np.logaddexp(0, logs[:, 1] - logs[:, 0])
    table = rank_agreement.compare({"first": logs[:, 0], "ratio": ratio}, doc_ids, top, seed=seed)
    return {
        "first": names[0],
        "second": names[1],
        "mean_first": _mean(np.exp(logs[:, 0])),
        "mean_ratio": _mean(np.exp(ratio)),
        "kendall": _number(table.kendall[0, 1]),
        "spearman": _number(table.spearman[0, 1]),
        "overlap": _number(table.overlap[0, 1]),
    }


def _mean(values: np.ndarray) -> float | None:
    return _number(values.mean()) if len(values) else None


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
