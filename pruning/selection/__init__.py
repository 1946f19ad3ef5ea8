"""Selections: which documents of a corpus are kept.

A selection is a view: per corpus shard the kept `doc_id`s in ascending order with their `n_tokens`,
and `blocks.parquet`, which cuts every shard's kept documents into blocks of 128 for the stream. A
hundred selections over one corpus copy no text.

This file reads selections; `select.py` makes them, by a strategy of `strategies.py` over a score of
`scores.py`, cut at the budget by `cut.py`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
from etils import epath

from pruning import artefact
from pruning.artefact import Artefact
from pruning.corpus import rows_of

ROW_GROUP = 1 << 14  # 128 blocks: what must be read to find the documents of one


@dataclasses.dataclass(frozen=True)
class Selection:
    """A finished selection."""

    artefact: Artefact

    @property
    def num_shards(self) -> int:
        return self.artefact.num_shards

    @property
    def documents(self) -> int:
        return self.artefact.manifest.rows

    @property
    def tokens(self) -> int:
        return self.artefact.manifest.tokens

    def doc_ids(self, shard: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """The kept documents of a shard, int64 ascending; reads the row groups that hold them.

        Args:
          shard: of the corpus.
          first: how many kept documents of the shard to pass over.
          count: how many to give; None for all that follow.
        """
        with self.artefact.parquet(shard) as file:
            return _rows(file, "doc_id", first, count)

    def rows(self, shard: int) -> np.ndarray:
        """The kept documents of a shard as its row numbers, int64 ascending."""
        return rows_of(self.doc_ids(shard))

    def mask(self, shard: int, documents: int) -> np.ndarray:
        """bool [documents], which documents of a corpus shard are kept."""
        mask = np.zeros(documents, bool)
        mask[self.rows(shard)] = True
        return mask


def load_selection(path: epath.PathLike, corpus: Artefact | None = None) -> Selection:
    """Opens a selection.

    Raises:
      ArtefactError: there is none, or it was made from another corpus than the one given.
    """
    selection = Selection(artefact.load(path, "selection"))
    if corpus is not None:
        artefact.require_input(selection.artefact, "corpus", corpus)
    return selection


def _rows(file: pq.ParquetFile, column: str, first: int, count: int | None) -> np.ndarray:
    """Rows [first, first + count) of a column, from the row groups that hold them."""
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    last = starts[-1] if count is None else min(first + count, starts[-1])
    groups = [i for i in range(len(sizes)) if starts[i] < last and starts[i + 1] > first]
    if not groups:
        return np.zeros(0, np.int64)
    values = file.read_row_groups(groups, columns=[column]).column(0).to_numpy()
    return values[first - starts[groups[0]] : last - starts[groups[0]]]
