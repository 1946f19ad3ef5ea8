"""Scores of texts in memory: those of the stage."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

import pruning
from pruning.scores import in_memory, vectors
from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.likelihood import Likelihood

ASK = AskLLM(prompt="q {document} a", yes=("y", "Y"), no=("n",), max_tokens=48)
TEXTS = [
    "short",
    "",
    "a longer text " * 9,
    "naïve café, 漢字",
    *(f"text {i} " * i for i in range(30)),
]


SCORERS = [ASK, Likelihood("causal", window=24, overlap=10), Embedding(48, store="float32")]


def numbers_of(table: pa.Table, name: str) -> np.ndarray:
    """Return a column's numbers; of vectors, those of the documents that have one."""
    column = table[name].combine_chunks()
    if not vectors.is_vector(table.schema.field(name)):
        return column.to_numpy(zero_copy_only=False).astype(float)
    return vectors.numbers(column.drop_null(), table.schema.field(name))


@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_those_of_the_stage(scorer, tmp_path, artifacts, model_path, monkeypatch):
    artifacts.corpus(tmp_path / "corpus", [TEXTS])
    settings = {"model": str(model_path), "row_length": 64, "batch_rows": 8, "dtype": "float32"}
    stage = engine.run(
        engine.ScoreConfig(
            corpus=str(tmp_path / "corpus"),
            output=str(tmp_path / "scores"),
            scorer=scorer,
            tokenizer="corpus",
            **settings,
        )
    ).read(0)
    monkeypatch.setattr(in_memory, "AT_ONCE", 20)  # two tables
    judge = pruning.TextScorer(scorer=scorer, tokenizer="bytes", **settings)
    found = judge.score(pa.array(TEXTS))
    assert found["status"].to_pylist() == stage["status"].to_pylist()
    assert found["status"][1].as_py() == "empty"
    for name in judge.columns:
        expected, value = numbers_of(stage, name), numbers_of(found, name)
        assert len(value) and value.shape == expected.shape
        np.testing.assert_allclose(value, expected, rtol=3e-6, atol=3e-6)
    again = pa.concat_tables(judge.stream(iter(TEXTS)))
    assert again.unify_dictionaries() == found.unify_dictionaries()
    assert judge.score([]).num_rows == 0


def test_a_stream_reads_no_further_than_its_table(model_path, monkeypatch):
    """So that an endless iterator is scored in bounded memory."""
    monkeypatch.setattr(in_memory, "AT_ONCE", 16)
    judge = pruning.Judge(str(model_path), ASK, tokenizer="bytes", row_length=64, batch_rows=8)
    endless = itertools.count()
    tables = judge.stream(f"text {number}" for number in endless)
    assert [next(tables).num_rows for _ in range(3)] == [16] * 3
    assert next(endless) == 48


def test_scores_are_added_to_tables_and_selected_from(model_path):
    judge = pruning.Judge(str(model_path), ASK, tokenizer="bytes", row_length=64, batch_rows=8)
    plain = judge.score(TEXTS)
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": TEXTS}, index=range(7, 7 + len(TEXTS)))
    scored = judge.add_to(frame)
    assert scored["status"].tolist() == plain["status"].to_pylist()
    np.testing.assert_array_equal(scored["ask_llm_yes"], plain["ask_llm_yes"].to_numpy())
    kept = pruning.select(scored, score="ask_llm", keep_documents=5)
    best = np.argsort(-np.nan_to_num(plain["ask_llm_yes"].to_numpy(), nan=-np.inf))[:5]
    assert sorted(kept.index - 7) == sorted(best)
    with pytest.raises(ValueError, match="no column 'body'; it has: text"):
        judge.add_to(frame, "body")


def test_what_is_no_text_is_refused(model_path):
    judge = pruning.Judge(str(model_path), ASK, tokenizer="bytes", row_length=64, batch_rows=8)
    with pytest.raises(TypeError, match="text 1 is of type float"):
        judge.score(["a", float("nan")])
    with pytest.raises(TypeError, match="text 0 holds half a surrogate pair"):
        judge.score(["\ud800"])
    with pytest.raises(AttributeError, match="no attribute 'Jury'"):
        pruning.Jury  # noqa: B018
