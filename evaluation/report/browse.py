"""The sample of documents that can be browsed in the page: its data, for page.js.

Choices
- The data are JSON in an inert script element, a column per property: 100,000 documents are read in
  a moment, and nothing of a document is ever parsed as markup. `<`, `>`, `&` and the two line
  separators that old parsers trip over are written as escapes.
- The page's own script is allowed by its hash and no other is (page.py).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from evaluation import shown
from evaluation.plan import FULL
from evaluation.report.results import Results

LEVELS = 10  # of shading


def data(results: Results) -> dict[str, Any]:
    """What page.js reads. Scores have four digits, None where there is none."""
    sample, pool = results.sample, results.pool
    rows = sample.rows
    sources = [str(name or "") for name in pool.source[rows]]
    kinds = sorted(set(sources))
    place = {kind: i for i, kind in enumerate(kinds)}
    titles = {sampler.name: sampler.title for sampler in results.samplers}
    seed = min(seed for _, _, seed in results.kept)
    return {
        "pool": len(pool.doc_id),
        "text": [shown.printable(text) for text in sample.text],
        "cut": _bits(sample.cut),
        "place": [shown.printable(text) for text in sample.place],
        "source": [place[name] for name in sources],
        "sources": [shown.printable(kind) for kind in kinds],
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
    """JSON that can stand in a script element: it holds no character that could end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _bits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values.tolist())


def _digits(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


def _shaded(results: Results) -> dict[str, Any]:
    """Tokens, and how unlikely each was, in tenths of all that are shown; "-": it has no value."""
    tokens = results.sample.tokens
    if not tokens:
        return {}
    every = np.concatenate([values for _, values in tokens.values()])
    every = every[~np.isnan(every)]
    edges = np.quantile(every, np.arange(1, LEVELS) / LEVELS) if len(every) else np.zeros(0)
    return {
        str(row): {
            "pieces": [shown.printable(piece) for piece in pieces],
            "levels": "".join(
                "-" if np.isnan(value) else str(level)
                for value, level in zip(values, np.searchsorted(edges, values), strict=True)
            ),
        }
        for row, (pieces, values) in tokens.items()
    }
