"""A cascade whose judge is a model: restarts ask nothing twice, levels and workers fit together."""

from __future__ import annotations

import dataclasses
import shutil
import threading

import jax
import numpy as np
import pytest

from models import weights
from pruning.corpus.selection_reader import load_selection
from pruning.scores.model import engine
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.selection import select
from pruning.selection.cascade import stage
from pruning.selection.cascade.config import CascadeConfig, Level
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Top
from pruning.store.manifest import ArtifactError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, build_corpus):
    rng = np.random.default_rng(4)
    shards = [
        [rng.integers(3, 259, rng.integers(2, 60)).tolist() for _ in range(size)]
        for size in (700, 0, 500)
    ]
    path = tmp_path_factory.mktemp("cascade") / "corpus"
    build_corpus(path, shards)
    return str(path)


def judge_of(corpus, model_path, output="", **settings) -> ScoreConfig:
    given = {"row_length": 64, "batch_rows": 8, "dtype": "float32", "tokenizer": "corpus"}
    scorer = Likelihood("prefix", window=24, overlap=8, max_tokens=60)
    return ScoreConfig(corpus, str(output), scorer, str(model_path), **(given | settings))


def config_of(corpus, output, judge, **settings) -> CascadeConfig:
    """A cascade by the total likelihood, of which the length is a cheap estimate."""
    given = {
        "score": "nll_total",
        "cheap_score": "corpus:n_tokens",
        "keep_documents": 0.3,
        "share": 0.8,
        "teach": (0.1,),
    }
    return CascadeConfig(corpus, str(output), judge, **(given | settings))


def ids_of(path) -> np.ndarray:
    selection = load_selection(path)
    return np.concatenate([selection.doc_ids(k) for k in range(selection.num_shards)])


@pytest.fixture(scope="module")
def alone(corpus, model_path, tmp_path_factory):
    """The selection of the judge alone."""
    path = tmp_path_factory.mktemp("alone")
    engine.run(judge_of(corpus, model_path, path / "scores"))
    scores = str(path / "scores")
    config = SelectConfig(
        corpus, str(path / "own"), Top(), scores=scores, score="nll_total", keep_documents=0.3
    )
    return ids_of(select.run(config).path)


def test_the_selection_and_its_costs(corpus, model_path, alone, tmp_path, capsys):
    selection = stage.run(config_of(corpus, tmp_path / "out", judge_of(corpus, model_path)))
    asked = selection.manifest.summary["cascade"]["asked"]
    assert not asked["everything"] and asked["share"] < 0.8
    assert len(np.intersect1d(ids_of(selection.path), alone)) >= 0.8 * len(alone)
    rounds = list((tmp_path / "out" / "rounds").iterdir())
    documents = [load_selection(path / "documents").documents for path in rounds]
    assert sum(documents) == asked["documents"]
    every = np.concatenate([ids_of(path / "documents") for path in rounds])
    assert len(np.unique(every)) == len(every)  # nothing is asked about twice
    assert "of asking the judge about every document" in capsys.readouterr().out


def test_a_restart_goes_on_with_the_answers_that_are_there(
    corpus, model_path, tmp_path, monkeypatch
):
    config = config_of(corpus, tmp_path / "out", judge_of(corpus, model_path))
    run, calls = engine.run, []

    def failing(settings, **given):
        calls.append(settings.output)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return run(settings, **given)

    monkeypatch.setattr(engine, "run", failing)
    with pytest.raises(RuntimeError, match="killed"):
        stage.run(config)
    selection = stage.run(config)
    assert len(set(calls)) == len(calls) - 1  # only the round that was killed is asked again
    whole = stage.run(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert whole.digest == selection.digest


def test_a_judge_that_changed_between_rounds_is_refused(corpus, tiny_t5, tmp_path):
    weights.save(tmp_path / "model", tiny_t5.model, tiny_t5.params)
    config = config_of(corpus, tmp_path / "out", judge_of(corpus, tmp_path / "model"))
    assert stage.run(dataclasses.replace(config, dry_run=True)) is None
    shutil.rmtree(tmp_path / "model")
    others = jax.tree.map(lambda values: 1.1 * values, tiny_t5.params)
    weights.save(tmp_path / "model", tiny_t5.model, others)
    with pytest.raises(ArtifactError, match="answered by another model than"):
        stage.run(config)


def test_workers_share_the_rounds(corpus, model_path, tmp_path):
    config = config_of(corpus, tmp_path / "out", judge_of(corpus, model_path))
    found = {}

    def work(worker):
        mine = dataclasses.replace(config, worker=worker, workers=2)
        found[worker] = stage.run(mine)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = stage.run(dataclasses.replace(config, output=str(tmp_path / "whole")))
    assert found[0].digest == whole.digest and found[1] is None


def test_a_level_between_is_asked_about_the_documents_in_doubt(corpus, model_path, alone, tmp_path):
    """A level that agrees with the judge leaves less for it to do."""
    judge = judge_of(corpus, model_path)
    shorter = dataclasses.replace(
        judge, scorer=Likelihood("prefix", window=24, overlap=8, max_tokens=59)
    )
    config = config_of(corpus, tmp_path / "out", judge, levels=(Level(shorter, "nll_total"),))
    selection = stage.run(config)
    asked = selection.manifest.summary["cascade"]["asked"]
    level = load_selection(tmp_path / "out" / "rounds" / "level_1" / "documents").documents
    assert 0 < level < 1200 and asked["share"] < 0.8
    assert len(np.intersect1d(ids_of(selection.path), alone)) >= 0.8 * len(alone)
