"""Answers of a judge as a score set, for a student to learn from.

Choices
- Only the order matters to a cascade, so that the student learns normal scores of ranks. Scores
  such as log P(yes) are crowded at the top, where the cut is, and a squared error neglects that.
"""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
from scipy import special, stats

from pruning.corpus.layout import rows_of
from pruning.scores import score_set
from pruning.scores.score_set import NO_VALUE, NOT_SELECTED, OK, Column
from pruning.selection.cascade.decide import Cascade
from pruning.selection.cascade.rounds import Rounds
from pruning.store.artifact import Artifact

COLUMN = "judge"
COLUMNS = {
    COLUMN: Column(pa.float64(), "the normal score of the judge's, among its answers so far")
}


def normal_scores(scores: np.ndarray) -> np.ndarray:
    """Return the standard normal quantiles of ranks, float64 [n]; ties have their mean rank.

    Blom (1958), Statistical Estimates and Transformed Beta-Variables, with (rank - 1/2) / n.
    """
    return special.ndtri((stats.rankdata(scores) - 0.5) / max(len(scores), 1))


def write(path: os.PathLike, rounds: Rounds, cascade: Cascade) -> Artifact:
    """Write the answers so far; documents that were not asked about are "not_selected"."""
    documents = rounds.documents
    corpus = documents.corpus
    scores = cascade.scores.copy()
    some = np.isfinite(scores)
    scores[some] = normal_scores(scores[some])
    identity = {"cascade": rounds.config.identity, "answers": int(cascade.answered.sum())}
    inputs = {} if rounds.judged is None else {"judged": rounds.judged}
    build = score_set.begin(os.fspath(path), identity, inputs, corpus, COLUMNS)
    for shard in build.pending():
        own = slice(documents.starts[shard], documents.starts[shard + 1])
        rows = rows_of(documents.ids[own])
        values = np.full(corpus.documents(shard), np.nan)
        values[rows] = scores[own]
        status = np.full(len(values), score_set.ALL_STATUSES.index(NOT_SELECTED), np.int8)
        status[np.isneginf(values)] = score_set.ALL_STATUSES.index(NO_VALUE)
        status[np.isfinite(values)] = score_set.ALL_STATUSES.index(OK)
        score_set.write(build, shard, corpus, COLUMNS, status, {COLUMN: values})
    answers = score_set.finish(build, "cascade", COLUMNS)
    assert answers is not None  # this process had every shard
    return answers
