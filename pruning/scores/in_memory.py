"""Scores of texts in memory: what scorers with a model and functions of the text have in common.

judge.score(texts)                # Arrow table, a row per text
judge.stream(lines)               # one table for every 8,192 texts
judge.add_to(frame, "text")       # a pandas or Polars DataFrame, ..., with further columns
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pruning.scores import tables
from pruning.scores.tables import Table

AT_ONCE = 8192  # texts scored together


class InMemory(abc.ABC):
    """A scorer of texts in memory."""

    @property
    @abc.abstractmethod
    def columns(self) -> Mapping[str, str]:
        """Descriptions of the columns, by name."""

    @abc.abstractmethod
    def _table(self, texts: Sequence[str]) -> pa.Table:
        """Return the scores of at most `AT_ONCE` texts."""

    def score(self, texts: Iterable[str]) -> pa.Table:
        """Return the scores of texts, in their order.

        Args:
          texts: strings: a list, a pandas or Polars series, an Arrow array, a column of a dataset.

        Returns:
          A row per text: `status` ("ok", "empty", ...) and the scorer's columns, null where there
          is no score.

        Raises:
          TypeError: an item is not a string.
        """
        return pa.concat_tables(self.stream(texts)).unify_dictionaries()

    def stream(self, texts: Iterable[str]) -> Iterator[pa.Table]:
        """Yield the scores of texts as `score` returns them, one table for every 8,192 texts.

        At most 8,192 texts are in memory at a time. An empty input gives one empty table.
        """
        remaining = iter(texts)
        first = 0
        while True:
            some = list(itertools.islice(remaining, AT_ONCE))
            if not some and first:
                return
            yield self._table(_strings(some, first))
            if len(some) < AT_ONCE:
                return
            first += len(some)

    def add_to(self, table: Table, column: str = "text", prefix: str = "") -> Table:
        """Return a table with the scores of its texts as further columns.

        Args:
          table: a pandas or Polars DataFrame, an Arrow table or a `datasets.Dataset`.
          column: the column with the texts.
          prefix: put in front of the names of the new columns; with two scorers, one needs it.

        Raises:
          TypeError: an item of the column is not a string.
          ValueError: the table has no such column, or has a column of a new one's name.
        """
        names = tables.columns(table)
        if column not in names:
            raise ValueError(f"the table has no column {column!r}; it has: {', '.join(names)}.")
        scores = self.score(tables.arrow(table, [column])[column])
        own = {f"{prefix}{name}": scores[name] for name in scores.column_names}
        return tables.with_columns(table, own)


def _strings(items: Sequence[Any], first: int) -> list[str]:
    """Return items as strings; Arrow's scalars are converted.

    Raises:
      TypeError: an item is not a string, or cannot be written as UTF-8.
    """
    strings = [item.as_py() if isinstance(item, pa.Scalar) else item for item in items]
    for place, text in enumerate(strings, first):
        if not isinstance(text, str):
            raise TypeError(f"text {place} is of type {type(text).__name__}, not a string.")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise TypeError(
                    f"text {place} holds half a surrogate pair: it is not valid Unicode."
                ) from error
    return strings
