"""k-means over stored embeddings: the cluster of each document and its similarity to the centroid.

    python -m pruning kmeans --gin_file=configs/score/kmeans.gin --gin.CORPUS=...

Two samplers use the columns. SSL prototypes (Sorscher et al. 2022, as used by Sachdeva et al.,
arXiv 2402.09668) drops the most prototypical documents first: the strategy Bottom over
column:centroid_similarity. SemDeDup compares documents within the clusters (semdedup.py).

Choices
- Training uses `points_per_cluster` documents for each cluster; their number is in the summary.
  They are drawn from row groups with eight times as many documents, themselves drawn from all. The
  amount read for training does not grow with the corpus, and a corpus sorted by domain is still
  sampled from most of its domains. All documents are then assigned in one pass.
- Training vectors are read once and stay on the devices up to `cached_gb`; larger sets are read in
  every iteration.
- One worker trains. The others wait for its centroids, and all divide the assignment by shards.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from models.terminal import say
from pruning.corpus.layout import doc_ids
from pruning.corpus.reader import load_corpus
from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.space import clusters, estimate, passes
from pruning.scores.space.clusters import Load
from pruning.scores.space.embeddings import Embeddings, loads, local_mesh
from pruning.scores.workers import require_worker, worker_of
from pruning.store import late, progress, randomness
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.intermediate import Parts
from pruning.store.randomness import Stream

NAME = "KMeans"
_SPREAD = 8  # ratio of documents in the row groups read to training documents
CENTROIDS = "centroids.npz"  # float32 `centroids` [clusters, width], and their history

COLUMNS = {
    "cluster": Column(pa.int32(), "the most similar centroid"),
    "centroid_similarity": Column(pa.float32(), "cosine to it; high is prototypical"),
}


@dataclasses.dataclass(frozen=True)
class KMeansConfig:
    """Settings of `kmeans`.

    Attributes:
      corpus: directory of the corpus.
      embeddings: a score set of the corpus with a column of vectors.
      output: directory of the score set.
      column: name of the column of embeddings.
      clusters: number of clusters k. The paper has 10,000 for C4.
      iterations: number of iterations of Lloyd's algorithm.
      points_per_cluster: training documents for each cluster; 0 trains on all documents.
      seed: seed of the training documents, of the first centroids and of splits.
      cached_gb: largest size of training vectors that stay on the devices.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes of `jax.distributed` divide them.
      dry_run: measure some documents and print the expected time, bytes of embeddings read and
        written, and memory.
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
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_worker(self.worker, self.workers)
        if self.cached_gb < 0:
            raise ValueError(f"cached_gb is 0 or more, not {self.cached_gb}.")
        if min(self.clusters, self.iterations) < 1 or self.points_per_cluster < 0:
            raise ValueError(
                "clusters and iterations are at least 1, points_per_cluster 0 or more."
            )


CONFIGURABLES: dict[str, type] = {NAME: KMeansConfig}


@late.stage
def run(config: KMeansConfig) -> Artifact | None:
    """Make the score set, or resume an interrupted run.

    Returns:
      The score set; None while other workers' shards are missing, and after a dry run.

    Raises:
      ArtifactError: corpus and embeddings do not belong together.
      ConfigurationChanged: the output holds work of other settings.
      TooFewVectors: there are fewer training documents than clusters.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artifact)
    if config.dry_run:
        sample = Sample.draw(config, embeddings)
        _, workers = worker_of(config.worker, config.workers)
        work = (config.clusters, config.iterations, sample.documents, sample.read)
        say(estimate.kmeans(embeddings, local_mesh(), *work, workers))
        return None
    names = ("column", "clusters", "iterations", "points_per_cluster", "seed")
    identity = {name: getattr(config, name) for name in names}
    build = score_set.begin(
        config.output, identity, {"embeddings": embeddings.artifact}, corpus, COLUMNS
    )
    if build.finished:
        return load_artifact(build.path, "scores")
    worker, workers = worker_of(config.worker, config.workers)
    mesh = local_mesh()
    trained = Parts(build, "centroids", 1)
    if trained.missing(worker, workers):
        trained.write(0, _train(config, embeddings, mesh))
    trained.wait()
    content = trained.read(0)
    with np.load(io.BytesIO(content)) as file:
        found = {name: file[name] for name in file.files}
    build.write_file(CENTROIDS, content)

    def assign(tiles: jax.Array) -> dict[str, jax.Array]:
        nearest, cosine = clusters.assign_tiles(found["centroids"], tiles, mesh)
        return {"cluster": nearest, "centroid_similarity": cosine}

    passes.score("assign", build, corpus, embeddings, COLUMNS, assign, mesh, worker, workers)
    return score_set.finish(
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


def _train(config: KMeansConfig, embeddings: Embeddings, mesh: Mesh) -> bytes:
    """Return the centroids and the history of their training, as an .npz file."""
    sample = Sample.draw(config, embeddings)
    where = f"{embeddings.artifact.path}, document"
    documents = 0

    def counted() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal documents
        for ids, vectors in sample.batches():
            documents += len(ids)
            yield ids, vectors

    if sample.gigabytes <= config.cached_gb:
        read = list(counted())
        first = clusters.first_centroids(read, config.clusters, config.seed)
        held = [(tiles, valid) for _, tiles, valid in loads(read, mesh, where)]
        del read

        def start() -> Iterable[Load]:
            return held

    else:
        first = clusters.first_centroids(counted(), config.clusters, config.seed)

        def start() -> Iterable[Load]:
            return ((tiles, valid) for _, tiles, valid in loads(sample.batches(), mesh, where))

    with progress.track("k-means", config.iterations, "iterations") as task:
        found = clusters.fit(
            start,
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
        training_documents=np.asarray(documents),
    )
    return sink.getvalue()


@dataclasses.dataclass(frozen=True)
class Sample:
    """The training documents: a share of the documents of some row groups.

    Attributes:
      embeddings: the embeddings they are drawn from.
      seed: seed of the draws.
      groups: shard -> its row groups that are read, ascending.
      share: share of their documents that is drawn.
      read: number of documents of these row groups.
      documents: approximate number of training documents.
    """

    embeddings: Embeddings
    seed: int
    groups: Mapping[int, Sequence[int]]
    share: float
    read: int
    documents: int

    @property
    def gigabytes(self) -> float:
        """Size of the training vectors in float32."""
        return self.documents * self.embeddings.width * 4e-9

    @classmethod
    def draw(cls, config: KMeansConfig, embeddings: Embeddings) -> Sample:
        """Draw row groups with `_SPREAD` times the wanted documents, all where there are fewer."""
        documents = max(embeddings.documents, 1)
        wanted = min(config.points_per_cluster * config.clusters or documents, documents)
        groups = embeddings.row_groups
        ids = doc_ids(*np.asarray([group[:2] for group in groups]).T)
        draws = randomness.uniform(Stream.KMEANS_GROUPS, config.seed, ids)
        order = np.argsort(draws, kind="stable")
        sizes = np.asarray([size for _, _, size in groups])
        read = np.searchsorted(np.cumsum(sizes[order]), _SPREAD * wanted) + 1
        chosen: dict[int, list[int]] = {}
        for place in np.sort(order[:read]).tolist():
            chosen.setdefault(groups[place][0], []).append(groups[place][1])
        # A share of the rows; rows without an embedding are left out on reading.
        rows = int(sizes[order[:read]].sum())
        share = min(wanted / documents * sizes.sum() / rows, 1.0)
        return cls(embeddings, config.seed, chosen, share, rows, wanted)

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield document ids, int64 [n], and their vectors as stored, [n, width]."""
        for shard, groups in self.groups.items():
            for rows, vectors in self.embeddings.stored(shard, groups):
                ids = doc_ids(shard, rows)
                draws = randomness.uniform(Stream.KMEANS_TRAINING, self.seed, ids)
                chosen = draws < self.share
                yield ids[chosen], vectors[chosen]
