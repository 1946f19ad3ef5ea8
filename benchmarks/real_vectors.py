"""Real documents as vectors, for benchmarks that need an embedding and no model."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from pruning.scores.text.hashing import Features, batches, hashed_ngrams
from pruning.scores.text.linear import Bags

DATA = Path(os.environ.get("WINNOW_DATA", Path(__file__).parents[2] / "shared" / "data"))


def vectors(documents: int, width: int) -> np.ndarray:
    """Real documents as points, C4 and film reviews: float32 [documents, width], of length 1."""
    texts: list[str] = []
    for name in ("c4/c4_real_merged", "imdb/aclImdb_train_lab", "imdb/aclImdb_train_unsup"):
        with gzip.open(DATA / "corpus" / f"{name}.jsonl.gz", "rt") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    return semantic(texts[:documents], width)


def semantic(texts: Sequence[str], width: int) -> np.ndarray:
    """Texts by latent semantic analysis: float32 [texts, width], of length 1.

    Logarithms of word counts, projected on their leading singular directions (Halko et al. 2011).
    No trained embedding is needed.
    """
    documents, features = len(texts), Features(1, 1 << 15)
    column = pa.array(texts, pa.large_string())
    bags = Bags.join([Bags.of(hashed_ngrams(batch, features)) for batch in batches(column)])
    matrix = bags.matrix(features.buckets)
    found = np.bincount(bags.buckets, minlength=features.buckets)
    matrix = matrix.multiply(np.log(documents / np.maximum(found, 1)).astype(np.float32)).tocsr()
    random = np.random.default_rng(0).standard_normal((features.buckets, width + 16))
    basis = np.linalg.qr(matrix @ random.astype(np.float32))[0]
    for _ in range(2):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    directions = np.linalg.svd(basis.T @ matrix, full_matrices=False)[2][:width]
    x = np.asarray(matrix @ directions.T, np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
