"""Whitening of embeddings: normalization of the mean and the principal components of a corpus.

    python -m pruning whiten --gin_file=configs/score/whiten.gin --gin.CORPUS=...

The embeddings of an encoder without contrastive training lie in a narrow cone: every cosine is
close to 1, and density, clusters and near-duplicates depend on a few directions of large variance.
This stage subtracts the corpus's mean from every vector and divides by the standard deviation along
each principal component, as Su et al. do with sentences ("Whitening Sentence Representations",
arXiv 2103.15316). Sentence-T5 embeddings do not need it.

Choices
- Input and output are score sets with a column of vectors, so all readers of embeddings take both.
- Mean and covariance are sums over documents in float64, added over workers. The result does not
  depend on the number of workers. The score set holds them as `whitening.npz`.
- Directions whose variance is within the rounding error of the stored numbers are left out;
  `components` keeps the leading ones only.
- Subtracting the mean alone is not offered: on a tiny T5's embeddings of real text it changed the
  mean cosine from 0.996 to 0.05, but found planted near-duplicates no better (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from pruning.corpus.reader import Corpus, load_corpus
from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.space import passes
from pruning.scores.space.embeddings import Embeddings, local_mesh, of_length_one
from pruning.scores.workers import require_worker, worker_of
from pruning.store import late, progress, randomness
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.intermediate import Parts
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream

NAME = "Whiten"
WHITENING = "whitening.npz"  # float64 `mean` [width], `directions` [width, components], `variances`
COLUMN = "embedding"

_PARTS = 64


@dataclasses.dataclass(frozen=True)
class WhitenConfig:
    """Settings of `whiten`.

    Attributes:
      corpus: directory of the corpus.
      embeddings: a score set of the corpus with a column of vectors.
      output: directory of the score set.
      column: name of the column of embeddings.
      components: number of leading directions that are kept; None for all that vary.
      documents: approximate number of documents, drawn by their ids, from which mean and covariance
        are computed; 0 for all.
      seed: seed of that draw.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes of `jax.distributed` divide them.
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
        require_worker(self.worker, self.workers)
        if self.documents < 0:
            raise ValueError(f"documents is 0, for all, or positive: not {self.documents}.")
        if self.components is not None and self.components < 1:
            raise ValueError("Whiten.components is at least 1, or None.")


CONFIGURABLES: dict[str, type] = {NAME: WhitenConfig}


@late.stage
def run(config: WhitenConfig) -> Artifact | None:
    """Make the score set, or resume an interrupted run.

    Returns:
      The score set; None while other workers' shards are missing.

    Raises:
      ArtifactError: corpus and embeddings do not belong together; the embeddings vary in fewer than
        `components` directions.
      ConfigurationChanged: the output holds work of other settings.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artifact)
    number = pa.from_numpy_dtype(embeddings.dtype)
    width = embeddings.width if config.components is None else config.components
    columns = {
        COLUMN: Column(pa.list_(number, width), f"{config.column}, whitened, of length 1"),
    }
    names = ("column", "components", "documents", "seed")
    build = score_set.begin(
        config.output,
        {name: getattr(config, name) for name in names},
        {"embeddings": embeddings.artifact},
        corpus,
        columns,
    )
    if build.finished:
        return load_artifact(build.path, "scores")
    worker, workers = worker_of(config.worker, config.workers)
    parts = Parts(build, "moments", min(embeddings.artifact.num_shards, _PARTS))
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
        raise ArtifactError(
            f"{embeddings.artifact.path}: the embeddings of {moments.documents} documents vary in "
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

    def whitened(tiles: jax.Array) -> dict[str, jax.Array]:
        return {COLUMN: _whitened(tiles, centre, factors)}

    passes.score("whiten", build, corpus, embeddings, columns, whitened, mesh, worker, workers)
    return score_set.finish(
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
    """Sums over documents; those of two sets of documents can be added.

    Attributes:
      documents: number of documents.
      total: float64 [width].
      outer: float64 [width, width], the sum of the vectors' outer products.
    """

    documents: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray) -> Moments:
        """Return the moments of vectors [n, width]."""
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
    """Return the directions in which documents vary, and their variances.

    Args:
      moments: moments of vectors of length 1.
      stored: number type in which they were stored.

    Returns:
      mean [width]; directions [width, components], orthonormal, in the order of descending
      variance; variances [components], each above that of rounding to `stored`. float64.

    Raises:
      ArtifactError: the vectors do not vary.
    """
    mean = moments.total / max(moments.documents, 1)
    covariance = moments.outer / max(moments.documents, 1) - np.outer(mean, mean)
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]
    # The components of a vector of length 1 are about 1/sqrt(width), with a rounding error of at
    # most half a unit in the last place.
    rounding = float(np.finfo(stored).eps) ** 2 / 12 / len(mean)
    varies = variances > max(rounding, 1e-12 * max(variances[0], 0.0))
    if not varies.any():
        raise ArtifactError(
            f"the embeddings of {moments.documents} documents are all alike: there is nothing to "
            "tell documents apart by. Give the embeddings of another model."
        )
    return mean, directions[:, varies], variances[varies]


def _moments(
    config: WhitenConfig, corpus: Corpus, embeddings: Embeddings, part: int, parts: int
) -> Moments:
    """Return the moments of the chosen documents in the shards of a part."""
    share = config.documents / max(embeddings.documents, 1) if config.documents else 1.0
    moments = Moments.of(np.zeros((0, embeddings.width)))
    for shard in range(part, corpus.num_shards, parts):
        doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        for rows, vectors in embeddings.stored(shard):
            chosen = randomness.uniform(Stream.WHITENING_SAMPLE, config.seed, doc_ids[rows]) < share
            where = f"{embeddings.artifact.path}, shard {shard}, row"
            moments += Moments.of(of_length_one(vectors[chosen], rows[chosen], where))
    return moments


@jax.jit
def _whitened(tiles: jax.Array, mean: jax.Array, factors: jax.Array) -> jax.Array:
    """Return whitened tiles, float32 [tiles, TILE, width] -> [tiles, TILE, components]."""
    moved = jnp.matmul(tiles - mean, factors, precision=jax.lax.Precision.HIGHEST)
    length = jnp.linalg.norm(moved, axis=-1, keepdims=True)
    return moved / jnp.where(length > 0, length, 1.0)
