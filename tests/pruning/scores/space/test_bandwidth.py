"""The chosen bandwidth gives the effective sample size that was wanted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pruning.scores.space import bandwidth, density
from pruning.scores.space.bandwidth import BandwidthError, Distances
from pruning.scores.space.density import DensityConfig
from pruning.scores.space.race import Race, collision_probability, weight_diagnostics

RACE = Race(rows=1000, buckets=2000, hashes_per_row=2)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Two crowds and a third of isolated documents, float32 [900, 16]."""
    rng = np.random.default_rng(0)
    crowds = [rng.normal(size=16) + 0.15 * rng.normal(size=(300, 16)) for _ in range(2)]
    found = np.concatenate([*crowds, rng.normal(size=(300, 16))])
    rng.shuffle(found)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def test_the_size_is_that_of_all_pairs(vectors):
    """Histograms of distances against the kernel of every pair, in float64."""
    distances = Distances.of(vectors, len(vectors))
    exact = vectors.astype(np.float64)
    for width in (2.0, 0.5, 0.1):
        race = dataclasses.replace(RACE, bandwidth=width)
        kernel = collision_probability(race, exact @ exact.T)
        np.fill_diagonal(kernel, 1.0)
        share = weight_diagnostics(1.0 / kernel.mean(axis=1))["ess_share"]
        assert distances.effective_sample_size(race) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("wanted", [0.9, 0.6])
def test_the_score_set_has_the_wanted_size(wanted, vectors, tmp_path, write):
    texts = [[f"document {i}" for i in range(500)], [f"other {i}" for i in range(400)]]
    corpus = write.corpus(tmp_path / "corpus", texts)
    write.scores(tmp_path / "embeddings", corpus, {"embedding": [vectors[:500], vectors[500:]]})
    made = density.run(
        DensityConfig(
            str(tmp_path / "corpus"),
            str(tmp_path / "embeddings"),
            str(tmp_path / "density"),
            race=RACE,
            effective_sample_size=wanted,
        )
    )
    summary = made.manifest.summary
    assert summary["bandwidth"]["expected_ess_share"] == pytest.approx(wanted, abs=0.01)
    assert summary["weights"]["ess_share"] == pytest.approx(wanted, abs=0.05)


def test_what_no_bandwidth_gives_is_refused(vectors):
    distances = Distances.of(vectors, len(vectors))
    with pytest.raises(BandwidthError, match=r"the least that a bandwidth gives is 0\.\d+"):
        bandwidth.choose(distances, RACE, 0.01)
    with pytest.raises(ValueError, match="p_stable"):
        DensityConfig("c", "e", "o", race=Race(family="sign"), effective_sample_size=0.5)
