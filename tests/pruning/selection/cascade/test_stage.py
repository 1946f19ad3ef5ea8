"""The stage: artifacts, dry runs, restarts, and agreement with `select`."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from pruning.corpus.reader import load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.scores.distilled.ngram_student import DistillConfig
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.served.server import Server
from pruning.selection import explain, select
from pruning.selection.cascade import report, stage
from pruning.selection.cascade.config import CascadeConfig
from pruning.selection.cascade.decide import Cascade
from pruning.selection.cascade.documents import ENCODING, Documents
from pruning.selection.config import SelectConfig, SelectError
from pruning.selection.select import SCHEMA
from pruning.selection.strategies import Top
from pruning.store.artifact import load_artifact
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError, ConfigurationChanged

SIZES = (2500, 0, 2500)


@pytest.fixture(scope="module")
def world(tmp_path_factory, artifacts):
    """Documents whose words, by frequency, explain the judge's score nearly."""
    path = tmp_path_factory.mktemp("cascade")
    random = np.random.default_rng(0)
    texts, scores, near = [], [], []
    for size in SIZES:
        ids = random.zipf(1.4, (size, 12)) % 200
        texts.append([" ".join(f"w{i}" for i in row) for row in ids.tolist()])
        scores.append(np.log(0.05 + (ids < 12).mean(axis=1)) + 0.01 * random.standard_normal(size))
        near.append((scores[-1] + 0.05 * random.standard_normal(size)).astype(np.float32))
    corpus = artifacts.corpus(path / "corpus", texts, row_group=1000)
    statuses = {(0, 3): "empty", (2, 7): "not_finite"}
    columns = {
        "ask_llm_yes": [s.astype(np.float32) for s in scores],
        "ask_llm_no": [np.zeros(len(s), np.float32) for s in scores],
    }
    artifacts.scores(path / "judged", corpus, columns, statuses)
    noise = [random.standard_normal(size).astype(np.float32) for size in SIZES]
    artifacts.scores(path / "near", corpus, {"near": near, "noise": noise}, {(0, 5): "too_short"})
    return path


def config_of(world, output, **settings) -> CascadeConfig:
    given = {
        "corpus": str(world / "corpus"),
        "output": str(output),
        "judged": str(world / "judged"),
        "cheap": str(world / "near"),
        "cheap_score": "column:near",
        "keep_documents": 0.2,
        "teach": (0.06,),
    }
    return CascadeConfig(**(given | settings))


def ids_of(artifact) -> np.ndarray:
    selection = load_selection(artifact.path)
    return np.concatenate([selection.doc_ids(k) for k in range(selection.num_shards)])


def judges_own(world, output, **settings) -> np.ndarray:
    given = settings or {"keep_documents": 0.2}
    config = SelectConfig(
        str(world / "corpus"),
        str(output),
        Top(),
        scores=str(world / "judged"),
        score="ask_llm",
        **given,
    )
    return ids_of(select.run(config))


def test_the_selection_holds_what_the_judge_alone_would_keep(world, tmp_path):
    selection = stage.run(config_of(world, tmp_path / "out"))
    own, kept = judges_own(world, tmp_path / "own"), ids_of(selection)
    found = selection.manifest.summary["cascade"]
    shared = len(np.intersect1d(own, kept)) / len(own)
    assert len(own) == len(kept) == 1000
    assert shared >= 0.95 and found["found"]["certified"] >= 0.95
    asked = found["asked"]
    assert 0.05 < asked["share"] < 0.8 and asked["unscored"] >= 1
    assert asked["documents"] == sum(
        asked.get(name, 0) for name in ("teach", "certify", "doubt", "unscored", "rest")
    )
    assert abs(found["predicted"] - asked["documents"]) < 0.15 * 5000
    with pytest.raises(SelectError, match=r"made by a cascade.* answers are in .*judged"):
        explain.config_of(selection)
    counts = selection.manifest.counts["documents"]
    assert counts["kept"] + counts["not_kept"] + counts["outside_of_pool"] == 5000


def test_a_useless_score_gives_exactly_the_selection_of_the_judge(world, tmp_path):
    """With the same seed, the ties included; in documents and in tokens."""
    for number, budget in enumerate(({"keep_documents": 0.2}, {"keep_tokens": 0.2})):
        settings = {"keep_documents": None, "cheap_score": "column:noise"}
        config = config_of(world, tmp_path / f"out{number}", **(settings | budget))
        selection = stage.run(config)
        assert selection.manifest.summary["cascade"]["asked"]["everything"]
        own = judges_own(world, tmp_path / f"own{number}", **budget)
        assert np.array_equal(ids_of(selection), own)


def test_a_budget_in_tokens(world, tmp_path):
    settings = {"keep_documents": None, "keep_tokens": 0.3}
    selection = stage.run(config_of(world, tmp_path / "out", **settings))
    own = judges_own(world, tmp_path / "own", keep_tokens=0.3)
    kept = load_selection(selection.path)
    budget = selection.manifest.summary["budget"]
    assert budget["unit"] == "tokens" and kept.tokens == budget["kept"] <= budget["wanted"]
    assert len(np.intersect1d(own, ids_of(selection))) > 0.93 * len(own)
    assert not selection.manifest.summary["cascade"]["asked"]["everything"]


def test_a_student_is_taught_in_rounds_and_a_dry_run_is_resumed(world, tmp_path, capsys):
    student = DistillConfig(
        "", "teacher", "student", n=4, buckets=1 << 17, l2=(0.3,), folds=2, workers=1
    )
    settings = {"cheap": None, "student": student, "teach": (0.08, 0.08), "share": 0.9}
    config = config_of(world, tmp_path / "out", **settings)
    assert stage.run(dataclasses.replace(config, dry_run=True)) is None
    said = capsys.readouterr().out
    assert "student 1: rank correlation" in said and "student 2: rank correlation" in said
    assert "predicted: the judge is asked about" in said
    selection = stage.run(config)
    summary = selection.manifest.summary["cascade"]
    first, second = summary["students"]
    assert second["examples"] > 1.5 * first["examples"] and second["spearman"] > 0.5
    own = judges_own(world, tmp_path / "own")
    assert len(np.intersect1d(own, ids_of(selection))) >= 0.9 * len(own)
    # The same work elsewhere gives the same bytes; here, the same artifact.
    again = stage.run(dataclasses.replace(config, output=str(tmp_path / "again")))
    assert again.digest == selection.digest == stage.run(config).digest


def test_other_settings_after_a_dry_run_leave_its_answers_in_place(world, tmp_path):
    config = config_of(world, tmp_path / "out", dry_run=True)
    assert stage.run(config) is None
    answer = tmp_path / "out" / "rounds" / "teach-1"  # as a judge's round leaves it
    answer.mkdir(parents=True)
    with pytest.raises(ConfigurationChanged, match="share"):
        stage.run(dataclasses.replace(config, share=0.9))
    assert stage.run(dataclasses.replace(config, dry_run=False)) is not None and answer.is_dir()


def test_a_score_that_learned_from_a_certifying_sample_is_certified_by_another(
    world, tmp_path, artifacts, monkeypatch
):
    """Such a score is exact where the judge was asked: the same sample would find no errors."""
    samples, settle = [], Cascade.settle

    def noted(cascade):
        outcome = settle(cascade)
        samples.append(cascade._sampled)
        return outcome

    monkeypatch.setattr(Cascade, "settle", noted)
    stage.run(config_of(world, tmp_path / "first"))
    corpus, judged = (load_artifact(world / name) for name in ("corpus", "judged"))
    documents = Documents.of(load_corpus(corpus.path), None, judged)
    judge = documents.read(judged, "ask_llm")
    known = samples[0] & np.isfinite(judge)
    noise = 0.7 * np.nanstd(judge) * np.random.default_rng(1).standard_normal(len(judge))
    rough = np.nanmean(judge) + 0.67 * (np.nan_to_num(judge - np.nanmean(judge)) + noise)
    learned = np.where(known, judge, rough).astype(np.float32)
    parts = [learned[a:b] for a, b in itertools.pairwise(documents.starts)]
    artifacts.scores(tmp_path / "learned", corpus, {"near": parts})
    selection = stage.run(config_of(world, tmp_path / "second", cheap=str(tmp_path / "learned")))
    found = selection.manifest.summary["cascade"]
    assert not found["asked"]["everything"] and found["found"]["actual"] >= 0.95


def test_a_round_of_other_documents_is_refused(world, tmp_path):
    """As another machine may plan them; its answers would be read as missing."""
    corpus = load_corpus(world / "corpus")
    documents = Documents.of(corpus, None, None)
    chosen = np.arange(len(documents)) % 7 == 0
    build = Build(
        tmp_path / "round", "selection", {}, {"corpus": corpus.artifact}, 3, SCHEMA, ENCODING
    )
    documents.write(build, chosen, {})
    selection = load_selection(tmp_path / "round", corpus.artifact)
    documents.require_chosen(selection, chosen)
    chosen[2] = True
    with pytest.raises(ArtifactError, match="other documents than this process would ask about"):
        documents.require_chosen(selection, chosen)


def test_the_report_does_not_round_up():
    asked = {"documents": 1, "of": 10, "share": 0.1, "everything": False}
    found = {
        "promised": {"share": 0.995, "confidence": 0.999, "unit": "documents"},
        "found": {"certified": 0.99596, "estimated": 0.9, "actual": None},
        "kept_unasked": 1,
        "dropped_unasked": 2,
        "asked": asked,
        "predicted": 1,
    }
    promised, certified, _ = report.lines(found, {})
    assert "99.5% of the documents" in promised and "a probability of 99.9%" in promised
    assert "at least 99.5% at" in certified
    student = {"examples": 60, "spearman": None, "spearman_interval": None}
    expected = {"students": [student], "everything": True, "documents": 9}
    assert "not defined out of fold" in next(report.prediction(expected))


def test_the_address_of_a_server_may_change_on_a_restart(world, tmp_path):
    def identity(port: int, top: int = 20):
        server = Server(f"http://localhost:{port}/v1", top=top)
        judge = ScoreConfig("", "", AskLLM(), "judge", server=server)
        return config_of(world, tmp_path, judged=None, judge=judge).identity

    assert identity(8000) == identity(8001) != identity(8000, top=10)


def test_inputs_that_do_not_fit_are_refused(world, tmp_path, artifacts):
    other = artifacts.corpus(tmp_path / "other", [["a b c"] * 10])
    with pytest.raises(ArtifactError, match="was made from the corpus"):
        stage.run(config_of(world, tmp_path / "out", corpus=str(other.path)))
    with pytest.raises(SelectError, match="keeps nothing"):
        stage.run(config_of(world, tmp_path / "none", keep_documents=1e-5))
    with pytest.raises(ArtifactError, match="have an answer to learn from"):
        stage.run(config_of(world, tmp_path / "few", teach=(0.001,)))
    stage.run(config_of(world, tmp_path / "done"))
    with pytest.raises(ConfigurationChanged, match="share"):
        stage.run(config_of(world, tmp_path / "done", share=0.9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_tokens": 0.2}, "one of keep_documents and keep_tokens"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"teach": ()}, "teach holds"),
        ({"judged": None}, "one of the three"),
        ({"cheap": None}, "one of the two"),
        ({"keep_documents": float("inf")}, "a positive number"),
        ({"workers": 2}, "need just one"),
        (
            {"cheap": None, "student": DistillConfig("", None, "student", model="earlier")},
            "an earlier student",
        ),
    ],
)
def test_settings_are_checked(world, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(world, tmp_path / "out", **settings)
