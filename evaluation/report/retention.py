"""Shares of tokens kept by kind of text, by package or site, and by length."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from evaluation.report.comparison import Cell
from evaluation.report.results import Results

_GROUPS_SHOWN = 14
_LENGTHS = (0, 64, 256, 1024, 4096)  # tokens


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of tokens kept; `shade` (percent) and `hue` mark its ratio to the keep-rate."""

    value: float
    shade: int
    hue: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A group of documents: its tokens, and the share that each cell kept."""

    name: str
    tokens: int
    shares: tuple[Share, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows for all groups of one kind, columns for all selections of one keep-rate."""

    title: str
    column: str
    cells: tuple[Cell, ...]
    rows: tuple[Row, ...]


def keep_rates(cells: Sequence[Cell]) -> list[float]:
    """Return the keep-rates of the selections, in descending order."""
    return sorted({cell.keep_rate for cell in cells if not cell.is_full}, reverse=True)


def tables(results: Results, cells: Sequence[Cell], keep_rate: float) -> list[Table]:
    """Return the tables at one keep-rate; a grouping with a single group is left out."""
    pool = results.pool
    shown = tuple(cell for cell in cells if not cell.is_full and cell.keep_rate == keep_rate)
    found = []
    for title, column, groups in (
        ("By kind of text", "Kind", _named_groups(pool.source)),
        ("By package or site", "Package or site", _named_groups(pool.domain, pool.n_tokens)),
        ("By length", "Tokens", _length_groups(pool.n_tokens)),
    ):
        if len(groups) > 1:
            rows = tuple(
                Row(
                    name,
                    int(pool.n_tokens[members].sum()),
                    tuple(_share(results, cell, members) for cell in shown),
                )
                for name, members in groups
            )
            found.append(Table(title, column, shown, rows))
    return found


def _share(results: Results, cell: Cell, members: np.ndarray) -> Share:
    """Return the share of a group's tokens that a cell kept, averaged over seeds."""
    tokens = results.pool.n_tokens[members]
    kept = [results.kept[run.sampler, run.keep_rate, run.seed][members] for run in cell.runs]
    value = float(np.mean([tokens[mask].sum() for mask in kept]) / max(tokens.sum(), 1))
    ratio = np.log2(max(value, 1e-3) / cell.keep_rate)
    return Share(value, round(min(abs(ratio) / 2, 1) * 55), "more" if ratio > 0 else "less")


def _named_groups(
    names: np.ndarray, n_tokens: np.ndarray | None = None
) -> list[tuple[str, np.ndarray]]:
    """Return (name, rows) of the largest groups of equal names, and of all others together."""
    labels = np.asarray(["(none)" if name is None else str(name) for name in names], dtype=object)
    values, codes = np.unique(labels.astype(str), return_inverse=True)
    weights = np.bincount(codes, weights=n_tokens, minlength=len(values))
    order = np.argsort(-weights, kind="stable")
    groups = [(str(values[i]), np.flatnonzero(codes == i)) for i in order[:_GROUPS_SHOWN]]
    if rest := order[_GROUPS_SHOWN:].tolist():
        groups.append((f"{len(rest):,} others", np.flatnonzero(np.isin(codes, rest))))
    return groups


def _length_groups(n_tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    place = np.digitize(n_tokens, _LENGTHS) - 1
    names = [f"{a:,} to {b - 1:,}" for a, b in itertools.pairwise(_LENGTHS)]
    names.append(f"{_LENGTHS[-1]:,} and more")
    groups = [(name, np.flatnonzero(place == i)) for i, name in enumerate(names)]
    return [(name, rows) for name, rows in groups if len(rows)]
