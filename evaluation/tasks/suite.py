"""Table of tasks: data set, conversion to text, and metrics of answers.

    suite.TASKS["glue_cola_v002"].examples("train", data)
    suite.tasks_of("super_glue_v102_proportional")

Choices
- Names, formats and metrics are T5's. WNLI is evaluated in the form of WSC and not trained on; WSC
  trains on the examples whose referent is right, with Definite Pronoun Resolution beside it.
- A mixture's task has a weight: its number of training examples, at most `cap` (examples-
  proportional mixing, arXiv 1910.10683, section 3.5.2). Weight 0: evaluated only.
- A task's score is the mean of its metrics, as in the benchmarks' own averages.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.tasks import metrics, sources, texts
from evaluation.tasks.metrics import Metric
from evaluation.tasks.texts import Example, Preprocess


class TaskError(ValueError):
    """A task is unknown, or does not have what is needed."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      dataset: as `sources` and TFDS name it.
      preprocess: an example of the data set -> examples of text.
      metrics: (targets, predictions) -> numbers; none if labels are not public.
      answer: a model's text and the example -> a prediction for the metrics.
      target: example -> a target for the metrics.
      words: the possible answers, which can be ranked; None if the answer is free text.
      splits: existing splits; all of the data set's if empty.
      most_tokens: largest length of an answer.
    """

    dataset: str
    preprocess: Preprocess
    metrics: tuple[Metric, ...] = (metrics.accuracy,)
    answer: Callable[[str, Example], Any] = lambda said, example: said
    target: Callable[[Example], Any] = lambda example: example["label"]
    words: tuple[str, ...] | None = None
    splits: tuple[str, ...] = ()
    most_tokens: int = 16

    def examples(self, split: str, data: str) -> list[Example]:
        """Return the examples of a split, in order; see `sources.read`.

        Raises TaskError where the task has no such split.
        """
        if self.splits and split not in self.splits:
            raise TaskError(f"the task has no split {split!r}; it has: {', '.join(self.splits)}.")
        rows = sources.read(self.dataset, split, data)
        return [made for row in rows for made in self.preprocess(row)]

    def judge(self, examples: Sequence[Example], said: Sequence[str]) -> dict[str, float]:
        """Return the metrics of a model's answers to the examples.

        Raises TaskError where the examples have no labels.
        """
        if not self.metrics:
            raise TaskError("the task has no public labels: there is nothing to judge by.")
        if any(example.get("label", 0) == -1 for example in examples):
            raise TaskError("some examples have no label (-1): this split cannot be judged.")
        wanted = [self.target(example) for example in examples]
        found = [self.answer(text, example) for text, example in zip(said, examples, strict=True)]
        numbers: dict[str, float] = {}
        for metric in self.metrics:
            numbers |= metric(wanted, found)
        return numbers

    def majority(self, examples: Sequence[Example]) -> dict[str, float] | None:
        """Return the metrics of always giving the most frequent answer; None for free answers."""
        if self.words is None:
            return None
        commonest = Counter(example["targets"] for example in examples).most_common(1)[0][0]
        return self.judge(examples, [commonest] * len(examples))


def score(numbers: Mapping[str, float]) -> float:
    """Return a task's score, the mean of its metrics."""
    return float(np.mean(list(numbers.values())))


def _labelled(
    dataset: str,
    prefix: str,
    names: Sequence[str],
    words: tuple[str, ...],
    measures: tuple[Metric, ...] = (metrics.accuracy,),
    splits: tuple[str, ...] = (),
    preprocess: Preprocess | None = None,
) -> Task:
    label = metrics.label_of(words)
    return Task(
        dataset=dataset,
        preprocess=preprocess or texts.fields(prefix, names, words),
        metrics=measures,
        answer=lambda said, example: label(said),
        words=words,
        splits=splits,
    )


def _rekeyed(preprocess: Preprocess, names: Mapping[str, str]) -> Preprocess:
    return lambda example: preprocess({names.get(k, k): v for k, v in example.items()})


_TRUTH = ("False", "True")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
_HYPOTHESIS = ("hypothesis", "premise")
_BOTH = (metrics.f1, metrics.accuracy)


def _referent(said: str, example: Example) -> int:
    return metrics.names_referent(said, example["targets"])


TASKS: dict[str, Task] = {
    "glue_cola_v002": _labelled(
        "glue/cola", "cola", ("sentence",), ("unacceptable", "acceptable"), (metrics.matthews,)
    ),
    "glue_sst2_v002": _labelled("glue/sst2", "sst2", ("sentence",), ("negative", "positive")),
    "glue_mrpc_v002": _labelled(
        "glue/mrpc", "mrpc", _PAIR, ("not_equivalent", "equivalent"), _BOTH
    ),
    "glue_qqp_v002": _labelled(
        "glue/qqp", "qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _BOTH
    ),
    "glue_stsb_v002": Task(
        "glue/stsb",
        texts.stsb,
        (metrics.pearson, metrics.spearman),
        answer=lambda said, example: metrics.number_of(said),
        words=tuple(f"{fifths / 5:.1f}" for fifths in range(26)),
    ),
    "glue_mnli_v002": _labelled("glue/mnli", "mnli", _HYPOTHESIS, _NLI),
    "glue_mnli_matched_v002": _labelled("glue/mnli_matched", "mnli", _HYPOTHESIS, _NLI),
    "glue_mnli_mismatched_v002": _labelled("glue/mnli_mismatched", "mnli", _HYPOTHESIS, _NLI),
    "glue_qnli_v002": _labelled("glue/qnli", "qnli", ("question", "sentence"), _ENTAILMENT),
    "glue_rte_v002": _labelled("glue/rte", "rte", _PAIR, _ENTAILMENT),
    "glue_wnli_v002": _labelled("glue/wnli", "wnli", _PAIR, ("not_entailment", "entailment")),
    "glue_wnli_v002_simple_eval": Task(
        "glue/wnli",
        texts.wnli,
        answer=_referent,
        splits=("validation", "test"),
        most_tokens=32,
    ),
    "glue_ax_v002": _labelled("glue/ax", "mnli", _HYPOTHESIS, _NLI, (), ("test",)),
    "super_glue_boolq_v102": _labelled(
        "super_glue/boolq", "boolq", ("passage", "question"), _TRUTH
    ),
    "super_glue_cb_v102": _labelled(
        "super_glue/cb",
        "cb",
        _HYPOTHESIS,
        ("entailment", "contradiction", "neutral"),
        (metrics.mean_f1(3), metrics.accuracy),
    ),
    "super_glue_copa_v102": _labelled(
        "super_glue/copa",
        "copa",
        ("choice1", "choice2", "premise", "question"),
        ("choice1", "choice2"),
    ),
    "super_glue_multirc_v102": dataclasses.replace(
        _labelled("super_glue/multirc", "multirc", (), _TRUTH, (metrics.multirc,)),
        preprocess=texts.multirc,
        target=lambda example: (example["group"], example["label"]),
    ),
    "super_glue_record_v102": Task(
        "super_glue/record",
        texts.record,
        (metrics.record,),
        target=lambda example: (example["group"], example["answers"]),
        most_tokens=64,
    ),
    "super_glue_rte_v102": _labelled("super_glue/rte", "rte", _HYPOTHESIS, _ENTAILMENT),
    "super_glue_wic_v102": _labelled(
        "super_glue/wic", "wic", ("sentence1", "sentence2", "word"), _TRUTH
    ),
    "super_glue_axb_v102": _labelled(
        "super_glue/axb",
        "rte",
        (),
        _ENTAILMENT,
        (),
        ("test",),
        _rekeyed(
            texts.fields("rte", _HYPOTHESIS, _ENTAILMENT),
            {"sentence1": "premise", "sentence2": "hypothesis"},
        ),
    ),
    "super_glue_axg_v102": _labelled(
        "super_glue/axg", "rte", _HYPOTHESIS, _ENTAILMENT, (), ("test",)
    ),
    "super_glue_wsc_v102_simple_train": Task(
        "super_glue/wsc.fixed", texts.wsc(training=True), (), splits=("train",)
    ),
    "super_glue_wsc_v102_simple_eval": Task(
        "super_glue/wsc.fixed",
        texts.wsc(training=False),
        answer=_referent,
        splits=("validation", "test"),
        most_tokens=32,
    ),
    "dpr_v001_simple": Task(
        "definite_pronoun_resolution",
        texts.definite_pronoun,
        target=lambda example: example["targets"],
        most_tokens=32,
    ),
    "squad_v010_allanswers": Task(
        "squad/v1.1",
        texts.squad,
        (metrics.squad,),
        target=lambda example: example["answers"],
        most_tokens=64,
    ),
    "cnn_dailymail_v002": Task(
        "cnn_dailymail",
        texts.summarize,
        (metrics.rouge,),
        target=lambda example: example["targets"],
        most_tokens=128,
    ),
}

# Mixture -> task -> its number of training examples, as published; 0: evaluated only.
MIXTURES: dict[str, dict[str, int]] = {
    "glue_v002_proportional": {
        "glue_cola_v002": 8_551,
        "glue_sst2_v002": 67_349,
        "glue_mrpc_v002": 3_668,
        "glue_qqp_v002": 363_849,
        "glue_stsb_v002": 5_749,
        "glue_mnli_v002": 392_702,
        "glue_qnli_v002": 104_743,
        "glue_rte_v002": 2_490,
        "glue_mnli_mismatched_v002": 0,
        "glue_mnli_matched_v002": 0,
        "glue_ax_v002": 0,
    },
    "super_glue_v102_proportional": {
        "dpr_v001_simple": 1_322,
        "super_glue_wsc_v102_simple_train": 259,
        "super_glue_wsc_v102_simple_eval": 0,
        "super_glue_boolq_v102": 9_427,
        "super_glue_cb_v102": 250,
        "super_glue_copa_v102": 400,
        "super_glue_multirc_v102": 27_243,
        "super_glue_record_v102": 138_854,
        "super_glue_rte_v102": 2_490,
        "super_glue_wic_v102": 5_428,
        "super_glue_axb_v102": 0,
        "super_glue_axg_v102": 0,
    },
}
# The first paper fine-tunes on all tasks of both benchmarks together.
MIXTURES["glue_and_super_glue_proportional"] = {
    name: size for mixture in tuple(MIXTURES.values()) for name, size in mixture.items()
}

Names = tuple[str, ...] | str


def listed(names: Names) -> list[str]:
    """Return a list of names; a string is split at white space and commas."""
    given = re.split(r"[\s,]+", names) if isinstance(names, str) else names
    return [name for name in given if name]


def tasks_of(names: Names, training: bool = False) -> list[str]:
    """Return task names, with mixtures replaced by their tasks.

    Args:
      names: of tasks and mixtures; or one text, separated by white space or commas.
      training: leave out the tasks that a mixture only evaluates; otherwise those that have
        nothing to be judged by.

    Raises TaskError on an unknown name.
    """
    found: list[str] = []
    for name in listed(names):
        if name in TASKS:
            found.append(name)
        elif name in MIXTURES:
            found += [
                task
                for task, size in MIXTURES[name].items()
                if (size if training else TASKS[task].metrics and task != "dpr_v001_simple")
            ]
        else:
            raise TaskError(f"no task or mixture {name!r}; there are: {', '.join(known())}.")
    return list(dict.fromkeys(found))


def known() -> list[str]:
    return [*TASKS, *MIXTURES]
