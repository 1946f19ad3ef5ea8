"""Distillation of an expensive score into an encoder, all of whose weights are trained.

    python -m pruning distill_encoder --gin_file=configs/score/distill_encoder.gin ...
    python -m pruning score --gin_file=configs/score/student.gin --gin.MODEL=runs/student ...

The first command fits an encoder (BERT-like, or that of a T5) to a teacher's scores of a
part of the corpus, or to a column of the corpus. It writes a model in the usual format. The second
command scores the corpus, or any other, with it.

Choices
- The model is the encoder with a head of one value, like a published classifier of one output, and
  is saved, loaded, sharded and packed like one. Special tokens, truncation and pooling of documents
  follow the encoder's directory.
- Agreement with the teacher is measured out of fold, beside that of length and of a random score:
  one training for each fold, without its documents. The model that is saved is trained on all.
- The out-of-fold value of every example is kept with the hash of its tokens. `score` gives this
  value to examples and their copies (`Student.examples`), so that they have no advantage over the
  documents that were no examples. The label of the model's output names the training, so that
  examples of another student are refused. A linear student scores every document by the model of
  its fold (folds.py); here that would take as many passes over the corpus as there are folds.
- A finished fold is kept on restart.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from models.packing import offsets_of
from pruning.scores.distilled.lessons import Lessons, agreement, beside
from pruning.scores.model.scorer import Documents, ScoreError
from pruning.scores.model.student import KIND, label_of
from pruning.scores.terms import CORPUS, Term
from pruning.scores.text.folds import Folds
from pruning.store import late
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.manifest import added_setting, config_of
from pruning.store.randomness import Stream

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus
    from pruning.scores.model.framed import Framed

NAME = "DistillEncoder"

T5_RATE, RATE = 1e-3, 1e-4  # peak learning rates

_SCHEMA = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("content_hash", pa.int64()),  # of the tokens that the student reads
        ("fold", pa.int8()),
        ("teacher", pa.float32()),
        ("student", pa.float32()),  # by the model that was not trained on the document
    ]
)


@dataclasses.dataclass(frozen=True)
class DistillEncoderConfig:
    """Settings of `distill_encoder`.

    Attributes:
      corpus: directory of the corpus.
      model: weights of an encoder or a T5 to initialize from, as for `score`.
      output: directory of the student, a model.
      teacher: a score set of the corpus; its scored documents are the examples. None if `score` is
        a column of the corpus.
      tokenizer: tokenizer of the model, as for `score`.
      score: the value to learn, named as for `select`.
      examples: largest number of examples.
      max_tokens: largest number of tokens of a document, special tokens included; longer documents
        are truncated.
      steps: number of training steps of each fold, and of the model that is saved.
      batch_size: documents per step, over all devices.
      learning_rate: peak learning rate of Adam; it rises over a twentieth of the steps, then falls
        to 0. None: 1e-3 for a T5, 1e-4 for other encoders.
      folds: number of folds; training takes one more.
      seed: seed of the examples, their order and the folds.
      dtype: dtype of the computation; parameters are float32.
    """

    corpus: str
    model: str
    output: str
    teacher: str | None = None
    tokenizer: str | None = added_setting(None)
    score: str = "ask_llm_ratio"
    examples: int = 200_000
    max_tokens: int = 256
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float | None = None
    folds: int = 3
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.examples < 20 or min(self.steps, self.batch_size) < 1 or self.max_tokens < 2:
            raise ValueError("examples is at least 20, max_tokens 2, steps and batch_size 1.")
        if not 2 <= self.folds <= 100:
            raise ValueError(f"folds is 2 to 100, not {self.folds}.")
        if (self.teacher is None) != (Term(self.score).source == CORPUS):
            raise ValueError(
                "learn from a teacher, or from a column of the corpus (score=corpus:NAME)."
            )
        rate = self.learning_rate
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"learning_rate is above 0, or None for the default, not {rate}.")


CONFIGURABLES: dict[str, type] = {NAME: DistillEncoderConfig}


@late.stage
def run(config: DistillEncoderConfig) -> Artifact:
    """Fit an encoder to a teacher's scores.

    Raises:
      ArtifactError: corpus and teacher do not belong together, or the teacher has no scores.
      VocabularyError: the model has another vocabulary than the corpus.
      ScoreError: the model has no encoder, or its family no heads.
    """
    from models import checkpoints, weights
    from pruning.corpus.reader import load_corpus
    from pruning.scores.distilled.encoder_training import EncoderTraining, Shapes
    from pruning.scores.model.framed import Framed
    from pruning.scores.model.loading import corpus_for

    own = load_corpus(config.corpus)
    inputs = {"corpus": own.artifact}
    teacher = None
    if config.teacher is not None:
        teacher = load_artifact(config.teacher, "scores")
        require_input(teacher, "corpus", own.artifact)
        inputs["teacher"] = teacher
    model, params = weights.load(config.model)
    if not model.config.has_encoder:
        raise ScoreError(f"{config.model} has no encoder: {_SUGGESTION}.")
    settings = {k: v for k, v in config_of(config).items() if k not in _PLACES}
    settings["model"] = f"{checkpoints.fingerprints({'params': params})['params']:08x}"
    label = label_of(settings, {name: one.digest for name, one in inputs.items()})
    try:
        shapes = Shapes.of(model.config, config.max_tokens, label)
    except ValueError as error:
        raise ScoreError(f"{config.model} cannot be a student ({error}): {_SUGGESTION}.") from error
    corpus = corpus_for(config.model, model.config, own, config.tokenizer)
    head = model.config.head
    framed = Framed.of(
        model.config,
        corpus.vocabulary,
        config.max_tokens,
        "" if head is None else head.prompt,
        head is not None and head.lower_case,
    )
    build = Build(config.output, KIND, settings, inputs, 1, _SCHEMA)
    if build.finished:
        return load_artifact(build.path, KIND)
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    documents = read_documents(corpus, lessons, framed)
    windows = framed.windows(documents)
    read = windows.document  # documents without tokens are no examples
    ids, targets = lessons.ids[read], lessons.targets[read]
    hashes = framed.content_hashes(documents)[read]
    folds = Folds(Stream.ENCODER_STUDENT_FOLD, config.seed, config.folds)
    fold = folds.of(hashes)
    started = time.perf_counter()
    rate = config.learning_rate
    if rate is None:
        rate = T5_RATE if model.config.family == "t5" else RATE
    training = EncoderTraining(
        shapes,
        params,
        windows.sides[0],
        targets,
        hashes,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=rate,
        seed=config.seed,
        dtype=config.dtype,
    )
    parts = Parts(build, "fold", folds.count)
    for k in parts.missing():
        taught = training.teach(np.flatnonzero(fold != k))
        parts.write(k, training.predict(taught, np.flatnonzero(fold == k)).tobytes())
    student = np.zeros(len(read), np.float32)
    for k in range(folds.count):
        student[fold == k] = np.frombuffer(parts.read(k), np.float32)
    if not (build.path / checkpoints.MODEL_FILE).exists():  # written last by `save`
        weights.save(build.path, training.model, training.teach(np.arange(len(read))))
    with build.shard(0) as writer:
        columns = {"doc_id": ids, "content_hash": hashes, "fold": fold.astype(np.int8)}
        writer.write(columns | {"teacher": targets, "student": student})
        writer.measured = {"seconds": time.perf_counter() - started}
    for name, content in corpus.vocabulary.files().items():
        build.write_file(name, content)
    lengths = [own.lengths_of(shard, rows) for shard, rows in enumerate(lessons.rows)]
    finished = build.finish(
        {
            "examples": len(read),
            "linear": agreement(training.linear(fold), targets),
            "spearman_beside": beside(
                np.concatenate(lengths)[read],
                ids,
                targets,
                Stream.ENCODER_STUDENT_BESIDE,
                config.seed,
            ),
            **agreement(student, targets),
        }
    )
    assert finished is not None  # it has one shard
    return finished


_PLACES = ("class", "corpus", "teacher", "output")
_SUGGESTION = "give a BERT-like encoder or a T5"


def read_documents(corpus: Corpus, lessons: Lessons, framed: Framed) -> Documents:
    """Return the examples' tokens as the model reads them, in corpus order, without its frame."""
    reader = framed.reader(corpus.vocabulary)
    parts = [Documents.of([])]
    for shard, rows in enumerate(lessons.rows):
        if not len(rows):
            continue
        if reader is None:
            found = [tokens[: framed.room] for tokens in corpus.tokens_of(shard, rows)]
            lengths = np.array([len(tokens) for tokens in found])
            flat = np.concatenate([np.zeros(0, np.int32), *found]).astype(np.int32)
            parts.append(Documents(flat, offsets_of(lengths)))
        else:
            texts = corpus.columns(shard, ["text"])["text"].take(pa.array(rows)).to_pylist()
            read = reader(texts)
            parts.append(Documents(read.tokens, read.offsets))
    return Documents.join(parts)
