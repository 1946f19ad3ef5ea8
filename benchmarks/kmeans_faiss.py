"""Spherical k-means against FAISS: the objective over some seeds, and the time.

    pip install faiss-cpu
    python benchmarks/kmeans_faiss.py --documents 50000 --clusters 200

Both get the same vectors (real documents by latent semantic analysis), the same number of
iterations and one thread each; the objective is computed here, from the centroids that each gives.
FAISS takes a random subset where there are more than 256 documents per cluster: keep below that.
CPU seconds are what can be compared on a machine that does other work.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

import jax
import numpy as np
from real_vectors import vectors

from pruning.scores.space.clusters import first_centroids, fit
from pruning.scores.space.embeddings import loads, local_mesh


def ours(x: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    mesh = local_mesh(jax.devices()[:1])
    held = [(tiles, valid) for _, tiles, valid in loads([(np.arange(len(x)), x)], mesh)]
    first = first_centroids([(np.arange(len(x)), x)], clusters, seed)
    return fit(lambda: held, first, iterations, mesh, seed).centroids


def faiss_s(x: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(1)
    kmeans = faiss.Kmeans(x.shape[1], clusters, niter=iterations, spherical=True, seed=seed)
    kmeans.train(x)
    return kmeans.centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    x = vectors(given.documents, given.width)
    print(f"{x.shape[0]:,} vectors of {x.shape[1]}, {given.clusters} clusters, one thread")
    inertia: dict[str, float] = {}
    seconds: dict[str, float] = {}
    runs: dict[str, Callable[..., np.ndarray]] = {"ours": ours, "FAISS": faiss_s}
    for name, run in runs.items():
        run(x, given.clusters, 1, 0)  # compile, load
        found, spent = [], 0.0
        for seed in range(given.seeds):
            start = time.process_time()
            centroids = run(x, given.clusters, given.iterations, seed + 1)
            spent += time.process_time() - start
            cosines = [(part @ centroids.T).max(axis=1) for part in np.array_split(x, 16)]
            found.append(2.0 - 2.0 * np.concatenate(cosines).mean())
        seconds[name] = spent / given.seeds
        inertia[name] = float(np.mean(found))
        print(
            f"{name:6} inertia per vector {np.mean(found):.5f} +- {np.std(found):.5f} over "
            f"{given.seeds} seeds, {seconds[name]:.2f} CPU s a run"
        )
    print(
        f"inertia {100 * (inertia['ours'] / inertia['FAISS'] - 1):+.2f}%, "
        f"speed {seconds['FAISS'] / seconds['ours']:.2f} x FAISS"
    )


if __name__ == "__main__":
    main()
