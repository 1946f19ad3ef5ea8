"""Draws that belong to a document: independent of order, streams and seeds; distributions right."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pruning.store import randomness
from pruning.store.randomness import Stream

REPOSITORY = Path(__file__).resolve().parents[3]


def test_splitmix64_agrees_with_its_published_sequence():
    # First outputs of SplitMix64 seeded with 1234567, as Rosetta Code lists them.
    state = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert randomness.mix(state).tolist() == expected


def test_a_draw_depends_on_its_own_id_only():
    ids = np.random.default_rng(0).integers(0, 1 << 50, 1000)
    whole = randomness.uniform(Stream.EXPERIMENT, 3, ids)
    order = np.random.default_rng(1).permutation(1000)
    assert np.array_equal(whole[order], randomness.uniform(Stream.EXPERIMENT, 3, ids[order]))
    assert randomness.uniform(Stream.EXPERIMENT, 3, ids[:1])[0] == whole[0]


@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (7, 7 + (1 << 32)), (-1, 0)])
def test_neighboring_seeds_are_unrelated(seeds):
    ids = np.arange(200_000)
    first, second = (randomness.uniform(Stream.EXPERIMENT, seed, ids) for seed in seeds)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.01
    assert abs(np.corrcoef(first[1:], second[:-1])[0, 1]) < 0.01


def test_streams_are_unrelated():
    ids = np.arange(50_000)
    draws = np.stack([randomness.uniform(stream, 0, ids) for stream in Stream])
    correlations = np.corrcoef(draws)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 0.025  # 5 standard errors


def test_only_members_of_the_enumeration_are_accepted():
    for draw in (randomness.hashed, randomness.uniform, randomness.gumbel):
        with pytest.raises(TypeError, match="a member of Stream"):
            draw(1, 0, np.arange(3))
    with pytest.raises(TypeError, match="a member of Stream"):
        randomness.generator(24, 0, 1)


def test_every_stream_has_one_user():
    """No two modules draw from one stream; the order of training examples is one purpose."""
    users: dict[str, set[str]] = {}
    for package in ("pruning", "evaluation"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("Stream"):
                    users.setdefault(node.attr, set()).add(file.name)
    users.pop("EXPERIMENT", None)
    shared = {name: files for name, files in users.items() if len(files - {"randomness.py"}) > 1}
    assert shared == {
        "SELECTION_DRAW": {"ranking.py", "select.py", "explain.py"},
        "SELECTION_TIE": {"ranking.py", "explain.py", "stage.py"},
        "SELECTION_SPLIT": {"ranking.py", "explain.py"},
        "EXAMPLE_ORDER": {"examples.py", "encoder_training.py", "randomness.py"},
    }
    assert set(Stream.__members__) - {"EXPERIMENT"} == set(users)


def test_uniform_and_gumbel_have_their_distributions():
    ids = np.arange(100_000) + (5 << 32)
    values = randomness.uniform(Stream.EXPERIMENT, 11, ids)
    assert values.min() > 0 and values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    gumbel = randomness.gumbel(Stream.EXPERIMENT, 11, ids)
    assert stats.kstest(gumbel, "gumbel_r").pvalue > 1e-3


def test_generators_of_different_keys_differ():
    keys = itertools.product((Stream.BOOTSTRAP, Stream.CLUSTER_SPLIT), range(15), range(15))
    draws = {randomness.generator(stream, 0, a, b).integers(1 << 62) for stream, a, b in keys}
    assert len(draws) == 450
    first, again = (randomness.generator(Stream.BOOTSTRAP, 0, 3, 4).random() for _ in range(2))
    assert first == again


def test_draws_of_earlier_artifacts_and_runs_go_on():
    """Golden draws, made by the version before streams were enumerated."""
    ids = np.array([0, 1, 5 << 32])
    assert randomness.hashed(Stream.SELECTION_DRAW, 7, ids).tolist() == [
        15598732397942086671,
        11310100880861243961,
        13896312981236178717,
    ]
    assert randomness.hashed(Stream.EPOCH_SEED, 7, ids).tolist() == [
        6375203923219479748,
        18392027910939584767,
        843098769363582094,
    ]
    golden = {
        Stream.EXAMPLE_ORDER: ((4,), 1874271383597136756),
        Stream.RACE_PROJECTIONS: ((4, 5), 3724032882317029736),
        Stream.DAMAGE: ((4, 5, 6), 4590075514977210807),
    }
    for stream, (counters, expected) in golden.items():
        assert randomness.generator(stream, 3, *counters).integers(1 << 62) == expected
    assert set(golden) == set(randomness._UNNUMBERED)
