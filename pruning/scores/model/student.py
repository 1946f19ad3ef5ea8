"""A scorer with one value per document: an encoder trained by `distill_encoder`."""

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
from pruning.store.artifact import load_artifact
from pruning.store.manifest import digest_of

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.corpus.tokenizers import Tokenizer

KIND = "student"  # of the artifact
COLUMN = Column(pa.float32(), "the teacher's score, as predicted by the student")

_MAX_TOKENS = 256  # of students of earlier versions, whose head does not say it


def label_of(config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the label of a student's output, which names its training.

    Args:
      config: recorded settings of `distill_encoder`, JSON values.
      inputs: digests of corpus and teacher, by name.
    """
    return f"student {digest_of({'config': dict(config), 'inputs': dict(inputs)})[:16]}"


@dataclasses.dataclass(frozen=True)
class Student:
    """Settings of the scorer.

    Attributes:
      max_tokens: largest number of tokens of a document, special tokens included; longer documents
        are truncated. None: as in training; with `examples`, at least as many.
      examples: directory of the model, as `distill_encoder` wrote it. Its examples, and documents
        of which the model reads the same tokens, get their out-of-fold values. None: all documents
        get the value of the model.
    """

    max_tokens: int | None = None
    examples: str | None = None

    def prepare(self, model: Model, tokenizer: Tokenizer | None) -> Prepared:
        """Build the three functions.

        Raises:
          ScoreError: the model was not trained by `distill_encoder`, or `examples` are of another
            model or longer than `max_tokens`.
          ArtifactError: `examples` is no student.
        """
        head = model.config.head
        if model.config.sentence_size != 1:
            raise ScoreError(
                "this model gives no single number: teach one with `python -m pruning "
                "distill_encoder`."
            )
        taught_tokens = (head and head.max_tokens) or _MAX_TOKENS
        max_tokens = taught_tokens if self.max_tokens is None else self.max_tokens
        text = ("", False) if head is None else (head.prompt, head.lower_case)
        framed = Framed.of(model.config, tokenizer, max_tokens, *text)
        as_taught = Framed.of(model.config, tokenizer, taught_tokens, *text)
        known = None
        if self.examples is not None:
            known = Examples.read(self.examples)
            if head is None or known.label not in head.labels:
                raise ScoreError(
                    f"Student.examples: {self.examples} is of another student than the model, or "
                    "one of them is of an earlier version: give the directory that "
                    "`distill_encoder` wrote for this model, or leave Student.examples out."
                )
            if max_tokens < taught_tokens:
                raise ScoreError(
                    f"Student.max_tokens={max_tokens} is less than the {taught_tokens} tokens of "
                    "training, by which examples are known: give at least that, or leave "
                    "Student.max_tokens or Student.examples out."
                )

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return framed.vectors(model.bind(params), batch)

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            student = np.full(len(documents), np.nan, np.float32)
            student[windows.document] = answers[:, 0]
            counts = {}
            if known is not None:
                value = known.values(as_taught.content_hashes(documents))
                example = np.isfinite(value)
                student[example] = value[example]
                counts["out_of_fold"] = int(example.sum())
            cut = framed.truncated(documents)
            return Scores({"student": student, "truncated_tokens": cut}, counts=counts)

        settings: dict[str, Any] = {"max_tokens": max_tokens}
        if known is not None:
            settings["examples"] = known.digest
        return Prepared(
            name="student",
            columns={"student": COLUMN, "truncated_tokens": TRUNCATED},
            sides=(framed.side, ANSWER),
            longest=(max_tokens, 1),
            answer_shape=(1,),
            windows=framed.windows,
            step=step,
            finish=finish,
            read=framed.reader(tokenizer),
            pretend=framed.pretender(tokenizer),
            settings=settings,
        )


@dataclasses.dataclass(frozen=True)
class Examples:
    """The documents that a student was trained on, by hash.

    Attributes:
      digest: of the student.
      label: of the output of the student's model, which names its training.
      hashes: int64 [examples], ascending.
      out_of_fold: float32 [examples].
    """

    digest: str
    label: str
    hashes: np.ndarray
    out_of_fold: np.ndarray

    @classmethod
    def read(cls, directory: str) -> Examples:
        """Raise ArtifactError if the directory is no student, ScoreError if it is an older one."""
        student = load_artifact(directory, KIND)
        table = student.read(0)
        if "content_hash" not in table.column_names:
            raise ScoreError(
                f"{directory} is of a version that stored no out-of-fold values: train it again, "
                "or leave Student.examples out."
            )
        hashes = table["content_hash"].to_numpy()
        order = np.argsort(hashes, kind="stable")
        inputs = {name: one["digest"] for name, one in student.manifest.inputs.items()}
        label = label_of(student.manifest.config, inputs)
        return cls(student.digest, label, hashes[order], table["student"].to_numpy()[order])

    def values(self, hashes: np.ndarray) -> np.ndarray:
        """Return the out-of-fold value of each document, float32 [n]; NaN if it is no example."""
        found = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[found] == hashes, self.out_of_fold[found], np.nan)
