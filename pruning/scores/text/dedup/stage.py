"""Detection of exact and near-duplicates of text.

    python -m pruning dedup --gin_file=configs/score/dedup.gin --gin.CORPUS=... --gin.OUTPUT=...

Every document belongs to a cluster of documents that are connected by equal texts or by similar
n-grams. `duplicate_rank` is 0 for the representative of a cluster, which is kept. A selection by
threshold of that column (configs/select/deduplicated.gin) is the corpus without duplicates, and
other selections are made within it.

Choices
- Other corpora can have precedence (`against`): corpora that are deduplicated already, or held-out
  sets. Their documents are kept, and duplicates of them have a rank of 1 or more.
- Connections are transitive: two documents may be connected by a third one. The probability that a
  similar pair is found is in minhash.py; with `min_jaccard` every connection has been compared.
- Texts are read in units of shards and sorted in buckets on disk (phases.py). Memory is bounded,
  and time grows with the number of documents. Only the clusters are computed in one
  process, with some 50 bytes for each document that has a duplicate.
- A killed run resumes with the files of units and buckets that are finished. Hosts share them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from models.terminal import say
from pruning.corpus.layout import doc_ids
from pruning.corpus.reader import Corpus
from pruning.scores import score_set
from pruning.scores.regroup import Regrouped
from pruning.scores.score_set import Column
from pruning.scores.terms import Combination, Term, read_scores
from pruning.scores.text.dedup import clusters, estimate, examples
from pruning.scores.text.dedup.clusters import Clusters
from pruning.scores.text.dedup.library import MOST_CORPORA, Library
from pruning.scores.text.dedup.minhash import MinHash
from pruning.scores.text.dedup.phases import Phases, buckets_for
from pruning.scores.text.dedup.share import Share
from pruning.scores.text.hashing import SCHEME
from pruning.scores.text.texts import Texts
from pruning.scores.workers import require_worker
from pruning.store import late, parallel, progress
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.manifest import config_of

NAME = "Dedup"
OWN = "corpus"

COLUMNS = {
    "duplicate_rank": Column(pa.int32(), "0: stays; else its place among those that repeat it"),
    "cluster_documents": Column(pa.int32(), "documents of its cluster, of all corpora"),
    "kept_doc_id": Column(pa.int64(), "the document of the cluster that stays, itself for rank 0"),
    "kept_corpus": Column(pa.int16(), "where that is: the corpus itself is 0, others count from 1"),
    "same_text": Column(pa.bool_(), "whether its text is that document's, byte for byte"),
}

_SIMILARITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class DedupConfig:
    """Settings of `dedup`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the score set.
      within: a selection of the corpus; other documents get the status "not_selected".
      against: name -> a corpus with precedence, whose documents are kept.
      against_within: name -> a selection of that corpus.
      near: find similar texts as well as equal ones.
      minhash: `@MinHash()`: n-grams and bands.
      min_jaccard: compare every pair of candidates, and connect those whose n-grams have at least
        this Jaccard similarity; None connects all candidates.
      keep: the document of a cluster that is kept: the "first", the "longest" in bytes, or the
        "highest" by `score`. Ties go to the first.
      scores, score: a score set and a value of it, named as for `select`; for "highest".
      examples: number of the largest clusters, and of others, that are written for inspection.
      memory_gb: memory of one process.
      workers: number of local processes; 0 for one per CPU.
      host, hosts: this host processes the parts whose index is `host` modulo `hosts`; all hosts
        write to one output.
      dry_run: measure a sample and print the expected time, disk space and memory.
    """

    corpus: str
    output: str
    within: str | None = None
    against: Mapping[str, str] = dataclasses.field(default_factory=dict)
    against_within: Mapping[str, str] = dataclasses.field(default_factory=dict)
    near: bool = True
    minhash: MinHash = dataclasses.field(default_factory=MinHash)
    min_jaccard: float | None = None
    keep: Literal["first", "longest", "highest"] = "first"
    scores: str | None = None
    score: str | None = None
    examples: int = 100
    memory_gb: float = 2.0
    workers: int = 0
    host: int = 0
    hosts: int = 1
    dry_run: bool = False

    def __post_init__(self) -> None:
        parallel.require_processes(self.workers)
        require_worker(self.host, self.hosts)
        if self.memory_gb <= 0:
            raise ValueError(f"memory_gb is positive, not {self.memory_gb}.")
        if self.min_jaccard is not None and not 0 < self.min_jaccard <= 1:
            raise ValueError(f"min_jaccard is above 0 and at most 1, not {self.min_jaccard}.")
        if self.keep not in ("first", "longest", "highest"):
            raise ValueError(f'keep is "first", "longest" or "highest", not {self.keep!r}.')
        if (self.keep == "highest") != (self.scores is not None and self.score is not None):
            raise ValueError('keep="highest" goes with both scores and score, and only then.')
        if unknown := sorted(set(self.against_within) - set(self.against)):
            raise ValueError(f"against_within names {unknown[0]!r}, against does not.")
        if OWN in self.against or len(self.against) >= MOST_CORPORA:
            raise ValueError(f"against takes {MOST_CORPORA - 1} names at most, not {OWN!r}.")
        if self.examples < 0:
            raise ValueError(f"examples is 0 or more, not {self.examples}.")


CONFIGURABLES: dict[str, type] = {NAME: DedupConfig, "MinHash": MinHash}


@late.stage
def run(config: DedupConfig) -> Artifact | None:
    """Make the score set, or resume an interrupted run.

    Returns:
      The score set; None while other hosts' shards are missing, and after a dry run.

    Raises:
      ArtifactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output holds work of other settings.
    """
    library = open_library(config)
    own = library.corpora[OWN]
    inputs: dict[str, Artifact] = {}
    for name, texts in library.corpora.items():
        inputs |= texts.inputs(OWN if name == OWN else f"against/{name}")
    if config.scores is not None:
        inputs["scores"] = load_artifact(config.scores, score_set.KIND)
        require_input(inputs["scores"], "corpus", own.corpus.artifact)
    minhash = config.minhash if config.near else None
    records = library.documents * (minhash.bands if minhash else 1)
    processes = (config.workers or parallel.available_cpus()) * config.hosts
    buckets = buckets_for(records, config.memory_gb, processes)
    if config.dry_run:
        say(estimate.lines(library, minhash, config.min_jaccard, buckets, processes))
        return None
    build = score_set.begin(config.output, _identity(config), inputs, own.corpus, COLUMNS)
    if build.finished:
        return load_artifact(build.path, score_set.KIND)
    phases = Phases(build, library, minhash, buckets, config.min_jaccard)
    phases.run(Share(config.host, config.hosts, config.workers))
    parts = {name: Parts(build, name, 1) for name in ("summary", "examples")}
    parts["outcome"] = Parts(build, "outcome", 1, beside=tuple(parts.values()))
    outcome = Regrouped(parts["outcome"], clusters.FOUND, own.corpus.num_shards)
    if parts["outcome"].missing(config.host, config.hosts):
        found = Clusters.find(phases, functools.partial(_values, config, inputs.get("scores")))
        summary = json.dumps(_summary(config, phases, found)).encode()
        parts["summary"].write(0, summary)
        parts["examples"].write(0, examples.to_parquet(found, config.examples))
        outcome.write(0, found.by_shard())  # last: its presence implies that of the other two
    parts["outcome"].wait()
    build.write_file(examples.FILE, parts["examples"].read(0))
    write = functools.partial(_write_shard, build, own, outcome)
    pending = build.pending(config.host, config.hosts)
    with progress.track("write", len(pending), "shards") as task:
        parallel.run_shards(write, pending, config.workers, lambda done, _: task.advance(done))
    return score_set.finish(build, "dedup", COLUMNS, json.loads(parts["summary"].read(0)))


def open_library(config: DedupConfig) -> Library:
    """Open the corpora, those with precedence in the order of their names."""
    first = {
        name: Texts.open(config.against[name], config.against_within.get(name))
        for name in sorted(config.against)
    }
    return Library(first | {OWN: Texts.open(config.corpus, config.within)})


def _identity(config: DedupConfig) -> dict[str, Any]:
    identity: dict[str, Any] = {"keep": config.keep, "examples": config.examples}
    if config.score is not None:
        identity["score"] = config.score
    if config.near:
        identity |= {
            "minhash": config_of(config.minhash),
            "min_jaccard": config.min_jaccard,
            "hashes": SCHEME,
        }
    return identity


def _summary(config: DedupConfig, phases: Phases, found: Clusters) -> dict[str, Any]:
    library = phases.library
    summary = {
        "keep": config.keep,
        "against": {name: k + 1 for k, name in enumerate(library.names[:-1])},
        "documents": {name: texts.documents for name, texts in library.corpora.items()},
        **phases.counts(),
        **found.counts(),
    }
    if config.near:
        summary["probability_of_a_pair"] = {
            str(s): round(config.minhash.probability(s), 4) for s in _SIMILARITIES
        }
    return summary


def _values(
    config: DedupConfig, scores: Artifact | None, corpus: Corpus, shard: int
) -> np.ndarray | None:
    """Return the values that rank a cluster, float64 [documents of the shard]; highest first."""
    if config.keep == "first":
        return None
    if config.keep == "longest":
        return corpus.columns(shard, ["n_bytes"])["n_bytes"].to_numpy().astype(np.float64)
    assert scores is not None and config.score is not None
    ids = doc_ids(shard, np.arange(corpus.documents(shard)))
    score = Combination((Term(config.score),))
    found = read_scores(score, corpus.artifact, {"scores": scores}, shard, ids)
    return np.where(np.isfinite(found.score), found.score, -np.inf)  # without a score: last


def _write_shard(
    build: Build, texts: Texts, outcome: Regrouped, shard: int, report: parallel.Report
) -> None:
    started = time.perf_counter()
    found = outcome.read(shard)
    status = score_set.status_within(texts.corpus, shard, texts.within)
    ids = doc_ids(shard, np.arange(len(status)))
    values = {
        "duplicate_rank": np.zeros(len(ids), np.int32),
        "cluster_documents": np.ones(len(ids), np.int32),
        "kept_doc_id": ids,
        "kept_corpus": np.zeros(len(ids), np.int16),
        "same_text": np.ones(len(ids), bool),
    }
    for name, column in values.items():
        column[found["row"]] = found[name]
    seconds = time.perf_counter() - started
    score_set.write(build, shard, texts.corpus, COLUMNS, status, values, seconds)
    report(1, len(ids))
