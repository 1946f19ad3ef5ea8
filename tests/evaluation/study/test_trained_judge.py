"""Report on the judge that a study trained: its accuracy, and how often it answers."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from evaluation.study import trained_judge
from pruning.scores.score_set import KIND
from pruning.store.artifact import load_artifact
from pruning.store.build import Build


@pytest.mark.parametrize(
    ("accuracy", "silent", "says"),
    [(0.95, 0.02, ()), (0.7, 0.5, ("do not read its selections", "the judge hardly answers"))],
)
def test_exam_and_answers(tmp_path, small_corpus, accuracy, silent, says):
    judge = tmp_path / "judge"
    judge.mkdir()
    lines = [
        {"step": step, "kind": "eval", "accuracy": value}
        for step, value in ((1, 0.5), (2, accuracy))
    ]
    (judge / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = load_artifact(small_corpus, "corpus")
    columns = {trained_judge.YES: "log-probability", trained_judge.NO: "the same"}
    schema = pa.schema([("doc_id", pa.int64()), *((name, pa.float32()) for name in columns)])
    build = Build(tmp_path / "scores", KIND, {}, {"corpus": corpus}, corpus.num_shards, schema)
    total = unanswered = 0
    for shard in range(corpus.num_shards):
        ids = corpus.read(shard, ["doc_id"])["doc_id"]
        quiet = np.arange(len(ids)) < silent * len(ids)
        total, unanswered = total + len(ids), unanswered + int(quiet.sum())
        answer = np.log(np.where(quiet, 0.1, 0.45)).astype(np.float32)
        with build.shard(shard) as writer:
            writer.write({"doc_id": ids, **dict.fromkeys(columns, pa.array(answer))})
    build.finish({"columns": columns})
    places = {"models": {"judge": str(judge)}, "stages": {"a": str(tmp_path / "scores"), "b": "x"}}
    exam, answers = trained_judge.lines(places)
    assert f"the judge told {2 * accuracy - 1:.0%} rightly" in exam
    assert (
        f"{total:,} documents; P(yes) + P(no) is below one half for {unanswered / total:.1%}"
        in answers
    )
    for text in says:
        assert text in exam + answers
    if not says:
        assert "do not read" not in exam and "hardly" not in answers
    assert list(trained_judge.lines({"models": {"judge": "google/flan-t5-xl"}, "stages": {}})) == []
    origin, told = trained_judge.caveats(str(judge))
    assert "trained here" in origin and told in exam


def test_published_weights_are_not_said_to_be_trained_here():
    (origin,) = trained_judge.caveats("google/flan-t5-xl")
    assert "google/flan-t5-xl" in origin and "trained here" not in origin
