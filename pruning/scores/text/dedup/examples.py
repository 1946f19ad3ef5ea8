"""Example clusters for inspection: the largest ones, and as many drawn from the others.

clusters.parquet    a row per document: cluster, its size, rank, corpus, doc_id, start of the text
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruning.corpus.layout import rows_of
from pruning.scores.text.dedup.clusters import Clusters
from pruning.scores.text.dedup.library import Library, Place, corpora_of, doc_ids_of
from pruning.store import randomness
from pruning.store.randomness import Stream

FILE = "clusters.parquet"
_MEMBERS = 5  # largest number of members shown of a cluster
_CHARACTERS = 400

_SCHEMA = pa.schema(
    [
        ("cluster", pa.int32()),
        ("cluster_documents", pa.int32()),
        ("duplicate_rank", pa.int32()),
        ("corpus", pa.string()),
        ("doc_id", pa.int64()),
        ("text", pa.large_string()),
    ]
)


def to_parquet(clusters: Clusters, count: int) -> bytes:
    """Return the content of clusters.parquet.

    Args:
      count: number of the largest clusters, and of the others.
    """
    chosen = _chosen(clusters, count)
    at = np.concatenate(
        [np.zeros(0, np.int64)]
        + [np.arange(head, head + min(clusters.members.size[head], _MEMBERS)) for head in chosen]
    )
    nodes = clusters.nodes[at]
    names = clusters.library.names
    columns = {
        "cluster": np.repeat(
            np.arange(len(chosen)), np.minimum(clusters.members.size[chosen], _MEMBERS)
        ),
        "cluster_documents": clusters.members.size[at],
        "duplicate_rank": clusters.members.rank[at],
        "corpus": [names[number] for number in corpora_of(nodes).tolist()],
        "doc_id": doc_ids_of(nodes),
        "text": _beginnings(clusters.library, nodes),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def _chosen(clusters: Clusters, count: int) -> np.ndarray:
    """Return the indices of the first members of the chosen clusters, int64."""
    heads = np.flatnonzero(clusters.members.rank == 0)
    heads = heads[np.argsort(-clusters.members.size[heads], kind="stable")]
    rest = heads[count:]
    draws = randomness.hashed(Stream.DUPLICATE_EXAMPLE, 0, clusters.nodes[rest].astype(np.int64))
    return np.concatenate([heads[:count], rest[np.argsort(draws, kind="stable")[:count]]])


def _beginnings(library: Library, nodes: np.ndarray) -> list[str]:
    """Return the starts of the nodes' texts, reading only their row groups."""
    found: dict[int, str] = {}
    places = [Place(int(n >> 56), int(n >> 32) & 0xFF_FFFF) for n in nodes.tolist()]
    for place in sorted(set(places), key=lambda place: place.first):
        mine = np.asarray([n for n, p in zip(nodes.tolist(), places, strict=True) if p == place])
        rows = rows_of(doc_ids_of(mine.astype(np.uint64)))
        with library.texts(place).corpus.artifact.parquet(place.shard) as file:
            starts = np.cumsum([0, *file.row_group_sizes()])[:-1]
            group_of = np.searchsorted(starts, rows, side="right") - 1
            for group in np.unique(group_of).tolist():
                column = file.read_row_groups([group], ["text"], use_threads=False)["text"]
                for i in np.flatnonzero(group_of == group).tolist():
                    text = column[int(rows[i] - starts[group])].as_py()
                    found[int(mine[i])] = text[:_CHARACTERS]
    return [found[node] for node in nodes.tolist()]
