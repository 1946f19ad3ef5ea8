"""A pass over stored embeddings that maps a function of their tiles to columns of a score set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from pruning.corpus.reader import Corpus
from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.space.embeddings import Embeddings
from pruning.store import progress
from pruning.store.build import Build

OfTiles = Callable[[jax.Array], Mapping[str, jax.Array | np.ndarray]]
"""Tiles float32 [tiles, TILE, width] -> column -> [tiles, TILE], vectors [tiles, TILE, ...]."""


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
