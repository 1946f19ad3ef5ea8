"""The report on score sets: its numbers are those of the scores, its texts cannot act."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from evaluation.report import histograms, score_report
from evaluation.report.score_report import ScoreReportConfig, deciles
from pruning.store.artifact import load_artifact
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError


@pytest.fixture(scope="module")
def scored(small_corpus, tmp_path_factory) -> Path:
    """Two score sets: one goes with the length, the other has no value for every fifth document."""
    root = tmp_path_factory.mktemp("scored")
    corpus = load_artifact(small_corpus, "corpus")
    rng = np.random.default_rng(0)
    word = pa.dictionary(pa.int8(), pa.string())
    for name in ("longest", "taste"):
        schema = pa.schema([("doc_id", pa.int64()), ("status", word), (name, pa.float32())])
        build = Build(
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
    corpus = load_artifact(small_corpus)
    columns = []
    for name in ("longest", "taste"):
        found = load_artifact(scored / name)
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
    with pytest.raises(ArtifactError, match="no column"):
        score_report.run(
            ScoreReportConfig(
                config.corpus,
                {"taste": config.scores["taste"]},
                {"taste": "column:tast"},
                str(tmp_path / "report"),
            )
        )


def test_scores_beside_labels(small_corpus, scored, tmp_path):
    """A score that is the label has area 1, noise 0.5; within fifths, length tells less."""
    from pruning.selection import select
    from pruning.selection.config import SelectConfig
    from pruning.selection.strategies import Split

    half = str(tmp_path / "half")
    select.run(SelectConfig(str(small_corpus), half, Split(0, 0.5)))
    middle = float(np.median(lengths_of(small_corpus)))
    config = config_of(small_corpus, scored)
    config = dataclasses.replace(
        config,
        values={**config.values, "truth": "corpus:n_tokens"},
        label="truth",
        label_from=middle,
        selection=half,
        output=str(tmp_path / "report"),
    )
    score_report.run(config)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    by_name = {row["name"]: row for row in report["labels"]["scores"]}
    assert list(by_name) == ["longest", "shortest", "taste", "length", "random"]
    assert by_name["longest"]["auc"]["value"] == by_name["length"]["auc"]["value"] == 1
    assert by_name["shortest"]["auc"]["value"] == 0
    for name in ("taste", "random"):
        assert by_name[name]["auc"]["low"] < 0.5 < by_name[name]["auc"]["high"]
        assert by_name[name]["spearman"]["low"] < 0 < by_name[name]["spearman"]["high"]
    assert [one["precision"] for one in by_name["longest"]["precision"]] == [1.0] * len(
        by_name["longest"]["precision"]
    )
    fifths = by_name["longest"]["within_length"]
    assert sum(one["documents"] for one in fifths) == by_name["longest"]["documents"]
    assert fifths[0]["auc"] is None  # the shortest are all of one kind
    for score in report["scores"]:
        groups = {group["name"]: group for group in score["histogram"]["groups"]}
        for group in groups.values():
            assert sum(group["counts"]) == group["documents"]
        whole = np.array(groups["all"]["counts"])
        parts = np.array(groups["kept"]["counts"]) + np.array(groups["dropped"]["counts"])
        np.testing.assert_array_equal(whole, parts)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Against the label truth" in page and page.count("<svg") >= 12
    with (tmp_path / "report" / "labels.csv").open() as file:
        assert [row["score"] for row in csv.DictReader(file)] == list(by_name)


def lengths_of(corpus: Path) -> np.ndarray:
    """Return the lengths of all documents."""
    artifact = load_artifact(corpus, "corpus")
    parts = [artifact.read(k, ["n_tokens"])["n_tokens"] for k in range(artifact.num_shards)]
    return np.concatenate([part.to_numpy() for part in parts])


def test_answers_of_judges_and_two_ways_to_rank(small_corpus, tmp_path):
    """Means, mass on none and rank correlation equal those of the columns; the page shows them."""
    corpus = load_artifact(small_corpus, "corpus")
    rng = np.random.default_rng(1)
    word = pa.dictionary(pa.int8(), pa.string())
    names = ("ask_llm_yes", "ask_llm_no")
    schema = pa.schema(
        [("doc_id", pa.int64()), ("status", word), *((name, pa.float32()) for name in names)]
    )
    build = Build(tmp_path / "judged", "scores", {}, {"corpus": corpus}, corpus.num_shards, schema)
    shares = []
    for shard in range(corpus.num_shards):
        ids = corpus.read(shard, ["doc_id"])["doc_id"]
        of_shard = rng.dirichlet([1, 1, 2], len(ids))
        shares.append(of_shard)
        status = pa.array(["ok"] * len(ids)).cast(word)
        logs = {name: np.log(of_shard[:, i]).astype(np.float32) for i, name in enumerate(names)}
        with build.shard(shard) as writer:
            writer.write({"doc_id": ids, "status": status} | logs)
    build.finish({"scorer": "ask_llm", "columns": dict.fromkeys(names, "")})
    sets = {name: str(tmp_path / "judged") for name in ("yes", "ratio")}
    values = {"yes": "ask_llm", "ratio": "ask_llm_ratio"}
    config = ScoreReportConfig(
        corpus=str(small_corpus), scores=sets, values=values, output=str(tmp_path / "report")
    )
    [page] = score_report.run(config)
    found = json.loads(Path(page).with_name("report.json").read_text())["answers"]
    assert list(found) == ["yes"]  # the same score set under two names
    [asked] = found["yes"]
    yes, no, none = np.concatenate(shares).T
    assert asked["answers"]["yes"] == pytest.approx(yes.mean(), rel=1e-5)
    assert asked["none"] == pytest.approx(none.mean(), rel=1e-5)
    assert asked["not_answered"] == pytest.approx((none > 0.5).mean())
    rankings = asked["rankings"]
    assert rankings["kendall"] == pytest.approx(stats.kendalltau(yes, yes / (yes + no)).statistic)
    assert rankings["mean_ratio"] == pytest.approx((yes / (yes + no)).mean(), rel=1e-5)
    assert "ratio P(yes) / (P(yes) + P(no))" in Path(page).read_text()


def test_lengths_are_told_apart_and_logarithms_shown_as_probabilities():
    n_tokens = np.array([5, 127, 128, 600, 9000])
    groups = histograms.groups(None, None, n_tokens)
    lengths = [mask for name, mask in groups.items() if name.startswith("length: ")]
    np.testing.assert_array_equal(np.sum(lengths, axis=0), groups["all"])
    assert groups["length: 0 to 127 tokens"].tolist() == [True, True, False, False, False]
    probability = np.array([0.01, 0.2, 0.5, 0.99, np.nan])
    of_yes = histograms.PROBABILITIES["ask_llm"].of(np.log(probability))
    np.testing.assert_allclose(of_yes, probability)
    odds = np.log(probability / (1 - probability))
    np.testing.assert_allclose(histograms.PROBABILITIES["ask_llm_ratio"].of(odds), probability)
    found = histograms.histogram(of_yes, groups, (0.0, 1.0))
    assert (found["edges"][0], found["edges"][-1]) == (0.0, 1.0)
    assert found["groups"][0]["documents"] == 4 == sum(found["groups"][0]["counts"])
