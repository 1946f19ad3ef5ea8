"""Columns of a corpus, how they are encoded, and document ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.corpus.tokenizers import Tokenizer

KIND = "corpus"

ROW_GROUP = 1024  # documents

FIXED: dict[str, pa.DataType] = {
    "doc_id": pa.int64(),
    "text": pa.large_string(),
    "tokens": pa.list_(pa.uint16()),
    "n_tokens": pa.int32(),
    "n_bytes": pa.int32(),
    "text_hash": pa.uint64(),
}

# Columns of a corpus of split documents, strings as other metadata.
PARTS = ("source_document", "part", "parts")


def doc_ids(shard: int, rows: np.ndarray) -> np.ndarray:
    """Return document ids, shard << 32 | row, int64 in the shape of `rows`."""
    return (np.int64(shard) << 32) + rows


def shards_of(doc_ids: np.ndarray) -> np.ndarray:
    """Return the corpus shards that documents are in."""
    return doc_ids >> 32


def rows_of(doc_ids: np.ndarray) -> np.ndarray:
    """Return the rows of documents within their corpus shards."""
    return doc_ids & 0xFFFF_FFFF


def column_of(field: str) -> str:
    return field.rpartition(".")[2]


def schema_of(vocabulary: Tokenizer, metadata: Sequence[str]) -> pa.Schema:
    """Return the schema of a corpus; tokens are uint16 unless there are more than 65,535 ids."""
    wide = vocabulary.size > np.iinfo(np.uint16).max
    fixed = FIXED | {"tokens": pa.list_(pa.uint32() if wide else pa.uint16())}
    return pa.schema([*fixed.items(), *((column_of(field), pa.string()) for field in metadata)])


def encoding_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the Parquet settings of these columns (reasons: pruning/corpus/ingest.py)."""
    metadata = [name for name in schema.names if name not in FIXED]
    zstd = dict.fromkeys(("doc_id", "text", "tokens.list.element"), "zstd")
    return {
        "use_dictionary": metadata,
        "compression": zstd | dict.fromkeys(metadata, "lz4"),
        "column_encoding": {"tokens.list.element": "BYTE_STREAM_SPLIT"},
        # The least and the greatest text of a row group would be of use to nobody.
        "write_statistics": [n for n in schema.names if n not in ("text", "tokens")],
    }
