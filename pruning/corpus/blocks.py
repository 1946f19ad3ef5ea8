"""Blocks: the units in which documents are shuffled, read and joined to training examples.

A block is 128 documents that follow one another in a shard of a selection (the last block of a
shard has fewer). T5 concatenates 128 documents as well before it splits them.

Choices
- The table of blocks is small (C4: 2.8 million rows) and is written with the selection, so opening
  a stream reads no document.
- Blocks are made of *kept* documents: a block of a 20% selection spans 640 documents of the corpus,
  and is read from the one or two row groups that hold them.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruning.corpus.layout import doc_ids, rows_of
from pruning.corpus.reader import Corpus
from pruning.corpus.selection_reader import Selection
from pruning.store.manifest import ArtifactError

FILE = "blocks.parquet"
DOCUMENTS = 128

SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("first_row", pa.int32()),  # within the shard of the selection
        ("n_documents", pa.int32()),
        ("n_tokens", pa.int64()),
    ]
)


def cut(shard: int, n_tokens: np.ndarray) -> pa.Table:
    """Cut the documents of a shard into blocks.

    Args:
      n_tokens: integers [documents], of the kept documents in order.
    """
    first = np.arange(0, len(n_tokens), DOCUMENTS, dtype=np.int32)
    tokens = np.add.reduceat(n_tokens.astype(np.int64), first) if len(first) else first
    columns = {
        "shard": np.full(len(first), shard, np.int32),
        "first_row": first,
        "n_documents": np.minimum(DOCUMENTS, len(n_tokens) - first).astype(np.int32),
        "n_tokens": tokens.astype(np.int64),
    }
    return pa.table(columns, schema=SCHEMA)


def to_parquet(tables: list[pa.Table] | tuple[pa.Table, ...]) -> bytes:
    """Return the blocks of all shards as the content of blocks.parquet."""
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables([SCHEMA.empty_table(), *tables]), sink, compression="zstd")
    return sink.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a selection, or of a whole corpus.

    Attributes:
      corpus: the corpus with the tokens.
      selection: None for all documents.
      shard, first_row, n_documents: int32 [blocks].
      n_tokens: int64 [blocks].
    """

    corpus: Corpus
    selection: Selection | None
    shard: np.ndarray
    first_row: np.ndarray
    n_documents: np.ndarray
    n_tokens: np.ndarray

    @classmethod
    def open(cls, corpus: Corpus, selection: Selection | None) -> Blocks:
        """Read the table of a selection or, without one, the lengths of all documents.

        For a large corpus, a selection made by the strategy All avoids reading the lengths. The
        table's lengths are of the corpus's own tokens; with a token set they are read from it.
        """
        if selection is not None:
            table = pq.read_table(pa.BufferReader(selection.artifact.file(FILE)))
            if type(corpus) is not Corpus:
                table = _measured(table, corpus, selection)
        else:
            table = pa.concat_tables(
                [SCHEMA.empty_table()]
                + [
                    cut(shard, corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy())
                    for shard in range(corpus.num_shards)
                ]
            )
        columns = {name: table[name].to_numpy() for name in SCHEMA.names}
        return cls(corpus, selection, **columns)

    def __len__(self) -> int:
        return len(self.shard)

    def read(self, block: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the documents of a block: their ids, int64 [n], and their tokens, n arrays.

        Raises:
          ArtifactError: the corpus does not hold what the table of blocks says.
        """
        shard, first = int(self.shard[block]), int(self.first_row[block])
        count = int(self.n_documents[block])
        if self.selection is None:
            ids = doc_ids(shard, np.arange(first, first + count))
        else:
            ids = self.selection.doc_ids(shard, first, count)
        tokens = self.corpus.tokens_of(shard, rows_of(ids))
        found = sum(map(len, tokens))
        if found != self.n_tokens[block]:
            of = (self.selection or self.corpus).artifact.path
            raise ArtifactError(
                f"block {block} of {of} (shard {shard}, row {first}) has {found:,} tokens, its "
                f"table says {int(self.n_tokens[block]):,}: verify the corpus and the selection."
            )
        return ids, tokens


def _measured(table: pa.Table, corpus: Corpus, selection: Selection) -> pa.Table:
    """Return a selection's table of blocks with the lengths of other tokens."""
    shards, counts = table["shard"].to_numpy(), table["n_documents"].to_numpy()
    cuts = []
    for shard in np.unique(shards).tolist():
        ids = selection.doc_ids(shard, 0, int(counts[shards == shard].sum()))
        cuts.append(cut(shard, corpus.lengths_of(shard, rows_of(ids))))
    return pa.concat_tables([SCHEMA.empty_table(), *cuts])
