"""Speed of scoring with a T5, of this revision relative to an earlier one.

    python benchmarks/scoring_revisions.py --revision=0b743fd --rounds=9

Both revisions run the same command, `python -m pruning score`, on one corpus in T5's vocabulary, in
turns: old, new, new, old, ... Reported are, for Ask-LLM and for the likelihood, the median over the
rounds of the ratio of documents/s (new over old) with its range, by the seconds of scoring alone
(measured.json), by those of the whole command, and by the CPU seconds of the command, which a busy
machine disturbs least. Whether the data files have the same bytes is printed, too. 0b743fd is the
last commit before models read with tokenizers of their own.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("WINNOW_DATA", REPOSITORY.parent / "shared" / "data"))
VOCABULARY = DATA / "tokenizer" / "t5-base.spiece.model"
TASKS = {
    "ask_llm": ("--gin_file=configs/score/ask_llm.gin",),
    "likelihood": (
        *("--gin_file=configs/score/likelihood.gin", "--gin.ESTIMATOR=prefix"),
        "--gin.MAX_TOKENS=512",
    ),
}
_MAKE_MODEL = """
import jax, sys, shutil
from models import weights
from models.config import T5Config
from models.model import Model
model = Model(T5Config(vocab_size=32128, d_model=128, d_kv=32, d_ff=256, num_heads=4,
                       num_encoder_layers=2, num_decoder_layers=2))
weights.save(sys.argv[1], model, jax.jit(model.init)(jax.random.key(0)))
shutil.copy(sys.argv[2], sys.argv[1] + "/spiece.model")
"""


def main() -> None:
    """Make a corpus and a model, run both revisions in turns and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--revision", default="0b743fd", help="the earlier revision")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--documents", type=int, default=1500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        trees = {"old": _checkout(work, given.revision), "new": REPOSITORY}
        _make(work, trees["old"], given.documents)
        for task in TASKS:
            _compare(work, trees, task, given.rounds)


def _checkout(work: Path, revision: str) -> Path:
    tree = work / "tree"
    tree.mkdir()
    git = ["git", "-C", str(REPOSITORY), "archive", revision]
    archive = subprocess.run(git, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    return tree


def _make(work: Path, tree: Path, documents: int) -> None:
    with gzip.open(DATA / "corpus" / "c4" / "c4_real_merged.jsonl.gz", "rt") as file:
        lines = [next(file) for _ in range(documents)]
    (work / "text.jsonl").write_text("".join(lines))
    _python(tree, "-c", _MAKE_MODEL, str(work / "model"), str(VOCABULARY))
    _python(
        tree, "-m", "pruning", "ingest", "--gin_file=configs/ingest/jsonl.gin",
        f"--gin.FILES={work / 'text.jsonl'}", f"--gin.VOCABULARY={VOCABULARY}",
        f"--gin.OUTPUT={work / 'corpus'}", "--gin.Ingest.workers=1",
    )  # fmt: skip


def _compare(work: Path, trees: dict[str, Path], task: str, rounds: int) -> None:
    found: dict[str, list[float]] = {"scoring": [], "command": [], "CPU": []}
    for number in range(rounds + 1):  # the first round fills the cache of compiled programs
        took: dict[str, tuple[float, ...]] = {}
        for name in ("old", "new") if number % 2 else ("new", "old"):
            output = work / f"{task}-{name}"
            shutil.rmtree(output, ignore_errors=True)
            started, used = time.perf_counter(), _cpu_seconds()
            _python(
                trees[name], "-m", "pruning", "score", *TASKS[task],
                f"--gin.CORPUS={work / 'corpus'}", f"--gin.MODEL={work / 'model'}",
                f"--gin.OUTPUT={output}", "--gin.DTYPE=float32",
                "--gin.ROW_LENGTH=1024", "--gin.BATCH_ROWS=8",  # the defaults differ
                f"--gin.Score.compilation_cache={work / 'compiled'}",
            )  # fmt: skip
            whole, used = time.perf_counter() - started, _cpu_seconds() - used
            seconds = json.loads((output / "measured.json").read_text())["seconds"]
            took[name] = seconds, whole, used
        if number:
            for ratios, old, new in zip(found.values(), took["old"], took["new"], strict=True):
                ratios.append(old / new)
    same = _data(work / f"{task}-old") == _data(work / f"{task}-new")
    for name, ratios in found.items():
        ratios.sort()
        said = f"{statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        print(f"{task:10} {name:8} new/old {said}  {rounds} rounds", flush=True)
    print(f"{task:10} data files: {'the same bytes' if same else 'DIFFERENT'}", flush=True)


def _cpu_seconds() -> float:
    """Return the CPU seconds of all commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _data(artifact: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(artifact.glob("data-*.parquet"))]


def _python(tree: Path, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


if __name__ == "__main__":
    main()
