"""Several questions about a document: what do four cost, relative to one?

    python benchmarks/questions.py --text=c4.jsonl.gz
    python benchmarks/questions.py --text=c4.jsonl.gz --max_tokens=512 --layers=4

A decoder-only judge of random weights, with a byte-level BPE tokenizer trained on the same text, is
asked one question of 60 tokens about each document, then four that begin differently. Measured are
tokens through the model, positions of packed rows, and CPU time (all threads) of everything that a
score takes but compilation: tokenization, packing, the model, columns. Rounds alternate; the ratio
is that of the least times.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time

import jax
import numpy as np

from models import packing
from models.config import DecoderConfig
from models.model import Model
from models.partitioning import make_mesh
from pruning.corpus.tokenizers import JsonTokenizer
from pruning.scores.model import estimate
from pruning.scores.model.device import Loaded, Step
from pruning.scores.model.rubric import Question, Rubric
from pruning.scores.model.scorer import Prepared

TOKENS = 60  # of a question
WORDS = ("style", "facts", "value", "reader")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", required=True, help="JSON lines with a text each, gzip")
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--max_tokens", type=int, default=2048, help="of prompt and document")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with gzip.open(options.text, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = trained(texts, options.vocabulary)
    texts = texts[:: max(1, len(texts) // options.documents)][: options.documents]
    model = Model(
        DecoderConfig(
            vocab_size=tokenizer.size,
            d_model=options.d_model,
            d_ff=4 * options.d_model,
            num_layers=options.layers,
            num_heads=options.d_model // 32,
            num_kv_heads=options.d_model // 32,
            head_dim=32,
        )
    )
    params = jax.jit(model.init)(jax.random.key(0))
    loaded = Loaded(model, params, make_mesh({"data": -1, "fsdp": 1, "tensor": 1}), "")
    questions = [question(word, tokenizer) for word in WORDS]
    runs = [Run(loaded, tokenizer, texts, questions[:n], options.max_tokens) for n in (1, 4)]
    lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)])
    print(
        f"{len(texts)} documents, {lengths.mean():.0f} tokens on average, at most "
        f"{options.max_tokens} with the prompt; {options.layers} layers of {options.d_model}; "
        f"{jax.device_count()} {jax.devices()[0].platform} devices"
    )
    seconds: list[list[float]] = [[], []]
    for _ in range(options.rounds):
        for run, kept in zip(runs, seconds, strict=True):
            kept.append(run.seconds())
    print(f"{'questions':>12}{'tokens':>12}{'positions':>12}{'CPU s':>9}")
    for run, kept, count in zip(runs, seconds, (1, 4), strict=True):
        print(f"{count:>12}{run.tokens:>12,}{run.positions:>12,}{min(kept):>9.2f}")
    one, four = runs
    cost = min(seconds[1]) / min(seconds[0])
    positions = four.positions / one.positions
    print(f"{'ratio':>12}{four.tokens / one.tokens:>12.3f}{positions:>12.3f}{cost:>9.3f}")


def trained(texts: list[str], size: int) -> JsonTokenizer:
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, size, show_progress=False)
    return JsonTokenizer(tokenizer._tokenizer.to_str().encode())


def question(word: str, tokenizer: JsonTokenizer) -> Question:
    """Return a question of TOKENS tokens that begins with its own word."""
    text = f" {word}?"
    while len(tokenizer.encode(text)) < TOKENS:
        text += " so"
    answers = {str(n): (f" {n}",) for n in range(1, 6)}
    return Question(word, answers, "{document}" + text)


class Run:
    """A rubric of some questions, compiled."""

    def __init__(
        self,
        loaded: Loaded,
        tokenizer: JsonTokenizer,
        texts: list[str],
        questions: list[Question],
        max_tokens: int,
    ):
        rubric = Rubric(tuple(questions), max_tokens)
        self.prepared: Prepared = rubric.prepare(loaded.model, tokenizer)
        self.texts = texts
        documents = self.prepared.read(texts)  # type: ignore[misc]
        windows = self.prepared.windows(documents)
        costs = estimate.Costs.of_scorer(loaded.model.config, self.prepared)
        row = self.prepared.longest[0]
        self.rows = estimate.choose_row_lengths(self.prepared, costs, windows.lengths, row)
        self.batch_rows = 8 * jax.device_count()
        packed = packing.pack(windows.lengths, self.rows)
        shapes = {
            name: (self.batch_rows, *rows.shape[1:]) for name, rows in packed.fill(windows).items()
        }
        self.tokens = int(windows.lengths[:, 0].sum())
        self.positions = packed.num_rows * self.rows[0]
        self.step = Step(self.prepared, loaded, shapes)

    def seconds(self) -> float:
        """Return the CPU seconds of scoring all texts."""
        started = time.process_time()
        documents = self.prepared.read(self.texts)  # type: ignore[misc]
        windows = self.prepared.windows(documents)
        packed = packing.pack(windows.lengths, self.rows)
        rows = packed.fill(windows)
        answers = []
        for first in range(0, packed.num_rows, self.batch_rows):
            some = {name: values[first : first + self.batch_rows] for name, values in rows.items()}
            count = len(next(iter(some.values())))
            padded = {
                name: np.pad(values, ((0, self.batch_rows - count), (0, 0)))
                for name, values in some.items()
            }
            answers.append(np.asarray(self.step(padded))[:count])
        read = packed.gather(windows, np.concatenate(answers))
        self.prepared.finish(documents, windows, read)
        return time.process_time() - started


if __name__ == "__main__":
    main()
