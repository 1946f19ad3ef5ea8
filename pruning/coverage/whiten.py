"""Whitened embeddings: what all documents share is taken away, so that likeness tells them apart.

    python -m pruning whiten --gin_file=configs/score/whiten.gin --gin.CORPUS=...

The encoder of a model that was never trained to tell documents apart puts all of them into one
narrow cone: every cosine is close to 1, and what density, clusters and near twins go by are the
few directions in which everything varies. Here every vector loses the corpus's mean and is divided
by the standard deviation along each principal component, as Su et al. do with sentences ("Whitening
Sentence Representations", arXiv 2103.15316). Sentence-T5 embeddings do not need it.

Choices
- A score set with a column of vectors in, another one out: what reads the one reads the other.
- Mean and covariance are sums over documents, in float64: workers add theirs up, and the result
  does not depend on how many there are. They lie in the score set, as `whitening.npz`.
- Directions that hold no more than the rounding of the stored numbers are left out; `components`
  keeps the leading ones only.
- The mean alone is no option: on a tiny T5's embeddings of real text it moved the mean cosine from
  0.996 to 0.05, and found planted near-duplicates no better (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import io
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from pruning import artefact, derived, progress, randomness
from pruning.artefact import Artefact, ArtefactError
from pruning.corpus import Corpus, load_corpus
from pruning.coverage.embeddings import Embeddings, loads, local_mesh, workers_of
from pruning.parts import Parts
from pruning.scorers import Column

NAME = "Whiten"
WHITENING = "whitening.npz"  # float64 `mean` [width], `directions` [width, components], `variances`
COLUMN = "embedding"

_PARTS = 64
_CHOSEN = 36  # stream of the draws that choose the documents to learn from


@dataclasses.dataclass(frozen=True)
class WhitenConfig:
    """Settings of `whiten`.

    Attributes:
      corpus: the corpus.
      embeddings: a score set of it with a column of vectors.
      output: the score set's directory.
      column: of the embeddings.
      components: how many of the leading directions are kept; None for all that vary.
      documents: about so many, drawn by their ids, give mean and covariance; 0: all.
      seed: of that draw.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes that `jax.distributed` knows share them.
    """

    corpus: str
    embeddings: str
    output: str
    column: str = "embedding"
    components: int | None = None
    documents: int = 1_000_000
    seed: int = 0
    worker: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.components is not None and self.components < 1:
            raise ValueError("Whiten.components is at least 1, or None.")


CONFIGURABLES: dict[str, type] = {NAME: WhitenConfig}


def run(config: WhitenConfig) -> Artefact | None:
    """Makes the score set, or goes on with it.

    Returns:
      The score set; None while other workers' shards are missing.

    Raises:
      ArtefactError: corpus and embeddings do not belong together; the embeddings do not vary in so
        many directions.
      ConfigurationChanged: the output was begun with other settings.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artefact)
    number = _number(embeddings)
    width = embeddings.width if config.components is None else config.components
    columns = {
        COLUMN: Column(pa.list_(number, width), f"{config.column}, whitened, of length 1"),
    }
    names = ("column", "components", "documents", "seed")
    build = derived.begin(
        config.output,
        {name: getattr(config, name) for name in names},
        {"embeddings": embeddings.artefact},
        corpus,
        columns,
    )
    if build.finished:
        return artefact.load(build.path, "scores")
    worker, workers = workers_of(config.worker, config.workers)
    parts = Parts(build, "moments", min(embeddings.artefact.num_shards, _PARTS))
    with progress.track("mean and covariance", parts.count, "parts") as task:
        for part in parts.missing(worker, workers):
            parts.write(part, _moments(config, corpus, embeddings, part, parts.count).to_bytes())
            task.advance()
    parts.wait()
    moments = Moments.from_bytes(parts.read(0))
    for part in range(1, parts.count):
        moments += Moments.from_bytes(parts.read(part))
    mean, directions, variances = whitening(moments, number.to_pandas_dtype())
    if config.components is not None and config.components > len(variances):
        raise ArtefactError(
            f"{embeddings.artefact.path}: the embeddings of {moments.documents} documents vary in "
            f"{len(variances)} directions; ask for at most so many, not for {config.components} "
            "(Whiten.components)."
        )
    directions, variances = directions[:, :width], variances[:width]
    sink = io.BytesIO()
    np.savez(sink, mean=mean, directions=directions, variances=variances)
    build.write_file(WHITENING, sink.getvalue())

    mesh = local_mesh()
    factors = jnp.asarray(directions / np.sqrt(variances), jnp.float32)
    centre = jnp.asarray(mean, jnp.float32)
    with progress.track("whiten", embeddings.documents, "documents") as task:
        for shard in build.pending(worker, workers):
            started = time.perf_counter()
            doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            status = derived.status_of(embeddings.artefact, shard, doc_ids)
            vectors = np.zeros((len(doc_ids), width), number.to_pandas_dtype())
            for rows, tiles, _ in loads(embeddings.batches(shard), mesh):
                found = np.asarray(_whitened(tiles, centre, factors))
                found = found.reshape(-1, found.shape[-1])[: len(rows)]
                vectors[rows, : found.shape[1]] = found
                task.advance(len(rows))
            seconds = time.perf_counter() - started
            derived.write(build, shard, corpus, columns, status, {COLUMN: vectors}, seconds)
    return derived.finish(
        build,
        "whiten",
        columns,
        {
            "learned_from": moments.documents,
            "components": len(variances),
            "mean_length": round(float(np.linalg.norm(mean)), 6),
            "variance_of_first": round(float(variances[0] / variances.sum()), 6),
        },
    )


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over documents; those of two sets of documents add up.

    Attributes:
      documents: how many.
      total: float64 [width].
      outer: float64 [width, width], the sum of the vectors' outer products.
    """

    documents: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Moments:
        """Args: vectors: [n, width]."""
        # NOTE: float64, since the covariance of a narrow cone is a small difference of large sums.
        vectors = vectors.astype(np.float64)
        return cls(len(vectors), vectors.sum(axis=0), vectors.T @ vectors)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.documents + other.documents, self.total + other.total, self.outer + other.outer
        )

    def to_bytes(self) -> bytes:
        sink = io.BytesIO()
        np.savez(sink, documents=self.documents, total=self.total, outer=self.outer)
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Moments:
        with np.load(io.BytesIO(content)) as file:
            return cls(int(file["documents"]), file["total"], file["outer"])


def whitening(
    moments: Moments, stored: type[np.floating] = np.float64
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where documents vary, and how much.

    Args:
      moments: of vectors of length 1.
      stored: the number type that they were stored in.

    Returns:
      mean [width]; directions [width, components], orthonormal, those of the largest variance
      first; variances [components], each above what rounding to `stored` makes. float64.

    Raises:
      ArtefactError: nothing varies.
    """
    mean = moments.total / max(moments.documents, 1)
    covariance = moments.outer / max(moments.documents, 1) - np.outer(mean, mean)
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]
    # The components of a vector of length 1 are 1/sqrt(width) in size, and are off by at most half
    # a unit in the last place.
    rounding = float(np.finfo(stored).eps) ** 2 / 12 / len(mean)
    varies = variances > max(rounding, 1e-12 * max(variances[0], 0.0))
    if not varies.any():
        raise ArtefactError(
            f"the embeddings of {moments.documents} documents are all alike: there is nothing to "
            "tell documents apart by. Give the embeddings of another model."
        )
    return mean, directions[:, varies], variances[varies]


def _moments(
    config: WhitenConfig, corpus: Corpus, embeddings: Embeddings, part: int, parts: int
) -> Moments:
    """Of the chosen documents in the shards of a part."""
    share = config.documents / max(embeddings.documents, 1) if config.documents else 1.0
    moments = Moments.of(np.zeros((0, embeddings.width)))
    for shard in range(part, corpus.num_shards, parts):
        doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        for rows, vectors in embeddings.batches(shard):
            chosen = randomness.uniform(config.seed, doc_ids[rows], _CHOSEN) < share
            moments += Moments.of(vectors[chosen])
    return moments


@jax.jit
def _whitened(tiles: jax.Array, mean: jax.Array, factors: jax.Array) -> jax.Array:
    """float32 [tiles, TILE, width] -> [tiles, TILE, components], of length 1."""
    moved = jnp.matmul(tiles - mean, factors, precision=jax.lax.Precision.HIGHEST)
    length = jnp.linalg.norm(moved, axis=-1, keepdims=True)
    return moved / jnp.where(length > 0, length, 1.0)


def _number(embeddings: Embeddings) -> pa.DataType:
    """What the embeddings' numbers are stored as."""
    with embeddings.artefact.parquet(0) as file:
        return file.schema_arrow.field(embeddings.column).type.value_type
