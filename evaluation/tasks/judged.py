"""Answers of a model to the tasks, and their metrics.

    python -m evaluation tasks --gin_file=configs/evaluate/tasks.gin --gin.MODEL=runs/finetuned \\
        --gin.TASKS=glue_v002_proportional --gin.DATA=eval --gin.OUTPUT=runs/finetuned/tasks

Choices
- "generate" is T5's evaluation: greedy decoding, and an answer that is no label is wrong. "rank"
  takes the most likely label, so every model gives an answer, fine-tuned or not.
- A decoder-only model gets the format of train.py: its first token, the inputs, then the targets.
- A continuous measure is added: the log-likelihood of the right answer per character.
- Metrics of always giving the most common answer are shown beside a task's metrics, as a floor.
- Every task is a result of its own, so an interrupted evaluation resumes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from evaluation import inference
from evaluation.inference import Inference, InferenceConfig, Pair
from evaluation.results_directory import ResultsDirectory
from evaluation.tasks import suite
from evaluation.tasks.suite import TASKS, TaskError, tasks_of
from evaluation.tasks.texts import Example
from pruning.scores.model.likelihood import start_id
from pruning.store.atomic import write_text

NAME = "Tasks"


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Settings of `tasks`.

    Attributes:
      inference: `@Inference()`, the model.
      tasks: names of tasks and mixtures; or one text, separated by white space or commas.
      data: directory of the original files; or "tfds:DIRECTORY".
      output: directory of the results.
      split: of every task.
      how: "generate"; or "rank" where a task's answers can be listed, "generate" for the others.
      limit: number of first examples of each task; None: all.
      samples: also write every example with the model's answer, as JSON lines.
    """

    inference: InferenceConfig
    tasks: tuple[str, ...] | str
    data: str
    output: str
    split: str = "validation"
    how: Literal["generate", "rank"] = "generate"
    limit: int | None = None
    samples: bool = True


CONFIGURABLES: dict[str, type] = {NAME: TasksConfig, "Inference": InferenceConfig}


def run(config: TasksConfig) -> list[str]:
    """Evaluate, or finish evaluating, and return a line for every task."""
    lines, scores = [], []
    for name, found in evaluate(config).items():
        numbers = ", ".join(f"{metric} {value:.2f}" for metric, value in found["metrics"].items())
        majority = found["majority"]
        beside = ""
        if majority is not None:
            beside = f" (commonest answer: {', '.join(f'{v:.2f}' for v in majority.values())})"
        likelihood = found.get("answer_log_likelihood")  # results of earlier versions have none
        if likelihood is not None:
            beside += f", {likelihood:.4f} nats per character of the right answer"
        lines.append(f"{name}: {numbers}{beside}, {found['examples']:,} examples")
        scores.append(found["score"])
    lines.append(f"mean of {len(scores)} tasks: {np.mean(scores):.2f}")
    return lines


def evaluate(config: TasksConfig) -> dict[str, Any]:
    """Evaluate, or finish evaluating, and return results by task.

    Raises:
      TaskError: an unknown task, or a split without labels.
      SourceError: the files are not there, or damaged.
    """
    names = tasks_of(config.tasks)
    if hidden := [name for name in names if not TASKS[name].metrics]:
        raise TaskError(f"{hidden[0]} has no public labels, or is for training only.")
    model = inference.load(config.inference)
    identity = {
        **model.identity(),
        **{name: getattr(config, name) for name in ("split", "how", "limit")},
    }
    record = ResultsDirectory(config.output, identity)
    return record.each(names, lambda name: _evaluate(config, name, model))


def _evaluate(config: TasksConfig, name: str, model: Inference) -> dict[str, Any]:
    task = TASKS[name]
    examples = task.examples(config.split, config.data)[: config.limit]
    if not examples:
        raise TaskError(f"{name} has no examples in the split {config.split!r} of {config.data}.")
    cut = model.cut
    if config.how == "rank" and task.words is not None:
        said = ranked(model, examples, task.words)
    else:
        said = generated(model, examples, task.most_tokens)
    numbers = task.judge(examples, said)
    likelihood = answer_log_likelihood(model, examples)
    if config.samples:
        lines = [
            json.dumps({**example, "said": text}, ensure_ascii=False) + "\n"
            for example, text in zip(examples, said, strict=True)
        ]
        file = epath.Path(config.output) / "samples" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "".join(lines))
    return {
        "metrics": numbers,
        "score": suite.score(numbers),
        "majority": task.majority(examples),
        "answer_log_likelihood": likelihood,
        "examples": len(examples),
        "inputs_cut": model.cut - cut,
    }


def generated(model: Inference, examples: Sequence[Example], most_tokens: int) -> list[str]:
    """Return the model's greedy answer to every example."""
    prompts = [_given(model, example) for example in examples]
    found = model.generate(prompts, most_tokens)
    return [model.decode(tokens).strip() for tokens in found]


def ranked(model: Inference, examples: Sequence[Example], words: Sequence[str]) -> list[str]:
    """Return the most likely word for every example, by the sum over the word's tokens."""
    answers = [model.tokenizer.encode(word) for word in words]
    pairs = [
        Pair(given, answer)
        for given in (_given(model, example) for example in examples)
        for answer in answers
    ]
    sums, _ = model.log_likelihoods(pairs)
    best = sums.reshape(len(examples), len(words)).argmax(axis=1)
    return [words[i] for i in best]


def answer_log_likelihood(model: Inference, examples: Sequence[Example]) -> float:
    """Return the mean log-likelihood of the right answers, in nats per character.

    Continuous measures of this kind rank training data at small sizes where accuracies are still at
    chance (Magnusson et al., arXiv 2504.11393). Examples with an empty answer are left out.
    """
    answered = [example for example in examples if example["targets"]]
    pairs = [
        Pair(_given(model, example), model.tokenizer.encode(example["targets"]))
        for example in answered
    ]
    sums, _ = model.log_likelihoods(pairs)
    characters = np.asarray([len(example["targets"]) for example in answered])
    return float(np.mean(sums / characters)) if answered else float("nan")


def _given(model: Inference, example: Example) -> list[int]:
    ids = model.tokenizer.encode(example["inputs"])
    if model.has_encoder:
        return ids
    return [start_id(model.model.config, model.tokenizer), *ids]
