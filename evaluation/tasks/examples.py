"""Tasks as token ids for fine-tuning with train.py, without TensorFlow.

    python -m evaluation examples --gin_file=configs/evaluate/examples.gin \\
        --gin.TASKS=glue_v002_proportional --gin.DATA=eval --gin.VOCABULARY=t5.model

writes Parquet files with `inputs` and `targets` for `@Examples()` (configs/pretrain/finetune.gin).

Choices
- There is one file per task. train.py draws examples uniformly, which gives examples-proportional
  mixing. With a cap, a larger task is represented by `cap` of its examples, those with the smallest
  hash of (seed, row).
- `@Examples()` appends EOS to an encoder's inputs and to all targets. Texts that are too long are
  cut at the end, as in T5, and counted.
- A test shows that the tokens are those of seqio's registered tasks (seqio_tasks.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pyarrow as pa

from evaluation.tasks import sources
from evaluation.tasks.suite import TASKS, TaskError, tasks_of
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.model.loading import find_tokenizer
from pruning.store import progress, randomness
from pruning.store.artifact import Artifact
from pruning.store.build import Build
from pruning.store.manifest import config_of
from pruning.store.randomness import Stream

NAME = "TaskExamples"
KIND = "examples"


@dataclasses.dataclass(frozen=True)
class TaskExamplesConfig:
    """Settings of `examples`.

    Attributes:
      tasks: names of tasks and mixtures; or one text, separated by white space or commas.
      data: directory of the original files; or "tfds:DIRECTORY".
      vocabulary: a SentencePiece file, "bytes", or a corpus.
      output: directory of the examples.
      split: of every task.
      cap: largest number of examples of a task; None: all.
      inputs_length, targets_length: tokens, the EOS to come included.
      seed: of the examples chosen under a cap.
    """

    tasks: tuple[str, ...] | str
    data: str
    vocabulary: str
    output: str
    split: str = "train"
    cap: int | None = None
    inputs_length: int = 512
    targets_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.inputs_length, self.targets_length) < 2 or (self.cap or 1) < 1:
            raise ValueError("lengths must be at least 2, a cap at least 1.")


CONFIGURABLES: dict[str, type] = {NAME: TaskExamplesConfig}


def run(config: TaskExamplesConfig) -> list[str]:
    """Make the examples, or finish them, and return lines about them."""
    made = make(config)
    return [
        f"{task}: {found['examples']:,} examples"
        + (f", {found['cut']:,} cut" if found["cut"] else "")
        for task, found in made.manifest.counts["tasks"].items()
    ] + [f"{made.path}: {made.manifest.rows:,} examples"]


def make(config: TaskExamplesConfig) -> Artifact:
    """Make and return the artifact.

    Raises:
      TaskError: an unknown task, or one without examples to learn from.
      SourceError: its files are not there, or damaged.
    """
    names = tasks_of(config.tasks, training=True)
    vocabulary = find_tokenizer("", config.vocabulary)
    if not isinstance(vocabulary, Vocabulary):
        raise TaskError(
            f"{config.vocabulary} is no SentencePiece vocabulary, nor bytes: examples are for "
            "models trained here."
        )
    described = config_of(config) | {
        "tasks": names,
        "vocabulary": vocabulary.digest,
        "data": {name: _digest(name, config) for name in names},
    }
    del described["output"]
    build = Build(config.output, KIND, described, {}, len(names), _schema(vocabulary))
    if not build.finished:
        with progress.track("examples", len(names), "tasks") as task:
            task.advance(len(names) - len(build.pending()))
            for shard in build.pending():
                _write(build, shard, names[shard], config, vocabulary)
                task.advance(1)
    made = build.finish({"tasks": names, "vocabulary": vocabulary.describe()})
    assert made is not None  # every shard was ours
    return made


def _write(
    build: Build, shard: int, name: str, config: TaskExamplesConfig, vocabulary: Vocabulary
) -> None:
    examples = TASKS[name].examples(config.split, config.data)
    if not examples:
        raise TaskError(f"{name} has no examples in the split {config.split!r} of {config.data}.")
    row = np.arange(len(examples))
    if config.cap is not None and len(examples) > config.cap:
        draws = randomness.uniform(Stream.TASK_SUBSET, config.seed, row)
        row = np.sort(np.argsort(draws, kind="stable")[: config.cap])
    chosen = [examples[i] for i in row]
    inputs, cut_inputs = _tokens(
        vocabulary, [one["inputs"] for one in chosen], config.inputs_length
    )
    targets, cut_targets = _tokens(
        vocabulary, [one["targets"] for one in chosen], config.targets_length
    )
    with build.shard(shard) as writer:
        columns = {"inputs": inputs, "targets": targets}
        writer.write(columns | {"task": [name] * len(row), "row": row})
        writer.tokens = sum(map(len, inputs)) + sum(map(len, targets))
        found = {"examples": len(row), "left_out": len(examples) - len(row)}
        writer.counts = {"tasks": {name: found | {"cut": int((cut_inputs | cut_targets).sum())}}}


def _tokens(
    vocabulary: Vocabulary, texts: list[str], length: int
) -> tuple[list[list[int]], np.ndarray]:
    """Return ids, at most `length` including the later EOS, and which texts were cut, bool."""
    ids = vocabulary.encode_batch(texts)
    cut = np.asarray([len(one) > length - 1 for one in ids], bool)
    return [one[: length - 1] for one in ids], cut


def _schema(vocabulary: Vocabulary) -> pa.Schema:
    ids = pa.list_(pa.uint16() if vocabulary.size <= np.iinfo(np.uint16).max else pa.uint32())
    names = [("inputs", ids), ("targets", ids), ("task", pa.string()), ("row", pa.int64())]
    return pa.schema(names)


def _digest(name: str, config: TaskExamplesConfig) -> Any:
    """Return a digest of a task's data: of the files' contents, or the TFDS version."""
    dataset = TASKS[name].dataset
    if config.data.startswith(sources.TFDS):
        return sources.version(dataset, config.data)
    files = sources.paths(dataset, config.split, config.data)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
