"""The scoring engine's host side alone: how many documents a second can it feed to a device?

    python benchmarks/engine_host.py --corpus=runs/c4/corpus
    python benchmarks/engine_host.py --documents=1000000 --scorers=nothing

Everything is real but the device step, which answers with zeros at once: reading the corpus,
windows, packing, filling batches, unpacking, columns, the Parquet writer. Documents per second of
CPU time (all threads, user and system) is documents per second and core.

Without a corpus it makes one of random ids with the lengths of C4 (log-normal: mean 436 tokens,
median 279), a row group at a time, and says how much memory scoring it took. The scorer "nothing"
takes the first 512 tokens of every document and gives 0: the engine without any scorer.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from models.model import Model
from models.packing import Side, Windows
from models.published import NAMED
from pruning.corpus.layout import KIND, schema_of
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.model import engine, estimate
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.batches import Reader
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.scorer import Documents, Prepared, Scorer, Scores
from pruning.scores.score_set import Column
from pruning.scores.score_set import schema_of as scores_schema
from pruning.store import progress
from pruning.store.build import Build

ROW_GROUP = 1024  # documents


class Nothing:
    """The first 512 tokens of a document, and 0 for it."""

    def prepare(self, model, vocabulary) -> Prepared:
        def windows(documents: Documents) -> Windows:
            some = np.flatnonzero(documents.lengths)
            shown, _ = documents.take(some).cut(512)
            features = {"decoder_input_tokens": shown.tokens}
            return Windows(some, (Side("decoder", shown.offsets, features),))

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            return Scores({"zero": np.zeros(len(documents), np.float32)})

        columns = {"zero": Column(pa.float32(), "nothing")}
        return Prepared("nothing", columns, ("decoder",), (512,), (), windows, None, finish)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="a corpus in T5's vocabulary")
    parser.add_argument("--documents", type=int, default=100_000, help="of a corpus made up")
    parser.add_argument("--vocabulary", type=Path, help="a SentencePiece model, for the prompt")
    parser.add_argument("--row_length", type=int, default=1024)
    parser.add_argument("--batch_rows", type=int, default=64)
    parser.add_argument("--shard", type=int, default=50_000, help="documents of a shard made up")
    parser.add_argument("--scorers", help="some of those below, with commas; all by default")
    options = parser.parse_args()
    scorers: dict[str, Scorer] = {
        "causal": Likelihood("causal"),
        "prefix": Likelihood("prefix"),
        "span": Likelihood("span"),
        "nothing": Nothing(),
    }
    with tempfile.TemporaryDirectory() as directory:
        path = options.corpus
        if path is None:
            path = Path(directory) / "corpus"
            make_corpus(path, options.documents, options.shard)
        corpus = load_corpus(path)
        vocabulary = corpus.vocabulary
        if options.vocabulary is not None:
            vocabulary = Vocabulary.from_file(options.vocabulary)
        if vocabulary.kind == "sentencepiece":
            scorers = {"ask_llm": AskLLM()} | scorers
        else:  # a question of about as many ids, in bytes
            scorers = {"ask_llm": AskLLM("#" * 79 + " {document}", ("y",), ("n",))} | scorers
        manifest = corpus.artifact.manifest
        print(f"{manifest.rows:,} documents, {manifest.tokens:,} tokens")
        print(f"{'':24} documents/s   and core   padding   peak memory")
        for name in options.scorers.split(",") if options.scorers else scorers:
            scorer = scorers[name]
            feed(name, scorer, corpus, vocabulary, options, Path(directory))


def feed(name, scorer, corpus: Corpus, vocabulary, options, directory: Path) -> None:
    """Scores the corpus with nothing and prints a line."""
    model = Model(NAMED["flan_t5_small"])
    prepared = scorer.prepare(model, vocabulary)
    costs = estimate.Costs(model.config, prepared.sides)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    # "prefix" cannot fill shorter rows: see the log.
    row_length = max(options.row_length, 2048 if name == "prefix" else 0)
    row_lengths = estimate.choose_row_lengths(prepared, costs, windows, row_length)
    reader = Reader(corpus, None, prepared, row_lengths, options.batch_rows)
    shape = (options.batch_rows, row_lengths[-1], *prepared.answer_shape)
    answers = np.zeros(shape, np.float32)
    inputs = {"corpus": corpus.artifact}
    schema = scores_schema(prepared.columns)
    output = directory / name
    build = Build(output, engine.KIND, {}, inputs, corpus.num_shards, schema)

    wall, cpu = time.perf_counter(), time.process_time()
    engine.score(reader, build.pending(), lambda rows: answers, build)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    build.finish()
    measured = sum_of(output)
    documents = corpus.artifact.manifest.rows
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:24} {documents / wall:11,.0f} {documents / cpu:10,.0f}"
        f" {100 * (1 - measured['model_tokens'] / measured['positions']):8.1f}% {memory:10,.0f} MB"
    )


def sum_of(output: Path) -> dict[str, float]:
    import json

    return json.loads((output / "measured.json").read_text())


def make_corpus(path: Path, documents: int, shard_documents: int) -> None:
    """Random ids in documents of C4's lengths; a row group at a time."""
    vocabulary = Vocabulary("bytes", b"", 125)
    schema = schema_of(vocabulary, [])
    shards = -(-documents // shard_documents)
    build = Build(path, KIND, {"made": "random"}, {}, shards, schema)
    with progress.track("make", documents, "documents") as task:
        for shard in build.pending():
            rng = np.random.default_rng(shard)
            count = min(shard_documents, documents - shard * shard_documents)
            with build.shard(shard) as writer:
                for first in range(0, count, ROW_GROUP):
                    table = some_documents(
                        rng, (shard << 32) + first, min(ROW_GROUP, count - first)
                    )
                    writer.write(table, row_group_size=ROW_GROUP)
                    writer.tokens += len(table["tokens"].combine_chunks().values)
            task.advance(count)
    build.finish({"vocabulary": vocabulary.describe(), "metadata": []})


def some_documents(rng: np.random.Generator, first_id: int, count: int) -> pa.Table:
    lengths = np.exp(rng.normal(np.log(279), 0.944, count)).clip(1, 20_000).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = rng.integers(3, 259, offsets[-1], dtype=np.uint16)
    columns = {
        "doc_id": first_id + np.arange(count),
        "text": pa.array([""] * count, pa.large_string()),
        "tokens": pa.ListArray.from_arrays(offsets, tokens),
        "n_tokens": lengths,
        "n_bytes": lengths,
        "text_hash": np.zeros(count, np.uint64),
    }
    return pa.table(columns, schema=schema_of(Vocabulary("bytes", b"", 125), []))


if __name__ == "__main__":
    main()
