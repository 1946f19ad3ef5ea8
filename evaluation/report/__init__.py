"""The report of a study: one HTML page, with its charts and tables as files beside it.

results.py     what a report is made of
reading.py     reads it from the study's artefacts
comparison.py  losses with intervals, differences, steps to reach
words.py       what the numbers say, in sentences
browse.py      the documents that can be browsed, as data for page.js
charts.py      the numbers as pictures
page.py        all of it as a page
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

NAME = "Report"


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Settings of `report`.

    Attributes:
      study: directory of a study.
      output: directory of the report; <study>/report if not given.
      documents: how many documents of the pool can be browsed in the page. 100,000 make a page of
        about 50 MB, which a browser still handles.
    """

    study: str
    output: str | None = None
    documents: int = 2000


CONFIGURABLES: dict[str, type] = {NAME: ReportConfig}


def run(config: ReportConfig) -> list[str]:
    """Writes the report, and says where it is."""
    from evaluation.report import page, reading

    output = Path(config.output) if config.output else Path(config.study) / "report"
    return [str(page.write(reading.read(config.study, config.documents), output))]
