"""README executed from top to bottom: its commands as written, with smaller sizes appended."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import hub_stand_ins

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = "--gin.T5Config.d_model=32 --gin.T5Config.d_ff=64 --gin.T5Config.num_heads=2"
FEW = "--gin.STEPS=2 --gin.Train.eval_batches=1"
# gin file or program -> what makes its command smaller.
SIZES = {
    "configs/pretrain/t5_tiny.gin": f"{FEW} {TINY} --gin.Stream.batch_size=4",
    "configs/pretrain/decoder_tiny.gin": f"{FEW} --gin.DecoderConfig.d_model=32 "
    "--gin.DecoderConfig.num_layers=1 --gin.Stream.batch_size=4",
    "configs/score/likelihood.gin": "--gin.MAX_TOKENS=24 --gin.WINDOW=24 --gin.OVERLAP=8 "
    "--gin.ROW_LENGTH=128",
    "configs/evaluate/perplexity.gin": "--gin.MAX_TOKENS=24 --gin.WINDOW=24 --gin.OVERLAP=8 "
    "--gin.ROW_LENGTH=128",
    "configs/pretrain/finetune.gin": "--gin.STEPS=2 --gin.BATCH_SIZE=4 --gin.INPUTS_LENGTH=64 "
    "--gin.TARGETS_LENGTH=16",
    "configs/evaluate/examples.gin": "--gin.CAP=200 --gin.INPUTS_LENGTH=64 --gin.TARGETS_LENGTH=16",
    "configs/evaluate/tasks.gin": "--gin.LIMIT=4 --gin.ROW_LENGTH=128",
    "configs/evaluate/harness.gin": "--gin.LIMIT=2 --gin.ROW_LENGTH=512",
}
# Commands that are not run here, and where they are.
ELSEWHERE = {
    "python -m pruning vocabulary": "in a table; tests/pruning/corpus/test_vocabulary_training.py",
    "python -m pruning status --serve": "serves; tests/pruning/cli/test_status_page.py",
    "python -m tpu.compile": "takes minutes and the TPU compiler; tests/tpu/test_compile.py",
    "python -m evaluation study --gin_file=configs/quickstart.gin  ": "make demo",
}


def blocks() -> list[str]:
    """Return the shell commands of README, in order: indented lines, with continued ones joined."""
    text = (REPOSITORY / "README.md").read_text()
    lines = re.findall(r"(?m)^    ((?:[^\n]*\\\n)*[^\n]*)$", text)
    return [line for line in lines if re.match(r"(python |V=)", line)]


@pytest.fixture
def home(tmp_path, real_data, monkeypatch) -> Path:
    """Return a directory with the data that README takes for granted."""
    for module in ("tensorflow_datasets", "seqio", "lm_eval"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    (tmp_path / "tensorflow_datasets").symlink_to(real_data / "tfds")
    (tmp_path / "eval").symlink_to(real_data / "eval")
    vocabulary = real_data / "tokenizer" / "t5-base.spiece.model"
    (tmp_path / vocabulary.name).symlink_to(vocabulary)
    (tmp_path / "train.py").symlink_to(REPOSITORY / "train.py")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "python").chmod(0o755)
    for name, value in {
        "HOME": str(tmp_path),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "JAX_NUM_CPU_DEVICES": "1",
        "PROJECT": "my-project",
        "ZONE": "us-west4-a",
        "BUCKET": "my-bucket",
    }.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.slow
def test_readme_runs_as_written(home):
    script, ran = "", 0
    for block in blocks():
        if block.startswith("V="):
            script += block + "\n"
            continue
        plain = re.sub(r"\\\n\s*", "", block)
        if any(plain.startswith(name) for name in ELSEWHERE):
            continue
        command = re.sub(r"\s{2,}#.*$", "", block)
        command += "".join(f" {size}" for file, size in SIZES.items() if f"={file}" in block)
        done = subprocess.run(
            ["bash", "-c", script + command], cwd=home, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 17

    programs = re.findall(r"(?s)```python\n(.*?)```", (REPOSITORY / "README.md").read_text())
    assert len(programs) == 2
    program = "\n".join(programs) + "\nassert {'doc_id', 'status', 'nll'} <= set(frame)\n"
    program += "first = next(dataset.as_numpy_iterator())\nassert set(first) >= {'inputs'}\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_lines_of_python_run(tmp_path, real_data, monkeypatch):
    """A tiny judge stands for the published one."""
    for module in ("pandas", "torch", "transformers"):
        pytest.importorskip(module)
    spiece = real_data / "tokenizer" / "t5-base.spiece.model"
    hub_stand_ins.write_t5(tmp_path, "google/flan-t5-large", spiece)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    import pandas

    with gzip.open(real_data / "corpus" / "c4" / "llamafactory_c4_demo.jsonl.gz", "rt") as file:
        texts = [json.loads(next(file))["text"] for _ in range(20)]
    names = {"texts": texts, "lines": texts, "frame": pandas.DataFrame({"text": texts})}
    (block,) = re.findall(
        r"(?m)^    import pruning\n(?:\n|    .*\n)*", (REPOSITORY / "README.md").read_text()
    )
    exec(textwrap.dedent(block), names)
    assert names["table"].column("ask_llm_yes").to_pylist() == list(names["scored"]["ask_llm_yes"])
    assert names["part"].num_rows == len(names["scored"]) == 20
    assert len(names["kept"]) == 4
