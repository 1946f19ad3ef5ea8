"""The RACE sketch on real text: its error against exact kernel sums, its weights, its speed.

    python benchmarks/density.py --documents 5000

Vectors are real documents by latent semantic analysis. For every kernel: relative error and rank
correlation at R rows, the effective sample size over N of inverse-propensity weights, and documents
per CPU second.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import dataclasses

import jax
import numpy as np
from real_vectors import vectors
from scipy import stats

from pruning.scores.space.embeddings import loads, local_mesh
from pruning.scores.space.race import (
    Race,
    Sketch,
    collision_probability,
    count_tiles,
    density_tiles,
    weight_diagnostics,
    without_chance,
)

KERNELS = {
    "p-stable, w=0.1, 1 hash": Race(bandwidth=0.1),
    "p-stable, w=1.0, 1 hash": Race(bandwidth=1.0),
    "p-stable, w=1.0, 4 hashes": Race(bandwidth=1.0, hashes_per_row=4),
    "sign, 8 hashes": Race("sign", hashes_per_row=8),
}


def densities(x: np.ndarray, race: Race) -> tuple[np.ndarray, float]:
    """The estimate for every vector, and CPU seconds of both passes."""
    mesh = local_mesh(jax.devices()[:1])
    sketch = Sketch.draw(race, x.shape[1])
    seconds = 0.0
    for _ in range(2):  # the first time compiles
        sketch.counts[:] = 0
        start = time.process_time()
        for _, tiles, valid in loads([(np.arange(len(x)), x)], mesh):
            sketch.counts += np.asarray(
                count_tiles(race, sketch.projections, sketch.offsets, tiles, valid, mesh)
            )
        table = (sketch.counts / len(x)).astype(np.float32)
        found = [
            np.asarray(density_tiles(race, sketch.projections, sketch.offsets, table, tiles, mesh))
            .reshape(-1)[: len(rows)]
            for rows, tiles, _ in loads([(np.arange(len(x)), x)], mesh)
        ]  # fmt: skip
        seconds = time.process_time() - start
    return without_chance(race, np.concatenate(found), len(x)), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    x = vectors(given.documents, given.width)
    cosines = np.clip(x @ x.T, -1, 1)
    np.fill_diagonal(cosines, 1)
    for name, kernel in KERNELS.items():
        exact = collision_probability(kernel, cosines).mean(axis=1)
        weights = weight_diagnostics(1 / exact)
        print(
            f"{name}: exact kernel means {exact.min():.2e} to {exact.max():.2e}; weights ESS/N "
            f"{weights['ess_share']:.3f}, max/min {weights['max_over_min']:.1f}"
        )
        for rows in (10, 100, 1000):
            errors, ranks = [], []
            for seed in range(given.seeds):
                race = dataclasses.replace(kernel, rows=rows, seed=seed)
                found, seconds = densities(x, race)
                errors.append(np.mean((found / exact - 1) ** 2))
                ranks.append(stats.spearmanr(found, exact).statistic)
            print(
                f"  R={rows:5}: relative error {100 * np.sqrt(np.mean(errors)):6.2f}%, rank "
                f"correlation {np.mean(ranks):.3f}, {len(x) / seconds:9,.0f} documents/CPU s"
            )


if __name__ == "__main__":
    main()
