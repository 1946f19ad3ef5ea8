"""CSV tables that are written beside the report, one function per file.

Every function returns the rows of its table, the header first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.report import headline_table, retention
from evaluation.report.comparison import Cell, Sizes
from evaluation.report.results import Results
from evaluation.statistics.rank_agreement import Agreement
from evaluation.statistics.significance import Estimate

Rows = list[list[Any]]


def tables(
    results: Results, cells: Sequence[Cell], agreement: Agreement, sizes: Mapping[str, Sizes]
) -> dict[str, Rows]:
    """Return file name without suffix -> rows. Tables without content are left out."""
    found = {
        "headline": headline(results, cells, sizes),
        "runs": runs(cells),
        "curves": curves(results),
        "agreement": pairs(agreement),
        "retention": retained(results, cells),
        "costs": costs(results),
    }
    if results.tasks:
        found["tasks"] = tasks(results)
    if sizes:
        found["sizes"] = model_sizes(sizes)
    return found


def headline(results: Results, cells: Sequence[Cell], sizes: Mapping[str, Sizes]) -> Rows:
    header = ["sampler", "keep_rate", *_columns("over_scaling")]
    header += ["effective_parameters", "cost_in_trainings"]
    header += [f"perplexity_{item.name}" for item in results.evaluations]
    rows: Rows = [[*header, *results.tasks]]
    for row in headline_table.rows(results, cells, sizes):
        over = row.over_scaling
        rows.append(
            [
                row.cell.sampler,
                row.cell.keep_rate,
                *_values(over),
                row.effective_size.value if row.effective_size else "",
                row.cost if row.cost is not None else "",
                *(found.perplexity for found in row.cell.measures.values()),
                *(row.cell.score(name)[0] for name in results.tasks),
            ]
        )
    return rows


def runs(cells: Sequence[Cell]) -> Rows:
    """Return losses, differences and p-values per cell and evaluation set."""
    header = ["sampler", "keep_rate", "share_kept", "epochs", "evaluation"]
    for name in ("loss", "to_full", "to_random"):
        header += _columns(name)
    header += ["to_full_p", "to_full_p_holm", "to_random_p", "to_random_p_holm"]
    rows: Rows = [[*header, "bits_per_byte", "steps_to_full"]]
    for cell in cells:
        for name, found in cell.measures.items():
            row: list[Any] = [cell.sampler, cell.keep_rate, cell.share_kept, cell.epochs, name]
            for estimate in (found.loss, found.to_full, found.to_random):
                row += _values(estimate)
            for estimate in (found.to_full, found.to_random):
                row += [estimate.p, estimate.adjusted] if estimate else ["", ""]
            rows.append([*row, found.bits_per_byte.value, found.steps_to_full])
    return rows


def curves(results: Results) -> Rows:
    """Return the evaluation losses during training, of the study's own model size."""
    rows: Rows = [["sampler", "keep_rate", "seed", "evaluation", "step", "loss"]]
    for run in results.runs:
        for name, curve in run.curves.items() if not run.size else ():
            rows += [
                [run.sampler, run.keep_rate, run.seed, name, int(step), float(loss)]
                for step, loss in zip(curve.step, curve.loss, strict=True)
            ]
    return rows


def pairs(agreement: Agreement) -> Rows:
    """Return the agreement of every pair of scores."""
    rows: Rows = [["a", "b", "documents", "kendall", "spearman", "overlap"]]
    matrices = (agreement.documents, agreement.kendall, agreement.spearman, agreement.overlap)
    for i, a in enumerate(agreement.names):
        for j, b in enumerate(agreement.names[:i]):
            rows.append([a, b, *(matrix[i, j] for matrix in matrices)])
    return rows


def retained(results: Results, cells: Sequence[Cell]) -> Rows:
    """Return the share of tokens kept by source, domain and length, at every keep-rate."""
    rows: Rows = [["by", "group", "tokens", "sampler", "keep_rate", "share_kept"]]
    for rate in retention.keep_rates(cells):
        for table in retention.tables(results, cells, rate):
            for row in table.rows:
                for cell, share in zip(table.cells, row.shares, strict=True):
                    rows.append(
                        [table.column, row.name, row.tokens, cell.sampler, rate, share.value]
                    )
    return rows


def costs(results: Results) -> Rows:
    rows: Rows = [["work", "cpu_seconds", "flops", "tokens"]]
    rows += [[item.title, item.cpu_seconds, item.flops, item.tokens] for item in results.costs]
    rows += [
        [f"all for {name}", item.cpu_seconds, item.flops, item.tokens]
        for name, item in results.sampler_costs.items()
    ]
    return rows


def tasks(results: Results) -> Rows:
    """Return the score of every run on every task."""
    header = ["sampler", "keep_rate", "seed", "size", "tasks", "task", "score"]
    rows: Rows = [[*header, "answer_log_likelihood"]]
    rows += [
        [
            *(run.sampler, run.keep_rate, run.seed, run.size, name, task, score),
            run.answers.get(name, {}).get(task, ""),
        ]
        for run in results.runs
        for name, scores in run.tasks.items()
        for task, score in scores.items()
    ]
    return rows


def model_sizes(sizes: Mapping[str, Sizes]) -> Rows:
    """Return measured losses per model size, and extrapolated ones with intervals."""
    rows: Rows = [["evaluation", "sampler", "parameters", "loss", "low", "high"]]
    for name, found in sizes.items():
        for sampler, losses in found.losses.items():
            points = zip(found.parameters, losses, strict=True)
            rows += [[name, sampler, n, y, "", ""] for n, y in points if y == y]
        for sampler, estimate in found.predicted.items():
            rows.append([name, sampler, round(found.target), *_values(estimate)])
    return rows


def _columns(name: str) -> list[str]:
    return [name, f"{name}_low", f"{name}_high"]


def _values(estimate: Estimate | None) -> list[Any]:
    return [estimate.value, estimate.low, estimate.high] if estimate else ["", "", ""]
