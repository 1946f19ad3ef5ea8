"""Hashed n-grams against the plain loop that they replace."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.scores.text.hashing import Features, NGrams, batches, hashed_ngrams, segment_sums

# Every character but the two whose lower case depends on more than themselves, and surrogates.
TEXT = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\u0130\u03a3"), max_size=60
)
WIDE = 1 << 32  # no two n-grams of a small text share a bucket


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    return [tuple(words[i : i + m]) for m in range(1, n + 1) for i in range(len(words) - m + 1)]


def per_document(found: NGrams) -> list[np.ndarray]:
    return np.split(found.buckets, found.offsets[1:-1])


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8), st.integers(1, 4))
def test_equal_ngrams_and_only_they_share_a_hash(texts, n):
    found = hashed_ngrams(pa.array(texts, pa.large_string()), Features(n, WIDE))
    names: dict[tuple[str, ...], int] = {}
    for text, buckets in zip(texts, per_document(found), strict=True):
        expected = grams(text, n)
        assert len(buckets) == len(expected)
        for gram, bucket in zip(expected, buckets.tolist(), strict=True):
            assert names.setdefault(gram, bucket) == bucket
    assert len(set(names.values())) == len(names)


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=8), st.integers(0, 7), st.integers(1, 40))
def test_a_documents_ngrams_do_not_depend_on_its_batch(texts, skip, size):
    features = Features(2, 1000)
    column = pa.array(texts, pa.large_string())
    alone = [hashed_ngrams(pa.array([t], pa.string()), features).buckets for t in texts]
    together = per_document(hashed_ngrams(column, features))
    sliced = per_document(hashed_ngrams(column.slice(min(skip, len(texts) - 1)), features))
    cut = [d for b in batches(column, size) for d in per_document(hashed_ngrams(b, features))]
    for expected, found in zip(alone, together, strict=True):
        np.testing.assert_array_equal(found, expected)
    for expected, found in zip(alone[-len(sliced) :], sliced, strict=True):
        np.testing.assert_array_equal(found, expected)
    for expected, found in zip(alone, cut, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_case_and_spacing_do_not_matter_but_order_does():
    column = pa.array(["The  Cat sat", "the cat\nSAT", "sat cat the"])
    first, second, third = per_document(hashed_ngrams(column, Features(2, WIDE)))
    np.testing.assert_array_equal(first, second)
    assert sorted(first[:3]) == sorted(third[:3])
    assert not set(first[3:]) & set(third[3:])


def test_golden_hashes():
    """Models and sketches outlive a version of the code: these numbers must never change."""
    found = hashed_ngrams(pa.array(["Hello, World!", "", "naïve Ünïcode"]), Features(2, 10_000))
    assert found.offsets.tolist() == [0, 7, 7, 10]
    assert found.buckets.tolist() == GOLDEN


GOLDEN = [3732, 6095, 6616, 3487, 4224, 9768, 7620, 4320, 7807, 2044]


def test_buckets_are_used_evenly():
    words = pa.array([" ".join(f"w{i}" for i in range(200_000))])
    counts = hashed_ngrams(words, Features(1, 1000)).counts(1000)
    # 200 expected in each: chi-square with 999 degrees of freedom, mean 999, deviation 44.7.
    chi_square = ((counts - 200.0) ** 2 / 200.0).sum()
    assert 800 < chi_square < 1200


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=10))
def test_segment_sums_take_empty_segments(lengths):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = np.arange(offsets[-1], dtype=np.float32) + 1
    expected = [values[a:b].sum() for a, b in itertools.pairwise(offsets)]
    np.testing.assert_array_equal(segment_sums(values, offsets), expected)


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match="not of int64"):
        hashed_ngrams(pa.array([1, 2]), Features())
    with pytest.raises(ValueError, match="null"):
        hashed_ngrams(pa.array(["a", None]), Features())
    with pytest.raises(ValueError, match="at least 1"):
        Features(n=0)
