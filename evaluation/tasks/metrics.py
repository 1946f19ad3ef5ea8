"""Metrics as T5 reports them: percentages, with answers that are no label counted as wrong.

    accuracy([0, 1], [0, 0]) -> {"accuracy": 50.0}

Choices
- scikit-learn, SciPy and rouge-score compute the metrics that they offer. SQuAD's EM and F1 follow
  the official script (normalized answers, bags of words, best over the references).
- Answers become labels by exact match with a label's word; anything else is -1.
- F1 on two classes counts an answer that is neither as the wrong class, which is T5's convention.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Metric = Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
"""(targets, predictions) -> name -> value. A target is a label, a number, a text, or a group's."""


def accuracy(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    from sklearn.metrics import accuracy_score

    return {"accuracy": 100 * float(accuracy_score(targets, predictions))}


def matthews(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Return Matthews' correlation; 0 if all predictions, or all targets, are the same."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_corrcoef": 100 * float(matthews_corrcoef(targets, predictions))}


def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Return F1 of class 1 of two; a prediction that is neither counts as the wrong one."""
    from sklearn.metrics import f1_score

    wanted, found = np.asarray(targets), np.asarray(predictions)
    found = np.where((found == 0) | (found == 1), found, 1 - wanted)
    return {"f1": 100 * float(f1_score(wanted, found, zero_division=0.0))}


def mean_f1(classes: int) -> Metric:
    """Return a metric: the unweighted mean of every class's F1."""

    def metric(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        value = f1_score(
            targets, predictions, labels=range(classes), average="macro", zero_division=0.0
        )
        return {f"mean_{classes}class_f1": 100 * float(value)}

    return metric


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Return Pearson's correlation; 0 for constant predictions."""
    from scipy.stats import pearsonr

    return {"pearson_corrcoef": _correlation(pearsonr, targets, predictions)}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """Return Spearman's correlation; 0 for constant predictions."""
    from scipy.stats import spearmanr

    return {"spearman_corrcoef": _correlation(spearmanr, targets, predictions)}


def _correlation(function: Any, targets: Sequence[float], predictions: Sequence[float]) -> float:
    if len(set(predictions)) < 2 or len(set(targets)) < 2:
        return 0.0
    return 100 * float(function(targets, predictions)[0])


def multirc(targets: Sequence[tuple[str, int]], predictions: Sequence[int]) -> dict[str, float]:
    """Return F1 over all answers, and the share of questions with all answers right.

    A target is (group, label).
    """
    right: dict[str, bool] = {}
    for (group, label), prediction in zip(targets, predictions, strict=True):
        right[group] = right.get(group, True) and label == prediction
    exact = 100 * float(np.mean(list(right.values())))
    return f1([label for _, label in targets], predictions) | {"exact_match": exact}


def record(
    targets: Sequence[tuple[str, Sequence[str]]], predictions: Sequence[str]
) -> dict[str, float]:
    """Return EM and F1 as in SQuAD, every query once. A target is (group, answers)."""
    first: dict[str, tuple[Sequence[str], str]] = {}
    for (group, answers), prediction in zip(targets, predictions, strict=True):
        first.setdefault(group, (answers, prediction))
    return squad([answers for answers, _ in first.values()], [said for _, said in first.values()])


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Return exact match and F1 of SQuAD 1.1, the best over each question's answers."""
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        said = normal(prediction)
        wanted = [normal(answer) for answer in answers]
        exact.append(max((float(said == answer) for answer in wanted), default=0.0))
        overlap.append(max((_word_f1(said, answer) for answer in wanted), default=0.0))
    return {"em": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def normal(text: str) -> str:
    """Return an answer in lower case, without punctuation, articles and extra white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(said: str, wanted: str) -> float:
    """Return F1 of two bags of words; 0 if they share none."""
    a, b = said.split(), wanted.split()
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Return mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L (sentences end at " . ")."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeLsum")
    scorer = RougeScorer(names)
    found = [
        scorer.score(target=_sentences(target), prediction=_sentences(prediction))
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {name: 100 * float(np.mean([one[name].fmeasure for one in found])) for name in names}


def _sentences(text: str) -> str:
    return text.replace(" . ", " .\n")


# --------------------------------------------------------------------------------------------------
# Answers of a model -> arguments of metrics


def label_of(words: Sequence[str]) -> Callable[[str], int]:
    """Return a function from an answer to the label of that word; -1 for anything else."""
    return lambda said: words.index(said) if said in words else -1


def number_of(said: str) -> float:
    """Return the number in an answer; -1 for anything else."""
    try:
        value = float(said)
    except ValueError:
        return -1.0
    return value if np.isfinite(value) else -1.0


_DETERMINERS = frozenset(
    {"a", "an", "few", "her", "his", "each", "every", "many", "much", "my", "our", "some"}
    | {"that", "the", "their", "these", "this", "those", "which", "whose", "your"}
)


def names_referent(said: str, referent: str) -> int:
    """Return 1 if a WSC answer names the noun phrase in question, else 0.

    Case and determiners are ignored; "fuzzy bunny" names "bunny"; "Bob" does not name "Bob's hat".
    """

    def words(text: str) -> str:
        text = text.strip().lower()
        return " ".join(word for word in text.split(" ") if word not in _DETERMINERS)

    said, referent = words(said), words(referent)
    if ("'" in said) != ("'" in referent):
        return 0
    a, b = set(said.split(" ")), set(referent.split(" "))
    return int(a <= b or b <= a)
