"""Diagnostics of a selection: weights, overlap with chance, retention by domain.

Counts of shards are added, in any order.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

OTHER = "(other)"
NONE = "(none)"  # the column is null

# A column of strings: codes int [n], and the string of each code; the code after the last is null.
Encoded = tuple[np.ndarray, pa.StringArray]

_DRAW_BITS = 16


@dataclasses.dataclass(frozen=True)
class Weights:
    """Sums over sampling weights, as logarithms."""

    documents: int
    log_sum: float
    log_sum_squares: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, log_weights: np.ndarray) -> Weights:
        if not len(log_weights):
            return cls(0, -np.inf, -np.inf, np.inf, -np.inf)
        highest = float(log_weights.max())
        relative = np.exp(log_weights - highest)
        return cls(
            len(log_weights),
            highest + float(np.log(relative.sum())),
            2 * highest + float(np.log(np.square(relative).sum())),
            float(log_weights.min()),
            highest,
        )

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.documents + other.documents,
            float(np.logaddexp(self.log_sum, other.log_sum)),
            float(np.logaddexp(self.log_sum_squares, other.log_sum_squares)),
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )

    def summary(self) -> dict[str, float | None]:
        """Return ESS/N = (sum w)^2 / (N sum w^2), 1 for uniform sampling, and max w / min w."""
        if not self.documents:
            return {"ess_share": None, "max_over_min": None}
        ess = np.exp(2 * self.log_sum - self.log_sum_squares - np.log(self.documents))
        with np.errstate(over="ignore"):
            ratio = float(np.exp(self.highest - self.lowest))
        return {"ess_share": float(ess), "max_over_min": ratio if np.isfinite(ratio) else None}


def draw_bucket(uniform: np.ndarray) -> np.ndarray:
    """Return the leading bits of draws in (0, 1), int64."""
    return (uniform * (1 << _DRAW_BITS)).astype(np.int64)


def draw_histogram(uniform: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return tokens by draw, int64 [buckets]."""
    return np.bincount(draw_bucket(uniform), tokens, 1 << _DRAW_BITS).astype(np.int64)


def random_bucket(histogram: np.ndarray, tokens: int) -> int:
    """Return the bucket of draws from which a random selection of about `tokens` tokens starts."""
    from_top = np.cumsum(histogram[::-1])
    return len(histogram) - int(np.argmin(np.abs(from_top - tokens))) - 1


def domain_counts(
    codes: np.ndarray, names: int, tokens: np.ndarray, pool: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """Return documents and tokens by domain, in the pool and kept.

    Args:
      codes: integers [n], up to `names`, which stands for all other domains.
      tokens: integers [n].
      pool, kept: bool [n].

    Returns:
      int64 [names + 1, 4].
    """
    columns = []
    for members in (pool, kept):
        rows = slice(None) if members.all() else np.flatnonzero(members)
        columns.append(np.bincount(codes[rows], minlength=names + 1))
        columns.append(np.bincount(codes[rows], weights=tokens[rows], minlength=names + 1))
    return np.stack(columns, axis=1).astype(np.int64)


def domain_table(names: Sequence[str], counts: np.ndarray) -> list[dict[str, Any]]:
    """Return `domain_counts` as a table, the largest domains first, the others summed last."""
    order = [*np.argsort(-counts[:-1, 1], kind="stable"), len(names)]
    named = [*names, OTHER]
    fields = ("documents", "tokens", "kept_documents", "kept_tokens")
    return [
        {"domain": named[i]} | dict(zip(fields, map(int, counts[i]), strict=True))
        for i in order
        if counts[i].any()
    ]


def encode(column: pa.ChunkedArray) -> Encoded:
    """Return codes and their meanings, of a column that may be dictionary-encoded already."""
    encoded = column.combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    codes, meanings = encoded.indices, encoded.dictionary.cast(pa.string())
    if codes.null_count:
        codes = codes.fill_null(len(meanings))
    return codes.to_numpy(zero_copy_only=False), meanings


def codes_among(names: Sequence[str], column: Encoded) -> np.ndarray:
    """Return each row's index in `names`, uint8 [n] or wider; len(names) where absent.

    Null has the place of `NONE`.
    """
    codes, meanings = column
    given = pa.array(names, pa.string())
    everything = pa.concat_arrays([meanings, pa.array([NONE], pa.string())])
    places = compute.index_in(everything, given).fill_null(len(names)).to_numpy()
    return places.astype(np.min_scalar_type(len(names)))[codes]


def sums(column: Encoded, numbers: np.ndarray) -> Counter[str]:
    """Return the sum of numbers, below 2^53, for every value that occurs."""
    codes, meanings = column
    totals = np.bincount(codes, numbers, len(meanings) + 1).astype(np.int64)
    there = np.flatnonzero(totals)
    found: Counter[str] = Counter()
    names = meanings.take(pa.array(there[there < len(meanings)])).to_pylist()
    for name, total in zip([*names, NONE], totals[there].tolist(), strict=False):
        found[name] += total
    return found
