"""Density of the neighborhood of each document, for samples that cover a corpus evenly.

    python -m pruning density --gin_file=configs/score/density.gin --gin.CORPUS=...

The stage takes two passes over stored embeddings: the first counts documents into a sketch
(race.py), the second looks up every document in it. The score set's `density` is the estimated mean
kernel to all documents. Sampling with probability proportional to 1 / density, as Sachdeva et al.
do (arXiv 2402.09668, section 3.3), is the strategy InversePropensity over column:density.

Choices
- The sketch is stored in the score set, with its hashes. A later run over more documents can add it
  to its own (`add`); its densities are then those of the union.
- The manifest records the unevenness of the sample: ESS/N, and the largest weight over the
  smallest. With the paper's one hash per row both are close to 1, which is nearly uniform sampling.
  Use these two numbers to set `hashes_per_row` and `bandwidth`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from models.terminal import say
from pruning.corpus.reader import load_corpus
from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.space import estimate, passes
from pruning.scores.space.bandwidth import shared_choice
from pruning.scores.space.embeddings import Embeddings, local_mesh
from pruning.scores.space.race import (
    Race,
    Sketch,
    count_tiles,
    density_tiles,
    weight_diagnostics,
    without_chance,
)
from pruning.scores.workers import require_worker, worker_of
from pruning.store import late, progress
from pruning.store.artifact import Artifact, load_artifact, open_shard
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.manifest import ArtifactError, ShardRecord, config_of

NAME = "Density"
SKETCH = "sketch.npz"

COLUMNS = {
    "density": Column(
        pa.float32(),
        "estimated mean kernel to all documents, itself included; in [1 / documents, 1]",
    )
}

_PARTS = 64  # number of partial sketches on disk; a killed worker repeats at most one


@dataclasses.dataclass(frozen=True)
class DensityConfig:
    """Settings of `density`.

    Attributes:
      corpus: directory of the corpus.
      embeddings: a score set of the corpus with a column of vectors.
      output: directory of the score set.
      race: the sketch's size and kernel, `@Race()`.
      column: name of the column of embeddings.
      effective_sample_size: target effective sample size of a sample by inverse density, as a share
        of the documents; the bandwidth is chosen for it (bandwidth.py), and that of `race` is
        ignored.
      add: other density score sets with the same hashes, whose documents are counted too.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes of `jax.distributed` divide them.
      dry_run: measure some documents and print the expected time, bytes of embeddings read and
        written, and memory.
    """

    corpus: str
    embeddings: str
    output: str
    race: Race = dataclasses.field(default_factory=Race)
    column: str = "embedding"
    effective_sample_size: float | None = None
    add: tuple[str, ...] = ()
    worker: int | None = None
    workers: int | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_worker(self.worker, self.workers)
        if self.effective_sample_size is None:
            return
        if not 0 < self.effective_sample_size < 1:
            raise ValueError("effective_sample_size is a share between 0 and 1.")
        if self.race.family != "p_stable" or self.add:
            raise ValueError(
                "effective_sample_size chooses the bandwidth of the p_stable family; sketches that "
                "are added have theirs: remove it, or add and family."
            )


CONFIGURABLES: dict[str, type] = {NAME: DensityConfig, "Race": Race}


@late.stage
def run(config: DensityConfig) -> Artifact | None:
    """Make the score set, or resume an interrupted run.

    Returns:
      The score set; None while other workers' shards are missing, and after a dry run.

    Raises:
      ArtifactError: corpus and embeddings do not belong together, or a sketch is damaged.
      ConfigurationChanged: the output holds work of other settings.
      SketchError: a sketch to be added has other hashes.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artifact)
    if config.dry_run:
        _, workers = worker_of(config.worker, config.workers)
        say(estimate.density(embeddings, local_mesh(), config.race, workers))
        return None
    added = {f"added_{i}": load_artifact(path, "scores") for i, path in enumerate(config.add)}
    wanted = config.effective_sample_size
    identity = {"scorer": config_of(config.race), "column": config.column}
    build = score_set.begin(
        config.output,
        identity if wanted is None else identity | {"effective_sample_size": wanted},
        {"embeddings": embeddings.artifact, **added},
        corpus,
        COLUMNS,
    )
    if build.finished:
        return load_artifact(build.path, "scores")
    worker, workers = worker_of(config.worker, config.workers)
    mesh = local_mesh()
    race, summary = config.race, dict[str, Any]()
    if wanted is not None:
        race, expected = shared_choice(build, embeddings, race, wanted, worker, workers)
        summary["bandwidth"] = {"chosen": race.bandwidth, "expected_ess_share": expected}
    sketch = count(build, embeddings, race, mesh, worker, workers)
    for other in added.values():
        sketch += _stored(other)
    documents = sketch.documents
    table = jax.device_put((sketch.counts / documents).astype(np.float32))
    build.write_file(SKETCH, sketch.to_bytes())

    def look_up(tiles: jax.Array) -> dict[str, np.ndarray]:
        share = density_tiles(race, sketch.projections, sketch.offsets, table, tiles, mesh)
        return {"density": without_chance(race, np.asarray(share), documents)}

    passes.score("look up", build, corpus, embeddings, COLUMNS, look_up, mesh, worker, workers)
    records = [record for record in build.records() if record is not None]
    summary["documents"] = documents
    if len(records) == build.num_shards:
        shards = [ShardRecord(**record["shard"]) for record in records]
        summary["weights"] = _diagnostics(build, shards)
    return score_set.finish(build, "density", COLUMNS, summary)


def count(
    build: Build,
    embeddings: Embeddings,
    race: Race,
    mesh: jax.sharding.Mesh,
    worker: int = 0,
    workers: int = 1,
) -> Sketch:
    """Return the sketch of all embedded documents; every worker counts some shards."""
    shards = embeddings.artifact.num_shards
    parts = Parts(build, "sketch", min(shards, _PARTS))
    with progress.track("count", embeddings.documents, "documents") as task:
        for part in parts.missing(worker, workers):
            sketch = Sketch.draw(race, embeddings.width)
            for shard in range(part, shards, parts.count):
                for rows, tiles, valid in embeddings.tiles(shard, mesh):
                    sketch.counts += np.asarray(
                        count_tiles(race, sketch.projections, sketch.offsets, tiles, valid, mesh)
                    )
                    task.advance(len(rows))
            parts.write(part, sketch.to_bytes())
    parts.wait()
    whole = Sketch.from_bytes(parts.read(0))
    for part in range(1, parts.count):
        whole += Sketch.from_bytes(parts.read(part))
    if whole.documents != embeddings.documents:
        raise ArtifactError(
            f"the sketch counts {whole.documents} documents, {embeddings.artifact.path} has "
            f"{embeddings.documents} embeddings: delete {build.path} and run the command again."
        )
    return whole


def _stored(scores: Artifact) -> Sketch:
    if SKETCH not in scores.manifest.files:
        raise ArtifactError(f"{scores.path} holds no {SKETCH}: it is no density score set.")
    return Sketch.from_bytes(scores.file(SKETCH))


def _diagnostics(build: Build, shards: list[ShardRecord]) -> dict[str, float]:
    """Return diagnostics of inverse-propensity weights over all documents."""
    weights = []
    for shard in shards:
        with open_shard(build.path, shard) as file:
            density = file.read(["density"])["density"].drop_null().to_numpy()
        weights.append(1.0 / density.astype(np.float64))
    return weight_diagnostics(np.concatenate(weights))
