"""The page on selections: its counts are those of the selections, its names cannot act."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from evaluation import __main__ as commands
from evaluation.report import overlap, overlap_picture, selection_report
from evaluation.report.selection_report import SelectionReportConfig
from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.corpus.sources import JsonlSource
from pruning.selection import select
from pruning.selection.select import SelectConfig
from pruning.selection.strategies import Random
from pruning.store.manifest import ArtifactError

HOSTILE = '<script>alert("x")<|script>\u202e'


@pytest.fixture(scope="module")
def selections(small_corpus, tmp_path_factory) -> dict[str, str]:
    """Name -> directory of random selections, one of them with a hostile name."""
    root = tmp_path_factory.mktemp("selections")
    found = {}
    for name, keep, seed in (("few", 0.2, 0), ("many", 0.6, 0), (HOSTILE, 0.3, 7)):
        found[name] = str(root / f"of-{seed}-{keep}")
        select.run(
            SelectConfig(
                corpus=str(small_corpus),
                output=found[name],
                strategy=Random(),
                keep_tokens=keep,
                seed=seed,
            )
        )
    return found


@pytest.fixture(scope="module")
def described(small_corpus, selections, tmp_path_factory) -> tuple[dict, str, Path]:
    output = tmp_path_factory.mktemp("report")
    config = SelectionReportConfig(str(small_corpus), selections, str(output), groups=2)
    [page] = selection_report.run(config)
    return json.loads((output / "report.json").read_text()), Path(page).read_text(), output


def test_counts_are_those_of_sets(small_corpus, selections, described):
    report = described[0]
    corpus = load_corpus(small_corpus)
    kept = []
    for path in selections.values():
        one = load_selection(path, corpus.artifact)
        kept.append({i for s in range(corpus.num_shards) for i in one.doc_ids(s).tolist()})
    for i, a in enumerate(kept):
        assert report["selections"][i]["documents"] == len(a)
        others = set().union(*(b for j, b in enumerate(kept) if j != i))
        assert report["selections"][i]["alone"] == len(a - others)
        for j, b in enumerate(kept):
            pair = report["pairs"][i][j]
            assert pair["both"] == len(a & b)
            assert pair["jaccard"] == pytest.approx(len(a & b) / len(a | b))
    rows = corpus.artifact.manifest.rows
    assert sum(item["documents"] for item in report["combinations"]) == rows
    assert report["combinations"][0]["documents"] == rows - len(set().union(*kept))
    for group in report["groups"]:
        assert sum(row["documents"] for row in group["rows"]) == rows
        for i, a in enumerate(kept):
            count = sum(row["documents"] * row["shares"][i] for row in group["rows"])
            assert count == pytest.approx(len(a))


def test_tables_hold_every_group_and_pair(described):
    report, _, output = described
    with (output / "retention.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups = sum(len(group["rows"]) for group in report["groups"])
    assert len(rows) == groups * len(report["selections"])
    with (output / "pairs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


def test_names_have_no_effect_on_the_page(described):
    _, page, _ = described
    assert "<script" not in page and "\u202e" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src)\s*=|url\(http|@import", page)
    assert "default-src 'none'" in page


def test_selections_of_another_corpus_are_refused(selections, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one more corpus"}\n')
    source = JsonlSource((str(tmp_path / "a.jsonl"),))
    ingest.run(IngestConfig(source, "bytes", str(tmp_path / "corpus"), workers=1))
    config = SelectionReportConfig(str(tmp_path / "corpus"), selections, str(tmp_path / "out"))
    with pytest.raises(ArtifactError):
        selection_report.run(config)


def test_names_are_the_parts_that_differ(capsys, tmp_path):
    def named(*paths: str) -> list[str]:
        return list(SelectionReportConfig("c", paths, "o").named())

    assert named("runs/a", "runs/b/") == ["a", "b"]
    assert named("runs/a/selection", "runs/b/selection") == ["a/selection", "b/selection"]
    with pytest.raises(ValueError, match="twice"):
        named("runs/a", "runs/a")
    with pytest.raises(ValueError, match="1 to 20"):
        SelectionReportConfig("c", (), "o")
    assert commands.main(["selections", "--recipe=selections", f"--corpus={tmp_path}"]) == 1
    assert "error:" in capsys.readouterr().err


def test_a_directory_given_twice_is_refused_where_it_is_set():
    with pytest.raises(ValueError, match="given twice"):
        SelectionReportConfig(corpus="corpus", selections=("a/b", "a/b"), output="output")


def test_chance_is_the_overlap_of_independent_selections():
    rng = np.random.default_rng(0)
    masks = [rng.uniform(size=200_000) < share for share in (0.2, 0.5)]
    found = overlap.Patterns(["a", "b"])
    found.add(overlap.patterns(masks), np.ones(200_000, np.int64))
    pair = found.pairs()[0][1]
    assert pair["chance"] == pytest.approx(0.1 / 0.6, rel=0.02)
    assert pair["jaccard"] == pytest.approx(pair["chance"], rel=0.02)
    drawing = overlap_picture.drawn(found.kept(), found.intersections(2))
    assert drawing.count("<circle") == 2 * 3  # two selections, three columns
    assert drawing.count("documents kept by none<") == 1 and "none alone" not in drawing


def test_every_input_is_recorded_whatever_selections_are_called(small_corpus, selections, tmp_path):
    few, many = selections["few"], selections["many"]
    named = {"corpus": few, "within": many}
    config = SelectionReportConfig(str(small_corpus), named, str(tmp_path), within=few)
    selection_report.run(config)
    inputs = json.loads((tmp_path / "report.json").read_text())["inputs"]
    assert inputs.keys() == {"corpus", "within", "selection corpus", "selection within"}
    assert inputs["selection corpus"] == inputs["within"] != inputs["selection within"]
    assert {file.suffix for file in tmp_path.glob("kept_by_length.*")} == {".svg", ".png"}
