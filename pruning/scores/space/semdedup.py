"""SemDeDup: semantic near-duplicates within a cluster (Abbas et al. 2023).

    python -m pruning semdedup --gin_file=configs/score/semdedup.gin --gin.CORPUS=...

Within each cluster of a k-means score set the documents are ordered by priority. `twin_similarity`
is the largest cosine to an earlier document that may drop this one (twins.py has the rules). To
drop near-duplicates at epsilon, select the documents with twin_similarity <= 1 - epsilon; to meet a
budget, take the lowest. A larger epsilon drops more.

Choices
- By default one score set serves every epsilon and every budget. With `epsilon` it is exact for
  that value.
- The duplicate farthest from the centroid is kept, as in the authors' code by default. `keep` can
  choose the closest, a random one, or the best by another score set, such as Ask-LLM.
- The embeddings are read once and written once, ordered by groups of clusters that fit into
  `memory_gb`; each group is compared within its own records. Bytes grow with the number of
  documents, comparisons with the sizes of the clusters. Workers divide shards, then groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa

from models.terminal import say
from pruning.corpus.layout import rows_of, shards_of
from pruning.corpus.reader import Corpus, load_corpus
from pruning.scores import score_set
from pruning.scores.regroup import Regrouped
from pruning.scores.score_set import Column
from pruning.scores.space import estimate
from pruning.scores.space.embeddings import Embeddings, local_mesh, of_length_one
from pruning.scores.space.twins import NONE, twin_similarities
from pruning.scores.terms import Combination, Term, read_scores
from pruning.scores.workers import require_worker, worker_of
from pruning.store import late, progress, randomness
from pruning.store.artifact import Artifact, load_artifact, require_input, require_same_documents
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream

NAME = "SemDeDup"

_LOAD_ROWS = 1 << 17  # rows that a device compares at a time
_PARTS = 1024  # largest number of files of regrouped embeddings

COLUMNS = {
    "twin_similarity": Column(
        pa.float32(), "cosine to an earlier document of the cluster that acts; -1 without one"
    )
}


@dataclasses.dataclass(frozen=True)
class SemDeDupConfig:
    """Settings of `semdedup`.

    Attributes:
      corpus: directory of the corpus.
      embeddings: a score set of the corpus with a column of vectors.
      clusters: a k-means score set of the same embeddings.
      output: directory of the score set.
      column: name of the column of embeddings.
      keep: the duplicate that is kept: "farthest" from the centroid, as in the authors' code
        (`keep_hard`), "closest" to it, "random", or "highest" by `score`.
      scores, score: a score set and a value of it, named as for `select`; for "highest".
      chains: let dropped documents drop others, as the public code does.
      epsilon: make the score set exact for this epsilon; None for all of them.
      seed: seed of the random order, and of ties.
      memory_gb: size of the embeddings that are compared at a time, in float32; copies of them take
        about twice as much again.
      worker, workers: this process takes the groups and shards whose index is `worker` modulo
        `workers`. By default the processes of `jax.distributed` divide them.
      dry_run: measure some documents and print the expected time, bytes of embeddings read and
        written, and memory.
    """

    corpus: str
    embeddings: str
    clusters: str
    output: str
    column: str = "embedding"
    keep: Literal["closest", "farthest", "random", "highest"] = "farthest"
    scores: str | None = None
    score: str | None = None
    chains: bool = False
    epsilon: float | None = None
    seed: int = 0
    memory_gb: float = 8.0
    worker: int | None = None
    workers: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_worker(self.worker, self.workers)
        if self.memory_gb <= 0:
            raise ValueError(f"memory_gb is positive, not {self.memory_gb}.")
        if (self.keep == "highest") != (self.scores is not None and self.score is not None):
            raise ValueError('keep="highest" goes with both scores and score, and only then.')
        if self.chains and self.epsilon is not None:
            raise ValueError("with chains one score set is exact for every epsilon: set one.")
        if self.epsilon is not None and not 0 <= self.epsilon <= 2:
            raise ValueError(f"epsilon is 1 - cosine, from 0 to 2, not {self.epsilon}.")

    @property
    def rule(self) -> Literal["nested", "at", "any"]:
        """Rule of twins.py for the documents that may drop others."""
        return "any" if self.chains else "nested" if self.epsilon is None else "at"


CONFIGURABLES: dict[str, type] = {NAME: SemDeDupConfig}


@late.stage
def run(config: SemDeDupConfig) -> Artifact | None:
    """Make the score set, or resume an interrupted run.

    Returns:
      The score set; None while other workers' shards are missing, and after a dry run.

    Raises:
      ArtifactError: the inputs do not belong together, or a cluster exceeds the memory.
      ConfigurationChanged: the output holds work of other settings.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artifact)
    clustering = load_artifact(config.clusters, "scores")
    require_input(clustering, "embeddings", embeddings.artifact)
    inputs = {"embeddings": embeddings.artifact, "clusters": clustering}
    if config.scores is not None:
        inputs["scores"] = load_artifact(config.scores, "scores")
        require_input(inputs["scores"], "corpus", corpus.artifact)
    if config.dry_run:
        sizes = cluster_sizes(clustering)
        _, workers = worker_of(config.worker, config.workers)
        mesh = local_mesh()
        say(estimate.semdedup(embeddings, mesh, sizes, config.rule, config.memory_gb, workers))
        return None
    names = ("column", "keep", "score", "chains", "epsilon", "seed")
    identity = {name: getattr(config, name) for name in names}
    build = score_set.begin(config.output, identity, inputs, corpus, COLUMNS)
    if build.finished:
        return load_artifact(build.path, "scores")
    worker, workers = worker_of(config.worker, config.workers)
    twins = Twins(config, corpus, embeddings, clustering, inputs.get("scores"), build)
    found = twins.compare(worker, workers)
    for shard in build.pending(worker, workers):
        doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        status = score_set.status_of(clustering, shard, doc_ids)
        similarity = np.full(len(doc_ids), NONE, np.float32)
        records = found.read(shard % twins.parts)
        records = records[shards_of(records["doc_id"]) == shard]
        similarity[rows_of(records["doc_id"])] = records["twin_similarity"]
        score_set.write(build, shard, corpus, COLUMNS, status, {"twin_similarity": similarity})
    return score_set.finish(build, "semdedup", COLUMNS, {"rule": config.rule, "keep": config.keep})


_FOUND = np.dtype([("doc_id", np.int64), ("twin_similarity", np.float32)])


@dataclasses.dataclass(frozen=True)
class Twins:
    """Inputs of the comparison, opened and checked for consistency."""

    config: SemDeDupConfig
    corpus: Corpus
    embeddings: Embeddings
    clustering: Artifact
    scores: Artifact | None
    build: Build

    @property
    def parts(self) -> int:
        """Number of files of members; shard k is in file k modulo this."""
        return min(self.corpus.num_shards, _PARTS)

    def compare(self, worker: int, workers: int) -> Regrouped:
        """Compare the documents within every cluster.

        Returns:
          Records of `_FOUND`, in the buckets of the parts of their shards.
        """
        groups = self._groups()
        count = int(groups.max(initial=0)) + 1
        # The groups depend on the memory, and so do the names of their files.
        name = f"{count}-{int(self.config.memory_gb * 1e6)}"
        members = Regrouped(Parts(self.build, f"members-{name}", self.parts), self._member, count)
        with progress.track("regroup", self.embeddings.documents, "documents") as task:
            for part in members.parts.missing(worker, workers):
                members.write(part, self._members(groups, part, task))
        members.parts.wait()
        found = Regrouped(Parts(self.build, f"twins-{name}", count), _FOUND, self.parts)
        with progress.track("twins", self.embeddings.documents, "documents") as task:
            for group in found.parts.missing(worker, workers):
                records = self._compare_group(members.read(group))
                found.write(group, [(records, shards_of(records["doc_id"]) % self.parts)])
                task.advance(len(records))
        found.parts.wait()
        return found

    @property
    def _room(self) -> int:
        """Number of vectors that fit into the memory."""
        return int(self.config.memory_gb * 1e9 / (4 * self.embeddings.width))

    @property
    def _member(self) -> np.dtype:
        """dtype of the records that are regrouped."""
        vector = ("vector", self.embeddings.dtype, (self.embeddings.width,))
        return np.dtype([("doc_id", np.int64), ("cluster", np.int32), ("rank", np.float64), vector])

    def _groups(self) -> np.ndarray:
        """Return the group of every cluster, int64 [clusters]: runs that fit into memory."""
        sizes = cluster_sizes(self.clustering)
        room = self._room
        if sizes.max(initial=0) > room:
            raise ArtifactError(
                f"cluster {int(sizes.argmax())} has {int(sizes.max()):,} documents, memory_gb="
                f"{self.config.memory_gb} holds {room:,}: raise it, or make more clusters."
            )
        groups = np.zeros(len(sizes), np.int64)
        group = held = 0
        for cluster, size in enumerate(sizes.tolist()):
            if held + size > room:
                group, held = group + 1, 0
            groups[cluster] = group
            held += size
        return groups

    def _compare_group(self, members: np.ndarray) -> np.ndarray:
        """Return the similarities of the members of whole clusters, [n] of `_FOUND`."""
        ties = randomness.hashed(Stream.DUPLICATE_ORDER, self.config.seed, members["doc_id"])
        order = np.lexsort((ties, -members["rank"], members["cluster"]))
        cluster = members["cluster"][order]
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(cluster)) + 1, [len(cluster)]])
        where = f"{self.embeddings.artifact.path}, document"
        records = np.empty(len(members), _FOUND)
        records["doc_id"] = members["doc_id"][order]
        records["twin_similarity"] = twin_similarities(
            of_length_one(members["vector"][order], members["doc_id"][order], where),
            bounds,
            local_mesh(),
            self.config.rule,
            self.config.epsilon or 0.0,
            min(_LOAD_ROWS, max(self._room // 4, 1)),
        )
        return records

    def _members(
        self, groups: np.ndarray, part: int, task: progress.Task
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the documents of the shards of a part, and their groups."""
        for shard in range(part, self.corpus.num_shards, self.parts):
            doc_ids = self.corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            table = self.clustering.read(shard, ["doc_id", "cluster", "centroid_similarity"])
            where = f"{self.clustering.path}, shard {shard}"
            require_same_documents(doc_ids, table["doc_id"].to_numpy(), where)
            cluster = table["cluster"].fill_null(-1).to_numpy()
            rank = self._ranks(shard, doc_ids, table["centroid_similarity"].to_numpy())
            for rows, vectors in self.embeddings.stored(shard):
                inside = cluster[rows] >= 0
                rows = rows[inside]
                records = np.empty(len(rows), self._member)
                records["doc_id"] = doc_ids[rows]
                records["cluster"] = cluster[rows]
                records["rank"] = rank[rows]
                records["vector"] = vectors[inside]
                yield records, groups[cluster[rows]]
                task.advance(len(rows))

    def _ranks(self, shard: int, doc_ids: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """Return ranks, float64 [n]; the document with the highest rank has precedence."""
        if self.config.keep == "closest":
            return similarity.astype(np.float64)
        if self.config.keep == "farthest":
            return -similarity.astype(np.float64)
        if self.scores is None or self.config.score is None:
            return np.zeros(len(doc_ids))  # "random": ordered by tie-breaking
        score = read_scores(
            Combination((Term(self.config.score),)),
            self.corpus.artifact,
            {"scores": self.scores},
            shard,
            doc_ids,
        ).score
        return np.where(np.isfinite(score), score, -np.inf)  # without a score: last


def cluster_sizes(clustering: Artifact) -> np.ndarray:
    """Return the number of documents in each cluster, int64 [clusters]."""
    sizes = np.zeros(0, np.int64)
    for shard in range(clustering.num_shards):
        cluster = clustering.read(shard, ["cluster"])["cluster"].drop_null().to_numpy()
        counts = np.bincount(cluster, minlength=len(sizes))
        counts[: len(sizes)] += sizes
        sizes = counts
    return sizes
