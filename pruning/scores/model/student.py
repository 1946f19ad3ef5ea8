"""A scorer of one number: a pooled encoder with a regression head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.packing import Windows
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.framed import Framed
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scores
from pruning.scores.score_set import Column

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.corpus.vocabulary import Vocabulary


COLUMN = Column(pa.float32(), "the teacher's score, less its mean, as the student predicts it")


@dataclasses.dataclass(frozen=True)
class Student:
    """Settings of the scorer.

    Attributes:
      max_tokens: largest number of tokens of a document, EOS included; longer documents are
        truncated. Use the value of training.
    """

    max_tokens: int = 256

    def prepare(self, model: Model, vocabulary: Vocabulary) -> Prepared:
        """Raise ScoreError if the model was not trained by `distill_encoder`."""
        if model.config.sentence_size != 1:
            raise ScoreError(
                "this model gives no single number: teach one with `python -m pruning "
                "distill_encoder`."
            )
        embedding = Embedding(self.max_tokens).prepare(model, vocabulary)
        framed = Framed.of(model.config, vocabulary, self.max_tokens)

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return framed.vectors(model.bind(params), batch)

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            student = np.full(len(documents), np.nan, np.float32)
            student[windows.document] = answers[:, 0]
            cut = framed.truncated(documents)
            return Scores({"student": student, "truncated_tokens": cut})

        return dataclasses.replace(
            embedding,
            name="student",
            columns={"student": COLUMN, "truncated_tokens": embedding.columns["truncated_tokens"]},
            step=step,
            finish=finish,
            summary={},
        )
