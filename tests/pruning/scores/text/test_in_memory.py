"""Scores of texts in memory by functions of the text: those of the stages."""

from __future__ import annotations

import dataclasses
import zlib
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

import pruning
from pruning.scores.score_set import Column
from pruning.scores.text import classifier, text_score
from pruning.scores.text.classifier import ClassifierConfig
from pruning.scores.text.hashing import Features
from pruning.scores.text.text_score import TextScoreConfig
from pruning.store.manifest import ArtifactError

TEXTS = [
    *("aaaa aaaa aaaa", "", "naïve café, 漢字", "x"),
    *(f"good words of document {i} and {i * i} more" for i in range(40)),
    *(f"buy now {i} cheap {i % 7} click" for i in range(40)),
]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Numbers of bytes; short texts have no value, and some an infinite one."""

    columns: ClassVar = {
        "compressed": Column(pa.float32(), "bytes after zlib"),
        "first": Column(pa.string(), "the first word"),
    }

    def __call__(self, texts: pa.Array):
        values = [len(zlib.compress(text.encode())) for text in texts.to_pylist()]
        found = np.where([len(text) < 2 for text in texts.to_pylist()], np.nan, values)
        found[[text.startswith("buy now 3 ") for text in texts.to_pylist()]] = np.inf
        first = np.array([text.partition(" ")[0] for text in texts.to_pylist()], object)
        return {"compressed": found, "first": first}


def rows(table: pa.Table) -> list[dict]:
    return table.drop_columns([n for n in ("doc_id",) if n in table.column_names]).to_pylist()


def test_scores_of_a_function_are_those_of_the_stage(tmp_path, write):
    write.corpus(tmp_path / "corpus", [TEXTS])
    config = TextScoreConfig(str(tmp_path / "corpus"), str(tmp_path / "out"), Lengths(), workers=1)
    found = pruning.TextFunction(Lengths()).score(TEXTS)
    assert rows(found) == rows(text_score.run(config).read(0))
    assert set(found["status"].to_pylist()) == {"ok", "empty", "too_short", "not_finite"}
    assert pruning.TextFunction(Lengths()).score([]).num_rows == 0


@dataclasses.dataclass(frozen=True)
class OneForAll(Lengths):
    """A function that gives one value for a batch, which is not one for each text."""

    def __call__(self, texts: pa.Array):
        return {"compressed": np.ones(1), "first": np.array(["a"], object)}


def test_a_function_gives_one_value_for_each_text():
    with pytest.raises(ValueError, match=r"for 84 documents the shape \(1,\)"):
        pruning.TextFunction(OneForAll()).score(TEXTS)


def test_a_fitted_classifier_scores_other_texts_as_the_stage_does(tmp_path, write):
    write.corpus(tmp_path / "good", [TEXTS[4:30]])
    write.corpus(tmp_path / "corpus", [TEXTS[30:]])
    write.corpus(tmp_path / "other", [TEXTS])
    settings = {"features": Features(buckets=1 << 12), "folds": 2, "workers": 1}
    corpora = {"corpus": str(tmp_path / "corpus"), "good": str(tmp_path / "good")}
    classifier.run(ClassifierConfig(output=str(tmp_path / "fitted"), **corpora, **settings))
    stage = classifier.run(
        ClassifierConfig(
            corpus=str(tmp_path / "other"),
            output=str(tmp_path / "applied"),
            model=str(tmp_path / "fitted"),
            workers=1,
        )
    )
    quality = pruning.NgramClassifier(str(tmp_path / "fitted"))
    table = quality.add_to(pa.table({"text": TEXTS}), prefix="q_")
    assert table.column_names == ["text", "q_status", "q_quality", "q_quality_probability"]
    for name in quality.columns:
        expected = stage.read(0, [name])[name].to_pylist()
        assert table[f"q_{name}"].to_pylist() == expected
    with pytest.raises(ArtifactError, match="not a classifier's score set"):
        scored = TextScoreConfig(str(tmp_path / "other"), str(tmp_path / "x"), Lengths(), workers=1)
        pruning.NgramClassifier(str(text_score.run(scored).path))
