"""Small artefacts, written as the stages write them, for the views of a corpus to be tested on."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pruning import artefact
from pruning.artefact import Artefact
from pruning.vocabulary import Vocabulary

BYTES = Vocabulary("bytes", b"", 125)

Documents = Sequence[Sequence[Sequence[int]]]  # shard -> document -> tokens


def write_corpus(
    path: Path,
    documents: Documents,
    *,
    domains: Sequence[Sequence[str | None]] | None = None,
    doc_ids: Sequence[np.ndarray] | None = None,
    row_group: int = 1024,
    vocabulary: Vocabulary = BYTES,
) -> Artefact:
    """A corpus of the given documents; `doc_ids` are shard << 32 | row unless given."""
    columns = {
        "doc_id": pa.int64(),
        "text": pa.large_string(),
        "tokens": pa.list_(pa.uint16()),
        "n_tokens": pa.int32(),
    } | ({} if domains is None else {"domain": pa.string()})
    schema = pa.schema(list(columns.items()))
    build = artefact.Build(path, "corpus", {"name": path.name}, {}, len(documents), schema)
    for k, of_shard in enumerate(documents):
        with build.shard(k) as shard:
            ids = (np.int64(k) << 32) + np.arange(len(of_shard)) if doc_ids is None else doc_ids[k]
            values = {
                "doc_id": ids,
                "text": [vocabulary.decode(tokens) for tokens in of_shard],
                "tokens": list(of_shard),
                "n_tokens": [len(tokens) for tokens in of_shard],
            } | ({} if domains is None else {"domain": domains[k]})
            shard.write(values, row_group)
            shard.tokens = sum(map(len, of_shard))
    if vocabulary.kind != "bytes":
        build.write_file("vocabulary.model", vocabulary.model)
    return build.finish({"vocabulary": vocabulary.describe(), "metadata": list(columns)[4:]})


def write_scores(
    path: Path,
    corpus: Artefact,
    columns: Mapping[str, Sequence[np.ndarray]],
    status: Sequence[Sequence[str]] | None = None,
    doc_ids: Sequence[np.ndarray] | None = None,
) -> Artefact:
    """A score set: column -> shard -> values."""
    word = pa.dictionary(pa.int32(), pa.string())
    types_ = {name: pa.from_numpy_dtype(parts[0].dtype) for name, parts in columns.items()}
    schema = pa.schema([("doc_id", pa.int64()), ("status", word), *types_.items()])
    config = {"name": path.name}
    build = artefact.Build(path, "scores", config, {"corpus": corpus}, corpus.num_shards, schema)
    for k in range(corpus.num_shards):
        rows = corpus.manifest.shards[k].rows
        ids = (np.int64(k) << 32) + np.arange(rows) if doc_ids is None else doc_ids[k]
        words = pa.array(["ok"] * rows if status is None else list(status[k]), pa.string())
        with build.shard(k) as shard:
            shard.write(
                {"doc_id": ids, "status": words.dictionary_encode()}
                | {name: parts[k] for name, parts in columns.items()}
            )
    return build.finish()


def random_documents(counts: Sequence[int], seed: int = 0, longest: int = 60) -> Documents:
    """Documents of random bytes, `counts[k]` of them in shard k."""
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(3, 259, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
        for count in counts
    ]


@pytest.fixture(scope="session")
def artefacts():
    """Writers of small artefacts."""
    return types.SimpleNamespace(
        vocabulary=BYTES, corpus=write_corpus, scores=write_scores, documents=random_documents
    )
