"""The cut equals that of a sorted list, however the documents come."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.selection import cut
from pruning.store import randomness
from pruning.store.randomness import Stream

# Few distinct keys, so that ties are the rule; every sign and size.
KEYS = st.sampled_from([-np.inf, -1e300, -1.5, -1e-300, -0.0, 0.0, 1e-300, 1.5, 1.5000001, np.inf])


@st.composite
def rankings(draw):
    rows = draw(st.integers(0, 40))
    groups = draw(st.integers(1, 70))  # both digit sizes
    documents = {
        "keys": draw(st.lists(KEYS | st.floats(-10, 10), min_size=rows, max_size=rows)),
        "costs": draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows)),
        "groups": draw(st.lists(st.integers(0, groups - 1), min_size=rows, max_size=rows)),
        "excluded": draw(st.lists(st.booleans(), min_size=rows, max_size=rows)),
    }
    targets = draw(st.lists(st.integers(0, 60), min_size=groups, max_size=groups))
    breaks = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
    return documents, np.asarray(targets, np.int64), breaks


def chunks_of(documents, breaks, grouped):
    values = cut.ordered(np.asarray(documents["keys"], np.float64))
    excluded = np.asarray(documents["excluded"], bool)
    values[excluded] = cut.EXCLUDED
    costs = np.asarray(documents["costs"], np.int32)
    groups = np.asarray(documents["groups"], np.int32)
    ids = np.arange(len(values))
    edges = [0, *breaks, len(values)]
    return [
        cut.RankedKeys(
            values[a:b],
            costs[a:b],
            groups[a:b] if grouped else None,
            lambda rows, ids=ids[a:b]: randomness.hashed(Stream.EXPERIMENT, 7, ids[rows]),
        )
        for a, b in itertools.pairwise(edges)
    ]


def expected_kept(documents, targets, grouped):
    """Takes the documents of a group one after another, until one does not fit."""
    rows = [i for i, out in enumerate(documents["excluded"]) if not out]
    tie = randomness.hashed(Stream.EXPERIMENT, 7, np.arange(len(documents["keys"])))
    rows.sort(key=lambda i: (documents["keys"][i] + 0.0, int(tie[i])), reverse=True)
    spent = np.zeros(len(targets), np.int64)
    closed = np.zeros(len(targets), bool)
    kept = np.zeros(len(documents["keys"]), bool)
    for i in rows:
        group = documents["groups"][i] if grouped else 0
        cost = documents["costs"][i]
        closed[group] |= spent[group] + cost > targets[group]
        if not closed[group]:
            spent[group] += cost
            kept[i] = True
    return kept, spent


@settings(max_examples=300, deadline=None)
@given(rankings(), st.booleans(), st.sampled_from([-1, cut._FEW]))
def test_equals_a_sorted_list(ranking, grouped, few):
    documents, targets, breaks = ranking
    targets = targets if grouped else targets[:1]
    chunks = chunks_of(documents, breaks, grouped)
    with mock.patch.object(cut, "_FEW", few):  # what ties is held, or read in every pass
        found = cut.find(lambda work: map(work, [chunks[:2], chunks[2:]]), targets)
    kept = np.concatenate([found.before(chunk) for chunk in chunks])
    expected, spent = expected_kept(documents, targets, grouped)
    np.testing.assert_array_equal(found.cost, spent)
    # Documents that cost nothing may stand on either side of the cut.
    matters = np.asarray(documents["costs"], np.int64) > 0
    np.testing.assert_array_equal(kept[matters], expected[matters])


@settings(max_examples=100, deadline=None)
@given(st.lists(KEYS | st.floats(allow_nan=False), min_size=2))
def test_ordered_keeps_the_order_and_comes_back(keys):
    keys = np.asarray(keys, np.float64)
    values = cut.ordered(keys)
    np.testing.assert_array_equal(values[:, None] < values, keys[:, None] < keys)
    np.testing.assert_array_equal(cut.unordered(values), keys)
    assert ((values != cut.EXCLUDED) & (values != cut.INCLUDED)).all()


def test_nan_is_excluded():
    assert cut.ordered(np.asarray([np.nan, -np.inf]))[0] == cut.EXCLUDED


def test_included_documents_are_kept_on_both_sides_of_a_start():
    chunk = cut.RankedKeys(
        np.append(cut.ordered(np.arange(4.0)), cut.INCLUDED),
        np.asarray([1, 1, 1, 1, 0]),
        None,
        lambda rows: rows.astype(np.uint64),
    )
    start, stop = (cut.find(lambda work: [work([chunk])], np.asarray([n])) for n in (1, 3))
    np.testing.assert_array_equal(cut.between(chunk, start, stop), [0, 1, 1, 0, 1])
