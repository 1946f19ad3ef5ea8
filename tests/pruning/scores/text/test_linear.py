"""The linear model over hashed n-grams, against scikit-learn and against what was planted."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pruning.scores.text.hashing import Features, batches, hashed_ngrams
from pruning.scores.text.linear import Bags, Linear, fit

FEATURES = Features(2, 1 << 16)


def documents(n, seed, words=300, length=40):
    """Bags of words, and how many of the words w0 ... w19 each has."""
    random = np.random.default_rng(seed)
    ids = random.zipf(1.3, (n, length)) % words
    texts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    return pa.array(texts, pa.large_string()), (ids < 20).mean(axis=1)


def bags_of(texts):
    return Bags.join([Bags.of(hashed_ngrams(batch, FEATURES)) for batch in batches(texts, 3000)])


def test_bags_are_logarithms_of_counts_of_length_one():
    texts = pa.array(["a a a b", "", "b", "c d c d"])
    bags = Bags.of(hashed_ngrams(texts, Features(1, 1 << 16)))
    names = {t: int(hashed_ngrams(pa.array([t]), Features(1, 1 << 16)).buckets[0]) for t in "abcd"}
    expected = [{"a": np.log(4), "b": np.log(2)}, {}, {"b": 1.0}, {"c": 1.0, "d": 1.0}]
    assert bags.offsets.tolist() == [0, 2, 2, 3, 5]
    for document, values in enumerate(expected):
        part = slice(bags.offsets[document], bags.offsets[document + 1])
        found = dict(zip(bags.buckets[part].tolist(), bags.values[part].tolist(), strict=True))
        norm = np.sqrt(sum(v * v for v in values.values()))
        assert found == pytest.approx({names[t]: v / norm for t, v in values.items()}, rel=1e-6)


def test_batches_do_not_matter():
    texts, _ = documents(200, 0)
    whole, cut = Bags.of(hashed_ngrams(texts, FEATURES)), bags_of(texts)
    for name in ("buckets", "values", "offsets"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))
    rows = np.array([3, 50, 199])
    some = Bags.of(hashed_ngrams(texts.take(pa.array(rows)), FEATURES))
    taken = whole.take(rows)
    np.testing.assert_array_equal(some.buckets, taken.buckets)
    np.testing.assert_allclose(some.values, taken.values)


@pytest.mark.parametrize("loss", ["logistic", "squared"])
def test_it_is_the_minimum_that_scikit_learn_finds(loss):
    models = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    texts, share = documents(400, 1)
    bags = bags_of(texts)
    x = bags.matrix(FEATURES.buckets).astype(np.float64)
    if loss == "logistic":
        y = (share > np.median(share)).astype(float)
        other = models.LogisticRegression(C=1 / 0.5, tol=1e-8, max_iter=1000).fit(x, y)
        expected = other.decision_function(x)
    else:
        y = share
        other = models.Ridge(alpha=0.5, tol=1e-10).fit(x, y)
        expected = other.predict(x)
    found = fit(bags, y, FEATURES, loss, l2=0.5)(bags)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.ptp(expected))


def test_it_finds_what_was_planted():
    texts, share = documents(3000, 2)
    unseen, unseen_share = documents(1000, 3)
    model = fit(bags_of(texts), share, FEATURES, "squared", l2=0.1)
    correlation = np.corrcoef(model(bags_of(unseen)), unseen_share)[0, 1]
    assert correlation > 0.95


def test_a_model_survives_a_file():
    texts, share = documents(100, 4)
    bags = bags_of(texts)
    model = fit(bags, share, FEATURES, "squared", l2=1.0)
    again = Linear.from_bytes(model.to_bytes())
    assert again.features == model.features
    np.testing.assert_array_equal(model(bags), again(bags))


def test_nothing_to_learn_is_an_error():
    texts, _ = documents(10, 5)
    with pytest.raises(ValueError, match="teach nothing"):
        fit(bags_of(texts), np.ones(10), FEATURES, "logistic", l2=1.0)
