"""Scores that are functions of the text alone: fastText, KenLM, a user's own.

    python -m pruning text_score --gin_file=mine.gin --gin.CORPUS=... --gin.OUTPUT=...

A text score is a frozen dataclass of settings with `columns` and a call that maps a batch of texts
to them. docs/examples/zlib_ratio.py is a complete example. The stage reads the corpus or a
selection of it, shares the shards among processes, resumes after an interruption and records the
settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.text import hashing, passes
from pruning.scores.text.fasttext import FastText
from pruning.scores.text.kenlm import KenLM
from pruning.scores.text.texts import Texts
from pruning.store import late
from pruning.store.artifact import Artifact
from pruning.store.manifest import config_of
from pruning.store.parallel import require_processes

NAME = "TextScore"


@runtime_checkable
class Score(Protocol):
    """Settings of a text score: a frozen dataclass, whose fields are recorded in the score set.

    A score that reads files has a method `digests()`: setting -> SHA-256 of the file that it names,
    which is recorded in place of the path.
    """

    @property
    def columns(self) -> Mapping[str, Column]:
        """Columns of the score set."""
        ...

    def __call__(self, texts: pa.Array) -> Mapping[str, np.ndarray]:
        """Return every column for a batch of texts, [texts] each; NaN where there is no value."""
        ...


@dataclasses.dataclass(frozen=True)
class TextScoreConfig:
    """Settings of `text_score`.

    Attributes:
      corpus: the corpus to score.
      output: the score set's directory.
      score: @FastText(), @KenLM(), or one of your own, named by its module, such as
        `@zlib_ratio.ZlibRatio()`.
      within: a selection of the corpus; other documents get the status "not_selected".
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    score: Score
    within: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        require_processes(self.workers)
        if not dataclasses.is_dataclass(self.score) or isinstance(self.score, type):
            raise ValueError(
                f"score is {self.score!r}: it has to be an instance of a dataclass, whose fields "
                "are its settings. In gin that is @module.Name(), with parentheses."
            )


CONFIGURABLES: dict[str, type] = {NAME: TextScoreConfig, "FastText": FastText, "KenLM": KenLM}


@late.stage
def run(config: TextScoreConfig) -> Artifact:
    """Make the score set, or resume it.

    Raises:
      ArtifactError: corpus and selection do not belong together.
      ConfigurationChanged: the output was begun with other settings.
    """
    texts = Texts.open(config.corpus, config.within)
    score, columns = config.score, config.score.columns
    digests = score.digests() if hasattr(score, "digests") else {}
    identity = {"score": config_of(score) | digests}
    build = score_set.begin(config.output, identity, texts.inputs("corpus"), texts.corpus, columns)
    if done := passes.finished(build):
        return done
    passes.score(build, texts, OfTexts(score), columns, config.workers)
    scores = score_set.finish(build, type(score).__name__, columns, identity)
    assert scores is not None  # this process had every shard
    return scores


@dataclasses.dataclass(frozen=True)
class OfTexts:
    """A text score as a function of batches of the corpus's texts."""

    column: ClassVar[str] = "text"

    score: Score

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        return hashing.batches(column)

    def __call__(self, documents: pa.Array) -> Mapping[str, np.ndarray]:
        return self.score(documents)
