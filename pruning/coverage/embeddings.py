"""Stored embeddings: read shard by shard, given length 1, laid tile by tile onto the devices.

Choices
- An embedding column is a fixed-size list in a score set: whatever embeds documents writes one, and
  the samplers here ask no more of it.
- Vectors have length 1: Sentence-T5's have, and distance and angle then tell the same.
- Devices get whole tiles of `TILE` rows. What is computed of a row is computed within its tile, in
  the same shape on every mesh, so that results do not depend on the number of devices.
- A process uses its own devices. Processes share the corpus by shards and meet in files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pruning import artefact
from pruning.artefact import Artefact, ArtefactError

TILE = 512  # rows; a multiple of every matrix unit's
AXIS = "tiles"
_LOAD = 64  # tiles per device and call


def local_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that the samplers share tiles over: by default this process's devices."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


def workers_of(worker: int | None, workers: int | None) -> tuple[int, int]:
    """Which worker of how many this is; unless said, a process of `jax.distributed`."""
    return (
        jax.process_index() if worker is None else worker,
        jax.process_count() if workers is None else workers,
    )


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A column of embeddings. Made by `Embeddings.open`.

    Attributes:
      artefact: a score set.
      column: its fixed-size list column.
      width: components of a vector.
    """

    artefact: Artefact
    column: str
    width: int

    @classmethod
    def open(cls, path: str, column: str, corpus: Artefact) -> Embeddings:
        """Opens the embeddings of a corpus.

        Raises:
          ArtefactError: the score set is of another corpus, or the column holds no vectors.
        """
        scores = artefact.load(path, "scores")
        artefact.require_input(scores, "corpus", corpus)
        with scores.parquet(0) as file:
            schema = file.schema_arrow
        if column not in schema.names:
            names = ", ".join(schema.names)
            raise ArtefactError(f"{path} has no column {column!r}; it has: {names}.")
        kind = schema.field(column).type
        if not pa.types.is_fixed_size_list(kind):
            raise ArtefactError(
                f"{path}: the column {column!r} is {kind}, not vectors of one length. Give the "
                "score set of an embedding scorer."
            )
        return cls(scores, column, kind.list_size)

    @property
    def documents(self) -> int:
        """How many documents have an embedding."""
        return int(self.artefact.manifest.counts["documents"].get("ok", 0))

    def batches(self, shard: int, rows: int = 1 << 16) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The embedded documents of one shard.

        Yields:
          int64 [n], row numbers within the shard; float32 [n, width], of length 1.

        Raises:
          ArtefactError: a vector is not finite, or zero.
        """
        first = 0
        with self.artefact.parquet(shard) as file:
            for batch in file.iter_batches(rows, columns=["status", self.column]):
                ok = np.asarray(batch.column("status").cast(pa.string()).to_numpy(False) == "ok")
                where = np.flatnonzero(ok)
                vectors = batch.column(self.column).take(pa.array(where)).flatten()
                vectors = vectors.to_numpy(zero_copy_only=False).astype(np.float32)
                vectors = vectors.reshape(len(where), -1)
                where = where + first
                first += batch.num_rows
                if len(where):
                    yield where, self._of_length_one(vectors, where, shard)

    def _of_length_one(self, vectors: np.ndarray, rows: np.ndarray, shard: int) -> np.ndarray:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            file = self.artefact.manifest.shards[shard].file
            raise ArtefactError(
                f"{self.artefact.path / file}, row {rows[bad[0]]}: the embedding has length "
                f"{lengths[bad[0], 0]}. Documents that cannot be embedded need a status."
            )
        return vectors / lengths


def loads(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], mesh: Mesh
) -> Iterator[tuple[np.ndarray, jax.Array, jax.Array]]:
    """Batches of vectors as tiles on the devices.

    Args:
      batches: pairs of row numbers [n] and float32 [n, width].

    Yields:
      int64 [n] row numbers; float32 [tiles, TILE, width] and bool [tiles, TILE], sharded over the
      first axis. Tiles per device are 1, 2, 4 or multiples of 8: few shapes, little padding.
    """
    sharding = NamedSharding(mesh, P(AXIS))
    most = _LOAD * mesh.size * TILE
    for rows, vectors in batches:
        for begin in range(0, len(rows), most):
            part = vectors[begin : begin + most]
            per_device = -(-len(part) // (TILE * mesh.size))
            if per_device > 8:
                per_device = -(-per_device // 8) * 8
            else:
                per_device = 1 << (per_device - 1).bit_length()
            tiles = mesh.size * per_device
            padded = np.zeros((tiles * TILE, vectors.shape[1]), np.float32)
            padded[: len(part)] = part
            valid = np.arange(tiles * TILE) < len(part)
            yield (
                rows[begin : begin + most],
                jax.device_put(padded.reshape(tiles, TILE, -1), sharding),
                jax.device_put(valid.reshape(tiles, TILE), sharding),
            )
