"""Small corpora and score sets, written as the stages write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pruning import artefact
from pruning.corpus import Corpus
from pruning.scorers import Column
from pruning.scoring.batches import schema_of
from pruning.vocabulary import Vocabulary

VOCABULARY = Vocabulary("bytes", b"", 125)


def write_corpus(
    path: Path, shards: Sequence[Sequence[str]], vocabulary: Vocabulary = VOCABULARY
) -> Corpus:
    """A corpus of texts: shard -> document."""
    schema = pa.schema(
        [
            ("doc_id", pa.int64()),
            ("text", pa.large_string()),
            ("tokens", pa.list_(pa.uint16())),
            ("n_tokens", pa.int32()),
        ]
    )
    build = artefact.Build(path, "corpus", {"test": str(path)}, {}, len(shards), schema)
    for k, texts in enumerate(shards):
        tokens = vocabulary.encode_batch(texts)
        with build.shard(k) as shard:
            columns = {
                "doc_id": (np.int64(k) << 32) + np.arange(len(texts)),
                "text": list(texts),
                "tokens": tokens,
                "n_tokens": [len(ids) for ids in tokens],
            }
            shard.write(columns, row_group_size=100)
            shard.tokens = sum(map(len, tokens))
    if vocabulary.kind != "bytes":
        build.write_file("vocabulary.model", vocabulary.model)
    return Corpus(build.finish({"vocabulary": vocabulary.describe(), "metadata": []}))


def write_scores(
    path: Path,
    corpus: Corpus,
    columns: Mapping[str, Sequence[np.ndarray]],
    statuses: Mapping[tuple[int, int], str] | None = None,
) -> artefact.Artefact:
    """A score set: column -> shard -> values [n] or vectors [n, width].

    Args:
      statuses: (shard, row) -> status, where it is not "ok".
    """
    kinds = {name: _kind(parts[0]) for name, parts in columns.items()}
    schema = schema_of({name: Column(kind, name) for name, kind in kinds.items()})
    config = {"test": str(path)}
    inputs = {"corpus": corpus.artefact}
    build = artefact.Build(path, "scores", config, inputs, corpus.num_shards, schema)
    for k in range(corpus.num_shards):
        names = ["ok"] * corpus.documents(k)
        for (shard, row), name in (statuses or {}).items():
            if shard == k:
                names[row] = name
        null = np.asarray(names) != "ok"
        with build.shard(k) as shard:
            shard.write(
                {
                    "doc_id": (np.int64(k) << 32) + np.arange(len(names)),
                    "status": pa.array(names, schema.field("status").type),
                }
                | {name: _arrow(parts[k], null, kinds[name]) for name, parts in columns.items()}
            )
            shard.counts = {"documents": dict(Counter(names))}
    return build.finish()


def _kind(values: np.ndarray) -> pa.DataType:
    kind = pa.from_numpy_dtype(values.dtype)
    return kind if values.ndim == 1 else pa.list_(kind, values.shape[1])


def _arrow(values: np.ndarray, null: np.ndarray, kind: pa.DataType) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values, kind, mask=null)
    # A missing vector is zeros: pyarrow cannot read back a null one.
    flat = pa.array(np.where(null[:, None], 0, values).reshape(-1), kind.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=kind)


class Writers:
    corpus = staticmethod(write_corpus)
    scores = staticmethod(write_scores)


@pytest.fixture
def write():
    """Writers of small artefacts."""
    return Writers


@pytest.fixture
def column():
    """Reads a column of a whole score set as float64, NaN where it is null."""

    def read(scores: artefact.Artefact, name: str) -> np.ndarray:
        parts = [scores.read(k, [name])[name].to_numpy() for k in range(scores.num_shards)]
        return np.concatenate([part.astype(np.float64) for part in parts])

    return read
