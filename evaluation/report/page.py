"""Puts a study's results on one HTML page that needs no network.

Choices
- Texts of the corpus come from the web and are hostile: Jinja escapes everything (only our own SVG
  is passed through), and control characters are shown as marks. The page's policy forbids frames,
  forms, requests of any kind, and every script but page.js, which is allowed by its hash.
- Without scripts, and on paper, all is there but the browsable sample.
- Nothing in the page depends on the clock: the same results give the same bytes.
- Tables stand beside the page as CSV files, charts as SVG and PNG.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import agreement, bootstrap, shown
from evaluation.plan import FULL
from evaluation.report import browse, charts, comparison, words
from evaluation.report.charts import Chart, Palette, Window
from evaluation.report.comparison import Cell, Sizes
from evaluation.report.results import Results, Score
from evaluation.significance import Estimate
from pruning import artefact

_HERE = Path(__file__).parent
_GROUPS_SHOWN = 14
_LENGTHS = (0, 64, 256, 1024, 4096)  # tokens


def write(results: Results, directory: Path) -> Path:
    """Writes the page with its charts and tables, and returns the path of index.html."""
    directory.mkdir(parents=True, exist_ok=True)
    own = [run for run in results.runs if not run.size]
    cells = comparison.compare(own, [item.name for item in results.evaluations])
    sizes = {
        item.name: found
        for item in results.evaluations
        if (found := comparison.sizes(results.runs, item.name, min(_rates(cells), default=1.0)))
    }
    palette = Palette({sampler.name: sampler.title for sampler in results.samplers})
    table = _agreement(results)
    for name, rows in _tables(results, cells, table, sizes).items():
        artefact.write_text(directory / f"{name}.csv", shown.table(rows))
    page = (
        _environment(palette)
        .get_template("page.html")
        .render(_context(results, cells, table, sizes, palette, directory))
    )
    artefact.write_text(directory / "index.html", page)
    return directory / "index.html"


def _context(
    results: Results,
    cells: Sequence[Cell],
    table: agreement.Agreement,
    sizes: Mapping[str, Sizes],
    palette: Palette,
    directory: Path,
) -> dict[str, Any]:
    titles = {sampler.name: sampler.title for sampler in results.samplers}
    script = (_HERE / "page.js").read_text()
    training = results.training_cost
    contents = [("results", "Results"), ("quality", "Quality against data"), ("curves", "Curves")]
    if results.scores:
        contents += [("scores", "Scores"), ("kept", "What was kept"), ("browse", "Browse")]
        contents += [("examples", "Examples")]
    if results.sizes:
        contents.insert(3, ("sizes", "Sizes"))
    contents += [("cost", "Cost"), ("corpus", "Corpus"), ("caveats", "Caveats")]
    contents += [("provenance", "Configuration")]
    return {
        "results": results,
        "cells": cells,
        "titles": titles,
        "best": {item.name: _best(cells, item.name) for item in results.evaluations},
        "headline": words.headline(
            cells,
            results.samplers,
            {s.name: s.title for s in results.scores},
            results.evaluations[0],
        ),
        "cost_sentence": words.cost(results.costs, training),
        "caveats": [*words.caveats(results, cells), *results.caveats],
        "facts": _facts(results, cells),
        "corpus_facts": _corpus_facts(results),
        "dropped": sorted(results.corpus["counts"].get("dropped", {}).items()),
        "contents": contents,
        "charts": _charts(results, cells, table, sizes, palette, directory),
        "sizes": sizes,
        "sizes_words": words.sizes(sizes, titles, results.evaluations) if sizes else [],
        "table1": _table1(results, cells, sizes),
        "agreement": table,
        "retention": _retention(results, cells, min(_rates(cells), default=1.0)),
        "training": training,
        "seeds": max(len(cell.runs) for cell in cells),
        "resamples": bootstrap.RESAMPLES,
        "steps_words": _steps_words,
        "configuration": json.dumps(results.configuration, indent=2, ensure_ascii=False),
        "style": (_HERE / "page.css").read_text(),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "documents": browse.inert(browse.data(results)),
        "version": artefact.code_revision()["version"],
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the headline table, which has the layout of paper A's Table 1."""

    cell: Cell
    over_scaling: Estimate | None  # the mean over evaluation sets
    effective_size: Estimate | None  # on the first of them, in parameters
    cost: float | None  # of scoring and training, in trainings on the full data


def _table1(results: Results, cells: Sequence[Cell], sizes: Mapping[str, Sizes]) -> list[Row]:
    """The full data and every sampler at the smallest keep-rate."""
    rate = min(_rates(cells), default=1.0)
    first = sizes.get(results.evaluations[0].name)
    rows = []
    for cell in cells:
        if not cell.is_full and cell.keep_rate != rate:
            continue
        cost, full = results.sampler_costs.get(cell.sampler), results.training_cost
        rows.append(
            Row(
                cell,
                comparison.mean_over_scaling(list(sizes.values()), cell.sampler),
                first.effective_size.get(cell.sampler) if first else None,
                1 + (cost.flops or 0) / full.flops if cost and full.flops else None,
            )
        )
    return rows


def _best(cells: Sequence[Cell], evaluation: str) -> list[Cell]:
    """The lowest loss of each keep-rate."""
    best: dict[float, Cell] = {}
    for cell in cells:
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


def _rates(cells: Sequence[Cell]) -> list[float]:
    """The keep-rates of the selections, the largest first."""
    return sorted({cell.keep_rate for cell in cells if not cell.is_full}, reverse=True)


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
    table: agreement.Agreement,
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
        for rate in _rates(cells):
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
    """The selections by this score that took all of a stretch of it, and which stretch."""
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
    """The seed whose selections are shown."""
    return min(run.seed for run in results.runs)


def _agreement(results: Results) -> agreement.Agreement:
    columns = {score.title: score.values for score in results.scores}
    columns["Length"] = results.pool.n_tokens.astype(np.float64)
    return agreement.compare(columns, results.pool.doc_id)


# --------------------------------------------------------------------------------------------------
# What was kept


def _retention(results: Results, cells: Sequence[Cell], keep_rate: float) -> list[dict[str, Any]]:
    """Tables of the share of tokens kept, by source, domain and length, at one keep-rate."""
    pool = results.pool
    shown = [cell for cell in cells if not cell.is_full and cell.keep_rate == keep_rate]
    tables = []
    for title, column, groups in (
        ("By kind of text", "Kind", _named_groups(pool.source)),
        ("By package or site", "Package or site", _named_groups(pool.domain, pool.n_tokens)),
        ("By length", "Tokens", _length_groups(pool.n_tokens)),
    ):
        if len(groups) < 2:
            continue
        rows = []
        for name, members in groups:
            tokens = pool.n_tokens[members]
            shares = [
                _shade(_share(results, cell, members, tokens), cell.keep_rate) for cell in shown
            ]
            rows.append({"name": name, "tokens": int(tokens.sum()), "shares": shares})
        tables.append({"title": title, "column": column, "cells": shown, "rows": rows})
    return tables


def _share(results: Results, cell: Cell, members: np.ndarray, tokens: np.ndarray) -> float:
    kept = [results.kept[run.sampler, run.keep_rate, run.seed][members] for run in cell.runs]
    return float(np.mean([tokens[mask].sum() for mask in kept]) / max(tokens.sum(), 1))


def _shade(share: float, keep_rate: float) -> tuple[float, int, str]:
    """The share, how strongly and in which colour it is marked: by its ratio to the rate."""
    ratio = np.log2(max(share, 1e-3) / keep_rate)
    return share, round(min(abs(ratio) / 2, 1) * 55), "more" if ratio > 0 else "less"


def _named_groups(
    names: np.ndarray, n_tokens: np.ndarray | None = None
) -> list[tuple[str, np.ndarray]]:
    """The largest groups of equal names, and all others together: (name, rows)."""
    labels = np.asarray(["(none)" if name is None else str(name) for name in names], dtype=object)
    values, codes = np.unique(labels.astype(str), return_inverse=True)
    weights = np.bincount(codes, weights=n_tokens, minlength=len(values))
    order = np.argsort(-weights, kind="stable")
    groups = [(str(values[i]), np.flatnonzero(codes == i)) for i in order[:_GROUPS_SHOWN]]
    if rest := order[_GROUPS_SHOWN:].tolist():
        groups.append((f"{len(rest):,} others", np.flatnonzero(np.isin(codes, rest))))
    return groups


def _length_groups(n_tokens: np.ndarray) -> list[tuple[str, np.ndarray]]:
    place = np.digitize(n_tokens, _LENGTHS) - 1
    names = [f"{a:,} to {b - 1:,}" for a, b in itertools.pairwise(_LENGTHS)]
    names.append(f"{_LENGTHS[-1]:,} and more")
    groups = [(name, np.flatnonzero(place == i)) for i, name in enumerate(names)]
    return [(name, rows) for name, rows in groups if len(rows)]


# --------------------------------------------------------------------------------------------------
# Files


def _tables(
    results: Results,
    cells: Sequence[Cell],
    table: agreement.Agreement,
    sizes: Mapping[str, Sizes],
) -> dict[str, list[list[Any]]]:
    """Name of a CSV file -> its rows, the first one the header."""
    runs: list[list[Any]] = [["sampler", "keep_rate", "share_kept", "epochs", "evaluation"]]
    for name in ("loss", "to_full", "to_random"):
        runs[0] += [name, f"{name}_low", f"{name}_high"]
    runs[0] += ["to_full_p", "to_full_p_holm", "to_random_p", "to_random_p_holm"]
    runs[0] += ["bits_per_byte", "steps_to_full"]
    for cell in cells:
        for name, found in cell.measures.items():
            row: list[Any] = [cell.sampler, cell.keep_rate, cell.share_kept, cell.epochs, name]
            for estimate in (found.loss, found.to_full, found.to_random):
                row += [estimate.value, estimate.low, estimate.high] if estimate else ["", "", ""]
            for estimate in (found.to_full, found.to_random):
                row += [estimate.p, estimate.adjusted] if estimate else ["", ""]
            runs.append([*row, found.bits_per_byte.value, found.steps_to_full])
    curves: list[list[Any]] = [["sampler", "keep_rate", "seed", "evaluation", "step", "loss"]]
    for run in results.runs:
        if run.size:
            continue
        for name, curve in run.curves.items():
            for step, loss in zip(curve.step, curve.loss, strict=True):
                curves.append([run.sampler, run.keep_rate, run.seed, name, int(step), float(loss)])
    pairs: list[list[Any]] = [["a", "b", "documents", "kendall", "spearman", "overlap"]]
    for i, a in enumerate(table.names):
        for j, b in enumerate(table.names[:i]):
            values = (
                m[i, j] for m in (table.documents, table.kendall, table.spearman, table.overlap)
            )
            pairs.append([a, b, *values])
    retention: list[list[Any]] = [["by", "group", "tokens", "sampler", "keep_rate", "share_kept"]]
    for rate in _rates(cells):
        for part in _retention(results, cells, rate):
            for row in part["rows"]:
                for cell, (share, *_) in zip(part["cells"], row["shares"], strict=True):
                    group = [part["column"], row["name"], row["tokens"]]
                    retention.append([*group, cell.sampler, rate, share])
    costs: list[list[Any]] = [["work", "cpu_seconds", "flops", "tokens"]]
    costs += [[item.title, item.cpu_seconds, item.flops, item.tokens] for item in results.costs]
    costs += [
        [f"all for {name}", item.cpu_seconds, item.flops, item.tokens]
        for name, item in results.sampler_costs.items()
    ]
    headline: list[list[Any]] = [
        ["sampler", "keep_rate", "over_scaling", "over_scaling_low", "over_scaling_high"]
    ]
    headline[0] += ["effective_parameters", "cost_in_trainings"]
    headline[0] += [f"perplexity_{item.name}" for item in results.evaluations]
    headline[0] += list(results.tasks)
    for line in _table1(results, cells, sizes):
        over = line.over_scaling
        headline.append(
            [
                line.cell.sampler,
                line.cell.keep_rate,
                *((over.value, over.low, over.high) if over else ("", "", "")),
                line.effective_size.value if line.effective_size else "",
                line.cost if line.cost is not None else "",
                *(found.perplexity for found in line.cell.measures.values()),
                *(line.cell.score(name)[0] for name in results.tasks),
            ]
        )
    others: list[list[Any]] = [["evaluation", "sampler", "parameters", "loss", "low", "high"]]
    for name, of_sizes in sizes.items():
        for sampler, losses in of_sizes.losses.items():
            points = zip(of_sizes.parameters, losses, strict=True)
            others += [[name, sampler, n, y, "", ""] for n, y in points if y == y]
        for sampler, estimate in of_sizes.predicted.items():
            ends = [estimate.value, estimate.low, estimate.high]
            others.append([name, sampler, round(of_sizes.target), *ends])
    tasks: list[list[Any]] = [["sampler", "keep_rate", "seed", "size", "tasks", "task", "score"]]
    tasks += [
        [run.sampler, run.keep_rate, run.seed, run.size, name, task, score]
        for run in results.runs
        for name, scores in run.tasks.items()
        for task, score in scores.items()
    ]
    return {
        "headline": headline,
        **({"tasks": tasks} if results.tasks else {}),
        **({"sizes": others} if sizes else {}),
        "runs": runs,
        "curves": curves,
        "agreement": pairs,
        "retention": retention,
        "costs": costs,
    }


# --------------------------------------------------------------------------------------------------
# The template's words


def _environment(palette: Palette) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "count": lambda number: f"{number:,}",
        "percent": lambda share: f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}",
        "signed": lambda value: f"{value:+.3f}".replace("-", "−"),
        "flops": lambda value: f"{value:.2g}",
        "size": lambda value: f"{value / 1e6:.2f}M" if np.isfinite(value) else "∞",
        "printable": shown.printable,
    }
    environment.globals["marker"] = lambda sampler: _marker(palette, sampler)
    return environment


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
    """The line and marker of a sampler, as they are in the charts."""
    import markupsafe

    if sampler == FULL:
        line = '<path d="M1 6h18" stroke="currentColor" stroke-width="1.6" stroke-dasharray="4 3"/>'
        return markupsafe.Markup(line)
    colour = palette.colour(sampler)
    return markupsafe.Markup(
        f'<g fill="{colour}"><path d="M0 6h20" stroke="{colour}" stroke-width="1.6"/>'
        f"{_SHAPES[palette.marker(sampler)]}</g>"
    )
