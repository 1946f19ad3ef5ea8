"""The report of a study, or of a training run: one HTML page, with its charts as files beside it.

results.py         results of a study as records
reading.py         reader of the study's artifacts
comparison.py      losses with intervals, differences, steps to a loss
floors.py          n-gram models that every model has to beat
sentences.py       sentences of the page
charts.py          figures
tables.py          CSV files
sample_data.py     documents that can be browsed, as data for page.js
templates.py       rendering of the pages, all from base.html
page.py            the page of a study
score_report.py    the page of `evaluation scores`
run_page.py        the page of a training run
selection_report.py  the page of `evaluation selections`; overlap.py, overlap_picture.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pruning.store import progress

NAME = "Report"


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Settings of `report`.

    Attributes:
      study: directory of a study.
      run: directory of a training run, in place of a study.
      output: directory of the report; "report" in that of the study or run if not given.
      documents: number of documents of the pool that can be browsed in the page. 100,000 make a
        page of about 50 MB, which a browser still handles.
    """

    study: str | None = None
    output: str | None = None
    documents: int = 2000
    run: str | None = None

    def __post_init__(self) -> None:
        if (self.study is None) == (self.run is None):
            raise ValueError("set one of study and run.")


CONFIGURABLES: dict[str, type] = {NAME: ReportConfig}


def run(config: ReportConfig) -> list[str]:
    """Write the report and return its path."""
    of = config.study or config.run
    assert of is not None
    output = Path(config.output) if config.output else Path(of) / "report"
    with progress.Phase(f"report: reading {of}"):
        if config.run is not None:
            from evaluation.report import run_page

            return [str(run_page.write(Path(config.run), output))]
        from evaluation.report import page, reading

        return [str(page.write(reading.read(of, config.documents), output))]
