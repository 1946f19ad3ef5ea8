"""SemDeDup: documents that have a near twin in their cluster (Abbas et al. 2023).

    python -m pruning semdedup --gin_file=configs/score/semdedup.gin --gin.CORPUS=...

Within each cluster of a k-means score set the documents stand in the order in which they are to be
kept, and `twin_similarity` is the cosine to an earlier one that acts (twins.py says which). To drop
near twins at epsilon, select the documents with twin_similarity <= 1 - epsilon; to meet a budget,
take the lowest. A larger epsilon drops more.

Choices
- By default one score set serves every epsilon and every budget. `epsilon` makes it exact for one.
- Which twin is kept the paper leaves open: the one closest to the centroid or farthest from it,
  either, or the better one by another score set, such as Ask-LLM.
- Clusters are read in groups that fit into `memory_gb`; each group is one reading of the
  embeddings. Workers share the groups: memory buys passes.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa

from pruning import artefact, derived, progress, randomness
from pruning.artefact import Artefact, ArtefactError, Build
from pruning.corpus import Corpus, load_corpus
from pruning.coverage.embeddings import Embeddings, local_mesh, workers_of
from pruning.coverage.twins import NONE, twin_similarities
from pruning.parts import Parts
from pruning.scorers import Column
from pruning.selection import scores as selection_scores
from pruning.selection.scores import Term

NAME = "SemDeDup"

COLUMNS = {
    "twin_similarity": Column(
        pa.float32(), "cosine to an earlier document of the cluster that acts; -1 without one"
    )
}

_ORDER = 33  # stream of the draws that break ties, and of the random order


@dataclasses.dataclass(frozen=True)
class SemDeDupConfig:
    """Settings of `semdedup`.

    Attributes:
      corpus: the corpus.
      embeddings: a score set of it with a column of vectors.
      clusters: a k-means score set of the same embeddings.
      output: the score set's directory.
      column: of the embeddings.
      keep: which of two twins: "closest" to the centroid, "farthest" from it, "random", or
        "highest", by `score`.
      scores, score: a score set and a value of it, named as for `select`; for "highest".
      chains: let documents that are dropped themselves drop others, as the public code does.
      epsilon: make the score set exact for this epsilon; None for all of them.
      seed: of the random order, and of ties.
      memory_gb: of the embeddings that are held at a time.
      worker, workers: this process takes the groups and shards whose index is `worker` modulo
        `workers`. By default the processes that `jax.distributed` knows share them.
    """

    corpus: str
    embeddings: str
    clusters: str
    output: str
    column: str = "embedding"
    keep: Literal["closest", "farthest", "random", "highest"] = "closest"
    scores: str | None = None
    score: str | None = None
    chains: bool = False
    epsilon: float | None = None
    seed: int = 0
    memory_gb: float = 8.0
    worker: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if (self.keep == "highest") != (self.scores is not None and self.score is not None):
            raise ValueError('keep="highest" goes with both scores and score, and only then.')
        if self.chains and self.epsilon is not None:
            raise ValueError("with chains one score set is exact for every epsilon: set one.")
        if self.epsilon is not None and not 0 <= self.epsilon <= 2:
            raise ValueError(f"epsilon is 1 - cosine, from 0 to 2, not {self.epsilon}.")

    @property
    def rule(self) -> Literal["nested", "at", "any"]:
        """Which earlier documents act: see twins.py."""
        return "any" if self.chains else "nested" if self.epsilon is None else "at"


CONFIGURABLES: dict[str, type] = {NAME: SemDeDupConfig}


def run(config: SemDeDupConfig) -> Artefact | None:
    """Makes the score set, or goes on with it.

    Returns:
      The score set; None while other workers' shards are missing.

    Raises:
      ArtefactError: the inputs do not belong together, or a cluster exceeds the memory.
      ConfigurationChanged: the output was begun with other settings.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artefact)
    clustering = artefact.load(config.clusters, "scores")
    artefact.require_input(clustering, "embeddings", embeddings.artefact)
    inputs = {"embeddings": embeddings.artefact, "clusters": clustering}
    if config.scores is not None:
        inputs["scores"] = artefact.load(config.scores, "scores")
        artefact.require_input(inputs["scores"], "corpus", corpus.artefact)
    names = ("column", "keep", "score", "chains", "epsilon", "seed")
    identity = {name: getattr(config, name) for name in names}
    build = derived.begin(config.output, identity, inputs, corpus, COLUMNS)
    if build.finished:
        return artefact.load(build.path, "scores")
    worker, workers = workers_of(config.worker, config.workers)
    twins = Twins(config, corpus, embeddings, clustering, inputs.get("scores"))
    parts = twins.compare(build, worker, workers)
    if pending := build.pending(worker, workers):
        found = _by_document([_unpack(parts.read(part)) for part in range(parts.count)])
        for shard in pending:
            doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            status = derived.status_of(clustering, shard, doc_ids)
            similarity = np.full(len(doc_ids), NONE, np.float32)
            begin, end = np.searchsorted(found["doc_id"], [shard << 32, (shard + 1) << 32])
            at = np.searchsorted(doc_ids, found["doc_id"][begin:end])
            similarity[at] = found["twin_similarity"][begin:end]
            derived.write(build, shard, corpus, COLUMNS, status, {"twin_similarity": similarity})
    return derived.finish(build, "semdedup", COLUMNS, {"rule": config.rule, "keep": config.keep})


@dataclasses.dataclass(frozen=True)
class Twins:
    """The inputs of the comparison, opened and found to belong together."""

    config: SemDeDupConfig
    corpus: Corpus
    embeddings: Embeddings
    clustering: Artefact
    scores: Artefact | None

    def compare(self, build: Build, worker: int, workers: int) -> Parts:
        """Compares the documents within every cluster; a part per group of clusters."""
        groups = self._groups()
        parts = Parts(build, "twins", int(groups.max(initial=0)) + 1)
        with progress.track("twins", parts.count, "groups of clusters") as task:
            for part in parts.missing(worker, workers):
                parts.write(part, self._compare_group(groups, part))
                task.advance()
        parts.wait()
        return parts

    def _groups(self) -> np.ndarray:
        """The group of every cluster, int64 [clusters]: runs that fit into memory."""
        sizes = np.zeros(0, np.int64)
        for shard in range(self.corpus.num_shards):
            cluster = self.clustering.read(shard, ["cluster"])["cluster"].drop_null().to_numpy()
            counts = np.bincount(cluster, minlength=len(sizes))
            counts[: len(sizes)] += sizes
            sizes = counts
        room = int(self.config.memory_gb * 1e9 / (4 * self.embeddings.width))  # vectors
        if sizes.max(initial=0) > room:
            raise ArtefactError(
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

    def _compare_group(self, groups: np.ndarray, group: int) -> bytes:
        found = [self._members(shard, groups, group) for shard in range(self.corpus.num_shards)]
        joined = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        ties = randomness.hashed(self.config.seed, joined["doc_id"], _ORDER)
        order = np.lexsort((ties, -joined["rank"], joined["cluster"]))
        cluster = joined["cluster"][order]
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(cluster)) + 1, [len(cluster)]])
        values = twin_similarities(
            joined["vectors"][order],
            bounds,
            local_mesh(),
            self.config.rule,
            self.config.epsilon or 0.0,
        )
        sink = io.BytesIO()
        np.savez(sink, doc_id=joined["doc_id"][order], twin_similarity=values)
        return sink.getvalue()

    def _members(self, shard: int, groups: np.ndarray, group: int) -> dict[str, np.ndarray]:
        """The documents of a shard that belong to a group: ids, clusters, ranks, vectors."""
        doc_ids = self.corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        table = self.clustering.read(shard, ["doc_id", "cluster", "centroid_similarity"])
        where = f"{self.clustering.path}, shard {shard}"
        artefact.require_same_documents(doc_ids, table["doc_id"].to_numpy(), where)
        cluster = table["cluster"].fill_null(-1).to_numpy()
        mine = (cluster >= 0) & (groups[cluster] == group)
        rank = self._ranks(shard, doc_ids, table["centroid_similarity"].to_numpy())
        parts = []
        for rows, vectors in self.embeddings.batches(shard):
            inside = mine[rows]
            rows = rows[inside]
            parts.append((doc_ids[rows], cluster[rows], rank[rows], vectors[inside]))
        nothing = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0))
        parts.append((*nothing, np.zeros((0, self.embeddings.width), np.float32)))
        names = ("doc_id", "cluster", "rank", "vectors")
        return {
            name: np.concatenate(column)
            for name, column in zip(names, zip(*parts, strict=True), strict=True)
        }

    def _ranks(self, shard: int, doc_ids: np.ndarray, similarity: np.ndarray) -> np.ndarray:
        """Who is to be kept first has the highest rank, float64 [n]."""
        if self.config.keep == "closest":
            return similarity.astype(np.float64)
        if self.config.keep == "farthest":
            return -similarity.astype(np.float64)
        if self.scores is None or self.config.score is None:
            return np.zeros(len(doc_ids))  # "random": ties decide
        terms = (Term(self.config.score),)
        score = selection_scores.read(terms, {"scores": self.scores}, shard, doc_ids).score
        return np.where(np.isfinite(score), score, -np.inf)  # without a score: last


def _unpack(content: bytes) -> Mapping[str, np.ndarray]:
    with np.load(io.BytesIO(content)) as file:
        return {name: file[name] for name in file.files}


def _by_document(parts: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All parts joined, in the order of document ids: 12 bytes a document."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["doc_id"], kind="stable")
    return {name: values[order] for name, values in joined.items()}
