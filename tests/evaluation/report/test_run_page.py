"""The page of a training run: its numbers are those of the metrics, its names cannot act."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evaluation import report
from evaluation.report import ReportConfig, run_page
from pruning.store.manifest import ArtifactError

pytest.importorskip("matplotlib")
HOSTILE = "<script>alert(1)</script>$\u202e$"


@pytest.fixture
def run(tmp_path) -> Path:
    lines = [
        {"step": step, "kind": "train", "loss": 9 - step / 50, "gradient_norm": 0.1, "tokens": step}
        for step in range(10, 210, 10)
    ]
    for step, loss in ((100, 7.5), (150, 6.25), (200, 6.5)):
        lines.append({"step": step, "kind": "eval", "name": HOSTILE, "loss": loss})
    lines.append({"step": 120, "kind": "event", "event": "loss spike", "loss": 30.0})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 210, "kin')  # killed while writing
    return tmp_path


def test_the_page_tells_what_the_metrics_hold(run):
    (path,) = report.run(ReportConfig(run=str(run)))
    assert path == str(run / "report" / "index.html")
    page = Path(path).read_text()
    assert "200 steps, 200 tokens; not finished." in page
    assert ">6.5</td>" in page and ">6.25</td>" in page and ">150</td>" in page
    assert "step 120: loss spike: loss 30.0" in page
    assert {p.name for p in (run / "report").glob("*.svg")} == {"loss.svg", "gradient_norm.svg"}
    assert page.count('role="img"') == 2
    assert "<script" not in page and "\u202e" not in page


def test_a_single_logged_step_is_drawn(run):
    line = {"step": 5, "kind": "train", "loss": 9.0, "gradient_norm": 0.1, "tokens": 10}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    report.run(ReportConfig(run=str(run)))
    drawn = (run / "report" / "gradient_norm.svg").read_text()
    assert len(re.findall(rf"<use [^>]*fill: {run_page._COLORS[0]}", drawn)) == 1
    assert re.findall(r">(\d+)</text>", drawn) == ["5"]  # the axis has whole steps only


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(ArtifactError, match="holds no training run"):
        run_page.read(tmp_path / "nothing")
    for line in (
        "[]",
        "null",
        '{"step": 1, "kind": 7}',
        '{"step": 1, "kind": "train", "loss": 1.0}',
        '{"step": "x", "kind": "train", "loss": 1.0, "tokens": 1}',
        '{"step": 1, "kind": "train", "loss": 1.0, "tokens": 1e999}',
        '{"step": 1, "kind": "eval", "loss": 1.0}',
        '{"step": 1, "kind": "eval", "name": 7, "loss": 1.0}',
        '{"step": 1, "kind": "event", "step": []}',
        '{"step": %s, "kind": "event"}' % ("9" * 400),
        '{"step": 1, "kind": "train", "loss": %s, "tokens": 1}' % ("9" * 400),
    ):
        (run / "metrics.jsonl").write_text(f"{line}\n")
        with pytest.raises(ArtifactError, match=r"is damaged.*Copy it again"):
            run_page.read(run)
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "foo"}\n')
    with pytest.raises(ArtifactError, match="kind is 'foo'"):
        run_page.read(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="no logged steps yet"):
        run_page.write(run, run / "report")
    with pytest.raises(ValueError, match="set one of study and run"):
        ReportConfig()
