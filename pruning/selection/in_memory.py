"""Selection from a table in memory, with the strategies and the cut of the stage.

    kept = pruning.select(table, score="ask_llm", keep_documents=0.2)

A table of n rows is ranked as a corpus of one shard of n documents: the rows kept are those that
`python -m pruning select` keeps of that corpus, with the same settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.corpus.layout import doc_ids
from pruning.scores import numbers, tables
from pruning.scores.score_set import NOT_SELECTED
from pruning.scores.tables import Table
from pruning.scores.terms import (
    CORPUS,
    SCORED,
    VALUES,
    Operation,
    Term,
    TermValues,
    combined,
    terms_of_table,
)
from pruning.selection import diagnostics, strategies
from pruning.selection.config import Quotas, SelectConfig, SelectError, validate
from pruning.selection.ranking import Pool, ShardDocuments, rank
from pruning.selection.select import find_cuts
from pruning.selection.strategies import Filter, Percentiles, Ranking, SetOperation, Threshold, Top


def select(
    table: Table,
    strategy: Ranking | Filter | str | None = None,
    *,
    score: str | tuple[Term, ...] | None = None,
    keep_documents: float | None = None,
    keep_tokens: float | None = None,
    combine: Operation = "sum",
    quotas: Quotas | None = None,
    keep_unscored: bool = False,
    seed: int = 0,
    n_tokens: str = "n_tokens",
) -> Table:
    """Return the rows of a table that a strategy keeps, in their order, as a table of its kind.

    Args:
      table: a pandas or Polars DataFrame, an Arrow table or a `datasets.Dataset`. If it has a
        column `status`, rows of another status than "ok" have no score.
      strategy: such as `Top()` or `Softmax(temperature=0.5)`, of pruning.selection.strategies, one
        of your own, or the name of one that needs no settings ("Random"); by default the highest
        scores.
      score: a column of the table, a named value of several ("nll_mean", "ask_llm"), or terms.
      keep_documents, keep_tokens: the budget: up to 1 a share, above 1 a number.
      combine, quotas, keep_unscored, seed: as for `python -m pruning select`.
      n_tokens: the column with the documents' numbers of tokens, for a budget in tokens and for
        `Percentiles`.

    Raises:
      SelectError, StrategyError, TermError: the settings are wrong, or keep nothing.
    """
    return tables.taken(
        table,
        kept_rows(
            table,
            SelectConfig(
                corpus="the table",
                output="",
                strategy=_strategy(strategy),
                scores="the table",
                score=_named(score, tables.columns(table)),
                keep_documents=keep_documents,
                keep_tokens=keep_tokens,
                combine=combine,
                quotas=quotas,
                keep_unscored=keep_unscored,
                seed=seed,
            ),
            n_tokens,
        ),
    )


def kept_rows(table: Any, config: SelectConfig, n_tokens: str = "n_tokens") -> np.ndarray:
    """Return the numbers of the rows that a selection keeps, int64, ascending."""
    if all(term.source == CORPUS for term in config.terms):
        config = dataclasses.replace(config, scores=None)
    validate(config)
    if isinstance(config.strategy, SetOperation):
        raise SelectError(
            f"{type(config.strategy).__name__} joins selections on disk: join tables by their rows."
        )
    pool = _TablePool.of(table, config, n_tokens).fitted()
    ranked = rank(pool)
    shard = ranked.shard(0)
    return np.flatnonzero(find_cuts(pool, ranked).keeps(shard.chunk(config)))


@dataclasses.dataclass(frozen=True)
class _TablePool(Pool):
    """A table as the pool of a selection, in one shard."""

    table: pa.Table
    n_tokens: np.ndarray

    @classmethod
    def of(cls, table: Any, config: SelectConfig, n_tokens: str) -> _TablePool:
        wanted = {column for term in config.terms for column in term.definition.columns}
        wanted |= {"status", n_tokens, *([config.quotas.column] if config.quotas else [])}
        found = tables.arrow(table, wanted)
        if not len(table):
            raise SelectError("the table has no rows.")
        strategy = config.strategy
        counted = config.unit == "tokens" and isinstance(strategy, Ranking)
        counted = counted and not isinstance(strategy, Threshold)
        needed = {
            n_tokens: counted and (strategy.takes_budget or isinstance(strategy, Percentiles))
        }
        if config.quotas:
            needed[config.quotas.column] = True
        for name in (name for name, is_needed in needed.items() if is_needed):
            if name not in found.column_names:
                raise SelectError(
                    f"the table has no column {name!r}; it has: {', '.join(tables.columns(table))}."
                )
        lengths = np.ones(len(table), np.int32)
        if counted and n_tokens in found.column_names:
            lengths = _lengths(found, n_tokens)
        nothing: Any = None  # files
        return cls(config, nothing, None, {}, config.combined, (), (), found, lengths)

    @property
    def shards(self) -> range:
        return range(1)

    @property
    def rows(self) -> int:
        return len(self.n_tokens)

    def map_runs(self, function: Any) -> Iterator[Any]:
        yield function(self.shards)

    def terms(self, shard: int) -> tuple[np.ndarray, TermValues]:
        ids = doc_ids(shard, np.arange(self.rows))
        return ids, terms_of_table(self.score.terms, self.table)

    def documents(self, shard: int) -> ShardDocuments:
        ids, values = self.terms(shard)
        found = combined(self.score, values)
        considered = np.ones(self.rows, bool)
        if NOT_SELECTED in found.reasons:
            considered = found.reason != found.reasons.index(NOT_SELECTED)
        column = self.config.quotas and self.config.quotas.column
        return ShardDocuments(
            ids,
            self.n_tokens,
            considered,
            found.reason == SCORED,
            found,
            None,
            diagnostics.encode(self.table[column]) if column else None,
        )


def _lengths(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of numbers of tokens, int32 [n].

    Raises:
      SelectError: a row has none, or something else.
    """
    try:
        found = numbers.parsed(table[name].combine_chunks())
    except TypeError as error:
        raise SelectError(f"the column {name!r} holds no numbers of tokens: {error}.") from error
    wrong = ~((found >= 0) & (found <= np.iinfo(np.int32).max) & (found == np.floor(found)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise SelectError(
            f"row {row} has {table[name][row].as_py()!r} tokens in the column {name!r}: tokens "
            "are counted, so every row needs a number."
        )
    return found.astype(np.int32)


def _strategy(given: Ranking | Filter | str | None) -> Any:
    if given is None:
        return Top()
    if not isinstance(given, str):
        return given
    cls = strategies.CONFIGURABLES.get(given)
    if cls is None:
        known = ", ".join(strategies.CONFIGURABLES)
        raise SelectError(f"there is no strategy {given!r}; there are: {known}.")
    try:
        return cls()
    except TypeError as error:
        raise SelectError(f"{given} needs settings ({error}): give {given}(...).") from error


def _named(
    score: str | tuple[Term, ...] | None, columns: list[str]
) -> str | tuple[Term, ...] | None:
    """Return the score, with "column:" in front of the bare name of a column."""
    if isinstance(score, str) and score not in VALUES and score in columns:
        return f"column:{score}"
    return score
