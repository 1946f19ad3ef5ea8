"""Hashed n-grams: megabytes of text per CPU second, against the usual ways in Python.

    python benchmarks/ngrams.py

Text: the C4 documents under WINNOW_DATA. All on one thread; CPU seconds.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa

from pruning.scores.text.hashing import Features, batches, hashed_ngrams
from pruning.scores.text.linear import Bags, Linear

DATA = Path(os.environ.get("WINNOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
FEATURES = Features(2, 10_000)
WIDE = Features(2, 1 << 20)


def hashing(texts: list[str], column: pa.Array) -> None:
    for batch in batches(column):
        hashed_ngrams(batch, FEATURES)


def counting(texts: list[str], column: pa.Array) -> None:
    total = np.zeros(FEATURES.buckets, np.int64)
    for batch in batches(column):
        total += hashed_ngrams(batch, FEATURES).counts(FEATURES.buckets)


def importance_weights(texts: list[str], column: pa.Array) -> None:
    table = np.linspace(-1, 1, FEATURES.buckets)
    for batch in batches(column):
        hashed_ngrams(batch, FEATURES).sums(table)


def linear_model(texts: list[str], column: pa.Array) -> None:
    model = Linear(WIDE, np.ones(WIDE.buckets, np.float32), 0.0)
    for batch in batches(column):
        model(Bags.of(hashed_ngrams(batch, WIDE)))


def python_hash(texts: list[str], column: pa.Array) -> None:
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        counts = np.zeros(FEATURES.buckets, np.int32)
        for gram in itertools.chain(words, itertools.pairwise(words)):
            counts[hash(gram) % FEATURES.buckets] += 1


def python_sha256(texts: list[str], column: pa.Array) -> None:
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        counts = np.zeros(FEATURES.buckets, np.int32)
        for gram in itertools.chain(words, map(" ".join, itertools.pairwise(words))):
            digest = hashlib.sha256(gram.encode()).hexdigest()
            counts[int(digest, 16) % FEATURES.buckets] += 1


def scikit_learn(texts: list[str], column: pa.Array) -> None:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=FEATURES.buckets, ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]+", norm=None
    )
    vectorizer.transform(texts)


def main() -> None:
    with gzip.open(DATA / "corpus" / "c4" / "c4_real_merged.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    runs: dict[str, tuple[Callable[[list[str], pa.Array], None], int]] = {
        "hash uni- and bigrams": (hashing, 1),
        "count buckets (DSIR, fit)": (counting, 1),
        "importance weights (DSIR)": (importance_weights, 1),
        "linear model (classifier)": (linear_model, 1),
        "Python loop, hash()": (python_hash, 10),
        "Python loop, SHA-256": (python_sha256, 20),
        "scikit-learn's HashingVectorizer": (scikit_learn, 10),
    }
    for name, (run, part) in runs.items():
        some = texts[: len(texts) // part]
        column = pa.array(some, pa.large_string())
        megabytes = sum(len(text.encode()) for text in some) / 1e6
        run(some[:50], column[:50])
        best = np.inf
        for _ in range(3):
            start = time.process_time()
            run(some, column)
            best = min(best, time.process_time() - start)
        print(f"{name:34} {megabytes / best:8.2f} MB/s")


if __name__ == "__main__":
    main()
