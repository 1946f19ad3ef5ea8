"""Metrics as T5 reports them: percentages, an answer that is no label counted as wrong.

    accuracy([0, 1], [0, 0]) -> {"accuracy": 50.0}

Choices
- scikit-learn, SciPy and rouge-score compute what they have; SQuAD's EM and F1 follow the official
  script's definition (normalised answers, words as a bag, best over the references).
- Answers become labels by exact match with a label's word; anything else is -1.
- F1 on two classes takes an answer that is neither as the wrong one (T5's convention), so that
  refusing to answer never pays.
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
    """Matthews' correlation; 0 where all predictions, or all targets, are the same."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_corrcoef": 100 * float(matthews_corrcoef(targets, predictions))}


def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """Of class 1 among two; a prediction that is neither counts as the wrong one."""
    from sklearn.metrics import f1_score

    wanted, found = np.asarray(targets), np.asarray(predictions)
    found = np.where((found == 0) | (found == 1), found, 1 - wanted)
    return {"f1": 100 * float(f1_score(wanted, found, zero_division=0.0))}


def mean_f1(classes: int) -> Metric:
    """Unweighted mean of every class's F1."""

    def metric(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        value = f1_score(
            targets, predictions, labels=range(classes), average="macro", zero_division=0.0
        )
        return {f"mean_{classes}class_f1": 100 * float(value)}

    return metric


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """NaN becomes 0: a model that always says the same correlates with nothing."""
    from scipy.stats import pearsonr

    return {"pearson_corrcoef": _correlation(pearsonr, targets, predictions)}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """As `pearson`, of ranks."""
    from scipy.stats import spearmanr

    return {"spearman_corrcoef": _correlation(spearmanr, targets, predictions)}


def _correlation(function: Any, targets: Sequence[float], predictions: Sequence[float]) -> float:
    if len(set(predictions)) < 2 or len(set(targets)) < 2:
        return 0.0
    return 100 * float(function(targets, predictions)[0])


def multirc(targets: Sequence[tuple[str, int]], predictions: Sequence[int]) -> dict[str, float]:
    """F1 over all answers, and the share of questions all of whose answers are judged rightly.

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
    """EM and F1 as in SQuAD, every query once. A target is (group, answers)."""
    first: dict[str, tuple[Sequence[str], str]] = {}
    for (group, answers), prediction in zip(targets, predictions, strict=True):
        first.setdefault(group, (answers, prediction))
    return squad([answers for answers, _ in first.values()], [said for _, said in first.values()])


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of SQuAD 1.1, the best over each question's answers."""
    exact, overlap = [], []
    for answers, prediction in zip(targets, predictions, strict=True):
        said = normal(prediction)
        wanted = [normal(answer) for answer in answers]
        exact.append(max((float(said == answer) for answer in wanted), default=0.0))
        overlap.append(max((_word_f1(said, answer) for answer in wanted), default=0.0))
    return {"em": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}


def normal(text: str) -> str:
    """An answer in lower case, without punctuation, articles and spare white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _word_f1(said: str, wanted: str) -> float:
    """Of two bags of words; 0 where they have nothing in common."""
    a, b = said.split(), wanted.split()
    common = sum((collections.Counter(a) & collections.Counter(b)).values())
    if not common:
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (of sentences, which end at " . "): means of F-measures."""
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
# What a model says -> what a metric takes


def label_of(words: Sequence[str]) -> Callable[[str], int]:
    """The label whose word is said; -1 for anything else."""
    return lambda said: words.index(said) if said in words else -1


def number_of(said: str) -> float:
    """The number that is said; -1 for anything else."""
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
    """WSC: whether what is said is the noun phrase in question, 1 or 0.

    Case and determiners don't matter; "fuzzy bunny" names "bunny"; "Bob" does not name "Bob's hat".
    """

    def words(text: str) -> str:
        text = text.strip().lower()
        return " ".join(word for word in text.split(" ") if word not in _DETERMINERS)

    said, referent = words(said), words(referent)
    if ("'" in said) != ("'" in referent):
        return 0
    a, b = set(said.split(" ")), set(referent.split(" "))
    return int(a <= b or b <= a)
