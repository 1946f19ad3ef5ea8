"""Distillation of an expensive score into a T5 encoder: mean of outputs, projected to a number.

    python -m pruning distill_encoder --gin_file=configs/score/distill_encoder.gin ...
    python -m pruning score --gin_file=configs/score/student.gin --gin.MODEL=runs/student ...

The first command fits an encoder, initialized from any T5's weights, to a teacher's scores of a
part of the corpus. It writes a model in the usual format. The second command scores the whole
corpus with it. Labels, held-out documents and the report are as in ngram_student.py.

Choices
- The model is a Sentence-T5 of one dimension: encoder, mean over the tokens, projection to a
  number. It is saved, loaded, sharded and packed like any Sentence-T5.
- There is no bias, as in Sentence-T5. The student predicts the teacher's score minus its mean,
  which leaves rankings unchanged.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pruning.scores.model.scorer import ScoreError
from pruning.store import late
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.build import Build
from pruning.store.manifest import added_setting, config_of

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus
    from pruning.scores.distilled.lessons import Lessons

NAME = "DistillEncoder"
KIND = "student"

_SCHEMA = pa.schema([("doc_id", pa.int64()), ("teacher", pa.float32()), ("student", pa.float32())])


@dataclasses.dataclass(frozen=True)
class DistillEncoderConfig:
    """Settings of `distill_encoder`.

    Attributes:
      corpus: directory of the corpus.
      teacher: a score set of the corpus; its scored documents are the examples.
      model: weights of a T5 to initialize from, as for `score`.
      output: directory of the student, a model.
      tokenizer: tokenizer of the model, as for `score`.
      score: the value to learn, named as for `select`.
      examples: largest number of examples.
      max_tokens: largest number of tokens of a document, EOS included; longer documents are
        truncated.
      steps: number of training steps.
      batch_size: documents per step, over all devices.
      learning_rate: peak learning rate of Adam; it rises over a twentieth of the steps, then falls
        to 0.
      seed: seed of the examples, their order and the projection.
      dtype: dtype of the computation; parameters are float32.
    """

    corpus: str
    teacher: str
    model: str
    output: str
    tokenizer: str | None = added_setting(None)
    score: str = "ask_llm_ratio"
    examples: int = 200_000
    max_tokens: int = 256
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.examples < 20 or min(self.steps, self.batch_size) < 1 or self.max_tokens < 2:
            raise ValueError("examples is at least 20, max_tokens 2, steps and batch_size 1.")


CONFIGURABLES: dict[str, type] = {NAME: DistillEncoderConfig}


@late.stage
def run(config: DistillEncoderConfig) -> Artifact:
    """Fit an encoder to a teacher's scores.

    Raises:
      ArtifactError: corpus and teacher do not belong together, or the teacher has no scores.
      VocabularyError: the model has another vocabulary than the corpus.
      ScoreError: the model has no encoder.
    """
    from models import checkpoints, weights
    from pruning.corpus.reader import load_corpus
    from pruning.scores.distilled.encoder_training import EncoderTraining
    from pruning.scores.distilled.lessons import Lessons, agreement
    from pruning.scores.model.loading import corpus_for

    corpus = load_corpus(config.corpus)
    teacher = load_artifact(config.teacher, "scores")
    require_input(teacher, "corpus", corpus.artifact)
    model, params = weights.load(config.model)
    if not model.config.has_encoder:
        raise ScoreError(f"{config.model} has no encoder: give a T5.")
    corpus = corpus_for(config.model, model.config, corpus, config.tokenizer)
    settings = {k: v for k, v in config_of(config).items() if k not in _PLACES}
    settings["model"] = f"{checkpoints.fingerprints({'params': params})['params']:08x}"
    inputs = {"corpus": corpus.artifact, "teacher": teacher}
    build = Build(config.output, KIND, settings, inputs, 1, _SCHEMA)
    if build.finished:
        return load_artifact(build.path, KIND)
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    started = time.perf_counter()
    training = EncoderTraining(
        model,
        params,
        first_tokens(corpus, lessons, config.max_tokens, model.config.eos_id),
        lessons.targets,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        dtype=config.dtype,
    )
    training.run(np.flatnonzero(~lessons.held_out))
    found = training.predict(np.flatnonzero(lessons.held_out))
    truth = lessons.targets[lessons.held_out]
    with build.shard(0) as writer:
        ids = lessons.ids[lessons.held_out]
        writer.write({"doc_id": ids, "teacher": truth, "student": found})
        writer.measured = {"seconds": time.perf_counter() - started}
    weights.save(build.path, training.model, training.params)
    for name, content in corpus.vocabulary.files().items():
        build.write_file(name, content)
    known = {"examples": int((~lessons.held_out).sum())}
    student = build.finish(known | dict(agreement(found, truth)))
    assert student is not None  # it has one shard
    return student


_PLACES = ("class", "corpus", "teacher", "output")


def first_tokens(corpus: Corpus, lessons: Lessons, length: int, eos_id: int) -> np.ndarray:
    """Return tokens and EOS of every example, int32 [documents, length]; 0 is padding."""
    rows = np.zeros((len(lessons.targets), length), np.int32)
    place = 0
    for shard, wanted in enumerate(lessons.rows):
        for tokens in corpus.tokens_of(shard, wanted):
            kept = tokens[: length - 1]
            rows[place, : len(kept)] = kept
            rows[place, len(kept)] = eos_id
            place += 1
    return rows
