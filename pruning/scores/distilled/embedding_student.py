"""A student of stored embeddings: an expensive score, as a linear function of a document's vector.

    python -m pruning distill_embedding --gin_file=configs/score/distill_embedding.gin ...

FineWeb-Edu's classifier is a linear layer over a published embedder whose weights are not changed
(Penedo et al., arXiv 2406.17557). This stage fits such a layer to the scores of a teacher, or to a
column of the corpus, by ridge regression. One pass of the embedder serves any number of students.

Choices
- No document is scored by a layer that was fitted to it or to a copy of it: folds by content, as
  those of the n-gram student. Agreement with the teacher is measured on these scores, beside the
  agreement of length and of a random score.
- Ridge regression has a closed form in as many unknowns as a vector has components: a fit takes
  less than a second. Each fold's penalty is chosen on a held-out tenth of the other folds.
- The layer is stored with the scores and applied to embeddings of another corpus by
  `DistillEmbedding.model`.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.corpus.layout import rows_of, shards_of
from pruning.corpus.reader import Corpus, load_corpus
from pruning.scores import score_set
from pruning.scores.content import content_hashes
from pruning.scores.distilled import ridge
from pruning.scores.distilled.lessons import Lessons, agreement, beside
from pruning.scores.fitted import fit_once
from pruning.scores.score_set import Column
from pruning.scores.space.embeddings import Embeddings, of_length_one
from pruning.scores.space.same_model import require_same_model
from pruning.scores.terms import CORPUS, Term
from pruning.scores.text.folds import Folds
from pruning.scores.text.hashing import Features
from pruning.scores.text.texts import Texts
from pruning.store import late, progress
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream

NAME = "DistillEmbedding"
MODEL = "layer.npz"

COLUMNS = {"student": Column(pa.float32(), "the teacher's score, as predicted by the student")}


@dataclasses.dataclass(frozen=True)
class DistillEmbeddingConfig:
    """Settings of `distill_embedding`.

    Attributes:
      corpus: the corpus to score.
      embeddings: a score set of the corpus with a column of vectors.
      output: directory of the score set.
      teacher: a score set of the corpus, whose scored documents are the examples. None if `score`
        is a column of the corpus, or if a model is applied.
      score: the value to learn, named as for `select`.
      model: a score set of an earlier `distill_embedding`, whose layer is applied instead of
        training. Its embeddings must be of the same model.
      column: name of the column of embeddings.
      examples: largest number of the teacher's documents to train on.
      l2: weights of the penalty to choose from, in documents.
      folds: number of layers, each fitted without one part of the examples.
      seed: seed of the examples and the folds.
    """

    corpus: str
    embeddings: str
    output: str
    teacher: str | None = None
    score: str = "corpus:score"
    model: str | None = None
    column: str = "embedding"
    examples: int = 200_000
    l2: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    folds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 20 or not self.l2 or min(self.l2) <= 0 or self.folds < 2:
            raise ValueError("examples is at least 20, folds 2, and l2 holds positive numbers.")
        own = Term(self.score).source == CORPUS
        if self.model is not None:
            if self.teacher is not None:
                raise ValueError("model applies a fitted layer: remove teacher.")
        elif (self.teacher is None) != own:
            raise ValueError(
                "learn from a teacher, or from a column of the corpus (score=corpus:NAME)."
            )


CONFIGURABLES: dict[str, type] = {NAME: DistillEmbeddingConfig}


@late.stage
def run(config: DistillEmbeddingConfig) -> Artifact:
    """Make the score set, or resume an interrupted run.

    Raises:
      ArtifactError: inputs do not belong together, or too few documents have score and embedding.
      ConfigurationChanged: the output holds work of other settings.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artifact)
    inputs = {"embeddings": embeddings.artifact}
    identity: dict[str, Any] = {"column": config.column}
    summary: dict[str, Any]
    teacher = fitted = None
    if config.model is not None:
        fitted = load_artifact(config.model, score_set.KIND)
        if MODEL not in fitted.manifest.files:
            raise ArtifactError(f"{fitted.path} holds no {MODEL}: it is no student of embeddings.")
        inputs |= {"model": fitted}
    else:
        if config.teacher is not None:
            teacher = load_artifact(config.teacher, score_set.KIND)
            require_input(teacher, "corpus", corpus.artifact)
            inputs |= {"teacher": teacher}
        names = ("score", "examples", "l2", "folds", "seed")
        identity |= {name: getattr(config, name) for name in names}
    build = score_set.begin(config.output, identity, inputs, corpus, COLUMNS)
    if build.finished:
        return load_artifact(build.path, score_set.KIND)
    model_of = {name: embeddings.artifact.manifest.config.get(name) for name in ("model", "scorer")}
    if fitted is not None:
        known = fitted.manifest.summary["embeddings"]
        require_same_model(str(fitted.path), known, config.embeddings, model_of)
        content, summary = fitted.file(MODEL), {"fitted_by": fitted.digest}
    else:
        content, summary = fit_once(build, lambda: learn(config, corpus, embeddings, teacher))
    student = Layers.from_bytes(content)
    if (width := student.weights.shape[1]) != embeddings.width:
        raise ArtifactError(
            f"{config.model} was fitted to vectors of {width} components, {config.embeddings} has "
            f"{embeddings.width}: embed the corpus with the same model."
        )
    build.write_file(MODEL, content)
    with progress.track("score", corpus.num_shards, "shards") as task:
        for shard in build.pending():
            rows, vectors = vectors_of(embeddings, shard)
            ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            status = score_set.status_of(embeddings.artifact, shard, ids)
            values = np.zeros(len(ids))
            values[rows] = student(vectors, student.folds.of(hashes_of(corpus, shard, rows)))
            score_set.write(build, shard, corpus, COLUMNS, status, {"student": values})
            task.advance()
    summary |= {"embeddings": model_of}
    scores = score_set.finish(build, "distilled", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def vectors_of(embeddings: Embeddings, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the embedded documents of a shard: rows int64 [n], vectors float32 [n, width]."""
    found = list(embeddings.stored(shard))
    rows = np.concatenate([np.zeros(0, np.int64), *(part for part, _ in found)])
    empty = np.zeros((0, embeddings.width), np.float32)
    where = f"{embeddings.artifact.path}, shard {shard}, row"
    return rows, np.concatenate([empty, *(of_length_one(part, own, where) for own, part in found)])


def hashes_of(corpus: Corpus, shard: int, rows: np.ndarray) -> np.ndarray:
    """Return content hashes of some documents of a shard, int64 [rows]."""
    found = [content_hashes(batch) for batch in Texts(corpus).read(shard, rows, Features())]
    return np.concatenate([np.zeros(0, np.int64), *found])


def learn(
    config: DistillEmbeddingConfig,
    corpus: Corpus,
    embeddings: Embeddings,
    teacher: Artifact | None,
) -> tuple[Layers, dict]:
    """Return the layers of all folds, and their agreement with the teacher out of fold."""
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    shard_of, row_of = shards_of(lessons.ids), rows_of(lessons.ids)
    parts, hashes, kept, lengths = [], [], [], []
    for shard in range(corpus.num_shards):
        wanted = np.flatnonzero(shard_of == shard)
        rows, vectors = vectors_of(embeddings, shard)
        # An example without an embedding, such as one outside of `within`, is left out.
        wanted = wanted[np.isin(row_of[wanted], rows)]
        own = row_of[wanted]
        parts.append(vectors[np.searchsorted(rows, own)])
        hashes.append(hashes_of(corpus, shard, own))
        lengths.append(corpus.lengths_of(shard, own))
        kept.append(wanted)
    chosen = np.concatenate(kept)
    vectors, targets = np.concatenate(parts), lessons.targets[chosen]
    if len(targets) < 20:
        raise ArtifactError(
            f"{len(targets)} documents have a score to learn and an embedding: embed more of them."
        )
    folds = Folds(Stream.EMBEDDING_STUDENT_FOLD, config.seed, config.folds)
    contents, ids = np.concatenate(hashes), lessons.ids[chosen]
    fold = folds.of(contents)
    weights, biases, l2 = ridge.folded(
        vectors, targets, fold, folds, config.l2, contents, Stream.EMBEDDING_STUDENT_PENALTY
    )
    student = Layers(folds, weights, biases)
    return student, {
        "examples": len(targets),
        "l2": l2,
        "spearman_beside": beside(
            np.concatenate(lengths), ids, targets, Stream.EMBEDDING_STUDENT_BESIDE, config.seed
        ),
        **agreement(student(vectors, fold), targets),
    }


@dataclasses.dataclass(frozen=True)
class Layers:
    """A linear layer for each fold.

    Attributes:
      weights: float64 [folds, width].
      biases: float64 [folds].
    """

    folds: Folds
    weights: np.ndarray
    biases: np.ndarray

    def __call__(self, vectors: np.ndarray, fold: np.ndarray) -> np.ndarray:
        """Return the value of each vector under the layer of its fold, float64 [n]."""
        found = np.zeros(len(fold))
        for k in np.unique(fold):
            own = np.flatnonzero(fold == k)
            found[own] = vectors[own] @ self.weights[k].astype(vectors.dtype) + self.biases[k]
        return found

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        seed = np.array(self.folds.seed)
        np.savez(sink, seed=seed, weights=self.weights, biases=self.biases)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Layers:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            weights, biases, seed = file["weights"], file["biases"], int(file["seed"])
        return cls(Folds(Stream.EMBEDDING_STUDENT_FOLD, seed, len(weights)), weights, biases)
