"""Stored embeddings: read shard by shard, scaled to length 1, sent tile by tile to the devices.

Choices
- Every scorer of embeddings writes a column of vectors (pruning/scores/vectors.py), which is all
  that the stages here require.
- Vectors have length 1, as Sentence-T5's have. Distance and angle then give the same order.
- Devices get whole tiles of `TILE` rows. Each row is computed within its tile, in the same shape on
  every mesh, so that results do not depend on the number of devices.
- A process uses its own devices. Processes divide the corpus by shards and exchange results through
  files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pruning.corpus.layout import doc_ids
from pruning.scores import pipeline
from pruning.scores import vectors as columns
from pruning.store.artifact import Artifact, load_artifact, require_input, require_same_documents
from pruning.store.manifest import ArtifactError

TILE = 512  # rows; a multiple of every matrix unit's
AXIS = "tiles"
_LOAD = 64  # tiles per device and call
_AHEAD = 2  # number of loads that are prefetched
_BATCH = 1 << 15  # documents read at a time


def local_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Return the mesh over which tiles are divided: by default this process's devices."""
    devices = jax.local_devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices
    )


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """A column of embeddings. Made by `Embeddings.open`.

    Attributes:
      artifact: a score set.
      field: its column of vectors.
      width: number of components of a vector.
      dtype: dtype of the stored numbers.
    """

    artifact: Artifact
    field: pa.Field
    width: int
    dtype: np.dtype

    @classmethod
    def open(cls, path: str, column: str, corpus: Artifact) -> Embeddings:
        """Open the embeddings of a corpus.

        Raises:
          ArtifactError: the score set is of another corpus, or the column holds no vectors.
        """
        scores = load_artifact(path, "scores")
        require_input(scores, "corpus", corpus)
        with scores.parquet(0) as file:
            schema = file.schema_arrow
        if column not in schema.names:
            names = ", ".join(schema.names)
            raise ArtifactError(f"{path} has no column {column!r}; it has: {names}.")
        field = schema.field(column)
        if not columns.is_vector(field):
            raise ArtifactError(
                f"{path}: the column {column!r} is {field.type}, not vectors of one length. "
                "Give the score set of an embedding scorer."
            )
        dtype, width = columns.shape_of(field)
        return cls(scores, field, width, dtype)

    @property
    def documents(self) -> int:
        """Number of documents with an embedding."""
        return int(self.artifact.manifest.counts["documents"].get("ok", 0))

    @functools.cached_property
    def row_groups(self) -> list[tuple[int, int, int]]:
        """Shard, index and number of documents of every row group; reads all footers."""
        found = []
        for shard in range(self.artifact.num_shards):
            with self.artifact.parquet(shard) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            found += [(shard, group, size) for group, size in enumerate(sizes)]
        return found

    def tiles(self, shard: int, mesh: Mesh) -> Iterator[tuple[np.ndarray, jax.Array, jax.Array]]:
        """Yield the embedded documents of one shard as `loads` does."""
        file = self.artifact.path / self.artifact.manifest.shards[shard].file
        return loads(self.stored(shard), mesh, f"{file}, row")

    def stored(
        self, shard: int, groups: Sequence[int] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the embedded documents of one shard, with their vectors as stored.

        Yields:
          int64 [n], row numbers within the shard; [n, width] of `dtype`.
        """
        with self.artifact.parquet(shard) as file:
            sizes = file.row_group_sizes()
            starts = np.cumsum([0, *sizes])
            for group in range(len(sizes)) if groups is None else groups:
                first = int(starts[group])
                batches = file.iter_batches(_BATCH, ["doc_id", "status", self.field.name], [group])
                for batch in batches:
                    self._require_own(batch.column("doc_id").to_numpy(), shard, first)
                    status = batch.column("status").cast(pa.string())
                    where = np.flatnonzero(status.to_numpy(False) == "ok")
                    found = columns.numbers(batch.column(self.field.name), self.field)
                    if len(where) < len(found):
                        found = found[where]
                    rows = where + first
                    first += batch.num_rows
                    if len(rows):
                        yield rows, found

    def _require_own(self, ids: np.ndarray, shard: int, first: int) -> None:
        expected = doc_ids(shard, np.arange(first, first + len(ids)))
        file = self.artifact.path / self.artifact.manifest.shards[shard].file
        require_same_documents(expected, ids, f"{file}, from row {first}")


def of_length_one(vectors: np.ndarray, names: np.ndarray, where: str) -> np.ndarray:
    """Return vectors of length 1, float32 [n, width].

    Args:
      vectors: floating [n, width].
      names: [n], names of the vectors, for the message.
      where: prefix of the name, such as "file, row".

    Raises:
      ArtifactError: a vector is not finite, or zero.
    """
    wide = vectors.astype(np.float32)
    # NOTE: avoids the two copies that np.linalg.norm makes.
    lengths = np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None]
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise ArtifactError(
            f"{where} {names[bad[0]]}: the embedding has length {lengths[bad[0], 0]}. Documents "
            "that cannot be embedded need a status."
        )
    wide /= lengths
    return wide


@functools.partial(jax.jit, static_argnames="mesh")
def _normalized(tiles: jax.Array, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Return tiles in float32, scaled to length 1, and a mask of nonzero rows, [tiles, TILE]."""

    def one(tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        wide = tile.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(wide * wide, axis=1))
        good = jnp.isfinite(length) & (length > 0)
        return wide / jnp.where(good, length, 1.0)[:, None], good

    return jax.shard_map(
        lambda t: jax.lax.map(one, t), mesh=mesh, in_specs=P(AXIS), out_specs=(P(AXIS), P(AXIS))
    )(tiles)


def loads(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], mesh: Mesh, where: str = "vector"
) -> Iterator[tuple[np.ndarray, jax.Array, jax.Array]]:
    """Yield batches of vectors as tiles on the devices, of length 1.

    Vectors are sent to the devices as stored and converted there. The next load is read while one
    is in use.

    Args:
      batches: pairs of row numbers [n] and floating [n, width].
      where: prefix of a row number in messages.

    Yields:
      int64 [n] row numbers; float32 [tiles, TILE, width] and bool [tiles, TILE], sharded over the
      first axis. Tiles per device are 1, 2, 4 or multiples of 8: few shapes, little padding.

    Raises:
      ArtifactError: a vector is not finite, or zero; at the latest at the end.
    """
    sharding = NamedSharding(mesh, P(AXIS))
    last: tuple[jax.Array, np.ndarray, np.ndarray] | None = None
    with pipeline.ahead(_padded(batches, mesh.size), _AHEAD) as read:
        for rows, vectors, padded, valid in read:
            tiles, good = _normalized(jax.device_put(padded, sharding), mesh)
            if last is not None:  # of the previous load, so that this one is not waited for
                _require_lengths(*last, where)
            last = (good, rows, vectors)
            yield rows, tiles, jax.device_put(valid, sharding)
    if last is not None:
        _require_lengths(*last, where)


def _padded(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], devices: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield rows, their vectors, and both as whole tiles: [tiles, TILE, width], [tiles, TILE]."""
    most = _LOAD * devices * TILE
    for rows, vectors in batches:
        for begin in range(0, len(rows), most):
            part = vectors[begin : begin + most]
            per_device = -(-len(part) // (TILE * devices))
            if per_device > 8:
                per_device = -(-per_device // 8) * 8
            else:
                per_device = 1 << (per_device - 1).bit_length()
            count = devices * per_device * TILE
            padded = part
            if len(part) < count:
                padded = np.zeros((count, vectors.shape[1]), vectors.dtype)
                padded[: len(part)] = part
            valid = np.arange(count) < len(part)
            yield (
                rows[begin : begin + most],
                part,
                padded.reshape(-1, TILE, vectors.shape[1]),
                valid.reshape(-1, TILE),
            )


def _require_lengths(good: jax.Array, rows: np.ndarray, vectors: np.ndarray, where: str) -> None:
    """Raise ArtifactError if a vector has no direction."""
    if not np.asarray(good).reshape(-1)[: len(rows)].all():
        of_length_one(vectors, rows, where)
