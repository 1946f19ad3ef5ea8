"""Scores of a published classifier: a transformers model with a classification head.

FineWeb-Edu's (Penedo et al., arXiv 2406.17557) is an encoder with a single output, the grade of a
document from 0 to 5. Others have classes: topics, formats, good and bad.

Choices
- A single output is stored unchanged. Several outputs give the log-probability of every class, and
  for exclusive classes also the expected value: the sum of the classes' values weighted by their
  probabilities, which ranks more finely than the most probable class.
- Classes are columns `class_0`, `class_1`, ..., whose descriptions hold the labels, because labels
  come from the model and may be any text.
- The beginning of a document is judged. The score set has the number of tokens not read.
- Heads that were trained on pairs of texts (rerankers, NLI) get a single text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.packing import Windows
from pruning.scores.model.document_windows import TRUNCATED
from pruning.scores.model.framed import ANSWER, Framed
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scores
from pruning.scores.score_set import Column

if TYPE_CHECKING:
    import jax

    from models.config import Head
    from models.model import Model
    from pruning.corpus.tokenizers import Tokenizer

MAX_TOKENS = 512  # unless the settings or the model's positions are less


@dataclasses.dataclass(frozen=True)
class SequenceClassifier:
    """Settings of the scorer.

    Attributes:
      max_tokens: largest number of tokens of a document, special tokens included; longer documents
        are truncated. None: 512, or fewer if the model has fewer positions.
      values: value of each class, in the order of the model's labels, for the expected value; by
        default 0, 1, 2, ...
    """

    max_tokens: int | None = None
    values: tuple[float, ...] | None = None

    def prepare(self, model: Model, tokenizer: Tokenizer | None) -> Prepared:
        """Raise ScoreError if the model is not a classifier, or has another number of classes."""
        config, head = model.config, model.config.head
        if head is None or head.kind == "embedding":
            raise ScoreError(
                "this model has no classification head: give one whose config.json names a "
                "...ForSequenceClassification, or describe the head in head.json "
                "(models/weights/huggingface_heads.py)."
            )
        max_tokens = self.max_tokens or min(MAX_TOKENS, config.max_positions or MAX_TOKENS)
        values = self._values(head)
        framed = Framed.of(config, tokenizer, max_tokens)
        outputs = len(head.labels)

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            import jax

            logits = framed.vectors(model.bind(params), batch)
            if head.kind == "classes":
                return jax.nn.log_softmax(logits, axis=-1)
            return jax.nn.log_sigmoid(logits) if head.kind == "independent" else logits

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            given = np.full((len(documents), outputs), np.nan, np.float32)
            given[windows.document] = answers
            columns = dict(zip(_names(head), given.T, strict=True))
            if values is not None:
                columns["expected"] = np.exp(given.astype(np.float64)) @ values
            return Scores({**columns, "truncated_tokens": framed.truncated(documents)})

        settings: dict[str, Any] = {"max_tokens": max_tokens}
        return Prepared(
            name="sequence_classifier",
            columns=_columns(head, values is not None),
            sides=(framed.side, ANSWER),
            longest=(max_tokens, 1),
            answer_shape=(outputs,),
            windows=framed.windows,
            step=step,
            finish=finish,
            summary={"labels": list(head.labels), "kind": head.kind},
            settings=settings,
        )

    def _values(self, head: Head) -> np.ndarray | None:
        """Return the values of exclusive classes, float64; None for other outputs."""
        if head.kind != "classes":
            if self.values is not None:
                raise ScoreError(
                    "values are of classes one of which applies; this model has "
                    f"{len(head.labels)} outputs of another kind: leave them out."
                )
            return None
        if self.values is None:
            return np.arange(len(head.labels), dtype=np.float64)
        if len(self.values) != len(head.labels):
            raise ScoreError(
                f"there are {len(self.values)} values, and the model has {len(head.labels)} "
                f"classes: {', '.join(head.labels[:20])}."
            )
        return np.asarray(self.values, np.float64)


def _names(head: Head) -> list[str]:
    if len(head.labels) == 1:
        return ["value"]
    stem = "value" if head.kind == "values" else "class"
    return [f"{stem}_{i}" for i in range(len(head.labels))]


def _columns(head: Head, expected: bool) -> dict[str, Column]:
    what = "output" if head.kind == "values" else "log-probability of the class"
    columns = {
        name: Column(pa.float32(), f"{what} {label!r}")
        for name, label in zip(_names(head), head.labels, strict=True)
    }
    if expected:
        columns["expected"] = Column(pa.float32(), "expected value of the classes' values")
    return {**columns, "truncated_tokens": TRUNCATED}
