"""The reader of a finished corpus."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from etils import epath

from pruning.corpus.layout import KIND, doc_ids
from pruning.corpus.tokenizers import Tokenizer, load_stored
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.manifest import ArtifactError
from pruning.store.verified import VerifiedParquet


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A finished corpus. Made by `load_corpus`."""

    artifact: Artifact

    @property
    def num_shards(self) -> int:
        return self.artifact.num_shards

    @functools.cached_property
    def vocabulary(self) -> Tokenizer:
        """The one that it was tokenized with."""
        described = self.artifact.manifest.summary["vocabulary"]
        return load_stored(self.artifact.path, described)

    @property
    def metadata(self) -> list[str]:
        """Names of the metadata columns."""
        return list(self.artifact.manifest.summary["metadata"])

    def documents(self, shard: int) -> int:
        return self.artifact.manifest.shards[shard].rows

    def columns(self, shard: int, names: Sequence[str]) -> pa.Table:
        """Return some columns of a whole shard."""
        self._require_own_documents(shard)
        return self.artifact.read(shard, names)

    def iter_batches(
        self, shard: int, names: Sequence[str], batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a shard, `batch_size` documents at a time, in order."""
        self._require_own_documents(shard)
        with self.artifact.parquet(shard) as file:
            yield from file.iter_batches(batch_size, list(names))

    def lengths_of(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Return the token counts of some documents of a shard, int [n], in the order of `rows`."""
        return self.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()[rows]

    def tokens_of(self, shard: int, rows: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of some documents of a shard, reading only their row groups.

        Args:
          rows: integers [n], rows within the shard, in any order.

        Returns:
          n arrays [n_tokens] of the corpus's integer type, in the order of `rows`.

        Raises:
          IndexError: the shard has no such row.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return []
        if rows.min() < 0 or rows.max() >= self.documents(shard):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} of shard {shard} of {self.artifact.path} are "
                f"wanted, it has {self.documents(shard)}."
            )
        self._require_own_documents(shard)
        starts = self._row_groups[shard]
        group_of = np.searchsorted(starts, rows, side="right") - 1
        tokens: list[np.ndarray] = [np.empty(0)] * len(rows)
        with self.artifact.parquet(shard) as file:
            for group in np.unique(group_of):
                column = file.read_row_groups([int(group)], ["tokens"], use_threads=False)
                lists = column["tokens"].combine_chunks()
                values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
                for i in np.flatnonzero(group_of == group):
                    row = rows[i] - starts[group]
                    tokens[i] = values[offsets[row] : offsets[row + 1]]
        return tokens

    def _require_own_documents(self, shard: int) -> None:
        if shard not in self._checked:
            require_own_documents(self.artifact, shard)
            self._checked.add(shard)

    @functools.cached_property
    def _checked(self) -> set[int]:
        return set()

    @functools.cached_property
    def _row_groups(self) -> _RowGroups:
        return _RowGroups(self.artifact)


def require_own_documents(corpus: Artifact, shard: int) -> None:
    """Raise ArtifactError unless a data file holds the documents of its shard, all of them.

    Row numbers are joined with scores and selections: a file that was exchanged with another
    shard's would give other documents. The least and the greatest doc_id of every row group stand
    in the file's footer, so the check reads no data.
    """
    where = f"{corpus.path}/{corpus.manifest.shards[shard].file}"
    first = 0
    with corpus.parquet(shard) as file:
        for group, low, high, count in _id_ranges(file):
            wanted = doc_ids(shard, np.array([first, first + count - 1])).tolist()
            if [low, high] != wanted:
                raise ArtifactError(
                    f"{where}, row group {group}, holds the documents {low} to {high} where shard "
                    f"{shard} has {wanted[0]} to {wanted[1]}: the file belongs to another shard or "
                    "corpus. Put the files back, or make the corpus again."
                )
            first += count
    if first != corpus.manifest.shards[shard].rows:
        raise ArtifactError(
            f"{where} holds {first:,} documents, its manifest says "
            f"{corpus.manifest.shards[shard].rows:,}: the file was changed after it was written. "
            "Delete the corpus and make it again."
        )


def _id_ranges(file: VerifiedParquet) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number, the least and the greatest doc_id and the rows of every row group."""
    for group in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(group)
        if not rows.num_rows:
            continue
        columns = (rows.column(i) for i in range(rows.num_columns))
        statistics = next(c for c in columns if c.path_in_schema == "doc_id").statistics
        if statistics is not None and statistics.has_min_max:
            yield group, statistics.min, statistics.max, rows.num_rows
        else:
            ids = file.read_row_groups([group], ["doc_id"])["doc_id"].to_numpy()
            yield group, int(ids.min()), int(ids.max()), rows.num_rows


class _RowGroups(dict[int, np.ndarray]):
    """Shard -> first row of each of its row groups, int64; looked up when asked for."""

    def __init__(self, corpus: Artifact):
        super().__init__()
        self._corpus = corpus

    def __missing__(self, shard: int) -> np.ndarray:
        with self._corpus.parquet(shard) as file:
            sizes = file.row_group_sizes()
        self[shard] = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
        return self[shard]


def load_corpus(path: epath.PathLike) -> Corpus:
    """Open a finished corpus.

    Raises:
      ArtifactError: there is none, or it is unfinished.
    """
    return Corpus(load_artifact(path, KIND))
