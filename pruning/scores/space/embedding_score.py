"""User-defined scores that are functions of stored embeddings.

    python -m pruning embedding_score --gin_file=mine.gin --gin.CORPUS=... --gin.OUTPUT=...

An embedding score is a frozen dataclass of settings with `columns` and a call that maps vectors of
length 1 to them. docs/examples/axis.py is a complete example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax

from pruning.scores.score_set import Column
from pruning.scores.space import passes
from pruning.scores.workers import require_worker
from pruning.store import late
from pruning.store.artifact import Artifact
from pruning.store.manifest import config_of

NAME = "EmbeddingScore"


@runtime_checkable
class Score(Protocol):
    """Settings of an embedding score: a frozen dataclass, recorded in the score set."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """Columns of the score set."""
        ...

    def __call__(self, vectors: jax.Array) -> Mapping[str, jax.Array]:
        """Map float32 [tiles, TILE, width], of length 1, to every column, [tiles, TILE] each."""
        ...


@dataclasses.dataclass(frozen=True)
class EmbeddingScoreConfig:
    """Settings of `embedding_score`.

    Attributes:
      corpus: directory of the corpus.
      embeddings: a score set of the corpus with a column of vectors.
      output: directory of the score set.
      score: the score, named by its module, such as `@axis.Axis()`.
      column: name of the column of embeddings.
      worker, workers: this process takes the shards whose index is `worker` modulo `workers`. By
        default the processes of `jax.distributed` divide them.
    """

    corpus: str
    embeddings: str
    output: str
    score: Score
    column: str = "embedding"
    worker: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        require_worker(self.worker, self.workers)
        if not dataclasses.is_dataclass(self.score) or isinstance(self.score, type):
            raise ValueError(
                f"score is {self.score!r}: it has to be an instance of a dataclass, whose fields "
                "are its settings. In gin that is @module.Name(), with parentheses."
            )


CONFIGURABLES: dict[str, type] = {NAME: EmbeddingScoreConfig}


@late.stage
def run(config: EmbeddingScoreConfig) -> Artifact | None:
    """Make the score set, or resume it; return None while other workers' shards are missing.

    Raises:
      ArtifactError: corpus and embeddings do not belong together.
      ConfigurationChanged: the output holds work of other settings.
    """
    score = config.score
    summary = {"score": config_of(score)}
    return passes.Embedded.open(config).score(
        type(score).__name__, score.columns, summary, {}, lambda: (score, summary)
    )
