"""Texts or tokens of the documents of a corpus, read a batch at a time, and samples of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import pyarrow as pa

from pruning.corpus.layout import doc_ids
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.store.artifact import Artifact

_READ = 4096  # documents at a time


class Reads(Protocol):
    """A column of the corpus and the size of the batches it is read in."""

    @property
    def column(self) -> str: ...

    def batches(self, column: pa.Array) -> Iterator[pa.Array]: ...


@dataclasses.dataclass(frozen=True)
class Texts:
    """Documents of a corpus, or those of a selection of it."""

    corpus: Corpus
    within: Selection | None = None

    @classmethod
    def open(cls, corpus: str, within: str | None = None) -> Texts:
        """Open a corpus and a selection of it; raise ArtifactError if they do not match."""
        opened = load_corpus(corpus)
        selection = None if within is None else load_selection(within, opened.artifact)
        return cls(opened, selection)

    def inputs(self, name: str) -> dict[str, Artifact]:
        """Return both as inputs for a manifest, under `name` and `name_within`."""
        inputs = {name: self.corpus.artifact}
        return inputs if self.within is None else inputs | {f"{name}_within": self.within.artifact}

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.corpus.artifact.manifest.rows if self.within is None else self.within.documents

    def rows(self, shard: int) -> np.ndarray:
        """Return the shard's documents as row numbers, int64 ascending."""
        if self.within is None:
            return np.arange(self.corpus.documents(shard))
        return self.within.rows(shard)

    def read(self, shard: int, rows: np.ndarray, reads: Reads) -> Iterator[pa.Array]:
        """Yield a column of some rows (ascending) of a shard, in batches of `reads.batches`."""
        first = 0
        for batch in self.corpus.iter_batches(shard, [reads.column], _READ):
            begin, end = np.searchsorted(rows, [first, first + batch.num_rows])
            inside = rows[begin:end] - first
            first += batch.num_rows
            if len(inside):
                yield from reads.batches(batch.column(0).take(pa.array(inside)))

    def all(self, shard: int, reads: Reads) -> Iterator[pa.Array]:
        """Yield the column of all documents of a shard."""
        return self.read(shard, self.rows(shard), reads)


def sample(
    texts: Texts, documents: int, draws: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """Return the documents with the lowest draws: rows int64 ascending, shard by shard.

    Args:
      documents: the most to return.
      draws: int64 ids [n] -> float64 [n]; infinity leaves a document out.
    """
    found = []
    for shard in range(texts.corpus.num_shards):
        rows = texts.rows(shard)
        draw = draws(doc_ids(shard, rows))
        some = np.isfinite(draw)
        found.append((np.full(some.sum(), shard), rows[some], draw[some]))
    shards, rows, draw = (np.concatenate(column) for column in zip(*found, strict=True))
    lowest = np.argsort(draw, kind="stable")[:documents]
    return [np.sort(rows[lowest][shards[lowest] == k]) for k in range(texts.corpus.num_shards)]
