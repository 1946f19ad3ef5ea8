"""Draws that belong to a document: independent of order, seeds unrelated, distributions right."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pruning import randomness


def test_splitmix64_agrees_with_its_published_sequence():
    # First outputs of SplitMix64 seeded with 1234567, as Rosetta Code lists them.
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert randomness.mix(state).tolist() == expected


def test_a_draw_depends_on_its_own_id_only():
    ids = np.random.default_rng(0).integers(0, 1 << 50, 1000)
    whole = randomness.uniform(3, ids)
    order = np.random.default_rng(1).permutation(1000)
    assert np.array_equal(whole[order], randomness.uniform(3, ids[order]))
    assert randomness.uniform(3, ids[:1])[0] == whole[0]


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (7, 7 + (1 << 32)), (-1, 0)])
def test_neighbouring_seeds_and_streams_are_unrelated(seeds):
    ids = np.arange(200_000)
    first, second = (randomness.uniform(seed, ids) for seed in seeds)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first[1:], second[:-1])[0, 1]) < 0.01
    assert abs(np.corrcoef(first, randomness.uniform(seeds[0], ids, stream=1))[0, 1]) < 0.01


def test_uniform_and_gumbel_have_their_distributions():
    ids = np.arange(100_000) + (5 << 32)
    values = randomness.uniform(11, ids)
    assert values.min() > 0 and values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert stats.kstest(randomness.gumbel(11, ids), "gumbel_r").pvalue > 1e-3


def test_generators_of_different_counters_differ():
    draws = {randomness.generator(0, a, b).integers(1 << 62) for a in range(20) for b in range(20)}
    assert len(draws) == 400
    assert randomness.generator(0, 3, 4).random() == randomness.generator(0, 3, 4).random()
