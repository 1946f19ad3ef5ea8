"""Rubrics: answers of a language model to questions about a document, with all probabilities.

    educational, answers 0 to 5 with their numbers as weights
    -> educational_0 ... educational_5   log-probability of each answer
       educational_expected              mean weight of the answer, given that it is one of these
       educational_none                  probability of a reply that is none of them

Choices
- A judge that gives most of its probability to replies outside the rubric does not answer it. This
  is recorded in `_none` and shown on the score page. `_expected` is conditional on the answers, so
  that it has the scale of the weights in either case.
- Decoder-only judges read the document once for all questions whose prompts begin alike
  (inquiry.py), so the document should precede the question. An encoder-decoder judge reads it once
  for each question.
- `Question.file` takes a published prompt unchanged.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from etils import epath

from models.packing import Windows
from pruning.corpus.tokenizers import Tokenizer
from pruning.scores.model.answers import Reading, expected_weight, mass_on_none, spelled
from pruning.scores.model.document_windows import (
    TRUNCATED,
    Aggregate,
    judged,
    require_windows,
    with_windows,
)
from pruning.scores.model.inquiry import Inquiry, Wording
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scores, require_predictions
from pruning.scores.score_set import Column

if TYPE_CHECKING:
    import jax

    from models.model import Model

_SLOT = "{document}"
_NAME = re.compile(r"\w+")
_OF_QUESTION = ("expected", "none")  # additional columns of a question


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a rubric.

    Attributes:
      name: prefix of the names of its columns.
      answers: name -> spellings. The probability of an answer is that of a reply which begins with
        one of them.
      prompt: the question, with `{document}` in place of the document.
      file: a text file with the prompt, instead of `prompt`.
      slot: placeholder of the document in the prompt.
      weights: name of an answer -> number; by default the names are read as numbers.
    """

    name: str
    answers: Mapping[str, tuple[str, ...]]
    prompt: str = ""
    file: str | None = None
    slot: str = _SLOT
    weights: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *self.answers):
            if not _NAME.fullmatch(name):
                raise ScoreError(
                    f"Question.name and names of answers are letters, digits and _: {name!r}."
                )
        if reserved := set(self.answers) & set(_OF_QUESTION):
            raise ScoreError(
                f"question {self.name!r}: an answer cannot be called {min(reserved)!r}, which is "
                "a column of its own."
            )
        if not self.answers:
            raise ScoreError(f"question {self.name!r} has no answers.")
        # The text is recorded instead of the file name, because it identifies the scores.
        object.__setattr__(self, "prompt", self._text())
        object.__setattr__(self, "slot", _SLOT)
        object.__setattr__(self, "file", None)
        object.__setattr__(self, "weights", self._weights())

    def _text(self) -> str:
        if bool(self.prompt) == (self.file is not None):
            raise ScoreError(f"question {self.name!r}: give either a prompt or a file with it.")
        text = self.prompt
        if self.file is not None:
            try:
                text = epath.Path(self.file).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ScoreError(
                    f"question {self.name!r}: the prompt {self.file} cannot be read: {error}."
                ) from error
        if (count := text.count(self.slot) if self.slot else 0) != 1:
            raise ScoreError(
                f"question {self.name!r}: {self.slot!r} is in the prompt {count} times; it must be "
                "there once. Question.slot names what stands for the document."
            )
        return text.replace(self.slot, _SLOT)

    def _weights(self) -> dict[str, float]:
        if self.weights is None:
            try:
                return {name: float(name) for name in self.answers}
            except ValueError as error:
                raise ScoreError(
                    f"question {self.name!r}: its answers are no numbers, so Question.weights has "
                    "to give the number of each."
                ) from error
        if set(self.weights) != set(self.answers):
            raise ScoreError(
                f"question {self.name!r}: weights are of {', '.join(self.weights)}, its answers "
                f"are {', '.join(self.answers)}."
            )
        return {name: float(self.weights[name]) for name in self.answers}

    def columns(self) -> dict[str, Column]:
        """Return the columns of the question."""
        found = {
            f"{self.name}_{answer}": Column(
                pa.float32(), f"natural-log probability of a reply that begins with {answer!r}"
            )
            for answer in self.answers
        }
        mean = "mean weight of the answer, given that it is one of them"
        none = "probability of a reply that begins with none of the answers"
        found[f"{self.name}_expected"] = Column(pa.float32(), mean)
        found[f"{self.name}_none"] = Column(pa.float32(), none)
        return found

    def values(self, log_probabilities: np.ndarray) -> dict[str, np.ndarray]:
        """Return the values of the columns from those of the answers, [windows, answers]."""
        assert self.weights is not None  # filled in above
        weights = np.array(list(self.weights.values()))
        found = {
            f"{self.name}_{answer}": log_probabilities[:, i]
            for i, answer in enumerate(self.answers)
        }
        found[f"{self.name}_expected"] = expected_weight(log_probabilities, weights)
        found[f"{self.name}_none"] = mass_on_none(log_probabilities)
        return found


@dataclasses.dataclass(frozen=True)
class Rubric:
    """Settings of a rubric.

    Attributes:
      questions: questions about each document.
      max_tokens: largest number of tokens of a question, the document and an encoder's EOS
        together. All questions see the same part of a document, limited by the longest question.
      chat, system, thinking: as in `AskLLM`.
      windows: largest number of windows of a document that are judged, each in the whole prompt;
        None for as many as cover the document.
      aggregate: how the windows' values give the document's value, column by column: the mean,
        weighted by the tokens of each (of probabilities, if the column has their logarithms), the
        minimum or the maximum.
      keep_windows: store the values of each window as well.
    """

    questions: tuple[Question, ...]
    max_tokens: int = 512
    chat: bool = False
    system: str | None = None
    thinking: bool = False
    windows: int | None = 1
    aggregate: Aggregate = "mean"
    keep_windows: bool = False

    def __post_init__(self) -> None:
        if not self.questions:
            raise ScoreError("Rubric.questions is empty: name at least one question.")
        require_windows(self.windows, "Rubric")
        columns = [column for question in self.questions for column in question.columns()]
        if twice := {column for column in columns if columns.count(column) > 1}:
            raise ScoreError(
                f"two questions have the column {min(twice)!r}: give questions names of their own."
            )

    def prepare(self, model: Model, tokenizer: Tokenizer) -> Prepared:
        """Raise ScoreError or VocabularyError if prompts, answers or tokenizer are unsuitable."""
        require_predictions(model.config, "Rubric")
        config = model.config
        wording = Wording(self.max_tokens, self.chat, self.system, self.thinking)
        prompts = [wording.prompt(q.prompt, tokenizer, config) for q in self.questions]
        answers = [spelled(f"question {q.name!r}", q.answers, tokenizer) for q in self.questions]
        start = config.start_id if config.has_encoder else None
        readings = [Reading.of(list(of_question.values()), start) for of_question in answers]
        asked = Inquiry(config, prompts, readings, self.max_tokens, self.windows, self.keep_windows)
        table = asked.point_tokens

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return point_log_probabilities(model, params, batch, table)

        def finish(documents: Documents, windows: Windows, found: np.ndarray) -> Scores:
            values: dict[str, np.ndarray] = {}
            logarithms: list[str] = []
            parts = zip(self.questions, readings, asked.by_question(found), strict=True)
            for question, reading, read in parts:
                values |= question.values(reading.log_probabilities(read))
                logarithms += [f"{question.name}_{answer}" for answer in question.answers]
            spans = asked.spans(documents)
            return judged(spans, values, logarithms, self.aggregate, self.keep_windows)

        columns = {k: v for question in self.questions for k, v in question.columns().items()}
        return Prepared(
            name="rubric",
            columns=with_windows({**columns, "truncated_tokens": TRUNCATED}, self.keep_windows),
            sides=asked.sides,
            longest=asked.longest,
            answer_shape=(table.shape[1],),
            windows=asked.windows,
            step=step,
            finish=finish,
            summary={
                "questions": {
                    question.name: {
                        "answers": {
                            name: [list(ids) for ids in own] for name, own in found.items()
                        },
                        "weights": question.weights,
                        "prompt_tokens": len(prompt),
                    }
                    for question, found, prompt in zip(
                        self.questions, answers, prompts, strict=True
                    )
                },
                "together": [[self.questions[q].name for q in group] for group in asked.groups],
            },
            absorbs=config.has_encoder,
            read=asked.read,
            pretend=asked.pretend,
        )


def point_log_probabilities(
    model: Model, params: Any, batch: Mapping[str, jax.Array], candidates: np.ndarray
) -> jax.Array:
    """Return log-probabilities of candidate tokens at the points of packed rows.

    Args:
      model, params: the judge.
      batch: int32, as for `LanguageModel.answer_states`, and the number of every point:
        `answer_points` or, with an encoder, `decoder_points`, [rows, points].
      candidates: token ids for every point, int32 [points, largest number of candidates].

    Returns:
      Natural-log probabilities over the whole vocabulary, float32 [rows, points, candidates].
      Positions of segment 0 are undefined.
    """
    import jax.numpy as jnp

    from models.losses import token_log_likelihood

    module = model.bind(params)
    points = batch["decoder_points" if model.config.has_encoder else "answer_points"]
    tokens = jnp.asarray(candidates)[points]
    return token_log_likelihood(module.answer_states(batch), module.output_head(), tokens)
