"""The n-gram floors: a distribution, equal to the definition, and better with order."""

import math
from collections import Counter

import numpy as np
import pytest

from evaluation.statistics import ngram_model

VOCABULARY = 7


def documents_of(seed: int, count: int = 12) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY - 1, rng.integers(0, 15)) for _ in range(count)]


def reference(documents, order):
    """Interpolated Kneser-Ney by its definition, with dictionaries."""
    counts = Counter()
    for document in documents:
        padded = ["<s>"] * (order - 1) + document.tolist()
        counts.update(tuple(padded[i - order + 1 : i + 1]) for i in range(order - 1, len(padded)))
    by_order = {order: counts}
    for n in range(order - 1, 0, -1):
        by_order[n] = Counter(gram[1:] for gram in by_order[n + 1])

    def probability(context, token):
        value = 1 / VOCABULARY
        for n in range(1, order + 1):
            before = context[len(context) - n + 1 :]
            table = by_order[n]
            once = sum(c == 1 for c in table.values())
            twice = sum(c == 2 for c in table.values())
            discount = min(max(once / (once + 2 * twice), 0.1), 0.95) if once else 0.5
            followers = {g[-1]: c for g, c in table.items() if g[:-1] == before}
            total = sum(followers.values())
            if not total:
                continue
            kept = max(followers.get(token, 0) - discount, 0)
            value = (kept + discount * len(followers) * value) / total
        return value

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_it_equals_the_definition(order):
    training, other = documents_of(0), documents_of(1)
    model = ngram_model.fit(training, order, VOCABULARY)
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in other])])
    found = model.log_probabilities(np.concatenate(other), offsets)
    probability = reference(training, order)
    expected = []
    for document in other:
        padded = ("<s>",) * (order - 1) + tuple(document.tolist())
        for i in range(order - 1, len(padded)):
            expected.append(math.log(probability(padded[i - order + 1 : i], padded[i])))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_all_tokens_sum_to_one(order):
    model = ngram_model.fit(documents_of(2), order, VOCABULARY)
    context = documents_of(3)[0][:4]
    ends = [np.append(context, token) for token in range(VOCABULARY)]
    offsets = (len(context) + 1) * np.arange(VOCABULARY + 1)
    last = model.log_probabilities(np.concatenate(ends), offsets)[offsets[1:] - 1]
    assert np.exp(last).sum() == pytest.approx(1)


def test_structure_is_learned_by_higher_orders_only():
    rng = np.random.default_rng(0)
    step = rng.permutation(50)

    def walk(length):
        walked = [int(rng.integers(50))]
        for _ in range(length - 1):
            walked.append(int(step[walked[-1]]) if rng.random() < 0.9 else int(rng.integers(50)))
        return np.asarray(walked)

    training, held_out = [walk(100) for _ in range(50)], walk(5000)
    loss = {
        order: -ngram_model.fit(training, order, 50)
        .log_probabilities(held_out, np.array([0, 5000]))
        .mean()
        for order in (1, 2)
    }
    entropy = -(0.902 * math.log(0.902) + 49 * 0.002 * math.log(0.002))
    assert loss[1] == pytest.approx(math.log(50), abs=0.05)
    assert entropy - 0.05 < loss[2] < entropy + 0.15


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="do not fit a vocabulary of 7"):
        ngram_model.fit([np.array([7])], 1, VOCABULARY)
    with pytest.raises(ValueError, match="at least one token"):
        ngram_model.fit([np.array([], int)], 1, VOCABULARY)
