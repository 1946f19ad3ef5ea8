"""Questions of scorers as a server is asked them, and the columns made of the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pruning.scores.model.ask_llm import COLUMNS, AskLLM
from pruning.scores.model.document_windows import TRUNCATED, with_windows
from pruning.scores.model.rubric import Rubric
from pruning.scores.model.scorer import ScoreError
from pruning.scores.model.served.prompts import Question
from pruning.scores.score_set import Column


class Asked(NamedTuple):
    """A question and the columns that are made of its answers.

    Attributes:
      columns: without those of `judged` and `_unlisted`.
      logarithms: names of the columns that are log-probabilities.
      values: log-probabilities of the answers [windows, answers] -> columns.
    """

    question: Question
    columns: Mapping[str, Column]
    logarithms: Sequence[str]
    values: Callable[[np.ndarray], dict[str, np.ndarray]]


def questions_of(scorer: Any) -> list[Asked]:
    """Return the questions of a scorer; raise ScoreError if it asks none."""
    if isinstance(scorer, AskLLM):
        names = ["ask_llm_yes", "ask_llm_no"]
        question = Question("ask_llm", scorer.prompt, {"yes": scorer.yes, "no": scorer.no})
        columns = {name: COLUMNS[name] for name in names}
        return [Asked(question, columns, names, lambda x: dict(zip(names, x.T, strict=True)))]
    if isinstance(scorer, Rubric):
        return [
            Asked(
                Question(q.name, q.prompt, q.answers),
                q.columns(),
                [f"{q.name}_{answer}" for answer in q.answers],
                q.values,
            )
            for q in scorer.questions
        ]
    raise ScoreError(
        f"{type(scorer).__name__} cannot be asked of a server: Score.server goes with @AskLLM() "
        "and @Rubric()."
    )


def columns_of(asked: Sequence[Asked], keep_windows: bool) -> dict[str, Column]:
    """Return the columns of a score set."""
    meaning = (
        "how much the sum of the answers may be too high: answers that the server did not list "
        "have the largest probability possible"
    )
    found: dict[str, Column] = {}
    for each in asked:
        found |= each.columns
        found[f"{each.question.name}_unlisted"] = Column(pa.float32(), meaning)
    return with_windows({**found, "truncated_tokens": TRUNCATED}, keep_windows)
