"""Comparison of artifacts of an earlier revision with this one's.

    python tests/compatibility/compare.py                     # about ten CPU minutes
    python tests/compatibility/compare.py --quick             # without models, training and study

Both revisions run the same commands on the same text, each in a directory of its own. Then

- every artifact of the earlier revision is read by this one: `inspect --verify`, the same commands
  again (which must find their work done), new selections and exports of old scores, two more steps
  of the old run, the report of the old study;
- every data file of the two is compared: its bytes and, where they differ, its columns.

Choices
- The earlier revision is checked out by `git worktree`; what it made is kept in --work, so that a
  second comparison takes half as long.
- Commands have relative paths and run in their revision's directory: manifests name equal paths.
- `DIFFERS` lists the differences that are intended, with the reason; anything else fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruning.scores import vectors

REPOSITORY = Path(__file__).resolve().parents[2]
BEFORE = "0b743fd"  # the last commit before the layout of November 2026

# Artifact -> the columns that differ from the earlier revision's on purpose, and the reason.
DIFFERS = {
    "distill": (
        {"student", "student.npz"},
        "every document is scored by a model that did not learn from it",
    ),
    "semdedup": (
        {"twin_similarity"},
        "the twin farthest from the centroid is kept, as in the reference",
    ),
    "kmeans": (
        {"centroid_similarity"},
        "vectors are brought to length 1 on the device: other last bits, 2e-7 at most here",
    ),
    "whiten": ({"embedding"}, "the same: one unit in the last place of float16"),
    "classifier": (
        {"quality", "quality_probability (only in one)"},
        "a document is scored by a model that was not fitted to it",
    ),
}

_MAKE_MODEL = """
import dataclasses, jax
from models import weights
from models.config import T5Config
from models.model import Model
shape = dict(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_encoder_layers=1)
model = Model(T5Config(num_decoder_layers=1, **shape))
weights.save("model", model, jax.jit(model.init)(jax.random.key(0)))
encoder = Model(T5Config(num_decoder_layers=0, sentence_head=12, **shape))
weights.save("encoder", encoder, jax.jit(encoder.init)(jax.random.key(1)))
"""
_BYTES = ("--gin.Score.tokenizer='corpus'",)  # unknown to the earlier revision, which never asks
_SCORE = ("--gin.Score.compilation_cache=None", "--gin.ROW_LENGTH=256", "--gin.BATCH_ROWS=8",
          "--gin.DTYPE=float32", "--gin.CORPUS=corpus")  # fmt: skip
_RUN = (
    "--gin_file=configs/pretrain/t5_tiny.gin", "--gin.CORPUS=corpus", "--gin.VALIDATION=corpus",
    "--gin.OUTPUT=run", "--gin.T5Config.vocab_size=384", "--gin.T5Config.d_model=16",
    "--gin.T5Config.d_ff=32", "--gin.Stream.batch_size=4", "--gin.Train.checkpoint_every=2",
    "--gin.Train.eval_batches=1", "--gin.COMPILATION_CACHE=None",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """A command and the artifact that it makes; `models`: needs the tiny models."""

    output: str
    command: tuple[str, ...]
    models: bool = False

    def argv(self, old: bool) -> list[str]:
        """Return the whole command line for one of the two revisions."""
        arguments = [a for a in self.command if not (old and a in _BYTES)]
        return [sys.executable, *arguments]


def _stage(output: str, *arguments: str, models: bool = False) -> Step:
    return Step(output, ("-m", "pruning", *arguments, f"--gin.OUTPUT={output}"), models)


STEPS = (
    _stage("vocabulary", "vocabulary", "--gin_file=configs/ingest/vocabulary.gin",
           "--gin.SOURCE=@JsonlSource()", "--gin.JsonlSource.paths=('text',)", "--gin.SIZE=60"),
    _stage("corpus", "ingest", "--gin_file=configs/ingest/jsonl.gin", "--gin.FILES=text",
           "--gin.VOCABULARY=bytes", "--gin.Ingest.workers=1"),
    _stage("half", "select", "--gin_file=configs/select/random.gin", "--gin.CORPUS=corpus",
           "--gin.KEEP=0.5"),
    _stage("entropy", "entropy", "--gin_file=configs/score/entropy.gin", "--gin.CORPUS=corpus"),
    _stage("dsir", "dsir", "--gin_file=configs/score/dsir.gin", "--gin.CORPUS=corpus",
           "--gin.TARGET=corpus", "--gin.TARGET_WITHIN=half"),
    _stage("classifier", "classifier", "--gin_file=configs/score/classifier.gin",
           "--gin.CORPUS=corpus", "--gin.GOOD=corpus", "--gin.GOOD_WITHIN=half"),
    _stage("likelihood", "score", "--gin_file=configs/score/likelihood.gin", "--gin.MODEL=model",
           "--gin.WINDOW=64", "--gin.OVERLAP=16", *_SCORE, *_BYTES, models=True),
    _stage("embedding", "score", "--gin_file=configs/score/embedding.gin", "--gin.MODEL=encoder",
           "--gin.MAX_TOKENS=64", *_SCORE, *_BYTES, models=True),
    _stage("distill", "distill", "--gin_file=configs/score/distill.gin", "--gin.CORPUS=corpus",
           "--gin.TEACHER=likelihood", "--gin.SCORE=nll_mean", models=True),
    _stage("whiten", "whiten", "--gin_file=configs/score/whiten.gin", "--gin.CORPUS=corpus",
           "--gin.EMBEDDINGS=embedding", models=True),
    _stage("kmeans", "kmeans", "--gin_file=configs/score/kmeans.gin", "--gin.CORPUS=corpus",
           "--gin.EMBEDDINGS=embedding", "--gin.CLUSTERS=5", models=True),
    _stage("semdedup", "semdedup", "--gin_file=configs/score/semdedup.gin", "--gin.CORPUS=corpus",
           "--gin.EMBEDDINGS=embedding", "--gin.CLUSTERS=kmeans", models=True),
    _stage("density", "density", "--gin_file=configs/score/density.gin", "--gin.CORPUS=corpus",
           "--gin.EMBEDDINGS=embedding", "--gin.ROWS=50", models=True),
    _stage("low", "select", "--gin_file=configs/select/likelihood_low.gin", "--gin.CORPUS=corpus",
           "--gin.SCORES=likelihood", "--gin.KEEP=0.4", models=True),
    _stage("rare", "select", "--gin_file=configs/select/inverse_propensity.gin",
           "--gin.CORPUS=corpus", "--gin.SCORES=density", "--gin.KEEP=0.4", models=True),
    _stage("dataset", "export", "--gin_file=configs/export.gin", "--gin.CORPUS=corpus",
           "--gin.SELECTION=half"),
    Step("run", ("train.py", *_RUN, "--gin.STEPS=4"), models=True),
    Step("study", ("-m", "evaluation", "study", "--gin_file=study.gin", "--gin.FILES=text",
                   "--gin.OUTPUT=study"), models=True),
)  # fmt: skip


def main() -> int:
    """Make both revisions' artifacts, compare them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--revision", default=BEFORE, help=f"the earlier one (default: {BEFORE})")
    parser.add_argument("--work", type=Path, default=Path("runs/compatibility"))
    parser.add_argument("--quick", action="store_true", help="without models, training and study")
    given = parser.parse_args()
    work = given.work.resolve()
    old, new = work / f"old-{given.revision}", work / "new"
    tree = _checkout(work, given.revision)
    steps = [step for step in STEPS if not (step.models and given.quick)]
    for place, source in ((old, tree), (new, REPOSITORY)):
        _prepare(place, source, not given.quick)
        for step in steps:
            if not _made(place / step.output):
                _run(place, source, step, old=place == old)
    rows = [_compared(step.output, old, new) for step in steps]
    rows += list(_read_again(old, steps))
    width = max(len(name) for name, *_ in rows)
    for name, outcome, detail in rows:
        print(f"{name:{width}}  {outcome:11}  {detail}")
    return int(any(outcome in ("differs", "not read", "made again") for _, outcome, _ in rows))


def _checkout(work: Path, revision: str) -> Path:
    tree = work / f"tree-{revision}"
    if not tree.exists():
        work.mkdir(parents=True, exist_ok=True)
        git = ["git", "-C", str(REPOSITORY), "archive", revision]
        archive = subprocess.run(git, check=True, capture_output=True).stdout
        tree.mkdir()
        subprocess.run(["tar", "-x", "-C", str(tree)], input=archive, check=True)
    return tree


def _prepare(place: Path, source: Path, models: bool) -> None:
    """Write the text and link the configurations; make the models with the earlier revision."""
    (place / "text").mkdir(parents=True, exist_ok=True)
    for name in ("configs", "train.py"):
        if not (place / name).exists():
            (place / name).symlink_to(source / name)
    (place / "study.gin").write_bytes(Path(__file__).with_name("study.gin").read_bytes())
    for part in range(3):
        lines = (json.dumps(record) for record in _records(part))
        (place / "text" / f"part-{part}.jsonl").write_text("\n".join(lines))
    if models and not (place / "model").exists():
        _python(place, source, ["-c", _MAKE_MODEL])


def _records(part: int) -> Iterator[dict[str, str]]:
    rng = np.random.default_rng(part)
    words = "the river carries silt to sea where gulls yes no wait for ships of grain"
    for i in range(60):
        text = " ".join(rng.choice(words.split(), int(rng.integers(8, 60))))
        host = "grain" if i % 3 else "silt"
        yield {"text": f"{text}. {i}", "url": f"https://{host}.example/{part}/{i}"}


def _made(path: Path) -> bool:
    ends = ("manifest.json", "result.json", "report/index.html")
    return any((path / end).exists() for end in ends)


def _run(place: Path, source: Path, step: Step, old: bool) -> str:
    return _python(place, source, step.argv(old)[1:])


def _python(place: Path, source: Path, arguments: list[str]) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "PYTHONSAFEPATH": "1",  # not the directory of train.py, which is a link
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\nin {place}:\n{done.stderr[-3000:]}")
    return done.stdout


def _compared(name: str, old: Path, new: Path) -> tuple[str, str, str]:
    """Return the artifact's row of the table."""
    if name == "run":
        return name, *_same_losses(old / name / "metrics.jsonl", new / name / "metrics.jsonl")
    old, new = old / name, new / name
    kinds = (".parquet", ".zst")  # of a study: those of all its stages
    files, others = (
        sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in kinds)
        for root in (old, new)
    )
    if files != others or not files:
        return name, "differs", f"{len(files)} data files, now {len(others)}"
    differing = [f for f in files if (old / f).read_bytes() != (new / f).read_bytes()]
    if not differing:
        return name, "same bytes", f"{len(files)} data files"
    columns = sorted({c for f in differing for c in _columns(old / f, new / f)})
    if not columns:
        return name, "same data", f"{len(differing)} files differ in their encoding only"
    intended, reason = DIFFERS.get(name, (set(), "?"))
    outcome = "intended" if set(columns) <= intended else "differs"
    return name, outcome, f"{', '.join(columns)}: {reason}"


def _same_losses(old: Path, new: Path) -> tuple[str, str]:
    first, second = (
        [json.loads(line).get("loss") for line in file.read_text().splitlines()]
        for file in (old, new)
    )
    steps = min(len(first), len(second))  # the old run may have gone on since
    same = first[:steps] == second[:steps] and steps
    return "same data" if same else "differs", f"{steps} losses"


def _columns(first: Path, second: Path) -> Iterator[str]:
    """Yield the columns in which two Parquet files differ."""
    if first.suffix != ".parquet":
        yield first.name
        return
    a, b = (_with_lists(pq.read_table(file)) for file in (first, second))
    for name in dict.fromkeys([*a.column_names, *b.column_names]):
        if name not in a.column_names or name not in b.column_names:
            yield f"{name} (only in one)"
        elif not a[name].equals(b[name]) and not _same_vectors(a[name], b[name]):
            yield name


def _with_lists(table: pa.Table) -> pa.Table:
    """Return a table whose vectors are lists, as earlier revisions stored them."""
    for place, field in enumerate(table.schema):
        if vectors.is_vector(field):
            lists = vectors.as_lists(table[field.name], field)
            table = table.set_column(place, field.name, lists)
    return table


def _same_vectors(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    """Return whether two columns hold the same vectors; NaN, of missing ones, is equal to NaN."""
    if not pa.types.is_fixed_size_list(a.type) or a.type != b.type:
        return False
    found = [
        np.asarray(c.combine_chunks().flatten().to_numpy(zero_copy_only=False)) for c in (a, b)
    ]
    return np.array_equal(*found, equal_nan=True)


def _read_again(old: Path, steps: list[Step]) -> Iterator[tuple[str, str, str]]:
    """Read the earlier revision's artifacts with this one; yield rows of the table."""
    tries = [(f"{s.output} inspected", ("-m", "pruning", "inspect", s.output, "--verify"))
             for s in steps if s.output not in ("run", "study")]  # fmt: skip
    tries += [(f"{s.output} again", s.command) for s in steps if s.output not in ("run", *DIFFERS)]
    tries += [
        ("old scores selected", (*_stage("top_new", "select", "--gin_file=configs/select/top.gin",
         "--gin.CORPUS=corpus", "--gin.SCORES=entropy", "--gin.SCORE='column:h_f'").command,)),
        ("old selection exported", _stage("dataset_new", "export", "--gin_file=configs/export.gin",
         "--gin.CORPUS=corpus", "--gin.SELECTION=half").command),
    ]  # fmt: skip
    if any(step.models for step in steps):
        train = str(REPOSITORY / "train.py")
        tries.append(("old run continued", (train, *_RUN, "--gin.STEPS=6")))
    for name, arguments in tries:
        manifest = old / name.partition(" ")[0] / "manifest.json"
        before = manifest.stat().st_mtime_ns if manifest.exists() else 0
        try:
            _python(old, REPOSITORY, list(arguments))
        except SystemExit as error:
            yield name, "not read", str(error).strip().rpartition("\n")[2]
        else:
            same = not manifest.exists() or manifest.stat().st_mtime_ns == before
            yield name, "read" if same else "made again", ""


if __name__ == "__main__":
    raise SystemExit(main())
