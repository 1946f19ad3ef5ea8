"""The tasks registered with seqio under their T5 names, and proportional mixtures of them.

    Train.data = @Seqio()
    Seqio.mixture_or_task = 'glue_v002_proportional'
    Seqio.modules = ('evaluation.tasks.seqio_tasks',)

Environment variables give the directory of the data and the vocabulary, because seqio's registry
knows names only:

    WINNOW_EVALUATION_DATA        directory of the original files, or tfds:DIRECTORY
    WINNOW_EVALUATION_VOCABULARY  a SentencePiece file, "bytes", or a corpus

or, in a program, by `register_all(data, vocabulary)`.

Choices
- The examples are those of suite.py: one implementation of formats and metrics. seqio tokenizes,
  appends EOS, trims and batches; its Evaluator calls the metrics.
- If the variables are set, importing this module registers the tasks that have data, and the
  mixtures all of whose weighted tasks are registered. It imports seqio and TensorFlow, which is
  kept off the accelerators.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf

from evaluation.tasks import sources
from evaluation.tasks.suite import MIXTURES, TASKS, Task
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.scores.model.loading import find_tokenizer

VOCABULARY = "WINNOW_EVALUATION_VOCABULARY"
CAP = 1 << 21  # of examples-proportional mixing, as T5's final models have it

for _kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], _kind)


class _Examples:
    """A task's examples, read at their first use. The whole example goes along as JSON
    for the metrics."""

    def __init__(self, task: Task, data: str):
        self._task, self._data = task, data
        self.of = functools.lru_cache(maxsize=4)(self._of)

    def _of(self, split: str) -> list[dict[str, Any]]:
        return self._task.examples(split, self._data)

    def dataset(
        self, split: str, shuffle_files: bool = False, seed: int | None = None
    ) -> tf.data.Dataset:
        examples = self.of(split)
        columns = {
            "inputs": [one["inputs"] for one in examples],
            "targets": [one["targets"] for one in examples],
            "example": [json.dumps(one) for one in examples],
        }
        return tf.data.Dataset.from_tensor_slices(columns)


def register_all(data: str, vocabulary: str) -> list[str]:
    """Register every task with data, and the mixtures of them, and return their names."""
    features = _features(find_tokenizer("", vocabulary), vocabulary)
    names = [name for name in TASKS if register(name, data, features) is not None]
    for name, weights in MIXTURES.items():
        if all(task in names for task, weight in weights.items() if weight):
            known = {task: weight for task, weight in weights.items() if task in names}
            register_mixture(name, known)
            names.append(name)
    return names


def register(name: str, data: str, features: Mapping[str, seqio.Feature]) -> seqio.Task | None:
    """Register one task; return None if it has no split."""
    task = TASKS[name]
    try:
        found = sources.splits(task.dataset, data)
    except (sources.SourceError, KeyError):
        return None
    splits = [split for split in found if not task.splits or split in task.splits]
    if not splits:
        return None
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(_Examples(task, data).dataset, splits=splits),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features=dict(features),
        postprocess_fn=functools.partial(_postprocess, task),
        metric_fns=[_metric(task)] if task.metrics else [],
    )


def register_mixture(name: str, sizes: Mapping[str, int], cap: int = CAP) -> seqio.Mixture:
    """Register a mixture; a task's rate is its number of examples, at most `cap`."""
    return seqio.MixtureRegistry.add(
        name, [(task, float(min(size, cap))) for task, size in sizes.items()]
    )


def _features(vocabulary: Any, path: str) -> dict[str, seqio.Feature]:
    if not isinstance(vocabulary, Vocabulary):
        raise VocabularyError(f"{path} is no SentencePiece vocabulary, nor bytes.")
    if vocabulary.kind == "bytes":
        own: seqio.Vocabulary = seqio.ByteVocabulary(vocabulary.extra_ids)
    else:
        file = os.path.join(path, "vocabulary.model") if os.path.isdir(path) else path  # noqa: PTH112,PTH118
        own = seqio.SentencePieceVocabulary(file, vocabulary.extra_ids)
    feature = seqio.Feature(own, add_eos=True)
    return {"inputs": feature, "targets": feature}


def _postprocess(task: Task, said: str, example: Mapping[str, Any], is_target: bool = False) -> Any:
    """Return the example of a target, or the text of a prediction."""
    return json.loads(example["example"]) if is_target else said


def _metric(task: Task) -> Callable[..., dict[str, float]]:
    def metric(targets: Sequence[Any], predictions: Sequence[str]) -> dict[str, float]:
        return task.judge(targets, predictions)

    return metric


if sources.DATA in os.environ and VOCABULARY in os.environ:
    register_all(os.environ[sources.DATA], os.environ[VOCABULARY])
