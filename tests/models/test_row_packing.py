"""Packing: every token of every window stands in exactly one place, and little room is wasted."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import packing
from models.model import Model
from models.packing import Side, Windows, offsets_of
from models.published import NAMED
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.model import estimate
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.likelihood import Likelihood


def windows_of(lengths: np.ndarray) -> Windows:
    """Windows whose feature values are all different, from 1."""
    sides, first = [], 1
    for index, name in enumerate(("encoder", "decoder")[: lengths.shape[1]]):
        offsets = offsets_of(lengths[:, index])
        values = np.arange(first, first + offsets[-1])
        sides.append(Side(name, offsets, {f"{name}_input_tokens": values}))
        first += offsets[-1]
    return Windows(np.arange(len(lengths)), tuple(sides))


one_side = st.lists(st.tuples(st.integers(1, 50)), max_size=60)
two_sides = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 20)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(one_side | two_sides, st.integers(50, 120), st.integers(20, 40))
def test_every_token_has_one_place(lengths, row, other_row):
    sides = len(lengths[0]) if lengths else 1
    lengths = np.array(lengths, np.int64).reshape(-1, sides)
    windows = windows_of(lengths)
    packed = packing.pack(lengths, (row, other_row)[:sides])
    rows = packed.fill(windows)
    for index, side in enumerate(windows.sides):
        tokens = rows[f"{side.name}_input_tokens"]
        segments = rows[f"{side.name}_segment_ids"]
        assert tokens.shape == (packed.num_rows, (row, other_row)[index])
        # Conservation: the values are those of the windows, each once.
        assert sorted(tokens[tokens > 0]) == sorted(side.features[f"{side.name}_input_tokens"])
        assert np.array_equal(segments > 0, tokens > 0)
        # A window is whole, in order, under its own segment id.
        for window in range(len(windows)):
            mine = tokens[packed.row[window]][
                segments[packed.row[window]] == packed.segment[window]
            ]
            own = side.features[f"{side.name}_input_tokens"]
            assert np.array_equal(mine, own[side.offsets[window] : side.offsets[window + 1]])
    # Values at the last side's positions find their way back.
    last = windows.sides[-1]
    values = rows[f"{last.name}_input_tokens"]
    assert np.array_equal(
        packed.gather(windows, values), last.features[f"{last.name}_input_tokens"]
    )


@settings(max_examples=50, deadline=None)
@given(two_sides, st.randoms())
def test_same_lengths_same_rows(lengths, _):
    lengths = np.array(lengths, np.int64).reshape(-1, 2)
    first, again = packing.pack(lengths, (64, 24)), packing.pack(lengths.copy(), (64, 24))
    assert np.array_equal(first.row, again.row)
    assert np.array_equal(first.starts, again.starts)


@settings(max_examples=100, deadline=None)
@given(one_side)
def test_one_side_is_packed_within_the_bound_of_first_fit_decreasing(lengths):
    lengths = np.array(lengths, np.int64).reshape(-1, 1)
    rows = packing.pack(lengths, (50,)).num_rows
    # FFD <= 11/9 OPT + 6/9 (Dosa 2007), and OPT >= total / row.
    assert rows <= 11 / 9 * max(1, _optimum_at_most(lengths[:, 0], 50)) + 6 / 9


def _optimum_at_most(lengths: np.ndarray, row: int) -> int:
    """An upper bound of the optimum that needs no search: next fit, of the sorted lengths."""
    rows, room = 0, 0
    for length in sorted(lengths.tolist(), reverse=True):
        if length > room:
            rows, room = rows + 1, row
        room -= length
    return rows


def test_too_long_a_window_is_refused():
    with pytest.raises(ValueError, match="window 1 has"):
        packing.pack(np.array([[3], [9]]), (8,))


def test_a_million_windows_in_linear_time():
    lengths = np.random.default_rng(0).integers(1, 513, (200_000, 1))
    packed = packing.pack(lengths, (2048,))
    assert lengths.sum() / (packed.num_rows * 2048) > 0.999


@pytest.mark.parametrize(
    ("scorer", "row_length"),
    [
        (AskLLM(), 1024),
        (AskLLM(), 2048),
        (Likelihood("causal"), 1024),
        (Likelihood("span"), 1024),
        (Likelihood("prefix"), 2048),  # shorter rows cannot be filled: see packing.py
    ],
    ids=lambda value: getattr(value, "estimator", value if isinstance(value, int) else "ask_llm"),
)
def test_padding_of_c4_is_under_two_percent(
    real_data, t5_vocabulary_file, c4_lengths, scorer, row_length
):
    """On both sides together, in chunks of about as many documents as the engine takes at once."""
    config = NAMED["flan_t5_small"]
    prepared = scorer.prepare(Model(config), Vocabulary.from_file(t5_vocabulary_file))
    costs = estimate.Costs(config, prepared.sides)
    # C4's documents are in random order, this file's come source by source.
    chunks = np.array_split(np.random.default_rng(0).permutation(c4_lengths), 2)
    row_lengths = None
    for chunk in chunks:
        windows = estimate.windows_of(prepared, chunk)
        if row_lengths is None:
            row_lengths = estimate.choose_row_lengths(prepared, costs, windows, row_length)
        rows = packing.pack(windows, row_lengths).num_rows
        assert 1 - windows.sum() / (rows * sum(row_lengths)) < 0.02


@pytest.fixture(scope="module")
def c4_lengths(real_data, t5_vocabulary_file) -> np.ndarray:
    vocabulary = Vocabulary.from_file(t5_vocabulary_file)
    with gzip.open(real_data / "corpus" / "c4" / "c4_real_merged.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    return np.array([len(ids) for ids in vocabulary.encode_batch(texts)])
