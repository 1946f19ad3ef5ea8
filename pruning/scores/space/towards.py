"""Similarity of documents to a set of target texts, such as the examples of a benchmark.

    python -m pruning towards --gin_file=configs/score/towards.gin --gin.CORPUS=...

Selection towards benchmarks (BETR, Mizrahi et al., arXiv 2507.12466) embeds the examples of the
tasks that a model is wanted for, embeds a sample of the corpus, scores the sample by similarity to
the examples, teaches a cheap model this score, and keeps the documents that it rates highest. This
stage is the similarity; configs/score/towards.gin shows the whole chain.

Choices
- The targets are a corpus of their own, embedded by the same model with the same settings. The
  stage refuses embeddings of another model.
- A document has the cosine to its nearest target, as BETR's maximum over examples, and the mean
  cosine to its `nearest` targets, which one odd example does not decide.
- Evaluation sets are targets, so documents that repeat them are the most similar ones. Remove them
  first (`python -m evaluation contamination`), or give the stage embeddings of a selection without
  them.
- BETR averages ranks of documents for every target; a rank needs all documents at once, and would
  change with the corpus. The cosine is used as it is.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.scores.score_set import Column
from pruning.scores.space import passes
from pruning.scores.space.embeddings import Embeddings, of_length_one
from pruning.scores.space.same_model import require_same_model
from pruning.scores.workers import require_worker
from pruning.store import late
from pruning.store.artifact import Artifact
from pruning.store.manifest import ArtifactError

NAME = "Towards"

COLUMNS = {
    "target_similarity": Column(pa.float32(), "cosine to the nearest target"),
    "target_mean": Column(pa.float32(), "mean cosine to the nearest targets"),
    "target": Column(pa.int64(), "doc_id of the nearest target"),
}

_MOST_TARGETS = 100_000


@dataclasses.dataclass(frozen=True)
class TowardsConfig:
    """Settings of `towards`.

    Attributes:
      corpus: directory of the corpus.
      embeddings: a score set of the corpus with a column of vectors.
      targets: a corpus of target texts.
      target_embeddings: a score set of `targets`, made by the same model.
      output: directory of the score set.
      targets_within: a selection of `targets`.
      nearest: number of targets that `target_mean` is over.
      column: name of the column of embeddings.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes of `jax.distributed` divide them.
    """

    corpus: str
    embeddings: str
    targets: str
    target_embeddings: str
    output: str
    targets_within: str | None = None
    nearest: int = 10
    column: str = "embedding"
    worker: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        require_worker(self.worker, self.workers)
        if self.nearest < 1:
            raise ValueError(f"nearest is at least 1, not {self.nearest}.")


CONFIGURABLES: dict[str, type] = {NAME: TowardsConfig}


@late.stage
def run(config: TowardsConfig) -> Artifact | None:
    """Make the score set, or resume it; return None while other workers' shards are missing.

    Raises:
      ArtifactError: inputs do not belong together, or there are no targets or too many.
      ConfigurationChanged: the output holds work of other settings.
    """
    embedded = passes.Embedded.open(config)
    embeddings = embedded.embeddings
    targets = load_corpus(config.targets)
    target_embeddings = Embeddings.open(config.target_embeddings, config.column, targets.artifact)
    require_same_model(
        config.embeddings,
        embeddings.artifact.manifest.config,
        config.target_embeddings,
        target_embeddings.artifact.manifest.config,
    )
    if embeddings.width != target_embeddings.width:
        raise ArtifactError(
            f"{config.embeddings} has vectors of {embeddings.width} components and "
            f"{config.target_embeddings} of {target_embeddings.width}: embed both with one model."
        )
    within = None
    inputs = {"targets": target_embeddings.artifact}
    if config.targets_within is not None:
        within = load_selection(config.targets_within, targets.artifact)
        inputs |= {"targets_within": within.artifact}

    def prepare() -> tuple[Similarity, dict[str, int]]:
        ids, vectors = targets_of(targets, target_embeddings, within)
        return Similarity(ids, vectors, config.nearest), {"targets": len(ids)}

    return embedded.score("towards", COLUMNS, {"nearest": config.nearest}, inputs, prepare)


def targets_of(
    corpus: Corpus, embeddings: Embeddings, within: Selection | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the targets' ids, int64 [targets], and vectors of length 1, float32 [targets, width].

    Raises:
      ArtifactError: there are none, or too many.
    """
    path = embeddings.artifact.path
    ids: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    for shard in range(corpus.num_shards):
        known = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        for rows, found in embeddings.stored(shard):
            chosen = np.ones(len(rows), bool)
            if within is not None:
                chosen = within.mask(shard, len(known))[rows]
            ids.append(known[rows[chosen]])
            vectors.append(of_length_one(found[chosen], ids[-1], f"{path}:"))
            if sum(map(len, ids)) > _MOST_TARGETS:
                raise ArtifactError(
                    f"{path} has over {_MOST_TARGETS:,} targets: choose some with "
                    "Towards.targets_within."
                )
    if not sum(map(len, ids)):
        raise ArtifactError(f"{path} has no target with an embedding.")
    return np.concatenate(ids), np.concatenate(vectors)


class Similarity:
    """Cosines to the nearest targets, a function of tiles of vectors of length 1."""

    def __init__(self, ids: np.ndarray, vectors: np.ndarray, nearest: int):
        """Put the targets on the devices.

        Args:
          ids: int64 [targets].
          vectors: float32 [targets, width], of length 1.
          nearest: number of targets that the mean is over.
        """
        self._ids = ids
        self._vectors = jnp.asarray(vectors)
        self._nearest = min(nearest, len(ids))
        self._of = jax.jit(self._tiles)

    def __call__(self, tiles: jax.Array) -> dict[str, jax.Array | np.ndarray]:
        """Map float32 [tiles, TILE, width] to every column, [tiles, TILE] each."""
        best, mean, index = self._of(tiles, self._vectors)
        # NOTE: document ids need 64 bits, which JAX does not have by default.
        target = self._ids[np.asarray(index)]
        return {"target_similarity": best, "target_mean": mean, "target": target}

    def _tiles(
        self, tiles: jax.Array, vectors: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def one(tile: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            cosines = jnp.matmul(tile, vectors.T, precision=jax.lax.Precision.HIGHEST)
            found, index = jax.lax.top_k(cosines, self._nearest)  # [TILE, nearest]
            return found[:, 0], found.mean(axis=1), index[:, 0]

        return jax.lax.map(one, tiles)
