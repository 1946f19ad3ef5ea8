"""Report page: a study's results as one HTML page that needs no network.

Choices
- Texts of the corpus come from the web and are hostile. Jinja escapes everything but our own SVG,
  and control characters are shown as marks. The page's policy forbids frames, forms, requests of
  any kind, and every script but page.js, which is allowed by its hash.
- Without scripts, and in print, only the browsable sample is missing.
- Nothing in the page depends on the clock: the same results give the same bytes.
- Tables stand beside the page as CSV files, charts as SVG and PNG.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.report import (
    charts,
    comparison,
    document_text,
    headline_table,
    retention,
    sample_data,
    sentences,
    tables,
    templates,
)
from evaluation.report.charts import Chart, Palette, Window
from evaluation.report.comparison import Cell, Noise, Sizes
from evaluation.report.results import Results, Score
from evaluation.report.retention import keep_rates
from evaluation.statistics import bootstrap, rank_agreement
from evaluation.study.plan import FULL
from pruning.store.atomic import write_text
from pruning.store.manifest import code_revision


def write(results: Results, directory: Path) -> Path:
    """Write the page with its charts and tables, and return the path of index.html."""
    directory.mkdir(parents=True, exist_ok=True)
    own = [run for run in results.runs if not run.size]
    names = [item.name for item in results.evaluations]
    cells = comparison.compare(own, names, results.floors)
    noises = {name: comparison.noise(own, name) for name in names}
    sizes = {
        item.name: found
        for item in results.evaluations
        if (found := comparison.sizes(results.runs, item.name, min(keep_rates(cells), default=1.0)))
    }
    palette = Palette({sampler.name: sampler.title for sampler in results.samplers})
    table = _agreement(results)
    for name, rows in tables.tables(results, cells, table, sizes).items():
        write_text(directory / f"{name}.csv", document_text.table(rows))
    context = _context(results, cells, noises, table, sizes, palette, directory)
    write_text(directory / "index.html", templates.render("page.html", _FILTERS, **context))
    return directory / "index.html"


def _context(
    results: Results,
    cells: Sequence[Cell],
    noises: Mapping[str, Noise | None],
    table: rank_agreement.Agreement,
    sizes: Mapping[str, Sizes],
    palette: Palette,
    directory: Path,
) -> dict[str, Any]:
    titles = {sampler.name: sampler.title for sampler in results.samplers}
    script = (templates.HERE / "page.js").read_text(encoding="utf-8")
    training = results.training_cost
    first = results.evaluations[0]
    contents = [("results", "Results"), ("quality", "Quality against data"), ("curves", "Curves")]
    if results.scores:
        contents += [("scores", "Scores"), ("kept", "What was kept"), ("browse", "Browse")]
        contents += [("examples", "Examples")]
    if results.sizes:
        contents.insert(3, ("sizes", "Sizes"))
    if results.cascades:
        contents += [("cascades", "Cascades")]
    contents += [("cost", "Cost"), ("corpus", "Corpus"), ("caveats", "Caveats")]
    contents += [("provenance", "Configuration")]
    return {
        "results": results,
        "cells": cells,
        "titles": titles,
        "best": {item.name: _best(cells, item.name) for item in results.evaluations},
        "headline": sentences.headline(
            cells,
            results.samplers,
            {s.name: s.title for s in results.scores},
            first,
        ),
        "noises": noises,
        "certainty": sentences.certainty(cells, noises[first.name]),
        "floor": sentences.floor(cells, results.floors[first.name], first),
        "cost_sentence": sentences.cost(results.costs, training),
        "caveats": [*sentences.caveats(results, cells, noises), *results.caveats],
        "facts": _facts(results, cells),
        "corpus_facts": _corpus_facts(results),
        "dropped": sorted(results.corpus["counts"].get("dropped", {}).items()),
        "contents": contents,
        "charts": _charts(results, cells, table, sizes, palette, directory),
        "sizes": sizes,
        "sizes_words": sentences.sizes(sizes, titles, results.evaluations) if sizes else [],
        "headline_rows": headline_table.rows(results, cells, sizes),
        "agreement": table,
        "explained": _explained(results, table),
        "retention": retention.tables(results, cells, min(keep_rates(cells), default=1.0)),
        "training": training,
        "seeds": max(len(cell.runs) for cell in cells),
        "resamples": bootstrap.RESAMPLES,
        "steps_words": _steps_words,
        "configuration": json.dumps(results.configuration, indent=2, ensure_ascii=False),
        "marker": lambda sampler: _marker(palette, sampler),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "documents": sample_data.inert(sample_data.data(results)),
        "version": code_revision()["version"],
    }


def _best(cells: Sequence[Cell], evaluation: str) -> list[Cell]:
    """Return the tested cell with the lowest loss at each keep-rate."""
    best: dict[float, Cell] = {}
    for cell in cells:
        found = cell.measures[evaluation]
        if not any(d and d.p is not None for d in (found.to_full, found.to_random)):
            continue
        rival = best.get(cell.keep_rate)
        loss = cell.measures[evaluation].loss.value
        if rival is None or loss < rival.measures[evaluation].loss.value:
            best[cell.keep_rate] = cell
    return [cell for cell in best.values() if not cell.is_full]


def _facts(results: Results, cells: Sequence[Cell]) -> list[tuple[str, str]]:
    run = results.runs[0]
    pool_tokens = int(results.pool.n_tokens.sum())
    return [
        ("Corpus", f"{results.corpus['rows']:,} documents, {results.corpus['tokens']:,} tokens"),
        ("Pool to select from", f"{len(results.pool.doc_id):,} documents, {pool_tokens:,} tokens"),
        ("Each model", f"{run.parameters / 1e6:.1f}M parameters, {run.steps:,} steps"),
        ("Models trained", f"{len(results.runs)} in {len(cells)} cells"),
    ]


def _corpus_facts(results: Results) -> list[tuple[str, str]]:
    corpus, tokens = results.corpus, results.pool.n_tokens
    vocabulary = corpus["summary"]["vocabulary"]
    n_bytes = corpus["summary"].get("bytes", 0)
    quantiles = np.quantile(tokens, [0.1, 0.5, 0.9]) if len(tokens) else [0, 0, 0]
    return [
        ("Documents", f"{corpus['rows']:,}"),
        ("Tokens", f"{corpus['tokens']:,}"),
        ("Bytes of text", f"{n_bytes:,}"),
        ("Bytes per token", f"{n_bytes / max(corpus['tokens'], 1):.2f}"),
        ("Vocabulary", f"{vocabulary['kind']}, {vocabulary['size']:,} ids"),
        ("Tokens of a document, 10% / half / 90%", " / ".join(f"{q:,.0f}" for q in quantiles)),
    ]


def _steps_words(cell: Cell, evaluation: str) -> str:
    if cell.is_full:
        return "–"
    steps = cell.measures[evaluation].steps_to_full
    if steps is None:
        return "not reached"
    fewer = 1 - steps / cell.runs[0].steps
    return f"{steps:,.0f} ({fewer:.0%} fewer)" if fewer >= 0.005 else f"{steps:,.0f}"


# --------------------------------------------------------------------------------------------------
# Charts


def _charts(
    results: Results,
    cells: Sequence[Cell],
    table: rank_agreement.Agreement,
    sizes: Mapping[str, Sizes],
    palette: Palette,
    directory: Path,
) -> dict[str, list[Chart]]:
    def drawn(name: str, description: str, paint: Callable[[Any], None], **size: float) -> Chart:
        return charts.draw(name, description, directory, paint, **size)

    def label(cell: Cell) -> str:
        return f"{palette.titles[cell.sampler]} {cell.keep_rate:.0%}"

    rows = sum(not cell.is_full for cell in cells)
    found: dict[str, list[Chart]] = {"quality": [], "differences": [], "curves": []}
    for item in results.evaluations:
        found["quality"].append(
            drawn(
                f"quality-{item.name}",
                f"Loss on {item.title}",
                charts.quality(cells, item.name, palette),
            )
        )
        found["differences"].append(
            drawn(
                f"differences-{item.name}",
                f"Difference to the full data on {item.title}",
                charts.differences(cells, item.name, palette, label),
                height=0.7 + 0.21 * rows,
            )
        )
        for rate in keep_rates(cells):
            found["curves"].append(
                drawn(
                    f"curves-{item.name}-{rate:g}",
                    f"Keeping {rate:.0%}: loss on {item.title}",
                    charts.curves(cells, item.name, rate, palette),
                )
            )
    found["sizes"] = [
        drawn(
            f"sizes-{item.name}", f"Loss on {item.title}", charts.sizes(sizes[item.name], palette)
        )
        for item in results.evaluations
        if item.name in sizes
    ]
    found["histograms"] = []
    for score in results.scores:
        windows = _windows(results, score, palette)
        paint = charts.histogram(score.values[~np.isnan(score.values)], score.axis, windows)
        height = 2.6 + 0.2 * len(windows)
        found["histograms"].append(
            drawn(f"histogram-{score.name}", score.title, paint, height=height)
        )
    size = 1.7 + 0.5 * len(table.names)
    found["agreement"] = [
        drawn(f"agreement-{name}", title, charts.matrix(values, table.names, low), height=size)
        for name, title, values, low in charts.agreement_panels(table)
    ]
    return found


def _windows(results: Results, score: Score, palette: Palette) -> list[Window]:
    """Return the intervals of a score that selections kept as a whole."""
    windows = []
    for sampler in results.samplers:
        for run in results.runs:
            shown = run.sampler == sampler.name and run.seed == _seed(results)
            if sampler.scorer != score.name or run.size or not shown:
                continue
            kept = results.kept[run.sampler, run.keep_rate, run.seed]
            low, high = np.nanquantile(score.values[kept], [0, 1])
            inside = (score.values >= low) & (score.values <= high)
            if kept[inside].mean() > 0.99:
                label = f"{sampler.title} {run.keep_rate:.0%}"
                windows.append(Window(label, low, high, palette.colour(sampler.name)))
    return windows


def _seed(results: Results) -> int:
    """Return the seed whose selections are shown."""
    return min(run.seed for run in results.runs)


def _explained(results: Results, table: rank_agreement.Agreement) -> list[tuple[str, float, float]]:
    """Return per score its Spearman correlations with unigram surprisal and with length."""
    place = {name: i for i, name in enumerate(table.names)}
    by_score = [(score.title, table.spearman[place[score.title]]) for score in results.scores]
    return [(t, row[place["Unigram surprisal"]], row[place["Length"]]) for t, row in by_score]


def _agreement(results: Results) -> rank_agreement.Agreement:
    columns = {score.title: score.values for score in results.scores}
    columns["Unigram surprisal"] = results.pool.surprisal
    columns["Length"] = results.pool.n_tokens.astype(np.float64)
    return rank_agreement.compare(columns, results.pool.doc_id)


# --------------------------------------------------------------------------------------------------
# The template's words


_FILTERS = {
    "percent": lambda share: f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}",
    "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
    "flops": lambda value: f"{value:.2g}",
    "rho": lambda value: "–" if np.isnan(value) else f"{value:+.2f}".replace("-", "−"),
    "size": lambda value: f"{value / 1e6:.2f}M" if np.isfinite(value) else "∞",
}


_SHAPES = {
    "o": '<circle cx="10" cy="6" r="3.4"/>',
    "s": '<rect x="7" y="3" width="6" height="6"/>',
    "D": '<path d="M10 1.8 14.2 6 10 10.2 5.8 6z"/>',
    "^": '<path d="M10 2 14 9.4H6z"/>',
    "v": '<path d="M10 10 14 2.6H6z"/>',
    "P": '<path d="M8.4 2h3.2v2.4H14v3.2h-2.4V10H8.4V7.6H6V4.4h2.4z"/>',
    "X": '<path d="M6.2 4 8 2.2l2 2 2-2L13.800 4l-2 2 2 2L12 9.800l-2-2-2 2L6.200 8l2-2z"/>',
    "<": '<path d="M6 6 13.400 2v8z"/>',
}


def _marker(palette: Palette, sampler: str) -> Any:
    """Return the line and marker of a sampler as SVG, as in the charts."""
    import markupsafe

    if sampler == FULL:
        line = '<path d="M1 6h18" stroke="currentColor" stroke-width="1.6" stroke-dasharray="4 3"/>'
        return markupsafe.Markup(line)
    colour = palette.colour(sampler)
    return markupsafe.Markup(
        f'<g fill="{colour}"><path d="M0 6h20" stroke="{colour}" stroke-width="1.6"/>'
        f"{_SHAPES[palette.marker(sampler)]}</g>"
    )
