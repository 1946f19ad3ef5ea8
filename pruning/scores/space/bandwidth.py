"""Choice of a density kernel's bandwidth for a target effective sample size.

A wide kernel gives all documents one density, so sampling by its inverse is uniform. A narrower one
separates crowded documents from isolated ones, and the effective sample size of the weights falls.
A kernel that is narrower still covers only the document itself, and all weights are equal again.

Choices
- The widest bandwidth with the target size is taken, the one nearest to uniform sampling.
- The kernel is known in closed form (race.collision_probability): one histogram of distances gives
  the densities of some documents among a sample for every bandwidth. The search makes no sketch.
- The sample is of row groups spread over the corpus, and of documents in them by their hashes. The
  bandwidth depends neither on devices nor on workers. One worker chooses, the others read it.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np

from pruning.corpus.layout import doc_ids
from pruning.scores.space.embeddings import Embeddings, of_length_one
from pruning.scores.space.race import Race, collision_probability, weight_diagnostics
from pruning.store import progress, randomness
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.randomness import Stream

_ROW_GROUPS = 256
_SAMPLE = 32_768  # documents among which a density is computed
_QUERIES = 2048  # documents whose density is computed
_BLOCK = 256
_NEAREST, _BINS = 1e-3, 512  # distances are counted in bins of equal ratio, from here to 2
_WIDEST, _NARROWEST, _STEPS = 16.0, 2e-3, 96


class BandwidthError(ValueError):
    """Error for an effective sample size that no bandwidth gives."""


@dataclasses.dataclass(frozen=True)
class Distances:
    """Distances of some documents to the documents of a sample.

    Attributes:
      counts: float64 [queries, bins], numbers of the sample's other documents.
      centers: float64 [bins], the distance that represents each bin.
      documents: number of documents in the corpus.
    """

    counts: np.ndarray
    centers: np.ndarray
    documents: int

    @classmethod
    def of(cls, vectors: np.ndarray, documents: int) -> Distances:
        """Count distances. vectors: float32 [sample, width], of length 1; the first are queries."""
        edges = np.geomspace(_NEAREST, 2.0 * (1 + 1e-6), _BINS)
        centers = np.concatenate([[0.0], np.sqrt(edges[:-1] * edges[1:])])
        queries = min(_QUERIES, len(vectors))
        counts = np.zeros((queries, _BINS))
        with progress.track("distances", queries, "documents") as task:
            for begin in range(0, queries, _BLOCK):
                rows = np.arange(begin, min(begin + _BLOCK, queries))
                cosine = vectors[rows] @ vectors.T
                distance = np.sqrt(np.maximum(2.0 - 2.0 * cosine, 0.0))
                place = np.searchsorted(edges, distance.ravel(), side="right")
                place = np.minimum(place, _BINS - 1).reshape(distance.shape)
                keys = place + (np.arange(len(rows)) * _BINS)[:, None]
                found = np.bincount(keys.ravel(), minlength=len(rows) * _BINS)
                counts[rows] = found.reshape(len(rows), _BINS)
                counts[rows, place[np.arange(len(rows)), rows]] -= 1  # the document itself
                task.advance(len(rows))
        return cls(counts, centers, documents)

    def effective_sample_size(self, race: Race) -> float:
        """Return the effective sample size of a sample by inverse density, as a share."""
        kernel = collision_probability(race, 1.0 - self.centers**2 / 2.0)
        others = self.counts @ kernel / self.counts[0].sum()
        own = 1.0 / self.documents
        return weight_diagnostics(1.0 / (others * (1.0 - own) + own))["ess_share"]


def choose(distances: Distances, race: Race, wanted: float) -> Race:
    """Return the kernel with the widest bandwidth whose effective sample size is `wanted`.

    Raises:
      BandwidthError: every bandwidth gives a larger one.
    """

    def size(bandwidth: float) -> float:
        return distances.effective_sample_size(dataclasses.replace(race, bandwidth=bandwidth))

    grid = np.geomspace(_WIDEST, _NARROWEST, _STEPS)
    sizes = np.array([size(width) for width in grid.tolist()])
    reached = np.flatnonzero(sizes <= wanted)
    if not len(reached) or reached[0] == 0:
        lowest = int(np.argmin(sizes))
        raise BandwidthError(
            f"the effective sample size cannot be {wanted:g} of the documents: the least that a "
            f"bandwidth gives is {sizes[lowest]:.3f}, at {grid[lowest]:.3g}. Set "
            f"Density.effective_sample_size higher, or Race.hashes_per_row above "
            f"{race.hashes_per_row}."
        )
    wide, narrow = np.log(grid[reached[0] - 1]), np.log(grid[reached[0]])
    for _ in range(30):
        middle = (wide + narrow) / 2
        wide, narrow = (wide, middle) if size(float(np.exp(middle))) <= wanted else (middle, narrow)
    return dataclasses.replace(race, bandwidth=float(f"{np.exp(narrow):.4g}"))


def shared_choice(
    build: Build, embeddings: Embeddings, race: Race, wanted: float, worker: int, workers: int
) -> tuple[Race, float]:
    """Return the kernel, chosen by one worker for all, and its expected effective sample size."""
    parts = Parts(build, "bandwidth", 1)
    for part in parts.missing(worker, workers):
        distances = Distances.of(_sample(embeddings), embeddings.documents)
        chosen = choose(distances, race, wanted)
        found = {
            "bandwidth": chosen.bandwidth,
            "expected": distances.effective_sample_size(chosen),
        }
        parts.write(part, json.dumps(found).encode())
    parts.wait()
    found = json.loads(parts.read(0))
    return dataclasses.replace(race, bandwidth=found["bandwidth"]), found["expected"]


def _sample(embeddings: Embeddings) -> np.ndarray:
    """Return vectors of length 1, float32 [sample, width], in the order of their draws."""
    groups = embeddings.row_groups
    places = np.unique(np.linspace(0, len(groups) - 1, _ROW_GROUPS).astype(np.int64))
    chosen = [groups[place] for place in places.tolist()]
    share = min(1.0, 1.1 * _SAMPLE / max(sum(size for *_, size in chosen), 1))
    vectors, draws = [], []
    for shard, group, _ in chosen:
        file = embeddings.artifact.manifest.shards[shard].file
        for rows, stored in embeddings.stored(shard, [group]):
            draw = randomness.uniform(Stream.DENSITY_SAMPLE, 0, doc_ids(shard, rows))
            some = draw < share
            where = f"{embeddings.artifact.path / file}, row"
            vectors.append(of_length_one(stored[some], rows[some], where))
            draws.append(draw[some])
    if sum(map(len, vectors)) < 10:
        raise BandwidthError(
            f"{embeddings.artifact.path} has too few embeddings to choose a bandwidth by: leave "
            "Density.effective_sample_size out."
        )
    order = np.argsort(np.concatenate(draws), kind="stable")[:_SAMPLE]
    return np.concatenate(vectors)[order]
