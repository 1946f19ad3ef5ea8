"""Rank agreement between score columns.

    table = compare({"likelihood": log_likelihood, "ask_llm": p_yes}, doc_ids)
    table.kendall[0, 1]

Choices
- Kendall's tau-b, as in the papers' figures, accounts for ties, of which a judge's rounded
  probabilities have many. Spearman's rho is given too, because others report it.
- Neither is specific to the top, which is all that a selection keeps. So the overlap of the top
  shares is given as Jaccard's index, next to that of two independent scorers.
- A document without one of two scores (NaN) is left out of that pair, and the number of remaining
  documents is reported.
- Ties at the edge of the top are cut by the document's hash, as a selection cuts them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from evaluation.errors import EvaluationError
from pruning.store import randomness
from pruning.store.randomness import Stream

MAX_DOCUMENTS = 500_000  # size of the sample of Sachdeva et al.


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Pairwise agreement of n score columns; every matrix is symmetric, float64 [n, n].

    Attributes:
      names: of the columns.
      documents: int64, how many documents both of a pair have scored.
      kendall, spearman: in [-1, 1]; NaN where a column is constant or nothing is shared.
      overlap: Jaccard's index of the two top `share`s, in [0, 1].
      share: of the documents that counts as the top.
    """

    names: tuple[str, ...]
    documents: np.ndarray
    kendall: np.ndarray
    spearman: np.ndarray
    overlap: np.ndarray
    share: float

    @property
    def chance_overlap(self) -> float:
        """Mean overlap of independent scorers, s^2 / (2 s - s^2)."""
        return self.share / (2 - self.share)


def kendall_tau_b(x: np.ndarray, y: np.ndarray) -> float:
    """Return Kendall's tau-b of two columns [documents], in O(n log n); NaN if one is constant."""
    from scipy import stats

    return float(stats.kendalltau(x, y, variant="b").statistic) if len(x) > 1 else float("nan")


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rho, Pearson's correlation of mid-ranks; NaN if a column is constant."""
    from scipy import stats

    if len(x) < 2:
        return float("nan")
    a, b = stats.rankdata(x), stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def top(x: np.ndarray, share: float, ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the highest `share` of the documents, round(share * n) of them: bool [documents]."""
    keep = round(share * len(x))
    order = np.lexsort((randomness.hashed(Stream.AGREEMENT_TIE, seed, ids), -x))
    chosen = np.zeros(len(x), bool)
    chosen[order[:keep]] = True
    return chosen


def top_overlap(
    x: np.ndarray, y: np.ndarray, share: float, ids: np.ndarray | None = None, seed: int = 0
) -> float:
    """Return Jaccard's index of the highest `share` by x and by y.

    Args:
      x, y: scores [documents], higher is better.
      share: in (0, 1].
      ids: int64 [documents], what ties are cut by; the row number if not given.
      seed: of the cutting of ties.
    """
    ids = np.arange(len(x)) if ids is None else ids
    a, b = top(x, share, ids, seed), top(y, share, ids, seed)
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else float("nan")


def compare(
    columns: Mapping[str, np.ndarray],
    ids: np.ndarray,
    share: float = 0.2,
    max_documents: int = MAX_DOCUMENTS,
    seed: int = 0,
) -> Agreement:
    """Compare every pair of columns.

    Args:
      columns: name -> scores [documents], higher is better; NaN where there is none.
      ids: int64 [documents].
      share: of the documents that counts as the top.
      max_documents: more than these are sampled, by the documents' hashes.
      seed: of the sample, and of the cutting of ties.

    Raises:
      ValueError: a column has another length than `ids`.
    """
    for name, column in columns.items():
        if len(column) != len(ids):
            raise EvaluationError(f"{name} has {len(column)} scores for {len(ids)} documents.")
    if len(ids) > max_documents:
        draw = randomness.hashed(Stream.AGREEMENT_SAMPLE, seed, ids)
        rows = np.sort(np.argpartition(draw, max_documents)[:max_documents])
        ids = ids[rows]
        columns = {name: column[rows] for name, column in columns.items()}

    n = len(columns)
    documents = np.zeros((n, n), np.int64)
    kendall, rho, overlap = (np.full((n, n), np.nan) for _ in range(3))
    values = [np.asarray(column, np.float64) for column in columns.values()]
    for i in range(n):
        for j in range(i, n):
            both = ~(np.isnan(values[i]) | np.isnan(values[j]))
            x, y = values[i][both], values[j][both]
            documents[i, j] = documents[j, i] = len(x)
            kendall[i, j] = kendall[j, i] = kendall_tau_b(x, y)
            rho[i, j] = rho[j, i] = spearman(x, y)
            overlap[i, j] = overlap[j, i] = top_overlap(x, y, share, ids[both], seed)
    return Agreement(tuple(columns), documents, kendall, rho, overlap, share)
