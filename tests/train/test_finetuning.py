"""configs/pretrain/finetune_seqio.gin, as users run it: a task of their own, from a module."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import train
from models import checkpoints, weights
from models.model import Model

pytest.importorskip("seqio", reason="the seqio extra is not installed")

ROOT = Path(train.__file__).parent

TASKS = """
import seqio
import tensorflow as tf


def numbers(split, shuffle_files, seed=None):
    first = {"train": 10, "validation": 20}[split]
    return tf.data.Dataset.range(first, first + 40).map(
        lambda i: {"inputs": tf.cast([i, i + 1], tf.int32), "targets": tf.cast([i + 2], tf.int32)}
    )


feature = seqio.Feature(seqio.PassThroughVocabulary(100, eos_id=1), dtype=tf.int32)
seqio.TaskRegistry.add(
    "counting",
    source=seqio.FunctionDataSource(numbers, splits=["train", "validation"]),
    preprocessors=[seqio.preprocessors.append_eos],
    output_features={"inputs": feature, "targets": feature},
)
"""


@pytest.mark.slow
def test_a_task_of_ones_own_is_fine_tuned_on(tiny_run, tmp_path):
    (tmp_path / "counting_tasks.py").write_text(TASKS)
    model = Model(tiny_run("").model)
    weights.save(tmp_path / "start", model, jax.jit(model.init)(jax.random.key(0)))
    output = tmp_path / "run"
    settings = {
        "MODEL": tmp_path / "start",
        "MIXTURE": "counting",
        "MODULES": "('counting_tasks',)",
        "OUTPUT": output,
        "STEPS": 4,
        "BATCH_SIZE": 8,
        "INPUT_LENGTH": 8,
        "TARGET_LENGTH": 4,
        "DTYPE": "float32",
        "Train.eval_every": 2,
        "Train.eval_batches": 2,
        "Train.checkpoint_every": 2,
        "Train.log_every": 1,
    }
    ran = subprocess.run(
        [sys.executable, str(ROOT / "train.py")]
        + ["--gin_file=configs/pretrain/finetune_seqio.gin"]
        + [f"--gin.{name}={value}" for name, value in settings.items()],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert checkpoints.read_config(output)["dropout_rate"] == 0.1
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-3] * 4)
    # A batch of 8: three tokens in and two out each, ends of sequence included.
    assert [line["target_tokens"] for line in steps] == [16, 32, 48, 64]
    assert [line["tokens"] for line in steps] == [40, 80, 120, 160]
    evaluations = [line["target_tokens"] for line in lines if line["kind"] == "eval"]
    assert evaluations == [32, 32]
