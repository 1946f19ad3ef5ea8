"""The report on score sets: its numbers are those of the scores, its texts cannot act."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from evaluation import score_report
from evaluation.score_report import ScoreReportConfig, deciles
from pruning import artefact
from pruning.artefact import ArtefactError


@pytest.fixture(scope="module")
def scored(small_corpus, tmp_path_factory) -> Path:
    """Two score sets: one goes with the length, the other has no value for every fifth document."""
    root = tmp_path_factory.mktemp("scored")
    corpus = artefact.load(small_corpus, "corpus")
    rng = np.random.default_rng(0)
    word = pa.dictionary(pa.int8(), pa.string())
    for name in ("longest", "taste"):
        schema = pa.schema([("doc_id", pa.int64()), ("status", word), (name, pa.float32())])
        build = artefact.Build(
            root / name, "scores", {"of": name}, {"corpus": corpus}, corpus.num_shards, schema
        )
        for shard in range(corpus.num_shards):
            table = corpus.read(shard, ["doc_id", "n_tokens"])
            values = table["n_tokens"].to_numpy().astype(np.float32)
            missing = np.arange(len(values)) % 5 == 0
            if name == "taste":
                values = rng.standard_normal(len(values)).astype(np.float32)
            else:
                missing[:] = False
            status = pa.array(np.where(missing, "too_short", "ok")).cast(word)
            with build.shard(shard) as writer:
                columns = {"doc_id": table["doc_id"], "status": status}
                writer.write(columns | {name: pa.array(values, mask=missing)})
        build.finish()
    return root


def config_of(corpus: Path, scored: Path, **settings) -> ScoreReportConfig:
    names = {"longest": "column:longest", "shortest": "-column:longest", "taste": "column:taste"}
    sets = {"longest": "longest", "shortest": "longest", "taste": "taste"}
    return ScoreReportConfig(
        corpus=str(corpus),
        scores={name: str(scored / place) for name, place in sets.items()},
        values=names,
        output=str(scored / "report"),
        **settings,
    )


@pytest.fixture(scope="module")
def report(small_corpus, scored) -> dict:
    [page] = score_report.run(config_of(small_corpus, scored))
    return json.loads(Path(page).with_name("report.json").read_text())


def test_length_and_its_reverse_show_as_such(report):
    longest, shortest, taste = report["scores"]
    assert longest["length"]["spearman"] == pytest.approx(1)
    assert shortest["length"]["kendall"] == pytest.approx(-1)
    assert abs(taste["length"]["spearman"]) < 0.6
    assert longest["deciles"][0]["mean_tokens"] < longest["deciles"][9]["mean_tokens"]


def test_pairs_are_compared_where_both_have_a_score(report, scored, small_corpus):
    corpus = artefact.load(small_corpus)
    columns = []
    for name in ("longest", "taste"):
        found = artefact.load(scored / name)
        parts = [found.read(k, [name])[name].to_numpy() for k in range(corpus.num_shards)]
        columns.append(np.concatenate(parts).astype(np.float64))
    known = ~np.isnan(columns[1])
    table = report["agreement"]
    i, j = (table["names"].index(name) for name in ("longest", "taste"))
    assert table["documents"][i][j] == known.sum() < report["documents"]
    expected = stats.kendalltau(columns[0][known], columns[1][known]).statistic
    assert table["kendall"][i][j] == pytest.approx(expected)
    rows = list(csv.DictReader((scored / "report" / "agreement.csv").open()))
    row = next(row for row in rows if {row["a"], row["b"]} == {"longest", "taste"})
    assert float(row["kendall_tau_b"]) == pytest.approx(expected)


def test_statuses_say_what_has_no_score(report):
    taste = report["scores"][2]
    assert sum(taste["statuses"].values()) == report["documents"]
    assert taste["statuses"]["too_short"] == report["documents"] - sum(
        decile["documents"] for decile in taste["deciles"]
    )


def test_hostile_texts_cannot_act(report, scored):
    page = (scored / "report" / "index.html").read_text()
    shown = [e["text"] for s in report["scores"] for d in s["deciles"] for e in d["examples"]]
    assert any("<script>" in text for text in shown)
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page


def test_a_sample_does_not_depend_on_what_is_not_in_it(small_corpus, scored):
    half = config_of(small_corpus, scored, max_documents=24)
    found = score_report.Found.read(half)
    assert 10 < len(found.doc_ids) < 40 and found.of == 48
    again = score_report.Found.read(half)
    np.testing.assert_array_equal(found.doc_ids, again.doc_ids)


def test_deciles_divide_the_documents_in_their_order():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(203)
    values[::7] = np.nan
    parts = deciles(values, np.ones(203), np.arange(203), 3, 0)
    assert sum(part["documents"] for part in parts) == np.isfinite(values).sum()
    bounds = [(part["low"], part["high"]) for part in parts]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(bounds))
    for part in parts:
        chosen = values[part["examples"]]
        assert len(chosen) == 3 and (np.diff(chosen) >= 0).all()
        assert part["low"] <= chosen.min() and chosen.max() <= part["high"]


def test_what_does_not_fit_is_refused(small_corpus, scored, tmp_path):
    with pytest.raises(ValueError, match="same things"):
        ScoreReportConfig(str(small_corpus), {"a": "x"}, {"b": "ask_llm"}, str(tmp_path))
    config = config_of(small_corpus, scored)
    with pytest.raises(ArtefactError, match="no column"):
        score_report.run(
            ScoreReportConfig(
                config.corpus,
                {"taste": config.scores["taste"]},
                {"taste": "column:tast"},
                str(tmp_path / "report"),
            )
        )
