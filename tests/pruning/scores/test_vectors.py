"""Columns of vectors: what is written is read, from files of this version and of earlier ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pruning.scores import vectors
from pruning.scores.score_set import Column, schema_of, spread
from pruning.scores.space.embeddings import loads, local_mesh
from pruning.store.manifest import ArtifactError


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_vectors_come_back_bit_by_bit_and_nulls_as_nulls(tmp_path, dtype):
    random = np.random.default_rng(0)
    values = random.standard_normal((50, 7)).astype(dtype)
    row = np.where(np.arange(70) % 7 == 3, -1, np.arange(70) % 50)
    kind = pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), 7)
    schema = schema_of({"x": Column(kind, "")})
    column = spread(values, row, kind)
    field = schema.field("x")
    status = pa.array(["ok"] * 70).cast(schema.field("status").type)
    table = pa.table({"doc_id": np.arange(70), "status": status, "x": column}, schema=schema)
    with pq.ParquetWriter(tmp_path / "x", schema, **vectors.encoding_of(schema)) as writer:
        writer.write_table(table, row_group_size=16)
    read = pq.ParquetFile(tmp_path / "x")
    assert read.metadata.row_group(0).column(2).compression == "UNCOMPRESSED"
    field = read.schema_arrow.field("x")
    assert vectors.is_vector(field) and vectors.shape_of(field) == (np.dtype(dtype), 7)
    for batch in (*read.iter_batches(9), read.read().combine_chunks().to_batches()[0].slice(5, 20)):
        places = batch.column(0).to_numpy()
        assert batch.column(2).is_null().to_numpy(False).tolist() == (row[places] < 0).tolist()
        found = vectors.numbers(batch.column(2), field)
        some = row[places] >= 0
        assert (found[some] == values[row[places][some]]).all()
    lists = vectors.as_lists(read.read()["x"], field)
    assert lists.type == kind
    expected = np.where(row[:, None] < 0, np.nan, values[row])
    np.testing.assert_array_equal(np.asarray(lists.to_pylist(), dtype), expected.astype(dtype))
    # NumPy alone, as the module says.
    plain = np.frombuffer(b"".join(read.read()["x"].drop_null().to_pylist()), dtype)
    assert (plain.reshape(-1, 7) == values[row[row >= 0]]).all()


def test_loads_are_of_length_one_from_any_dtype_and_refuse_what_has_no_direction():
    mesh = local_mesh()
    x = np.random.default_rng(1).standard_normal((700, 5))
    expected = x / np.linalg.norm(x, axis=1, keepdims=True)
    for dtype, error in ((np.float16, 1e-3), (np.float32, 1e-6)):
        parts = [
            (np.arange(400), x[:400].astype(dtype)),
            (np.arange(400, 700), x[400:].astype(dtype)),
        ]
        for rows, tiles, valid in loads(parts, mesh):
            found = np.asarray(tiles).reshape(-1, 5)[np.asarray(valid).reshape(-1)]
            np.testing.assert_allclose(found, expected[rows], atol=error)
    for bad in (0.0, np.nan, np.inf):
        broken = x.astype(np.float32)
        broken[650] = bad
        parts = [(np.arange(400), broken[:400]), (np.arange(400, 700), broken[400:])]
        with pytest.raises(ArtifactError, match="row 650: the embedding has length"):
            list(loads(parts, mesh, "row"))
