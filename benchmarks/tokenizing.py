"""Documents per second and core of a token set, beside the tokenizers library alone.

    python benchmarks/tokenizing.py --files ../shared/data/corpus/c4/c4_real_merged.jsonl.gz

The library has the texts in memory and forgets the ids. `python -m pruning tokenize` reads the
texts from a corpus and writes their ids; a stage that reads along (`read_with`) does not write. All
are bound to one core and measured in its CPU seconds, in turns in one run. Without `--tokenizer`,
one in the style of Qwen's is trained on the text (tests/pruning/tokenizer_styles.py; PYTHONPATH=.).

`--overlap` measures reading along in a thread ahead of a device: the wall time of scoring with a
small decoder-only model that reads a token set, and of the same with text tokenized on the way. Run
it with at least two cores: one computes, one tokenizes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pruning.corpus import ingest, token_set
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.layout import ROW_GROUP
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.sources import JsonlSource
from pruning.corpus.token_set import TokenizeConfig, read_with
from pruning.corpus.tokenizers import load_tokenizer


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def wall_seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_along(corpus: Corpus, tokenizer: str) -> None:
    view = read_with(corpus, load_tokenizer(tokenizer))
    for shard in range(view.num_shards):
        for _ in view.iter_batches(shard, ["doc_id", "tokens"], ROW_GROUP):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", required=True, help="JSON lines, a file or a pattern")
    parser.add_argument("--tokenizer", help="a directory, a tokenizer.json or a hub name")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--overlap", action="store_true")
    given = parser.parse_args()
    if not given.overlap and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        source = JsonlSource((given.files,))
        ingest.run(IngestConfig(source, "bytes", str(at / "corpus"), workers=1))
        corpus = load_corpus(at / "corpus")
        texts = [
            text
            for shard in range(corpus.num_shards)
            for text in corpus.columns(shard, ["text"])["text"].to_pylist()
        ]
        tokenizer = given.tokenizer or trained(texts, at)
        print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} million characters")
        (overlap if given.overlap else rates)(corpus, texts, tokenizer, at, given.repeats)


def rates(corpus: Corpus, texts: list[str], tokenizer: str, at: Path, repeats: int) -> None:
    """Print documents per second of one core: the library's, a token set's, and reading along."""
    library = load_tokenizer(tokenizer)._tokenizer
    library.encode_batch_fast(texts[:10], add_special_tokens=False)

    def make(repeat: int) -> None:
        path, output = str(corpus.artifact.path), str(at / f"tokens{repeat}")
        token_set.run(TokenizeConfig(path, tokenizer, output, workers=1))

    seconds: dict[str, list[float]] = {"library": [], "token set": [], "reading along": []}
    for repeat in range(repeats):
        alone = cpu_seconds(lambda: library.encode_batch_fast(texts, add_special_tokens=False))
        seconds["library"].append(alone)
        seconds["token set"].append(cpu_seconds(lambda repeat=repeat: make(repeat)))
        seconds["reading along"].append(cpu_seconds(lambda: read_along(corpus, tokenizer)))
    base = statistics.median(seconds["library"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        share = f"{base / middle:.2f} of the library" if name != "library" else ""
        print(f"{name:14} {len(texts) / middle:8,.0f} documents/s a core {share}", flush=True)


def overlap(corpus: Corpus, texts: list[str], tokenizer: str, at: Path, repeats: int) -> None:
    """Print the wall time of scoring from a token set and from text."""
    import jax

    from models import weights
    from models.config import DecoderConfig
    from models.model import Model
    from pruning.scores.model import engine
    from pruning.scores.model.engine import ScoreConfig
    from pruning.scores.model.likelihood import Likelihood

    opened = load_tokenizer(tokenizer)
    shape = DecoderConfig(
        vocab_size=opened.size, d_model=64, d_ff=128, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=64,
    )  # fmt: skip
    model = Model(shape)
    weights.save(at / "model", model, jax.jit(model.init)(jax.random.key(0)))
    path = str(corpus.artifact.path)
    token_set.run(TokenizeConfig(path, tokenizer, str(at / "tokens"), workers=1))

    def score(name: str, tokens: str | None) -> None:
        engine.run(
            ScoreConfig(
                corpus=path,
                output=str(at / name),
                scorer=Likelihood("causal", 256, 64),
                model=str(at / "model"),
                tokenizer=tokenizer,
                tokens=tokens,
                row_length=512,
                batch_rows=8,
                compilation_cache=str(at / "compiled"),
            )
        )

    score("warm", str(at / "tokens"))
    times: dict[str, list[float]] = {"a token set": [], "the text": []}
    spent: dict[str, list[float]] = {"a token set": [], "the text": []}
    for repeat in range(repeats):
        for name, tokens in (("a token set", str(at / "tokens")), ("the text", None)):
            output = f"{name}{repeat}".replace(" ", "_")
            started = time.process_time()
            times[name].append(wall_seconds(lambda o=output, t=tokens: score(o, t)))
            spent[name].append(time.process_time() - started)
    for name, each in times.items():
        wall, cpu = statistics.median(each), statistics.median(spent[name])
        print(f"tokens from {name}: {wall:.1f} s, {cpu:.1f} CPU seconds", flush=True)


def trained(texts: list[str], at: Path) -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.pruning import tokenizer_styles

    return str(tokenizer_styles.save("qwen", at / "qwen", texts, 8000))


if __name__ == "__main__":
    main()
