"""k-means over stored embeddings: every document's cluster, and how typical of it the document is.

    python -m pruning kmeans --gin_file=configs/score/kmeans.gin --gin.CORPUS=...

The columns serve two samplers. SSL prototypes (Sorscher et al. 2022, as Sachdeva et al., arXiv
2402.09668, use it) lets the most prototypical documents go first: Bottom over
column:centroid_similarity, and there is nothing more to it. SemDeDup looks for twins within the
clusters (semdedup.py).

Choices
- Trained on a stated part: the documents whose hashes come first, `points_per_cluster` for each
  cluster; how many they were stands in the summary. All documents are then assigned.
- Training vectors up to `cached_gb` stay on the devices; more are read again in every iteration.
- One worker trains, the others wait for its centroids and share the assignment by shards.
"""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from pruning import artefact, derived, progress, randomness
from pruning.artefact import Artefact
from pruning.corpus import Corpus, load_corpus
from pruning.coverage import clusters
from pruning.coverage.clusters import Load
from pruning.coverage.embeddings import Embeddings, loads, local_mesh, workers_of
from pruning.parts import Parts
from pruning.scorers import Column

NAME = "KMeans"
CENTROIDS = "centroids.npz"  # float32 `centroids` [clusters, width], and how they were found

COLUMNS = {
    "cluster": Column(pa.int32(), "the most similar centroid"),
    "centroid_similarity": Column(pa.float32(), "cosine to it; high is prototypical"),
}

_TRAINING = 32  # stream of the draws that choose training documents


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """Settings of `kmeans`.

    Attributes:
      corpus: the corpus.
      embeddings: a score set of it with a column of vectors.
      output: the score set's directory.
      column: of the embeddings.
      clusters: k. The paper has 10,000 for C4.
      iterations: of Lloyd's algorithm.
      points_per_cluster: training documents for each cluster; 0 trains on all documents.
      seed: of the training documents, of the first centroids and of splits.
      cached_gb: training vectors that stay on the devices.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes that `jax.distributed` knows share them.
    """

    corpus: str
    embeddings: str
    output: str
    column: str = "embedding"
    clusters: int = 10_000
    iterations: int = 25
    points_per_cluster: int = 256
    seed: int = 0
    cached_gb: float = 8.0
    worker: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if min(self.clusters, self.iterations) < 1 or self.points_per_cluster < 0:
            raise ValueError(
                "clusters and iterations are at least 1, points_per_cluster 0 or more."
            )


CONFIGURABLES: dict[str, type] = {NAME: KMeansConfig}


def run(config: KMeansConfig) -> Artefact | None:
    """Makes the score set, or goes on with it.

    Returns:
      The score set; None while other workers' shards are missing.

    Raises:
      ArtefactError: corpus and embeddings do not belong together.
      ConfigurationChanged: the output was begun with other settings.
      TooFewVectors: there are fewer training documents than clusters.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artefact)
    names = ("column", "clusters", "iterations", "points_per_cluster", "seed")
    identity = {name: getattr(config, name) for name in names}
    build = derived.begin(
        config.output, identity, {"embeddings": embeddings.artefact}, corpus, COLUMNS
    )
    if build.finished:
        return artefact.load(build.path, "scores")
    worker, workers = workers_of(config.worker, config.workers)
    mesh = local_mesh()
    trained = Parts(build, "centroids", 1)
    if trained.missing(worker, workers):
        trained.write(0, _train(config, corpus, embeddings, mesh))
    trained.wait()
    content = trained.read(0)
    with np.load(io.BytesIO(content)) as file:
        found = {name: file[name] for name in file.files}
    build.write_file(CENTROIDS, content)

    with progress.track("assign", embeddings.documents, "documents") as task:
        for shard in build.pending(worker, workers):
            started = time.perf_counter()
            doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            status = derived.status_of(embeddings.artefact, shard, doc_ids)
            cluster = np.zeros(len(doc_ids), np.int32)
            similarity = np.zeros(len(doc_ids), np.float32)
            for rows, tiles, _ in loads(embeddings.batches(shard), mesh):
                nearest, cosine = clusters.assign_tiles(found["centroids"], tiles, mesh)
                cluster[rows] = np.asarray(nearest).reshape(-1)[: len(rows)]
                similarity[rows] = np.asarray(cosine).reshape(-1)[: len(rows)]
                task.advance(len(rows))
            values = {"cluster": cluster, "centroid_similarity": similarity}
            seconds = time.perf_counter() - started
            derived.write(build, shard, corpus, COLUMNS, status, values, seconds)
    return derived.finish(
        build,
        "kmeans",
        COLUMNS,
        {
            "clusters": config.clusters,
            "training_documents": int(found["training_documents"]),
            "objective": [round(float(value), 6) for value in found["objective"]],
            "splits": int(found["splits"]),
        },
    )


def _train(config: KMeansConfig, corpus: Corpus, embeddings: Embeddings, mesh: Mesh) -> bytes:
    """Centroids and how they were found, as an .npz file."""
    documents = embeddings.documents
    wanted = config.points_per_cluster * config.clusters or documents
    # Exactly so many as the hashes give: the part is a function of seed and documents alone.
    share = min(wanted / max(documents, 1), 1.0)

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for shard in range(corpus.num_shards):
            doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            for rows, vectors in embeddings.batches(shard):
                ids = doc_ids[rows]
                chosen = randomness.uniform(config.seed, ids, _TRAINING) < share
                yield ids[chosen], vectors[chosen]

    first = clusters.first_centroids(batches(), config.clusters, config.seed)
    passes = _passes(batches, mesh, config.cached_gb * 1e9 >= share * documents * first[0].nbytes)
    with progress.track("k-means", config.iterations, "iterations") as task:
        found = clusters.fit(
            passes,
            first,
            config.iterations,
            mesh,
            config.seed,
            lambda iteration, objective: task.advance(mean_cosine=objective),
        )
    sink = io.BytesIO()
    np.savez(
        sink,
        centroids=found.centroids,
        objective=np.asarray(found.objective),
        splits=np.asarray(found.splits),
        training_documents=np.asarray(sum(len(ids) for ids, _ in batches())),
    )
    return sink.getvalue()


def _passes(
    batches: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]], mesh: Mesh, cached: bool
) -> Callable[[], Iterable[Load]]:
    """Starts passes over the training vectors, which stay on the devices if `cached`."""

    def start() -> Iterator[Load]:
        return ((tiles, valid) for _, tiles, valid in loads(batches(), mesh))

    if not cached:
        return start
    held = list(start())
    return lambda: held
