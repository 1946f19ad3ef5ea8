"""The scoring engine's host side alone: how many documents a second can it feed to a device?

    python benchmarks/engine_host.py --corpus=runs/c4/corpus --documents=100000

Everything is real but the device step, which answers with zeros at once: reading the corpus,
windows, packing, filling batches, unpacking, columns, the Parquet writer. Documents per second of
CPU time (all threads, user and system) is documents per second and core.

Without a corpus it makes one of random ids with the lengths of C4 (log-normal: mean 436 tokens,
median 279), in constant memory, and says how much memory scoring it took.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from models.config import NAMED
from models.model import Model
from pruning import progress
from pruning.artefact import Build
from pruning.corpus import KIND, Corpus, load_corpus, schema_of
from pruning.scorers import Scorer
from pruning.scorers.ask_llm import AskLLM
from pruning.scorers.likelihood import Likelihood
from pruning.scoring import engine, estimate
from pruning.scoring.batches import Reader
from pruning.scoring.batches import schema_of as scores_schema
from pruning.vocabulary import Vocabulary

SHARD = 50_000  # documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a corpus in T5's vocabulary")
    parser.add_argument("--documents", type=int, default=100_000, help="of a corpus made up")
    parser.add_argument("--vocabulary", type=Path, help="a SentencePiece model, for the prompt")
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--batch_rows", type=int, default=64)
    options = parser.parse_args()
    scorers: dict[str, Scorer] = {
        "likelihood, causal": Likelihood("causal"),
        "likelihood, prefix": Likelihood("prefix"),
        "likelihood, span": Likelihood("span"),
    }
    with tempfile.TemporaryDirectory() as directory:
        path = options.corpus
        if path is None:
            path = Path(directory) / "corpus"
            make_corpus(path, options.documents)
        corpus = load_corpus(path)
        vocabulary = corpus.vocabulary
        if options.vocabulary is not None:
            vocabulary = Vocabulary.from_file(options.vocabulary)
        if vocabulary.kind == "sentencepiece":
            scorers = {"Ask-LLM": AskLLM()} | scorers
        else:  # a question of about as many ids, in bytes
            scorers = {"Ask-LLM": AskLLM("#" * 79 + " {document}", ("y",), ("n",))} | scorers
        manifest = corpus.artefact.manifest
        print(f"{manifest.rows:,} documents, {manifest.tokens:,} tokens")
        print(f"{'':24} documents/s   and core   padding   peak memory")
        for name, scorer in scorers.items():
            feed(name, scorer, corpus, vocabulary, options, Path(directory))


def feed(name, scorer, corpus: Corpus, vocabulary, options, directory: Path) -> None:
    """Scores the corpus with nothing and prints a line."""
    model = Model(NAMED["flan_t5_small"])
    prepared = scorer.prepare(model, vocabulary)
    costs = estimate.Costs(model.config, prepared.sides)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    row_lengths = estimate.choose_row_lengths(prepared, costs, windows, options.row_length)
    reader = Reader(corpus, None, prepared, row_lengths, options.batch_rows)
    shape = (options.batch_rows, row_lengths[-1], *prepared.answer_shape)
    answers = np.zeros(shape, np.float32)
    inputs = {"corpus": corpus.artefact}
    schema = scores_schema(prepared.columns)
    output = directory / name.replace(", ", "_")
    build = Build(output, engine.KIND, {}, inputs, corpus.num_shards, schema)

    wall, cpu = time.perf_counter(), time.process_time()
    engine.score(reader, build.pending(), lambda rows: answers, build)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    build.finish()
    measured = sum_of(output)
    positions = measured["rows"] * sum(row_lengths)
    documents = corpus.artefact.manifest.rows
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:24} {documents / wall:11,.0f} {documents / cpu:10,.0f}"
        f" {100 * (1 - measured['model_tokens'] / positions):8.1f}% {memory:10,.0f} MB"
    )


def sum_of(output: Path) -> dict[str, float]:
    import json

    return json.loads((output / "measured.json").read_text())


def make_corpus(path: Path, documents: int) -> None:
    """Random ids in documents of C4's lengths; a shard at a time."""
    vocabulary = Vocabulary("bytes", b"", 125)
    schema = schema_of(vocabulary, [])
    shards = -(-documents // SHARD)
    build = Build(path, KIND, {"made": "random"}, {}, shards, schema)
    with progress.track("make", documents, "documents") as task:
        for shard in build.pending():
            rng = np.random.default_rng(shard)
            count = min(SHARD, documents - shard * SHARD)
            lengths = np.exp(rng.normal(np.log(279), 0.944, count)).clip(1, 20_000).astype(np.int32)
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            tokens = rng.integers(3, 259, offsets[-1], dtype=np.uint16)
            columns = {
                "doc_id": (shard << 32) + np.arange(count),
                "text": pa.array([""] * count, pa.large_string()),
                "tokens": pa.ListArray.from_arrays(offsets, tokens),
                "n_tokens": lengths,
                "n_bytes": lengths,
                "text_hash": np.zeros(count, np.uint64),
            }
            with build.shard(shard) as writer:
                writer.write(pa.table(columns, schema=schema), row_group_size=1024)
                writer.tokens = int(lengths.sum())
            task.advance(count)
    build.finish({"vocabulary": vocabulary.describe(), "metadata": []})


if __name__ == "__main__":
    main()
