"""Reader of selections, the sets of documents of a corpus that are kept.

A selection is a view. It has the kept `doc_id`s of every corpus shard in ascending order with their
`n_tokens`, and `blocks.parquet`, which divides every shard's kept documents into blocks of 128 for
the stream. Selections copy no text. `select` (pruning/selection/) makes them.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from etils import epath

from pruning.corpus.layout import rows_of, shards_of
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.manifest import ArtifactError
from pruning.store.verified import VerifiedParquet

ROW_GROUP = 1 << 14  # 128 blocks: what must be read to find the documents of one


@dataclasses.dataclass(frozen=True)
class Selection:
    """A finished selection."""

    artifact: Artifact

    @property
    def num_shards(self) -> int:
        return self.artifact.num_shards

    @property
    def documents(self) -> int:
        return self.artifact.manifest.rows

    @property
    def tokens(self) -> int:
        return self.artifact.manifest.tokens

    def doc_ids(self, shard: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return the kept documents of a shard, int64 ascending, reading only their row groups.

        Args:
          shard: of the corpus.
          first: how many kept documents of the shard to pass over.
          count: how many to give; None for all that follow.
        """
        with self.artifact.parquet(shard) as file:
            ids = _rows(file, "doc_id", first, count)
        if np.any(shards_of(ids) != shard) or np.any(np.diff(ids) <= 0):
            raise ArtifactError(
                f"{self.artifact.path / self.artifact.manifest.shards[shard].file} holds documents "
                f"that are not of shard {shard}, or not in order: the file belongs to another "
                "shard. Put the files back, or delete the selection and make it again."
            )
        return ids

    def rows(self, shard: int) -> np.ndarray:
        """Return the kept documents of a shard as its row numbers, int64 ascending."""
        return rows_of(self.doc_ids(shard))

    def mask(self, shard: int, documents: int) -> np.ndarray:
        """Return a mask of the kept documents of a corpus shard, bool [documents]."""
        mask = np.zeros(documents, bool)
        rows = self.rows(shard)
        if len(rows) and rows[-1] >= documents:
            raise ArtifactError(
                f"{self.artifact.path} keeps document {rows[-1]} of shard {shard}, which has "
                f"{documents:,}: it does not belong to this corpus."
            )
        mask[rows] = True
        return mask


def load_selection(path: epath.PathLike, corpus: Artifact | None = None) -> Selection:
    """Open a selection.

    Raises:
      ArtifactError: there is none, or it was made from another corpus than the one given.
    """
    selection = Selection(load_artifact(path, "selection"))
    if corpus is not None:
        require_input(selection.artifact, "corpus", corpus)
    return selection


def _rows(file: VerifiedParquet, column: str, first: int, count: int | None) -> np.ndarray:
    """Return rows [first, first + count) of a column, from the row groups that hold them."""
    sizes = file.row_group_sizes()
    starts = np.cumsum([0, *sizes])
    last = starts[-1] if count is None else min(first + count, starts[-1])
    groups = [i for i in range(len(sizes)) if starts[i] < last and starts[i + 1] > first]
    if not groups:
        return np.zeros(0, np.int64)
    values = file.read_row_groups(groups, [column]).column(0).to_numpy()
    return values[first - starts[groups[0]] : last - starts[groups[0]]]
