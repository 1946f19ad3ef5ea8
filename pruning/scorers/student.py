"""A T5 encoder as the student of a costly scorer: the mean of its outputs, and one number of it.

    python -m pruning distill_encoder --gin_file=configs/score/distill_encoder.gin ...
    python -m pruning score --gin_file=configs/score/student.gin --gin.MODEL=runs/student ...

The first command teaches an encoder, begun from any T5's weights, the scores that a teacher gave to
a part of the corpus; it leaves a model like any other. The second scores everything with it. What
is learned, held out and reported is as in distilled.py, which does the same with n-grams.

Choices
- The model is a Sentence-T5 of one dimension: encoder, mean over the tokens, projection to a
  number. Nothing new is needed to save, load, shard or pack it.
- There is no bias, as Sentence-T5 has none: the student's score is the teacher's less its mean,
  which no ranking can tell.
- Teaching is some thousand steps on rows of one length: a loop of its own, next to which the
  trainer, made for restarts and months, would be the longer text.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pruning import artefact, progress, randomness
from pruning.artefact import Artefact, Build
from pruning.scorers import Column, Documents, Prepared, ScoreError, Scores
from pruning.scorers.embedding import Embedding
from pruning.scoring.packing import Windows

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.corpus import Corpus
    from pruning.scorers.distilled import Lessons
    from pruning.vocabulary import Vocabulary

NAME = "DistillEncoder"
KIND = "student"

COLUMN = Column(pa.float32(), "the teacher's score, less its mean, as the student predicts it")
_SCHEMA = pa.schema([("doc_id", pa.int64()), ("teacher", pa.float32()), ("student", pa.float32())])


@dataclasses.dataclass(frozen=True)
class Student:
    """Settings of the scorer.

    Attributes:
      max_tokens: of the document and EOS together; longer documents are cut. As in teaching.
    """

    max_tokens: int = 256

    def prepare(self, model: Model, vocabulary: Vocabulary) -> Prepared:
        """Raises ScoreError where the model was not taught by `distill_encoder`."""
        if getattr(model.config, "sentence_head", None) != 1:
            raise ScoreError(
                "this model gives no single number: teach one with `python -m pruning "
                "distill_encoder`."
            )
        embedding = Embedding(self.max_tokens).prepare(model, vocabulary)

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return model.bind(params).pool(
                batch["encoder_input_tokens"],
                batch["encoder_segment_ids"],
                max_segments=batch["embedding_segment_ids"].shape[1],
            )

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            student = np.full(len(documents), np.nan, np.float32)
            student[windows.document] = answers[:, 0]
            cut = np.maximum(documents.lengths - (self.max_tokens - 1), 0).astype(np.int32)
            return Scores({"student": student, "truncated_tokens": cut})

        return dataclasses.replace(
            embedding,
            name="student",
            columns={"student": COLUMN, "truncated_tokens": embedding.columns["truncated_tokens"]},
            step=step,
            finish=finish,
            summary={},
        )


# --------------------------------------------------------------------------------------------------
# Teaching


@dataclasses.dataclass(frozen=True)
class DistillEncoderConfig:
    """Settings of `distill_encoder`.

    Attributes:
      corpus: the corpus.
      teacher: a score set of it; the documents that have a score there are learned from.
      model: weights of a T5 to begin with, as for `score`.
      output: the student's directory, a model.
      score: what is learned, named as for `select`.
      examples: at most as many of the teacher's documents.
      max_tokens: of a document and EOS together; longer documents are cut.
      steps: of training.
      batch_size: documents of a step, over all devices.
      learning_rate: of Adam, at its peak; it rises over a twentieth of the steps, then falls to 0.
      seed: of the examples, their order and the projection.
      dtype: of the computation; parameters are float32.
    """

    corpus: str
    teacher: str
    model: str
    output: str
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


def run(config: DistillEncoderConfig) -> Artefact:
    """Teaches an encoder.

    Raises:
      ArtefactError: corpus and teacher do not belong together, or the teacher has no scores.
      VocabularyError: the model was not made for the corpus's vocabulary.
      ScoreError: the model has no encoder.
    """
    from models import checkpoints, weights
    from pruning.corpus import load_corpus
    from pruning.scorers.distilled import Lessons, agreement
    from pruning.scoring.engine import require_vocabulary

    corpus = load_corpus(config.corpus)
    teacher = artefact.load(config.teacher, "scores")
    artefact.require_input(teacher, "corpus", corpus.artefact)
    model, params = weights.load(config.model)
    if model.config.family != "t5":
        raise ScoreError(f"{config.model} has no encoder: give a T5.")
    require_vocabulary(config.model, model.config, corpus.vocabulary)
    settings = {k: v for k, v in artefact.config_of(config).items() if k not in _PLACES}
    settings["model"] = f"{checkpoints.fingerprints({'params': params})['params']:08x}"
    inputs = {"corpus": corpus.artefact, "teacher": teacher}
    build = Build(config.output, KIND, settings, inputs, 1, _SCHEMA)
    if build.finished:
        return artefact.load(build.path, KIND)
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    started = time.perf_counter()
    pupil = Pupil(config, model, params, corpus, lessons)
    pupil.learn()
    found = pupil.predict(np.flatnonzero(lessons.held_out))
    truth = lessons.targets[lessons.held_out]
    with build.shard(0) as writer:
        ids = lessons.ids[lessons.held_out]
        writer.write({"doc_id": ids, "teacher": truth, "student": found})
        writer.measured = {"seconds": time.perf_counter() - started}
    weights.save(build.path, pupil.model, pupil.params)
    if corpus.vocabulary.kind == "sentencepiece":
        build.write_file("vocabulary.model", corpus.vocabulary.model)
    known = {"examples": int((~lessons.held_out).sum())}
    student = build.finish(known | dict(agreement(found, truth)))
    assert student is not None  # it has one shard
    return student


_PLACES = ("class", "corpus", "teacher", "output")


class Pupil:
    """An encoder that learns.

    Attributes:
      model, params: the student; after `learn`, in the teacher's units.
    """

    def __init__(
        self,
        config: DistillEncoderConfig,
        model: Model,
        params: Any,
        corpus: Corpus,
        lessons: Lessons,
    ):
        import jax

        from models import partitioning

        self.config = config
        self.mesh = partitioning.make_mesh({"data": -1}, devices=jax.local_devices())
        self.model, params = _begin(config, model, params)
        self.params = jax.device_put(params, partitioning.replicated(self.mesh))
        self._inputs = _inputs(config, self.model.config, corpus, lessons)
        self._targets = lessons.targets
        self._to_learn = np.flatnonzero(~lessons.held_out)
        sharding = partitioning.batch_sharding(self.mesh)
        self._put = lambda rows: jax.device_put(rows, sharding)
        self._predict = jax.jit(
            lambda params, tokens: self.model.bind(params).pool(tokens)[:, 0, 0]
        )

    def learn(self) -> None:
        """All steps; least squares on scores of mean 0 and variance 1."""
        import jax
        import jax.numpy as jnp
        import optax

        from models.optimizers import WarmupLinear

        config = self.config
        known = self._targets[self._to_learn]
        mean, spread = known.mean(), known.std() or 1.0
        schedule = WarmupLinear(config.learning_rate, config.steps, config.steps // 20)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

        @jax.jit
        def step(params, state, tokens, targets):
            def loss_of(params):
                return jnp.mean(jnp.square(self._predict(params, tokens) - targets))

            loss, gradient = jax.value_and_grad(loss_of)(params)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, loss

        params, state = self.params, optimizer.init(self.params)
        with progress.track("teach", config.steps, "steps") as task:
            for rows in self._batches():
                targets = ((self._targets[rows] - mean) / spread).astype(np.float32)
                tokens = self._put(self._inputs[rows])
                params, state, loss = step(params, state, tokens, self._put(targets))
                task.advance(loss=float(loss))
        kernel = params["projection_layer"]["kernel"] * spread
        self.params = params | {"projection_layer": {"kernel": kernel}}

    def predict(self, documents: np.ndarray) -> np.ndarray:
        """float32 [n], of some of the lessons' documents."""
        found = [np.zeros(0, np.float32)]
        size = self._batch_size
        for begin in range(0, len(documents), size):
            rows = documents[begin : begin + size]
            tokens = np.zeros((size, self.config.max_tokens), np.int32)
            tokens[: len(rows)] = self._inputs[rows]
            found.append(np.asarray(self._predict(self.params, self._put(tokens)))[: len(rows)])
        return np.concatenate(found)

    @property
    def _batch_size(self) -> int:
        return -(-self.config.batch_size // self.mesh.size) * self.mesh.size

    def _batches(self) -> Iterator[np.ndarray]:
        """Rows of each step, epoch after epoch in a new order."""
        size, count = self._batch_size, len(self._to_learn)
        for index in range(self.config.steps):
            places = np.arange(index * size, (index + 1) * size)
            order = [
                randomness.generator(self.config.seed, int(epoch)).permutation(count)
                for epoch in range(places[0] // count, places[-1] // count + 1)
            ]
            yield self._to_learn[np.concatenate(order)[places - places[0] // count * count]]


def _begin(config: DistillEncoderConfig, given: Model, params: Any) -> tuple[Model, Any]:
    """The encoder of the given model, under a new projection to one number."""
    import jax

    from models.model import Model

    changes = {"num_decoder_layers": 0, "sentence_head": 1, "dtype": config.dtype}
    model = Model(dataclasses.replace(given.config, **changes))
    fresh = jax.jit(model.init)(jax.random.key(config.seed))
    kept = {name: params[name] for name in ("token_embedder", "encoder")}
    return model, fresh | kept


def _inputs(
    config: DistillEncoderConfig, model_config: Any, corpus: Corpus, lessons: Lessons
) -> np.ndarray:
    """Tokens and EOS of every document, int32 [documents, max_tokens]; 0 is padding."""
    rows = np.zeros((len(lessons.targets), config.max_tokens), np.int32)
    place = 0
    for shard, wanted in enumerate(lessons.rows):
        for tokens in corpus.tokens_of(shard, wanted):
            kept = tokens[: config.max_tokens - 1]
            rows[place, : len(kept)] = kept
            rows[place, len(kept)] = model_config.eos_id
            place += 1
    return rows
