"""SemDeDup on planted near-twins of real documents: what it finds, and what it takes with it.

    python benchmarks/semdedup.py --model runs/junk/span --vocabulary runs/junk/vocabulary

Documents of C4, some of them once more with 1, 2, 5 or 10% of their words replaced by words of
other documents. The real stages embed, cluster and look for twins, with two embeddings: latent
semantic analysis, and (with --model) the mean encoder output of a T5. Printed for several epsilons,
from one pass of similarities: which share of the planted pairs lost a member (recall), which share
of all that was dropped belongs to a planted pair (precision; C4 has twins of its own, which count
against it), how many were dropped, and how many pairs lost both.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
from pathlib import Path

from pruning.store.randomness import Stream

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pyarrow as pa
from real_vectors import DATA, semantic

from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import Corpus
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores.model.embedding import Embedding
from pruning.scores.space import kmeans, semdedup
from pruning.scores.space.kmeans import KMeansConfig
from pruning.scores.space.semdedup import SemDeDupConfig
from pruning.store import randomness
from pruning.store.build import Build

SHARES = (0.01, 0.02, 0.05, 0.1)
EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2)
PER_SHARE = 120
LENGTHS = (600, 3000)  # characters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=2500)
    parser.add_argument("--clusters", type=int, default=20)
    parser.add_argument("--model")
    parser.add_argument("--vocabulary", default=str(DATA / "tokenizer" / "t5-base.spiece.model"))
    given = parser.parse_args()
    texts, pairs = planted(given.documents)
    print(f"{len(texts):,} documents, {len(pairs)} planted copies, {given.clusters} clusters")
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (at / "texts.jsonl").write_text(lines)
        ingested = ingest.run(
            IngestConfig(
                source=JsonlSource(paths=(str(at / "texts.jsonl"),)),
                vocabulary=given.vocabulary,
                output=str(at / "corpus"),
                workers=1,
            )
        )
        opened = Corpus(ingested)
        found = {"latent semantic analysis, 128": write(at / "lsa", opened, semantic(texts, 128))}
        if given.model:
            found["mean output of a T5's encoder"] = embed(at, given.model)
        for name, embeddings in found.items():
            report(name, twins(at, embeddings, given.clusters), pairs)


def planted(documents: int) -> tuple[list[str], np.ndarray]:
    """Texts, and int64 [copies, 3]: original, copy, and how many percent were changed."""
    with gzip.open(DATA / "corpus/c4/c4_real_merged.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    texts = [r["text"] for r in rows if LENGTHS[0] <= len(r["text"]) <= LENGTHS[1]][:documents]
    words = np.asarray([word for text in texts for word in text.split(" ") if word])
    pairs = []
    for number in range(PER_SHARE * len(SHARES)):
        share = SHARES[number % len(SHARES)]
        random = randomness.generator(Stream.EXPERIMENT, 0, number)
        changed = texts[number].split(" ")
        places = random.permutation(len(changed))[: max(1, round(share * len(changed)))]
        for place in places.tolist():
            changed[place] = str(words[random.integers(len(words))])
        pairs.append((number, len(texts), round(100 * share)))
        texts.append(" ".join(changed))
    return texts, np.asarray(pairs)


def write(path: Path, opened: Corpus, vectors: np.ndarray) -> Path:
    """Vectors, in the corpus's order, as the score set of an embedding scorer."""
    kind = pa.list_(pa.float32(), vectors.shape[1])
    word = pa.dictionary(pa.int8(), pa.string())
    schema = pa.schema([("doc_id", pa.int64()), ("status", word), ("embedding", kind)])
    inputs = {"corpus": opened.artifact}
    build = Build(path, "scores", {"embedding": "lsa"}, inputs, opened.num_shards, schema)
    first = 0
    for k in range(opened.num_shards):
        ids = opened.columns(k, ["doc_id"])["doc_id"]
        flat = pa.array(vectors[first : first + len(ids)].reshape(-1))
        first += len(ids)
        with build.shard(k) as shard:
            status = pa.array(["ok"] * len(ids)).cast(word)
            column = pa.FixedSizeListArray.from_arrays(flat, type=kind)
            shard.write({"doc_id": ids, "status": status, "embedding": column})
            shard.counts = {"documents": {"ok": len(ids)}}
    build.finish()
    return path


def embed(at: Path, model: str) -> Path:
    from pruning.scores.model import engine
    from pruning.scores.model.engine import ScoreConfig

    engine.run(
        ScoreConfig(
            corpus=str(at / "corpus"),
            output=str(at / "t5"),
            scorer=Embedding(max_tokens=512, store="float32"),
            model=model,
            row_length=1024,
            batch_rows=4,
            dtype="float32",
            compilation_cache=None,
        )
    )
    return at / "t5"


def twins(at: Path, embeddings: Path, clusters: int) -> np.ndarray:
    """Similarity to the nearest twin that is kept first, float64 [documents]."""
    where = {"corpus": str(at / "corpus"), "embeddings": str(embeddings)}
    clustered = f"{embeddings}_clusters"
    kmeans.run(KMeansConfig(**where, output=clustered, clusters=clusters))
    made = semdedup.run(SemDeDupConfig(**where, clusters=clustered, output=f"{embeddings}_twins"))
    assert made is not None  # one worker
    return made.read(0, ["twin_similarity"])["twin_similarity"].to_numpy().astype(np.float64)


def report(name: str, similarity: np.ndarray, pairs: np.ndarray) -> None:
    original, copy, percent = pairs.T
    in_pair = np.zeros(len(similarity), bool)
    in_pair[original] = in_pair[copy] = True
    changes = sorted(set(percent.tolist()))
    head = " | ".join(f"{change}%" for change in changes)
    print(f"\n{name}\n| epsilon | {head} | precision | dropped | both |")
    for epsilon in EPSILONS:
        dropped = similarity > 1 - epsilon
        lost = dropped[original] | dropped[copy]
        recall = " | ".join(f"{lost[percent == c].mean():.2f}" for c in changes)
        precision = in_pair[dropped].mean() if dropped.any() else float("nan")
        both = np.count_nonzero(dropped[original] & dropped[copy])
        print(f"| {epsilon} | {recall} | {precision:.2f} | {np.count_nonzero(dropped)} | {both} |")


if __name__ == "__main__":
    main()
