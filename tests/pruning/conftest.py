"""A small vocabulary and small corpora, made by the stages themselves."""

from __future__ import annotations

import json
import random
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pruning.corpus import ingest, vocabulary_training
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import Corpus
from pruning.corpus.sources import JsonlSource
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.score_set import schema_of
from pruning.store.artifact import Artifact
from pruning.store.build import Build

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
        return Corpus(ingest.run(IngestConfig(**defaults | settings)))

    return make


BYTES = Vocabulary("bytes", b"", 125)

Documents = Sequence[Sequence[Sequence[int] | str]]  # shard -> document -> tokens, or the text


def write_corpus(
    path: Path,
    documents: Documents,
    *,
    domains: Sequence[Sequence[str | None]] | None = None,
    doc_ids: Sequence[np.ndarray] | None = None,
    row_group: int = 1024,
    vocabulary: Vocabulary = BYTES,
) -> Artifact:
    """A corpus of the given documents; `doc_ids` are shard << 32 | row unless given."""
    columns = {
        "doc_id": pa.int64(),
        "text": pa.large_string(),
        "tokens": pa.list_(pa.uint16()),
        "n_tokens": pa.int32(),
    } | ({} if domains is None else {"domain": pa.string()})
    schema = pa.schema(list(columns.items()))
    build = Build(path, "corpus", {"name": path.name}, {}, len(documents), schema)
    for k, of_shard in enumerate(documents):
        tokens = [vocabulary.encode(each) if isinstance(each, str) else each for each in of_shard]
        texts = [each if isinstance(each, str) else vocabulary.decode(each) for each in of_shard]
        with build.shard(k) as shard:
            ids = (np.int64(k) << 32) + np.arange(len(of_shard)) if doc_ids is None else doc_ids[k]
            values = {
                "doc_id": ids,
                "text": texts,
                "tokens": tokens,
                "n_tokens": [len(ids) for ids in tokens],
            } | ({} if domains is None else {"domain": domains[k]})
            shard.write(values, row_group)
            shard.tokens = sum(map(len, tokens))
    if vocabulary.kind != "bytes":
        build.write_file("vocabulary.model", vocabulary.model)
    return build.finish({"vocabulary": vocabulary.describe(), "metadata": list(columns)[4:]})


def write_scores(
    path: Path,
    corpus: Artifact,
    columns: Mapping[str, Sequence[np.ndarray]],
    statuses: Mapping[tuple[int, int], str] | None = None,
    doc_ids: Sequence[np.ndarray] | None = None,
) -> Artifact:
    """A score set: column -> shard -> values [n] or vectors [n, width].

    Args:
      statuses: (shard, row) -> status, where it is not "ok"; there the values are null.
    """
    kinds = {name: _kind(parts[0]) for name, parts in columns.items()}
    # Vectors are lists, as in score sets of earlier versions.
    schema = pa.schema([*schema_of({}), *kinds.items()])
    config = {"name": path.name}
    build = Build(path, "scores", config, {"corpus": corpus}, corpus.num_shards, schema)
    for k in range(corpus.num_shards):
        names = ["ok"] * corpus.manifest.shards[k].rows
        for (shard, row), name in (statuses or {}).items():
            if shard == k:
                names[row] = name
        null = np.asarray(names) != "ok"
        with build.shard(k) as shard:
            shard.write(
                {
                    "doc_id": (np.int64(k) << 32) + np.arange(len(names))
                    if doc_ids is None
                    else doc_ids[k],
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


def random_documents(counts: Sequence[int], seed: int = 0, longest: int = 60) -> Documents:
    """Documents of random bytes, `counts[k]` of them in shard k."""
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(3, 259, rng.integers(1, longest + 1)).tolist() for _ in range(count)]
        for count in counts
    ]


@pytest.fixture(scope="session")
def artifacts():
    """Writers of small artifacts."""
    return types.SimpleNamespace(
        vocabulary=BYTES, corpus=write_corpus, scores=write_scores, documents=random_documents
    )


@pytest.fixture(scope="session")
def english_texts() -> list[str]:
    """Texts of a few lines each, with punctuation, numbers and other scripts in some."""
    texts = [english(60, seed) for seed in range(60)]
    lines = [
        "1,024 items (32%) — naïve café",
        "\ttabs\tand\n\n\nempty lines...",
        "漢字 и кириллица",
    ]
    return [text + "\n" + lines[i % 3] if i % 4 else text for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory, english_texts) -> Callable[[str], Path]:
    """Style -> directory of a tokenizer in that style, as transformers saves it."""
    import importlib.util

    place = Path(__file__).with_name("tokenizer_styles.py")
    spec = importlib.util.spec_from_file_location("tokenizer_styles", place)
    styles = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(styles)
    made: dict[str, Path] = {}

    def directory(style: str) -> Path:
        if style not in made:
            made[style] = styles.save(style, tmp_path_factory.mktemp(style), english_texts, 600)
        return made[style]

    return directory
