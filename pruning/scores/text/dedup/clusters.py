"""Clusters of duplicates: connected documents, and the representative of each cluster."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np

from pruning.corpus.layout import rows_of, shards_of
from pruning.corpus.reader import Corpus
from pruning.scores.text.dedup.components import Ranked, components, nodes_of, ranked
from pruning.scores.text.dedup.library import Library, Place, corpora_of, doc_ids_of
from pruning.scores.text.dedup.phases import Phases

FOUND = np.dtype(
    [
        ("row", np.int64),
        ("duplicate_rank", np.int32),
        ("cluster_documents", np.int32),
        ("kept_doc_id", np.int64),
        ("kept_corpus", np.int16),
        ("same_text", bool),
    ]
)

_AT_ONCE = 1 << 20  # documents

Values = Callable[[Corpus, int], np.ndarray | None]
"""Corpus and shard -> float64 [documents]: the highest stays; None: the first does."""


@dataclasses.dataclass(frozen=True)
class Clusters:
    """Documents that have a duplicate, cluster after cluster, the representative first.

    Attributes:
      library: library of the documents.
      nodes: uint64 [documents].
      text: int64 [documents], equal for equal texts.
      members: ranks and clusters of the documents.
    """

    library: Library
    nodes: np.ndarray
    text: np.ndarray
    members: Ranked

    @classmethod
    def find(cls, phases: Phases, values: Values) -> Clusters:
        """Connect the pairs and rank the members."""
        library = phases.library
        nodes = nodes_of(itertools.chain(phases.equal(), phases.similar()))
        text = components(nodes, phases.equal())
        component = components(nodes, itertools.chain(phases.equal(), phases.similar()))
        own = corpora_of(nodes) == library.own
        value = np.zeros(len(nodes))
        for shard, begin, end in _shards(library, nodes):
            column = values(library.corpora[library.names[-1]].corpus, shard)
            if column is not None:
                value[begin:end] = column[rows_of(doc_ids_of(nodes[begin:end]))]
        members = ranked(component, own.astype(np.int8), value)
        return cls(library, nodes[members.order], text[members.order], members)

    @property
    def _own(self) -> np.ndarray:
        return corpora_of(self.nodes) == self.library.own

    def by_shard(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the documents of the corpus that have a duplicate, `FOUND`, and their shards."""
        at = np.flatnonzero(self._own)
        at = at[np.argsort(self.nodes[at])]
        for begin in range(0, len(at), _AT_ONCE):
            part = at[begin : begin + _AT_ONCE]
            yield self._found(part), shards_of(doc_ids_of(self.nodes[part]))

    def _found(self, at: np.ndarray) -> np.ndarray:
        kept = self.members.head[at]
        found = np.zeros(len(at), FOUND)
        found["row"] = rows_of(doc_ids_of(self.nodes[at]))
        found["duplicate_rank"] = self.members.rank[at]
        found["cluster_documents"] = self.members.size[at]
        found["kept_doc_id"] = doc_ids_of(self.nodes[kept])
        corpus = corpora_of(self.nodes[kept])
        found["kept_corpus"] = np.where(corpus == self.library.own, 0, corpus + 1)
        found["same_text"] = self.text[kept] == self.text[at]
        return found

    def counts(self) -> dict[str, object]:
        """Return counts of the corpus's duplicates, by kind and by the corpora they duplicate."""
        own = self._own
        dropped = own & (self.members.rank > 0)
        same = self.text == self.text[self.members.head]
        cluster = np.cumsum(self.members.rank == 0) - 1
        clusters = int(cluster[-1]) + 1 if len(cluster) else 0
        repeated = {}
        for number, name in enumerate(self.library.names[:-1]):
            has = np.zeros(clusters, bool)
            has[cluster[corpora_of(self.nodes) == number]] = True
            repeated[name] = int(np.count_nonzero(own & has[cluster]))
        with_own = np.zeros(clusters, bool)
        with_own[cluster[own]] = True
        return {
            "duplicates": {
                "same_text": int(np.count_nonzero(dropped & same)),
                "similar": int(np.count_nonzero(dropped & ~same)),
            },
            "clusters": int(with_own.sum()),
            "largest_cluster": int(self.members.size[own].max(initial=0)),
            "repeats_of": repeated,
        }


def _shards(library: Library, nodes: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield the shards of the last corpus that contain some of the nodes, and their positions.

    Args:
      nodes: uint64, ascending.
    """
    count = library.corpora[library.names[-1]].corpus.num_shards
    firsts = [Place(library.own, shard).first for shard in range(count + 1)]
    bounds = np.searchsorted(nodes, np.asarray(firsts, np.uint64)).tolist()
    for shard, (begin, end) in enumerate(itertools.pairwise(bounds)):
        if end > begin:
            yield shard, begin, end
