"""N-grams of tokens, beside those of a plain loop."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.scores.text.linear import Bags
from pruning.scores.text.pieces import Pieces

DOCUMENTS = st.lists(st.lists(st.integers(1, 6) | st.integers(1, 65_535), max_size=12), max_size=6)


def column_of(documents):
    return pa.array(documents, pa.list_(pa.uint16()))


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(1, 3), st.none() | st.integers(1, 5))
def test_bags_are_counts_of_length_one_and_frequencies(documents, n, first):
    pieces = Pieces(n, 1 << 22, first)
    found = pieces.bags(pieces.ngrams(column_of(documents)))
    for d, tokens in enumerate(documents):
        tokens = tokens[:first]
        entries = slice(found.offsets[d], found.offsets[d + 1])
        buckets, values = found.buckets[entries], found.values[entries]
        grams = Counter(tuple(tokens[i : i + k]) for k in range(1, n + 1)
                        for i in range(len(tokens) - k + 1))  # fmt: skip
        logs = np.sort([math.log1p(count) for count in grams.values()])
        expected = logs / max(np.linalg.norm(logs), 1e-9)
        in_counts = buckets < pieces.buckets
        np.testing.assert_allclose(np.sort(values[in_counts]), expected, rtol=1e-5)
        frequencies = dict(zip(buckets[~in_counts] - pieces.buckets, values[~in_counts],
                               strict=True))  # fmt: skip
        assert set(frequencies) == set(tokens)
        for token, count in Counter(tokens).items():
            assert frequencies[token] == pytest.approx(8 * count / len(tokens))
        assert (np.diff(buckets) > 0).all()


def test_batches_are_the_documents_and_change_nothing():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 9000, size).tolist() for size in rng.integers(0, 30_000, 20)]
    column, pieces = column_of(documents), Pieces(first=50)
    parts = list(pieces.batches(column))
    assert len(parts) > 3 and pa.concat_arrays(parts).equals(column)
    whole = pieces.bags(pieces.ngrams(column))
    cut = Bags.join([pieces.bags(pieces.ngrams(part)) for part in parts])
    np.testing.assert_array_equal(whole.buckets, cut.buckets)
    np.testing.assert_array_equal(whole.values, cut.values)
    # What lies behind the first tokens does not matter.
    shorter = pieces.bags(pieces.ngrams(column_of([d[:50] for d in documents])))
    np.testing.assert_array_equal(whole.values, shorter.values)


def test_order_matters_and_wide_tokens_are_told_apart():
    pieces = Pieces(2)
    both = pieces.ngrams(column_of([[3, 4], [4, 3]]))
    assert set(both.buckets[:2]) == set(both.buckets[3:5]) and both.buckets[2] != both.buckets[5]
    wide = pa.array([[7], [7 + (1 << 16)]], pa.list_(pa.uint32()))
    first, second = Pieces(2).ngrams(wide).buckets
    assert first == second  # single tokens of a large vocabulary share buckets
    pairs = pa.array([[7, 7], [7, 7 + (1 << 16)]], pa.list_(pa.uint32()))
    buckets = Pieces(2).ngrams(pairs).buckets
    assert buckets[2] != buckets[5]


@settings(max_examples=30, deadline=None)
@given(DOCUMENTS, st.integers(2, 4))
def test_places_are_counted_apart_beside_the_same_other_entries(documents, places):
    plain, placed = Pieces(2, 1 << 22, first=8), Pieces(2, 1 << 22, 8, places)
    grams = placed.ngrams(column_of(documents))
    found = placed.bags(grams)
    below, expected = found.below(plain.size), plain.bags(grams)
    for name in ("buckets", "values", "offsets"):
        np.testing.assert_array_equal(getattr(below, name), getattr(expected, name))
    for d, tokens in enumerate(documents):
        entries = slice(found.offsets[d], found.offsets[d + 1])
        mine = found.buckets[entries] >= plain.size
        counts = Counter((token, i * places // 8) for i, token in enumerate(tokens[:8]))
        logs = np.sort([math.log1p(count) for count in counts.values()])
        np.testing.assert_allclose(
            np.sort(found.values[entries][mine]),
            logs / max(np.linalg.norm(logs), 1e-9),
            rtol=1e-5,
        )
    assert found.buckets.max(initial=0) < placed.size
    assert Pieces.of_size(2, placed.size, 8, places) == placed
    assert plain.scheme == "pieces-1" and placed.scheme != plain.scheme


def test_settings_are_checked():
    with pytest.raises(ValueError, match="places"):
        Pieces(places=8)
    with pytest.raises(ValueError, match="places"):
        Pieces(first=4, places=8)
    with pytest.raises(ValueError, match="first is at least 1"):
        Pieces(first=0)
    with pytest.raises(ValueError, match="buckets"):
        Pieces(buckets=100)
