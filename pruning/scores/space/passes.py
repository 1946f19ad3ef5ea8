"""A pass over stored embeddings that maps a function of their tiles to columns of a score set.

`score` is the pass; `Embedded` is the whole of a stage that consists of it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from pruning.corpus.reader import Corpus, load_corpus
from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.space.embeddings import Embeddings, local_mesh
from pruning.scores.workers import worker_of
from pruning.store import progress
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build

OfTiles = Callable[[jax.Array], Mapping[str, jax.Array | np.ndarray]]
"""Tiles float32 [tiles, TILE, width] -> column -> [tiles, TILE], vectors [tiles, TILE, ...]."""


class Config(Protocol):
    """Settings that the stages of one pass have in common."""

    @property
    def corpus(self) -> str: ...

    @property
    def embeddings(self) -> str: ...

    @property
    def output(self) -> str: ...

    @property
    def column(self) -> str: ...

    @property
    def worker(self) -> int | None: ...

    @property
    def workers(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A corpus and its embeddings, for a stage that maps a function over them."""

    config: Config
    corpus: Corpus
    embeddings: Embeddings

    @classmethod
    def open(cls, config: Config) -> Embedded:
        """Raise ArtifactError if corpus and embeddings do not belong together."""
        corpus = load_corpus(config.corpus)
        return cls(
            config, corpus, Embeddings.open(config.embeddings, config.column, corpus.artifact)
        )

    def score(
        self,
        name: str,
        columns: Mapping[str, Column],
        identity: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        prepare: Callable[[], tuple[OfTiles, Mapping[str, Any]]],
    ) -> Artifact | None:
        """Make or resume a score set; return None while other workers' shards are missing.

        Args:
          name: name of the score, for the manifest.
          identity: settings that decide the scores, besides the column.
          inputs: artifacts besides the embeddings.
          prepare: returns the function and the summary; called if the score set is not finished.
        """
        worker, workers = worker_of(self.config.worker, self.config.workers)
        build = score_set.begin(
            self.config.output,
            {**identity, "column": self.config.column},
            {"embeddings": self.embeddings.artifact, **inputs},
            self.corpus,
            columns,
        )
        if build.finished:
            return load_artifact(build.path, score_set.KIND)
        function, summary = prepare()
        mesh = local_mesh()
        score(
            "score", build, self.corpus, self.embeddings, columns, function, mesh, worker, workers
        )
        return score_set.finish(build, name, columns, summary)


def score(
    name: str,
    build: Build,
    corpus: Corpus,
    embeddings: Embeddings,
    columns: Mapping[str, Column],
    function: OfTiles,
    mesh: Mesh,
    worker: int,
    workers: int,
) -> None:
    """Write the shards of a worker; documents without an embedding keep their status.

    Args:
      name: name of the pass, for the progress line.
      function: function of tiles. A vector shorter than its column is padded with zeros.
    """
    with progress.track(name, embeddings.documents, "documents") as task:
        for shard in build.pending(worker, workers):
            started = time.perf_counter()
            doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
            status = score_set.status_of(embeddings.artifact, shard, doc_ids)
            values = {key: _zeros(column.type, len(doc_ids)) for key, column in columns.items()}
            for rows, tiles, _ in embeddings.tiles(shard, mesh):
                for key, found in function(tiles).items():
                    flat = np.asarray(found).reshape(-1, *found.shape[2:])[: len(rows)]
                    if flat.ndim == 1:
                        values[key][rows] = flat
                    else:
                        values[key][rows, : flat.shape[1]] = flat
                task.advance(len(rows))
            seconds = time.perf_counter() - started
            score_set.write(build, shard, corpus, columns, status, values, seconds)


def _zeros(kind: pa.DataType, documents: int) -> np.ndarray:
    if pa.types.is_fixed_size_list(kind):
        return np.zeros((documents, kind.list_size), kind.value_type.to_pandas_dtype())
    return np.zeros(documents, kind.to_pandas_dtype())
