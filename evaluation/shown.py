"""What reports show: texts of documents, made harmless, and tables as CSV.

Choices
- Texts come from the web and are hostile. Escaping is the template's; what is left are characters
  that change how the ones around them are shown: these become marks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pruning.artefact import Artefact
from pruning.corpus import rows_of, shards_of

# What isprintable() refuses though it harms nobody: spaces of all widths.
_SPACES = frozenset("\u00a0\u2002\u2003\u2009\u200a\u202f\u3000")


def documents(corpus: Artefact, doc_ids: np.ndarray) -> dict[int, dict[str, str]]:
    """Text and address of some documents, by doc_id; reads the row groups that hold them."""
    found: dict[int, dict[str, str]] = {}
    for shard in np.unique(shards_of(doc_ids)).tolist():
        wanted = doc_ids[shards_of(doc_ids) == shard]
        with corpus.parquet(shard) as file:
            columns = [
                name for name in ("doc_id", "text", "url") if name in file.schema_arrow.names
            ]
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            groups = np.searchsorted(np.cumsum(sizes), rows_of(wanted), side="right")
            for group in np.unique(groups).tolist():
                table = file.read_row_group(group, columns=columns)
                mask = pc.is_in(table["doc_id"], pa.array(wanted))
                found |= {row["doc_id"]: row for row in table.filter(mask).to_pylist()}
    return found


def printable(text: str) -> str:
    """Text in which control and direction-changing characters are marks; lines and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or character.isprintable() or character in _SPACES
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def table(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as a CSV file, the first one its header."""
    sink = io.StringIO()
    csv.writer(sink, lineterminator="\n").writerows(rows)
    return sink.getvalue()
