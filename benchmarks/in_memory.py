"""Scores of texts in memory (`pruning.Judge`) beside those of the stage: speed and difference.

    python benchmarks/in_memory.py --files ../shared/data/corpus/c4/c4_real_merged.jsonl.gz

The stage (`python -m pruning score`) reads stored tokens of a corpus and writes a score set; in
memory the texts are tokenized, and nothing is written. Both are measured in this process, in turns,
in CPU seconds of all threads (on a busy machine the clock would measure the others), loading the
model included, after one pass of each that compiles. With `--texts` above the number of documents,
these are repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import pruning
from models import weights
from models.config import T5Config
from models.model import Model
from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import load_corpus
from pruning.corpus.sources import JsonlSource
from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", required=True, help="JSON lines, a file or a pattern")
    parser.add_argument("--vocabulary", required=True, help="T5's SentencePiece model")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--max_tokens", type=int, default=160, help="prompt and document")
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        at = Path(name)
        corpus = ingest.run(
            IngestConfig(JsonlSource((given.files,)), given.vocabulary, str(at / "all"), workers=1)
        )
        columns = load_corpus(corpus.path).columns
        read = (columns(k, ["text"])["text"].to_pylist() for k in range(corpus.num_shards))
        texts = list(itertools.islice(itertools.cycle(itertools.chain(*read)), given.texts))
        compare(texts, at, given)


def compare(texts: list[str], at: Path, given: argparse.Namespace) -> None:
    """Print documents per CPU second of both, their ratio, and the largest difference."""
    file = at / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    ingest.run(
        IngestConfig(JsonlSource((str(file),)), given.vocabulary, str(at / "corpus"), workers=1)
    )
    size = given.d_model
    model = Model(
        T5Config(
            vocab_size=32_128, d_model=size, d_kv=64, d_ff=2 * size, num_heads=max(size // 64, 1),
            num_encoder_layers=4, num_decoder_layers=4,
        )
    )  # fmt: skip
    weights.save(at / "model", model, model.init(jax.random.key(0)))
    scorer = AskLLM(max_tokens=given.max_tokens)
    shared = {"row_length": 512, "batch_rows": 16, "dtype": "float32"}

    def stage(number: int) -> np.ndarray:
        scores = engine.run(
            engine.ScoreConfig(
                corpus=str(at / "corpus"),
                output=str(at / f"scores-{number}"),
                scorer=scorer,
                model=str(at / "model"),
                tokenizer="corpus",
                compilation_cache=str(at / "compiled"),
                **shared,
            )
        )
        parts = [scores.read(k, ["ask_llm_yes"]) for k in range(scores.num_shards)]
        return np.concatenate([part["ask_llm_yes"].to_numpy() for part in parts])

    def memory(_: int) -> np.ndarray:
        judge = pruning.Judge(str(at / "model"), scorer, tokenizer=given.vocabulary, **shared)
        return judge.score(texts)["ask_llm_yes"].to_numpy()

    found = {"stage": stage(0), "in memory": memory(0)}
    rates: dict[str, list[float]] = {"stage": [], "in memory": []}
    for number in range(1, given.rounds + 1):
        for name, work in (("stage", stage), ("in memory", memory)):
            started = time.process_time()
            work(number)
            rates[name].append(len(texts) / (time.process_time() - started))
    difference = np.max(np.abs(found["stage"] - found["in memory"]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{len(texts):,} texts of at most {given.max_tokens} tokens, d_model {size}, rounds:")
    for name, values in rates.items():
        print(f"  {name:<10} {medians[name]:8.1f} documents per CPU second", end="  (")
        print(", ".join(f"{value:.1f}" for value in values) + ")")
    print(f"in memory / stage: {medians['in memory'] / medians['stage']:.3f}")
    print(f"largest difference of log P(yes): {difference:.2e}")


if __name__ == "__main__":
    main()
