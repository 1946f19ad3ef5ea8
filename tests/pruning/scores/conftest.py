"""Small corpora and score sets, written as the stages write them."""

from __future__ import annotations

import types

import numpy as np
import pytest

from pruning.corpus.reader import Corpus
from pruning.store.artifact import Artifact


@pytest.fixture
def write(artifacts):
    """Writers of small corpora, opened for reading, and of score sets of them."""

    def corpus(path, shards, **settings) -> Corpus:
        return Corpus(artifacts.corpus(path, shards, row_group=100, **settings))

    def scores(path, corpus: Corpus, columns, statuses=None) -> Artifact:
        return artifacts.scores(path, corpus.artifact, columns, statuses)

    return types.SimpleNamespace(corpus=corpus, scores=scores)


@pytest.fixture
def column():
    """Reads a column of a whole score set as float64, NaN where it is null."""

    def read(scores: Artifact, name: str) -> np.ndarray:
        parts = [scores.read(k, [name])[name].to_numpy() for k in range(scores.num_shards)]
        return np.concatenate([part.astype(np.float64) for part in parts])

    return read
