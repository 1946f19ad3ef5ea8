"""Density: how crowded a document's neighbourhood is, for samples that cover a corpus evenly.

    python -m pruning density --gin_file=configs/score/density.gin --gin.CORPUS=...

Two passes over stored embeddings: one counts documents into a sketch (race.py), one looks every
document up in it. The score set's `density` is the estimated mean kernel to all documents; keeping
documents with probability proportional to 1 / density is the sampler of Sachdeva et al. (arXiv
2402.09668, section 3.3), one configuration away: InversePropensity over column:density.

Choices
- The sketch lies in the score set, hashes included. A later run over more documents adds it to its
  own (`add`), and its densities are those of the union.
- How uneven the sample will be is said at once, in the manifest: ESS/N and the largest weight over
  the smallest. With the paper's one hash per row they are close to 1 each, which is nearly uniform
  sampling; `hashes_per_row` and `bandwidth` are there to be set by these two numbers.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from pruning import artefact, derived, progress
from pruning.artefact import Artefact, ArtefactError, Build, config_of
from pruning.corpus import load_corpus
from pruning.coverage.embeddings import Embeddings, loads, local_mesh, workers_of
from pruning.coverage.race import (
    Race,
    Sketch,
    count_tiles,
    density_tiles,
    weight_diagnostics,
    without_chance,
)
from pruning.parts import Parts
from pruning.scorers import Column

NAME = "Density"
SKETCH = "sketch.npz"

COLUMNS = {
    "density": Column(
        pa.float32(),
        "estimated mean kernel to all documents, itself included; in [1 / documents, 1]",
    )
}

_PARTS = 64  # sketches kept until all are counted; a killed worker loses one of its own


@dataclasses.dataclass(frozen=True)
class DensityConfig:
    """Settings of `density`.

    Attributes:
      corpus: the corpus.
      embeddings: a score set of it with a column of vectors.
      output: the score set's directory.
      race: the sketch's size and kernel, `@Race()`.
      column: of the embeddings.
      add: other density score sets, of the same hashes, whose documents count as well.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes that `jax.distributed` knows share them.
    """

    corpus: str
    embeddings: str
    output: str
    race: Race = dataclasses.field(default_factory=Race)
    column: str = "embedding"
    add: tuple[str, ...] = ()
    worker: int | None = None
    workers: int | None = None


CONFIGURABLES: dict[str, type] = {NAME: DensityConfig, "Race": Race}


def run(config: DensityConfig) -> Artefact | None:
    """Makes the score set, or goes on with it.

    Returns:
      The score set; None while other workers' shards are missing.

    Raises:
      ArtefactError: corpus and embeddings do not belong together, or a sketch is damaged.
      ConfigurationChanged: the output was begun with other settings.
      SketchError: a sketch to be added has other hashes.
    """
    corpus = load_corpus(config.corpus)
    embeddings = Embeddings.open(config.embeddings, config.column, corpus.artefact)
    added = {f"added_{i}": artefact.load(path, "scores") for i, path in enumerate(config.add)}
    build = derived.begin(
        config.output,
        {"scorer": config_of(config.race), "column": config.column},
        {"embeddings": embeddings.artefact, **added},
        corpus,
        COLUMNS,
    )
    if build.finished:
        return artefact.load(build.path, "scores")
    worker, workers = workers_of(config.worker, config.workers)
    mesh = local_mesh()
    sketch = count(build, embeddings, config.race, mesh, worker, workers)
    for other in added.values():
        sketch += _stored(other)
    documents = sketch.documents
    table = jax.device_put((sketch.counts / documents).astype(np.float32))
    build.write_file(SKETCH, sketch.to_bytes())

    with progress.track("look up", embeddings.documents, "documents") as task:
        for shard in build.pending(worker, workers):
            started = time.perf_counter()
            doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            status = derived.status_of(embeddings.artefact, shard, doc_ids)
            density = np.zeros(len(doc_ids))
            for rows, tiles, _ in loads(embeddings.batches(shard), mesh):
                share = density_tiles(
                    config.race, sketch.projections, sketch.offsets, table, tiles, mesh
                )
                share = np.asarray(share).reshape(-1)[: len(rows)]
                density[rows] = without_chance(config.race, share, documents)
                task.advance(len(rows))
            seconds = time.perf_counter() - started
            derived.write(build, shard, corpus, COLUMNS, status, {"density": density}, seconds)
    files = [record["shard"]["file"] for record in build.records() if record is not None]
    summary: dict[str, Any] = {"documents": documents}
    if len(files) == build.num_shards:
        summary["weights"] = _diagnostics(build, files)
    return derived.finish(build, "density", COLUMNS, summary)


def count(
    build: Build,
    embeddings: Embeddings,
    race: Race,
    mesh: jax.sharding.Mesh,
    worker: int = 0,
    workers: int = 1,
) -> Sketch:
    """The sketch of all embedded documents; every worker counts some shards and gets the whole."""
    shards = embeddings.artefact.num_shards
    parts = Parts(build, "sketch", min(shards, _PARTS))
    with progress.track("count", embeddings.documents, "documents") as task:
        for part in parts.missing(worker, workers):
            sketch = Sketch.draw(race, embeddings.width)
            for shard in range(part, shards, parts.count):
                for rows, tiles, valid in loads(embeddings.batches(shard), mesh):
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
        raise ArtefactError(
            f"the sketch counts {whole.documents} documents, {embeddings.artefact.path} has "
            f"{embeddings.documents} embeddings: delete {build.path} and run the command again."
        )
    return whole


def _stored(scores: Artefact) -> Sketch:
    path = scores.path / SKETCH
    if not path.exists():
        raise ArtefactError(f"{scores.path} holds no {SKETCH}: it is no density score set.")
    return Sketch.from_bytes(path.read_bytes())


def _diagnostics(build: Build, files: list[str]) -> dict[str, float]:
    """Of inverse-propensity weights, over all documents."""
    weights = []
    for name in files:
        with artefact.open_parquet(build.path / name) as file:
            density = file.read(["density"])["density"].drop_null().to_numpy()
        weights.append(1.0 / density.astype(np.float64))
    return weight_diagnostics(np.concatenate(weights))
