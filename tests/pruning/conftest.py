"""A small vocabulary and small corpora, made by the stages themselves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pruning import corpus, vocabulary_training
from pruning.corpus import Corpus, IngestConfig
from pruning.sources import JsonlSource

_WORDS = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will more no if out
so said what up its about into than them can only other new some could time yes very like river
mountain garden teacher letter winter summer question answer number
"""


def english(words: int, seed: int) -> str:
    """Sentences of common words, the same for the same seed."""
    rng = random.Random(seed)
    vocabulary = _WORDS.split()
    sentences = []
    while words > 0:
        count = min(words, rng.randint(4, 12))
        sentence = " ".join(rng.choices(vocabulary, k=count))
        sentences.append(sentence.capitalize() + rng.choice([".", ".", "?", "!"]))
        words -= count
    return " ".join(sentences)


def _records(count: int, seed: int, words: int = 40) -> list[dict]:
    return [
        {"text": english(1 + (seed + i * 7) % words, seed * 1000 + i), "n": i} for i in range(count)
    ]


@pytest.fixture(scope="session")
def records() -> Callable[..., list[dict]]:
    """`records(count, seed, words=40)`: JSON records with texts of 1 to `words` words."""
    return _records


@pytest.fixture(scope="session")
def small_vocabulary_file(tmp_path_factory) -> Path:
    """A SentencePiece model of 240 pieces with T5's special ids; it knows "yes" and "no"."""
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    texts = [english(200, seed) for seed in range(200)]
    path.write_bytes(vocabulary_training.train(texts, 240, words=("yes", "no", "###")))
    return path


def write_jsonl(path: Path, records: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def make_corpus(small_vocabulary_file) -> Callable[..., Corpus]:
    """Ingests JSON lines: `make_corpus(directory, [[record, ...] per shard], **settings)`."""

    def make(directory: Path, shards: Sequence[Sequence[dict]], **settings) -> Corpus:
        directory.mkdir(parents=True, exist_ok=True)
        for index, records in enumerate(shards):
            write_jsonl(directory / f"part-{index:03d}.jsonl", records)
        defaults = {
            "source": JsonlSource((str(directory),)),
            "vocabulary": str(small_vocabulary_file),
            "output": str(directory / "corpus"),
            "workers": 1,
        }
        return Corpus(corpus.run(IngestConfig(**defaults | settings)))

    return make
