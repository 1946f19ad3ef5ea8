"""Random samples of the texts in files of JSON lines, which models of text are fitted to.

A draw is a hash of the content and the seed, so that which texts are drawn depends neither on the
order of the files nor on how they are divided. While files are read, a few times the size of the
sample is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pruning.corpus.sources.document import Document, SourceError, lookup
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.scores.content import content_hashes
from pruning.store import randomness
from pruning.store.randomness import Stream

HELD = 4  # times the size of a sample: so many texts are in memory while files are read


def hashes_of(texts: list[str]) -> np.ndarray:
    """Return the content hashes of strings, int64 [n]."""
    return content_hashes(pa.array(texts, pa.large_string()))


def lowest(draws: np.ndarray, most: int) -> np.ndarray:
    """Return the places of the `most` lowest draws [n], int64, ascending."""
    return np.sort(np.argsort(draws, kind="stable")[:most])


def read(
    files: Sequence[str], text_field: str, most: int, seed: int, score_field: str | None = None
) -> tuple[list[str], np.ndarray]:
    """Return a random sample of distinct texts of some files, and the numbers of a field.

    Returns:
      At most `most` texts; float64 of the same length, zeros without a `score_field`. Lines without
      text or score are left out.

    Raises:
      SourceError: there are fewer than two texts, or a score is no number.
    """
    source = JsonlSource(tuple(files), text_field)
    found: dict[str, float] = {}
    for file in source.files():
        fields = [score_field] if score_field else []
        for item in source.read(file, fields, lambda size: None):
            if not isinstance(item, Document) or not item.text.strip():
                continue
            number = lookup(item.fields, score_field) if score_field else "0"
            if number is None:
                continue
            found[item.text] = _finite(number, f"{file}: {score_field}")
            if len(found) >= HELD * most:
                found = _sampled(found, most, seed)
    if len(found) < 2:
        raise SourceError(
            f"{', '.join(files)} hold {len(found)} texts under {text_field!r}"
            f"{f' with {score_field!r}' if score_field else ''}: look at Quality.text_field and "
            "score_field."
        )
    found = _sampled(found, most, seed)
    return list(found), np.array(list(found.values()))


def _finite(number: str, where: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SourceError(f"{where} is {number!r}, not a finite number.")
    return value


def _sampled(found: dict[str, float], most: int, seed: int) -> dict[str, float]:
    """Return the texts with the lowest draws, in their order."""
    texts = list(found)
    rows = lowest(randomness.hashed(Stream.QUALITY_SAMPLE, seed, hashes_of(texts)), most)
    return {texts[row]: found[texts[row]] for row in rows}
