"""Cost of comparing digests in the stages that read a corpus or weights.

    python benchmarks/verification.py --documents=300000 --directory=/tmp/verification

Each stage runs alternately on artifacts with digests and on the same files under manifests that
name none, as those of earlier versions: these are read unchecked. Weights are read with and without
the files of digests beside them. Figures are the ratio of the medians of processor time, in one
process, and that of the least times; every run parses digests and footers anew. On a busy machine
both vary by more than the checks cost; "inside" is steadier: the time within the checks of shards,
over the rest of the same run. Pages of mapped files are touched before that time is taken, because
reading without checks has the same page faults. Texts are drawn from 50,000 words with Zipf's
frequencies. `score` runs a T5 of one layer over a thousandth of the corpus: a larger one spends a
smaller share on reading.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from models import weights
from models.config import T5Config
from models.model import Model
from models.weights import huggingface
from pruning.corpus import ingest
from pruning.corpus.sources import JsonlSource
from pruning.data import export
from pruning.data.objectives import CausalLM
from pruning.data.stream import StreamConfig
from pruning.scores.model import engine
from pruning.scores.model.embedding import Embedding
from pruning.scores.text import entropy
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Top
from pruning.store import digests, verified
from pruning.store.digests import Digests
from pruning.store.manifest import MANIFEST

_SHARDS = 4
_INPUTS = ("corpus", "few", "entropy", "selection")
_WEIGHTS = "weights"
_MODEL = T5Config(
    vocab_size=32_128,
    d_model=512,
    d_kv=64,
    d_ff=1024,
    num_heads=8,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


def main() -> None:
    works = {
        "select": _select,
        "stream": _stream,
        "export": _export,
        "weights": _load,
        "score": _score,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--directory", help="where the inputs are kept; default: a temporary one")
    parser.add_argument("--stages", nargs="+", choices=works, default=list(works))
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        directory = given.directory or stack.enter_context(tempfile.TemporaryDirectory())
        checked, unchecked = Path(directory, "checked"), Path(directory, "unchecked")
        if not unchecked.exists():
            _make(checked, given.documents)
            for name in _INPUTS:
                _without_digests(checked / name, unchecked / name)
            shutil.copytree(
                checked / _WEIGHTS,
                unchecked / _WEIGHTS,
                copy_function=os.link,
                ignore=shutil.ignore_patterns("*.digests"),
            )
        for name in ("corpus", _WEIGHTS):
            size = sum(file.stat().st_size for file in (checked / name).iterdir())
            print(f"{name}: {size / 1e6:.0f} MB; {os.cpu_count()} CPUs")
        heads = ("stage", "seconds, unchecked", "seconds, checked", "ratio", "ratio of the least")
        print(f"| {' | '.join(heads)} | inside |\n{'|---' * 6}|")
        for name in given.stages:
            plain, with_checks, inside = _seconds(works[name], unchecked, checked, given.repeats)
            before, after = statistics.median(plain), statistics.median(with_checks)
            print(
                f"| {name} | {before:.3f} | {after:.3f} | {after / before:.3f} | "
                f"{min(with_checks) / min(plain):.3f} | {inside:.2%} |",
                flush=True,
            )


def _make(root: Path, documents: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("aeiorstnlm"), rng.integers(2, 9)))
                      for _ in range(50_000)])  # fmt: skip
    (root / "documents").mkdir(parents=True)
    for shard in range(_SHARDS):
        with (root / "documents" / f"{shard}.jsonl").open("w") as file:
            for _ in range(documents // _SHARDS):
                drawn = np.minimum(rng.zipf(1.2, rng.integers(50, 350)), len(words)) - 1
                file.write(json.dumps({"text": " ".join(words[drawn])}) + "\n")
    source = JsonlSource((f"{root}/documents",))
    ingest.run(ingest.IngestConfig(source, "bytes", f"{root}/corpus", workers=1))
    (root / "few").mkdir()
    for shard in range(_SHARDS):
        with (root / "documents" / f"{shard}.jsonl").open() as file:
            lines = itertools.islice(file, documents // _SHARDS // 1000)
            (root / "few" / f"{shard}.jsonl").write_text("".join(lines))
    (root / "few").rename(root / "few documents")
    few = JsonlSource((f"{root}/few documents",))
    ingest.run(ingest.IngestConfig(few, "bytes", f"{root}/few", workers=1))
    model = Model(_MODEL)
    huggingface.save(root / _WEIGHTS, model, jax.jit(model.init)(jax.random.key(0)))
    entropy.run(entropy.EntropyConfig(f"{root}/corpus", f"{root}/entropy", workers=1))
    _select(root, root / "selection")


def _without_digests(artifact: Path, copy: Path) -> None:
    """Link an artifact's files under a manifest that names no digests."""
    shutil.copytree(artifact, copy, copy_function=os.link)
    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["seal"]
    for shard in manifest["shards"]:
        del shard["blocks"]
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).write_text(json.dumps(manifest))


def _select(root: Path, output: Path) -> None:
    config = SelectConfig(
        corpus=f"{root}/corpus",
        scores=f"{root}/entropy",
        score="column:h_f",
        strategy=Top(),
        keep_documents=0.5,
        output=str(output),
        threads=1,
    )
    select.run(config)


def _stream(root: Path, output: Path) -> None:
    config = StreamConfig(
        f"{root}/corpus",
        batch_size=64,
        selection=f"{root}/selection",
        objective=CausalLM(),
        target_length=1024,
    )
    batches = config.open()
    for step in range(batches.num_batches):
        batches.batch(step)


def _export(root: Path, output: Path) -> None:
    selection, scores = f"{root}/selection", f"{root}/entropy"
    export.run(
        export.ExportConfig(f"{root}/corpus", str(output), selection, scores=scores, workers=1)
    )


def _load(root: Path, output: Path) -> None:
    weights.load(root / _WEIGHTS, dtype="float32")


def _score(root: Path, output: Path) -> None:
    config = engine.ScoreConfig(
        corpus=f"{root}/few",
        output=str(output),
        scorer=Embedding(max_tokens=128),
        model=f"{root}/{_WEIGHTS}",
        tokenizer="corpus",
        row_length=256,
        dtype="float32",
        compilation_cache=f"{root.parent}/compiled",
    )
    engine.run(config)


def _seconds(
    work: Callable[[Path, Path], None], first: Path, second: Path, repeats: int
) -> tuple[list[float], list[float], float]:
    """Return the seconds of two places, taken in turn, and the median share of the second's checks.

    A first round is not counted.
    """
    taken: dict[Path, list[float]] = {first: [], second: []}
    shares = []
    for _ in range(repeats + 1):
        for root in taken:
            output = root / "made"
            with _checks() as spent:
                started = time.process_time()
                work(root, output)
                taken[root].append(time.process_time() - started)
            shutil.rmtree(output, ignore_errors=True)
        shares.append(sum(spent) / (taken[second][-1] - sum(spent)))
    return taken[first][1:], taken[second][1:], statistics.median(shares[1:])


@contextlib.contextmanager
def _checks() -> Iterator[list[float]]:
    """Provide a list that gets the processor time of every check of a shard's blocks."""
    spent: list[float] = []

    def timed(method: Callable[..., Any], prepare: Callable[..., Any] | None = None) -> Any:
        def call(*given: Any) -> Any:
            if prepare is not None:
                prepare(*given)
            started = time.thread_time()
            try:
                return method(*given)
            finally:
                spent.append(time.thread_time() - started)

        return call

    check, wanted = timed(Digests.check, _touch), timed(Digests.wanted)
    with (
        mock.patch.multiple(Digests, check=check, wanted=wanted),
        mock.patch.object(digests, "_load", timed(functools.lru_cache(1024)(digests._read))),
        mock.patch.object(verified, "_FOOTERS", verified._Footers(64)),
    ):
        yield spent


def _touch(checked: Digests, blocks: Iterable[int], content: memoryview, offset: int = 0) -> None:
    """Read a byte of every page of the blocks."""
    pages = np.frombuffer(content, np.uint8)
    for block in blocks:
        pages[checked.start(block) - offset : checked.ends[block] - offset : mmap.PAGESIZE].max()


if __name__ == "__main__":
    main()
