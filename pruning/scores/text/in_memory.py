"""Scores of texts in memory that need no model on a device: fastText, KenLM, n-gram classifiers.

language = pruning.TextFunction(FastText("lid.176.ftz", labels=("en",)))
quality = pruning.NgramClassifier("runs/c4/quality")      # a score set of `classifier`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pruning.scores import score_set
from pruning.scores.in_memory import InMemory
from pruning.scores.score_set import EMPTY, STATUSES, Column
from pruning.scores.text import classifier, passes
from pruning.scores.text.passes import DocumentFunction
from pruning.scores.text.text_score import Score
from pruning.store.artifact import load_artifact


class TextFunction(InMemory):
    """A function of text, such as `FastText(...)`, `KenLM(...)` or one of your own."""

    def __init__(self, function: Score):
        """Take the settings of a score, as `python -m pruning text_score` does."""
        self._function: DocumentFunction | Score = function
        self._columns: Mapping[str, Column] = function.columns

    @property
    def columns(self) -> Mapping[str, str]:
        """Descriptions of the columns, by name."""
        return {name: column.meaning for name, column in self._columns.items()}

    def _table(self, texts: Sequence[str]) -> pa.Table:
        empty = np.array([not text.strip() for text in texts], bool)
        status = np.where(empty, STATUSES.index(EMPTY), 0).astype(np.int8)
        values = self._function(pa.array(texts, pa.string())) if texts else {}
        found = {
            name: [passes.checked(values, name, len(texts))] if texts else []
            for name in self._columns
        }
        whole = passes.placed(self._columns, found, np.arange(len(texts)), status)
        return score_set.table_of(self._columns, status, whole)


class NgramClassifier(TextFunction):
    """A classifier that `python -m pruning classifier` has fitted, for other texts."""

    def __init__(self, scores: str):
        """Read the model.

        Args:
          scores: directory of the score set.

        Raises:
          ArtifactError: it is not a score set of `classifier`.
        """
        self._function = classifier.fitted_model(load_artifact(scores, score_set.KIND))
        self._columns = classifier.COLUMNS
