"""Cost of a stage over stored embeddings, measured on some of them before it starts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from pruning.scores.quantities import bytes_in_words
from pruning.scores.space import clusters
from pruning.scores.space.embeddings import Embeddings, loads
from pruning.scores.space.race import Race, Sketch, count_tiles, density_tiles
from pruning.scores.space.twins import Rule, twin_similarities
from pruning.store.progress import duration

_MEASURED = 1 << 14  # documents
_CLUSTER = 2048  # documents of the cluster in the measurement


@dataclasses.dataclass(frozen=True)
class Measured:
    """Documents on the devices, and the time it took to transfer them.

    Attributes:
      tiles, valid: as in `loads`.
      documents: number of these documents.
      seconds: time per document, to read and to transfer.
    """

    tiles: jax.Array
    valid: jax.Array
    documents: int
    seconds: float

    @classmethod
    def of(cls, embeddings: Embeddings, mesh: Mesh) -> Measured:
        """Read some documents of the first row groups that have any."""
        for _ in range(2):  # the first time compiles
            started = time.perf_counter()
            vectors: list[np.ndarray] = []
            for shard, group, _ in embeddings.row_groups:
                vectors += [found for _, found in embeddings.stored(shard, [group])]
                if sum(map(len, vectors)) >= _MEASURED:
                    break
            joined = np.concatenate(vectors)[:_MEASURED]
            made = list(loads([(np.arange(len(joined)), joined)], mesh))[:1]
            jax.block_until_ready(made[0][1])
            seconds = (time.perf_counter() - started) / len(joined)
        places, tiles, valid = made[0]
        return cls(tiles, valid, len(places), seconds)

    def time(self, work: Callable[[], object]) -> float:
        """Return seconds per document of the second of two calls; the first one compiles."""
        jax.block_until_ready(work())
        started = time.perf_counter()
        jax.block_until_ready(work())
        return (time.perf_counter() - started) / self.documents


def kmeans(
    embeddings: Embeddings,
    mesh: Mesh,
    k: int,
    iterations: int,
    training: int,
    read: int,
    workers: int,
) -> str:
    """Return the estimate of `kmeans`.

    Args:
      k: number of clusters.
      training: number of training documents.
      read: number of documents of the row groups from which these are drawn.
    """
    some = Measured.of(embeddings, mesh)
    random = np.random.default_rng(0).standard_normal((k, embeddings.width), np.float32)
    assign = some.time(lambda: clusters.assign_tiles(random, some.tiles, mesh))
    update = some.time(
        lambda: clusters.fit(lambda: [(some.tiles, some.valid)], random, 1, mesh).objective
    )
    documents = embeddings.documents
    train = read * some.seconds + training * iterations * update
    whole = documents * (some.seconds + assign)
    return _lines(
        embeddings,
        f"training {duration(train)} in one process, then assignment {duration(whole / workers)} "
        f"in each of {workers} processes",
        read=read + documents,
        written=0,
        memory=4 * embeddings.width * (training + 3 * k),
    )


def semdedup(
    embeddings: Embeddings,
    mesh: Mesh,
    sizes: np.ndarray,
    rule: Rule,
    memory_gb: float,
    workers: int,
) -> str:
    """Return the estimate of `semdedup`. Args: sizes: int64 [clusters], documents of each."""
    some = Measured.of(embeddings, mesh)
    vectors = np.random.default_rng(0).standard_normal((_CLUSTER, embeddings.width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bounds = np.array([0, _CLUSTER])
    for _ in range(2):  # the first time compiles
        started = time.perf_counter()
        twin_similarities(vectors, bounds, mesh, rule)
        pair = 2 * (time.perf_counter() - started) / _CLUSTER**2
    pairs = float((sizes.astype(np.float64) ** 2).sum()) / 2
    documents = embeddings.documents
    return _lines(
        embeddings,
        f"regrouping {duration(documents * some.seconds / workers)}, {pairs:.3g} comparisons "
        f"{duration(pairs * pair / workers)} in each of {workers} processes",
        read=2 * documents,
        written=documents,
        memory=3e9 * memory_gb,
    )


def density(embeddings: Embeddings, mesh: Mesh, race: Race, workers: int) -> str:
    """Return the estimate of `density`."""
    some = Measured.of(embeddings, mesh)
    sketch = Sketch.draw(race, embeddings.width)
    table = jax.device_put(np.zeros(sketch.counts.shape, np.float32))
    drawn = (race, sketch.projections, sketch.offsets)
    count = some.time(lambda: count_tiles(*drawn, some.tiles, some.valid, mesh))
    look = some.time(lambda: density_tiles(*drawn, table, some.tiles, mesh))
    seconds = embeddings.documents * (2 * some.seconds + count + look)
    return _lines(
        embeddings,
        f"{duration(seconds / workers)} in each of {workers} processes",
        read=2 * embeddings.documents,
        written=0,
        memory=4 * sketch.counts.nbytes,
    )


def _lines(embeddings: Embeddings, how_long: str, read: int, written: int, memory: float) -> str:
    size = embeddings.width * embeddings.dtype.itemsize
    return (
        f"{embeddings.documents:,} vectors of {embeddings.width} {embeddings.dtype}\n"
        f"time: {how_long}\n"
        f"embeddings read {bytes_in_words(read * size)}, written {bytes_in_words(written * size)}\n"
        f"memory: about {bytes_in_words(memory)} for a process beside its own"
    )
