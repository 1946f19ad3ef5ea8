"""Texts of documents for reports, with control characters replaced, and CSV tables.

Choices
- Texts come from the web and are hostile. Templates escape markup. Here, characters that change how
  their neighbors are shown are replaced by marks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pruning.corpus.layout import rows_of, shards_of
from pruning.store.artifact import Artifact

# Harmless, but not printable by isprintable(): spaces of all widths.
_SPACES = frozenset("\u00a0\u2002\u2003\u2009\u200a\u202f\u3000")


def documents(corpus: Artifact, doc_ids: np.ndarray) -> dict[int, dict[str, str]]:
    """Read text and address of some documents, by doc_id; only their row groups are read."""
    found: dict[int, dict[str, str]] = {}
    for shard in np.unique(shards_of(doc_ids)).tolist():
        wanted = doc_ids[shards_of(doc_ids) == shard]
        with corpus.parquet(shard) as file:
            columns = [
                name for name in ("doc_id", "text", "url") if name in file.schema_arrow.names
            ]
            groups = np.searchsorted(
                np.cumsum(file.row_group_sizes()), rows_of(wanted), side="right"
            )
            for group in np.unique(groups).tolist():
                table = file.read_row_groups([group], columns)
                mask = pc.is_in(table["doc_id"], pa.array(wanted))
                found |= {row["doc_id"]: row for row in table.filter(mask).to_pylist()}
    return found


def printable(text: str) -> str:
    """Return text with control and bidirectional characters replaced; newlines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or character.isprintable() or character in _SPACES
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as a CSV file, the header first."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(rows)
    return sink.getvalue()
