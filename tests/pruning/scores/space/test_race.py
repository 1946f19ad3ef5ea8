"""The RACE sketch against exact kernel sums, and against itself on other meshes and in parts."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from pruning.scores.space.embeddings import loads, local_mesh
from pruning.scores.space.race import (
    Race,
    Sketch,
    buckets_of,
    collision_probability,
    count_tiles,
    density_tiles,
    weight_diagnostics,
    without_chance,
)
from pruning.store import randomness
from pruning.store.randomness import Stream

WIDTH = 24
KERNELS = [
    Race(rows=64, bandwidth=0.5),
    Race(rows=64, bandwidth=2.0, hashes_per_row=4, buckets=512),
    Race(rows=64, bandwidth=0.01, buckets=64),  # more hash values than buckets
    Race("sign", rows=64, hashes_per_row=6),
    Race("sign", rows=64, hashes_per_row=12, buckets=128),
]


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def documents(n, seed=0):
    """Like embeddings of documents: topics of all sizes, some tight, some loose."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((40, WIDTH))
    topic = np.minimum(random.geometric(0.1, n), 40) - 1
    spread = np.linspace(0.2, 1.2, 40)[topic]
    return unit(centres[topic] + spread[:, None] * random.standard_normal((n, WIDTH)))


def sketch_of(x, race, mesh):
    sketch = Sketch.draw(race, x.shape[1])
    race = dataclasses.replace(race, seed=0)  # all seeds share a program
    for _, tiles, valid in loads(iter([(np.arange(len(x)), x)]), mesh):
        counts = count_tiles(race, sketch.projections, sketch.offsets, tiles, valid, mesh)
        sketch.counts += np.asarray(counts)
    return sketch


def shares(x, sketch, mesh):
    table = (sketch.counts / sketch.documents).astype(np.float32)
    race = dataclasses.replace(sketch.race, seed=0)  # all seeds share a program
    parts = [
        np.asarray(
            density_tiles(race, sketch.projections, sketch.offsets, table, tiles, mesh)
        ).reshape(-1)[: len(rows)]
        for rows, tiles, _ in loads(iter([(np.arange(len(x)), x)]), mesh)
    ]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def mesh():
    return local_mesh(jax.devices()[:1])


@pytest.mark.parametrize("race", KERNELS, ids=str)
def test_the_kernel_is_the_probability_of_sharing_hash_values(race):
    """Over 20,000 rows the share of equal buckets is K + (1 - K) chance, to three deviations."""
    race = Race(race.family, 20_000, race.buckets, race.hashes_per_row, race.bandwidth)
    for cosine in (0.999, 0.9, 0.3, -0.5):
        pair = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]], np.float32)
        sketch = Sketch.draw(race, 2)
        a, b = np.asarray(buckets_of(race, sketch.projections, sketch.offsets, pair))
        kernel = collision_probability(race, cosine)
        expected = kernel + (1 - kernel) * race.chance
        deviation = np.sqrt(expected * (1 - expected) / race.rows) + 1e-4
        assert abs((a == b).mean() - expected) < 3.5 * deviation


@pytest.mark.parametrize("race", KERNELS, ids=str)
def test_counts_are_those_of_a_plain_loop(race, mesh):
    x = documents(700)
    sketch = sketch_of(x, race, mesh)
    buckets = np.asarray(buckets_of(race, sketch.projections, sketch.offsets, x))
    assert buckets.min() >= 0 and buckets.max() < race.buckets  # also where hashes are negative
    for row in range(race.rows):
        expected = np.bincount(buckets[:, row], minlength=race.buckets)
        np.testing.assert_array_equal(sketch.counts[row], expected)
    assert sketch.documents == 700
    plain = sketch.counts[np.arange(race.rows), buckets].mean(axis=1) / 700
    np.testing.assert_allclose(shares(x, sketch, mesh), plain, rtol=1e-6)


@pytest.mark.parametrize(
    "race",
    # One of each family; how devices share the work is the same for all.
    [
        pytest.param(race, marks=() if i in (1, 4) else pytest.mark.sweep)
        for i, race in enumerate(KERNELS)
    ],
    ids=str,
)
def test_one_and_eight_devices_give_the_same_bits(race, mesh, eight_devices):
    x = documents(3000)
    many = local_mesh(eight_devices)
    one, eight = sketch_of(x, race, mesh), sketch_of(x, race, many)
    np.testing.assert_array_equal(one.counts, eight.counts)
    np.testing.assert_array_equal(shares(x, one, mesh), shares(x, eight, many))


def test_halves_add_up_to_the_whole(mesh):
    x = documents(2000)
    race = KERNELS[1]
    halves = sketch_of(x[:900], race, mesh) + sketch_of(x[900:], race, mesh)
    np.testing.assert_array_equal(halves.counts, sketch_of(x, race, mesh).counts)


@pytest.mark.parametrize(
    "race", [Race(bandwidth=0.5), Race(bandwidth=2.0, hashes_per_row=4)], ids=["one", "four"]
)
def test_error_against_exact_kernel_sums_falls_like_one_over_root_r(race, mesh):
    x = documents(5000)
    cosines = np.clip(x @ x.T, -1, 1)
    np.fill_diagonal(cosines, 1.0)
    exact = collision_probability(race, cosines).mean(axis=1)
    errors = []
    for rows in (10, 100, 1000):
        found = []
        for seed in range(6 if rows < 1000 else 2):
            sized = Race(race.family, rows, race.buckets, race.hashes_per_row, race.bandwidth, seed)
            share = shares(x, sketch_of(x, sized, mesh), mesh)
            found.append(without_chance(sized, share, len(x)))
        relative = np.sqrt(np.mean([(f / exact - 1) ** 2 for f in found]))
        rank = np.mean([stats.spearmanr(f, exact).statistic for f in found])
        errors.append(relative)
        print(f"R={rows:5d}: relative error {100 * relative:5.2f}%, rank correlation {rank:.4f}")
    for coarse, fine in itertools.pairwise(errors):
        assert 0.5 < (coarse / fine) / np.sqrt(10) < 2.0
    assert errors[-1] < 0.05
    assert rank > 0.97


def test_without_chance_removes_what_shared_buckets_add(mesh):
    x = documents(4000)
    race = Race(rows=2000, buckets=50, hashes_per_row=4, bandwidth=1.0)
    exact = collision_probability(race, np.clip(x @ x.T, -1, 1)).mean(axis=1)
    share = shares(x, sketch_of(x, race, mesh), mesh)
    raw = (share - exact).mean()
    assert abs(raw - 1 / 50) < 2e-3
    assert abs((without_chance(race, share, len(x)) - exact).mean()) < 0.1 * raw
    assert without_chance(race, np.array([1e-9]), 4000) == 1 / 4000


def test_inverse_propensity_flattens_a_planted_mixture(mesh):
    """90% in one tight cluster, 10% spread out: the share of the spread in the sample."""
    random = np.random.default_rng(1)
    n, tail = 6000, 600
    tight = unit(random.standard_normal(WIDTH) + 0.05 * random.standard_normal((n - tail, WIDTH)))
    spread = unit(random.standard_normal((tail, WIDTH)))
    x = np.concatenate([tight, spread])
    race = Race(rows=1000, hashes_per_row=4, bandwidth=1.0)
    density = without_chance(race, shares(x, sketch_of(x, race, mesh), mesh), n)
    exact = collision_probability(race, np.clip(x @ x.T, -1, 1)).mean(axis=1)
    keep = 1000

    # Theory: k draws without replacement take document i with probability 1 - exp(-c w_i), with c
    # such that these add up to k (Rosen 1972); w from exact kernel sums.
    weight = 1.0 / exact
    low, high = 0.0, 1.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (1 - np.exp(-c * weight)).sum() < keep else (low, c)
    expected = (1 - np.exp(-c * weight))[-tail:].sum() / keep

    ids = np.arange(n)
    found = []
    for seed in range(20):
        kept = np.argsort(-(randomness.gumbel(Stream.EXPERIMENT, seed, ids) - np.log(density)))[
            :keep
        ]
        found.append((kept >= n - tail).mean())
    print(f"share of the spread: 10.0% of all, {100 * np.mean(found):.1f}% of the sample, "
          f"theory {100 * expected:.1f}%; {weight_diagnostics(1 / density)}")  # fmt: skip
    assert expected > 0.4  # against 10% of a uniform sample
    assert abs(np.mean(found) - expected) < 0.02


def test_a_sketch_survives_a_file_bit_by_bit(mesh):
    sketch = sketch_of(documents(100), KERNELS[1], mesh)
    again = Sketch.from_bytes(sketch.to_bytes())
    assert again.race == sketch.race
    np.testing.assert_array_equal(again.counts, sketch.counts)
    np.testing.assert_array_equal(again.projections, sketch.projections)
    np.testing.assert_array_equal(again.offsets, sketch.offsets)
    assert again.to_bytes() == sketch.to_bytes()


def test_a_damaged_or_foreign_sketch_is_refused(mesh):
    sketch = sketch_of(documents(100), KERNELS[0], mesh)
    with pytest.raises(ValueError, match="do not add up"):
        sketch + Sketch.draw(Race(rows=64, bandwidth=0.5, seed=1), WIDTH)
    with pytest.raises(ValueError, match="do not add up"):
        sketch + Sketch.draw(KERNELS[0], WIDTH + 1)
    sketch.counts[7, 0] += 1
    with pytest.raises(ValueError, match="row 7"):
        _ = sketch.documents


def test_diagnostics():
    assert weight_diagnostics(np.full(10, 3.0)) == {"ess_share": 1.0, "max_over_min": 1.0}
    half = weight_diagnostics(np.array([1.0] * 50 + [1e-9] * 50))
    assert abs(half["ess_share"] - 0.5) < 1e-6
