"""Data of the documents that can be browsed in the page, for page.js.

Choices
- The data are JSON in an inert script element, a column per property. 100,000 documents load in
  about a second, and no part of a document is parsed as markup. `<`, `>`, `&` and the two line
  separators that old parsers do not accept are written as escapes.
- Only the page's own script is allowed, by its hash (page.py).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from evaluation.report import document_text
from evaluation.report.results import Results
from evaluation.study.plan import FULL

LEVELS = 10  # of shading


def data(results: Results) -> dict[str, Any]:
    """Return the data of page.js. Scores have four digits; missing ones are None."""
    sample, pool = results.sample, results.pool
    rows = sample.rows
    sources = [str(name or "") for name in pool.source[rows]]
    kinds = sorted(set(sources))
    place = {kind: i for i, kind in enumerate(kinds)}
    titles = {sampler.name: sampler.title for sampler in results.samplers}
    seed = min(seed for _, _, seed in results.kept)
    return {
        "pool": len(pool.doc_id),
        "text": [document_text.printable(text) for text in sample.text],
        "cut": _bits(sample.cut),
        "place": [document_text.printable(text) for text in sample.place],
        "source": [place[name] for name in sources],
        "sources": [document_text.printable(kind) for kind in kinds],
        "tokens": pool.n_tokens[rows].tolist(),
        "scores": [
            {"title": score.title, "axis": score.axis, "values": _digits(score.values[rows])}
            for score in results.scores
        ],
        "kept": [
            {"title": f"{titles[name]} {rate:.0%}", "in": _bits(kept[rows])}
            for (name, rate, of_seed), kept in results.kept.items()
            if name != FULL and of_seed == seed
        ],
        "shaded": _shaded(results),
    }


def inert(value: Any) -> str:
    """Return JSON without characters that could end a script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _bits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values.tolist())


def _digits(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


def _shaded(results: Results) -> dict[str, Any]:
    """Return tokens with the decile of their surprisal among all shown; "-" for no value."""
    tokens = results.sample.tokens
    if not tokens:
        return {}
    every = np.concatenate([values for _, values in tokens.values()])
    every = every[~np.isnan(every)]
    edges = np.quantile(every, np.arange(1, LEVELS) / LEVELS) if len(every) else np.zeros(0)
    return {
        str(row): {
            "pieces": [document_text.printable(piece) for piece in pieces],
            "levels": "".join(
                "-" if np.isnan(value) else str(level)
                for value, level in zip(values, np.searchsorted(edges, values), strict=True)
            ),
        }
        for row, (pieces, values) in tokens.items()
    }
