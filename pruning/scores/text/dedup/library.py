"""Documents to be compared: those of a corpus, and those of other corpora that have precedence.

A document is a node: the index of its corpus << 56 | its doc_id. Other corpora have the lower
indices, so that ascending nodes are in the order of precedence.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from pruning.corpus.layout import doc_ids, rows_of
from pruning.scores.text.texts import Texts

UNIT = 1 << 16  # target number of documents of a unit
_CORPUS_BITS = np.uint64(56)
MOST_CORPORA = 127


@dataclasses.dataclass(frozen=True)
class Place:
    """A shard of one of the corpora."""

    corpus: int
    shard: int

    @property
    def first(self) -> int:
        """The least node that the shard can contain."""
        return (self.corpus << 56) | (self.shard << 32)


@dataclasses.dataclass(frozen=True)
class Library:
    """Corpora in the order of precedence; the last one is deduplicated.

    Attributes:
      corpora: name -> texts.
    """

    corpora: Mapping[str, Texts]

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.corpora)

    @property
    def own(self) -> int:
        """Index of the corpus that is deduplicated."""
        return len(self.corpora) - 1

    def texts(self, place: Place) -> Texts:
        return self.corpora[self.names[place.corpus]]

    @property
    def documents(self) -> int:
        return sum(texts.documents for texts in self.corpora.values())

    @functools.cached_property
    def units(self) -> tuple[tuple[Place, ...], ...]:
        """Runs of shards of about `UNIT` documents, at least one shard each."""
        found: list[tuple[Place, ...]] = []
        run: list[Place] = []
        held = 0
        for corpus, texts in enumerate(self.corpora.values()):
            for shard in range(texts.corpus.num_shards):
                size = texts.corpus.documents(shard)
                if run and held + size > UNIT:
                    found.append(tuple(run))
                    run, held = [], 0
                run.append(Place(corpus, shard))
                held += size
        return tuple([*found, tuple(run)] if run else found)

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Numbers of documents of the units, those outside of a selection included."""
        return [
            sum(self.texts(place).corpus.documents(place.shard) for place in unit)
            for unit in self.units
        ]

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        return np.asarray([unit[0].first for unit in self.units], np.uint64)

    def unit_of(self, nodes: np.ndarray) -> np.ndarray:
        """Return the units of nodes, int64."""
        return np.searchsorted(self._starts, nodes, side="right") - 1

    def nodes(self, place: Place, rows: np.ndarray) -> np.ndarray:
        """Return the nodes of rows of a shard, uint64."""
        return doc_ids(place.shard, rows).astype(np.uint64) | (
            np.uint64(place.corpus) << _CORPUS_BITS
        )

    def by_place(self, unit: int, nodes: np.ndarray) -> Iterator[tuple[Place, np.ndarray]]:
        """Yield the shards of a unit and the rows of `nodes` in them, for those with any.

        Args:
          nodes: uint64, ascending, all of the unit.
        """
        bounds = [*(place.first for place in self.units[unit][1:]), 1 << 63]
        cuts = np.searchsorted(nodes, np.asarray(bounds, np.uint64))
        begin = 0
        for place, end in zip(self.units[unit], cuts.tolist(), strict=True):
            if end > begin:
                yield place, rows_of(doc_ids_of(nodes[begin:end]))
            begin = end


def doc_ids_of(nodes: np.ndarray) -> np.ndarray:
    """Return the document ids of nodes in their corpora, int64."""
    return (nodes & np.uint64((1 << 56) - 1)).astype(np.int64)


def corpora_of(nodes: np.ndarray) -> np.ndarray:
    """Return the indices of the nodes' corpora, int64."""
    return (nodes >> _CORPUS_BITS).astype(np.int64)
