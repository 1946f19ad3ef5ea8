"""Tensors on disk: shape and type known, bytes copied only when and where they are wanted.

- A stored tensor copies a range of itself into a NumPy view that the caller made. The view may be
  transposed, one layer of a stack, or of another type, so that a parameter is put together in its
  final form without a second copy of it on the host.
- Bytes move in bands of at most `BAND_BYTES`. The host holds the caller's block and one band; of a
  zarr array, one chunk more, as it is stored and as it was before it was compressed.
- Plain seeks and reads, no memory map: they work on object storage, and a file that is replaced
  while it is being read cannot crash the process.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

BAND_BYTES = 4 << 20

Index = tuple[slice, ...]


class StoredTensor(Protocol):
    """What the importers need of a tensor, whatever file format it is kept in."""

    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def grain(self) -> tuple[int, ...]:
        """The shape of what is read at once. Parts cut at multiples of it are read only once."""

    def copy_to(self, out: np.ndarray, index: Index) -> None:
        """Write `self[index]` into `out`, which has that shape, casting to its type.

        `index` has one slice a dimension, with step 1; its bounds may be None.
        """


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in C order, little-endian, at byte ranges of a file.

    Attributes:
        regions: (offset, bytes) of the pieces that follow each other in the tensor. Nearly always
            one; Flax's msgpack files cut arrays of over 1 GiB into several.
    """

    path: epath.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    regions: tuple[tuple[int, int], ...]

    @property
    def grain(self) -> tuple[int, ...]:
        return (1, *self.shape[1:]) if self.shape else ()

    def copy_to(self, out: np.ndarray, index: Index) -> None:
        # Bands run along the leading axis, whose rows lie next to each other in the file.
        shape, rows, rest = self.shape, slice(0, 1), index
        if shape:
            rows, rest = slice(*index[0].indices(shape[0])), index[1:]
        else:
            shape, out = (1,), out[None]
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        band = max(1, BAND_BYTES // max(row_bytes, 1))
        with self.path.open("rb") as file:
            for start in range(rows.start, rows.stop, band):
                stop = min(start + band, rows.stop)
                data = self._bytes(file, start * row_bytes, stop * row_bytes)
                values = np.frombuffer(data, self.dtype).reshape(stop - start, *shape[1:])
                out[start - rows.start : stop - rows.start] = values[(slice(None), *rest)]

    def _bytes(self, file: Any, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the tensor, across its regions."""
        pieces, position = [], 0
        for offset, size in self.regions:
            first, last = max(start - position, 0), min(stop - position, size)
            if first < last:
                file.seek(offset + first)
                pieces.append(file.read(last - first))
            position += size
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(data) != stop - start:
            raise ValueError(
                f"{self.path} is cut off: a tensor {self.shape} at byte {self.regions[0][0]} ends "
                "beyond the end of the file; copy or download it again"
            )
        return data


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
        import tensorstore

        # TensorStore decodes chunk by chunk straight into the (possibly strided) view.
        source = tensorstore.cast(self._store, tensorstore.dtype(out.dtype))
        tensorstore.array(out).write(source[index] if index else source).result()

    @functools.cached_property
    def _store(self) -> Any:
        store = open_zarr(self.kvstore, self.driver, self.sparse).result()
        if store.shape != self.shape:
            raise ValueError(
                f"{self.kvstore['path']}: the array on disk is {tuple(store.shape)}, the "
                f"checkpoint's index says {self.shape}; the directory mixes two checkpoints"
            )
        return store


def open_zarr(kvstore: Mapping[str, Any], driver: str = "zarr", sparse: bool = False) -> Any:
    """A future of the TensorStore array in `kvstore`, for reading."""
    import tensorstore

    # NOTE: a missing chunk would otherwise read as zeros, and a checkpoint half copied as one
    # with dead heads.
    spec = {"driver": driver, "kvstore": dict(kvstore), "fill_missing_data_reads": sparse}
    return tensorstore.open(spec, read=True, open=True, context=_context())


@functools.cache
def _context() -> Any:
    import tensorstore

    # NOTE: one chunk at a time. What is in flight is what the host holds beside the caller's block,
    # and of what several threads have freed glibc keeps a part for each.
    return tensorstore.Context(
        {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    )


def kvstore(path: epath.Path) -> dict[str, str]:
    """TensorStore's specification of a directory, local or in object storage (gs://, s3://)."""
    scheme, _, rest = str(path).rpartition("://")
    if not scheme:
        return {"driver": "file", "path": f"{path}/"}
    bucket, _, inside = rest.partition("/")
    return {"driver": {"gs": "gcs"}.get(scheme, scheme), "bucket": bucket, "path": f"{inside}/"}
