"""Rows of the headline table, in the layout of Table 1 of Sachdeva et al. (2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from evaluation.report import comparison
from evaluation.report.comparison import Cell, Sizes
from evaluation.report.results import Results
from evaluation.report.retention import keep_rates
from evaluation.statistics.significance import Estimate


@dataclasses.dataclass(frozen=True)
class Row:
    """A selection, and its measures in the headline table.

    Attributes:
      over_scaling: mean over evaluation sets.
      effective_size: on the first evaluation set, in parameters.
      cost: FLOPs of scoring and one training, in trainings on the full data.
    """

    cell: Cell
    over_scaling: Estimate | None
    effective_size: Estimate | None
    cost: float | None


def rows(results: Results, cells: Sequence[Cell], sizes: Mapping[str, Sizes]) -> list[Row]:
    """Return the full data and every sampler at the smallest keep-rate."""
    rate = min(keep_rates(cells), default=1.0)
    first = sizes.get(results.evaluations[0].name)
    over_scaling = comparison.mean_over_scaling(list(sizes.values()))
    found = []
    for cell in cells:
        if not cell.is_full and cell.keep_rate != rate:
            continue
        cost, full = results.sampler_costs.get(cell.sampler), results.training_cost
        found.append(
            Row(
                cell,
                over_scaling.get(cell.sampler),
                first.effective_size.get(cell.sampler) if first else None,
                1 + (cost.flops or 0) / full.flops if cost and full.flops else None,
            )
        )
    return found
