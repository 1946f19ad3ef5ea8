"""Tensors on disk: shape and type are known, bytes are copied only when they are wanted.

- A stored tensor copies a range of itself into a NumPy view of the caller's. The view may be
  transposed, one layer of a stack, or of another type, so that a parameter is put together in its
  final form without a second copy of it on the host.
- Bytes move in bands of at most `BAND_BYTES`. The host holds the caller's block and one band; of a
  zarr array also one chunk, as it is stored and as it was before compression.
- Files are read by plain seeks and reads, not through a memory map: that works on object storage,
  and a file that is replaced while it is being read cannot crash the process.
- Files with digests are checked while they are read (`digests`).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from models.errors import ModelError, first_line, reading
from models.weights.digests import Digests

BAND_BYTES = 4 << 20

Index = tuple[slice, ...]


class StoredTensor(Protocol):
    """A tensor as the importers use it, independent of its file format."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def grain(self) -> tuple[int, ...]:
        """The shape of the smallest unit of reading; parts cut at its multiples are read once."""

    def copy_to(self, out: np.ndarray, index: Index) -> None:
        """Write `self[index]` into `out`, which has that shape, casting to its type.

        `index` has one slice a dimension, with step 1; its bounds may be None.
        """


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in C order, little-endian, at byte ranges of a file.

    Attributes:
        regions: (offset, bytes) of the consecutive pieces of the tensor. Nearly always one; Flax's
            msgpack files cut arrays of over 1 GiB into several.
        digests: of the file, where it has any; what is read is then checked.
    """

    path: epath.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    regions: tuple[tuple[int, int], ...]
    digests: Digests | None = None

    @property
    def grain(self) -> tuple[int, ...]:
        return (1, *self.shape[1:]) if self.shape else ()

    def copy_to(self, out: np.ndarray, index: Index) -> None:
        """Write `self[index]` into `out`; see `StoredTensor`."""
        # Bands run along the leading axis, whose rows lie next to each other in the file.
        shape, rows, rest = self.shape, slice(0, 1), index
        if shape:
            rows, rest = slice(*index[0].indices(shape[0])), index[1:]
        else:
            shape, out = (1,), out[None]
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        band = max(1, BAND_BYTES // max(row_bytes, 1))
        with reading(self.path), self.path.open("rb") as file:
            for start in range(rows.start, rows.stop, band):
                stop = min(start + band, rows.stop)
                data = self._bytes(file, start * row_bytes, stop * row_bytes)
                values = np.frombuffer(data, self.dtype).reshape(stop - start, *shape[1:])
                out[start - rows.start : stop - rows.start] = values[(slice(None), *rest)]

    def _bytes(self, file: Any, start: int, stop: int) -> bytes | memoryview:
        """Return bytes [start, stop) of the tensor, across its regions."""
        pieces: list[bytes | memoryview] = []
        position = 0
        for offset, size in self.regions:
            first, last = max(start - position, 0), min(stop - position, size)
            if first < last:
                pieces.append(self._region(file, offset + first, offset + last))
            position += size
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) != stop - start:
            raise ModelError(
                f"{self.path} is cut off: a tensor {self.shape} at byte {self.regions[0][0]} ends "
                "beyond the end of the file; copy or download it again"
            )
        return data

    def _region(self, file: Any, start: int, stop: int) -> bytes | memoryview:
        """Return bytes [start, stop) of the file, checked where it has digests."""
        if self.digests is not None:
            return self.digests.read(file, start, stop)
        file.seek(start)
        return file.read(stop - start)


@dataclasses.dataclass(frozen=True)
class ZarrTensor:
    """A zarr array, as T5X and Orbax write one for each parameter; read through TensorStore.

    Attributes:
        shape: as the checkpoint's index states it; a zarr array that differs raises.
        kvstore: TensorStore's specification of where the array's directory is.
        driver: "zarr" or "zarr3".
        sparse: chunks that hold nothing but zeros were not stored.
    """

    shape: tuple[int, ...]
    kvstore: Mapping[str, Any]
    driver: str = "zarr"
    sparse: bool = False

    @property
    def dtype(self) -> np.dtype:
        return self._store.dtype.numpy_dtype

    @property
    def grain(self) -> tuple[int, ...]:
        return tuple(self._store.chunk_layout.read_chunk.shape)

    def copy_to(self, out: np.ndarray, index: Index) -> None:
        """Write `self[index]` into `out`; see `StoredTensor`."""
        import tensorstore

        # TensorStore decodes chunk by chunk straight into the (possibly strided) view.
        source = tensorstore.cast(self._store, tensorstore.dtype(out.dtype))
        try:
            tensorstore.array(out).write(source[index] if index else source).result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error

    @functools.cached_property
    def _store(self) -> Any:
        try:
            store = open_zarr(self.kvstore, self.driver, self.sparse).result()
        except (ValueError, OSError) as error:
            raise self._damaged(error) from error
        if store.shape != self.shape:
            raise ModelError(
                f"{self.kvstore['path']}: the array on disk is {tuple(store.shape)}, the "
                f"checkpoint's index says {self.shape}; the directory mixes two checkpoints: copy "
                "one of them whole"
            )
        return store

    def _damaged(self, error: Exception) -> ModelError:
        return ModelError(
            f"the array {self.kvstore['path']} cannot be read ({tensorstore_reason(error)}): copy "
            "or download the checkpoint again"
        )


def tensorstore_reason(error: Exception) -> str:
    """Return TensorStore's reason without the specifications that follow it."""
    return first_line(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]


def open_zarr(kvstore: Mapping[str, Any], driver: str = "zarr", sparse: bool = False) -> Any:
    """Return a future of the TensorStore array in `kvstore`, opened for reading."""
    import tensorstore

    # NOTE: a missing chunk would otherwise read as zeros, and a checkpoint half copied as one
    # with dead heads.
    spec = {"driver": driver, "kvstore": dict(kvstore), "fill_missing_data_reads": sparse}
    return tensorstore.open(spec, read=True, open=True, context=_context())


@functools.cache
def _context() -> Any:
    import tensorstore

    # NOTE: one chunk at a time. The host holds what is in flight beside the caller's block, and
    # glibc keeps a part of what each of several threads has freed.
    return tensorstore.Context(
        {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    )


def kvstore(path: epath.Path) -> dict[str, str]:
    """Return TensorStore's specification of a directory, local or in object storage."""
    scheme, _, rest = str(path).rpartition("://")
    if not scheme:
        return {"driver": "file", "path": f"{path}/"}
    bucket, _, inside = rest.partition("/")
    return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{inside}/"}
