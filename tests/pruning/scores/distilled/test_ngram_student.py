"""The distilled scorer learns a teacher that words explain, and says how well."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from pruning.scores.distilled import ngram_student
from pruning.scores.distilled.lessons import Lessons, agreement
from pruning.scores.distilled.ngram_student import DistillConfig, NGramStudent, smallest
from pruning.scores.text.folds import FoldedLinear, Folds
from pruning.scores.text.linear import Linear, LinearError
from pruning.scores.text.pieces import Pieces
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream


def texts(n, seed):
    random = np.random.default_rng(seed)
    ids = random.zipf(1.3, (n, 50)) % 400
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()], (ids < 20).mean(axis=1)


@pytest.fixture
def world(tmp_path, write):
    """Three shards; the teacher has scored four documents of five, by what words they have."""
    parts = [texts(n, seed) for seed, n in enumerate((900, 0, 700))]
    corpus = write.corpus(tmp_path / "corpus", [part[0] for part in parts])
    teaching = [np.log(0.05 + part[1]) for part in parts]
    skipped = {
        (k, row): "not_selected" for k in range(3) for row in range(0, corpus.documents(k), 5)
    }
    columns = {
        "ask_llm_yes": [t.astype(np.float32) for t in teaching],
        "ask_llm_no": [np.zeros(len(t), np.float32) for t in teaching],
    }
    teacher = write.scores(tmp_path / "teacher", corpus, columns, skipped)
    return tmp_path, corpus, teacher, np.concatenate(teaching), skipped


def config_of(world, name, **settings):
    path = world[0]
    settings = {"n": 4, "l2": (0.1, 1.0)} | settings  # tokens are bytes here
    return DistillConfig(
        str(path / "corpus"), str(path / "teacher"), str(path / name), workers=1, **settings
    )


def test_the_student_ranks_documents_that_the_teacher_never_saw(world, column):
    _, corpus, _, truth, skipped = world
    scores = ngram_student.run(config_of(world, "student"))
    found = column(scores, "student")
    assert not np.isnan(found).any()
    unseen = np.array([(k, row) in skipped for k in range(3) for row in range(corpus.documents(k))])
    assert np.corrcoef(found[unseen], truth[unseen])[0, 1] > 0.9
    summary = scores.manifest.summary
    assert summary["spearman"] > 0.9 and summary["best_tenth_overlap"] > 0.6
    assert summary["examples"] == summary["held_out"] == 1600 - len(skipped)
    assert summary["spearman_interval"][0] < summary["spearman"] < summary["spearman_interval"][1]
    assert abs(summary["spearman_beside"]["random"]["value"]) < 0.1
    # Predictions are in the teacher's units.
    assert abs((found - truth)[unseen].mean()) < 0.05


def test_lessons_are_the_teachers_documents(world):
    _, corpus, teacher, truth, skipped = world
    lessons = Lessons.of(corpus, teacher, "ask_llm_ratio", 10_000, seed=0)
    places = [(k, row) for k, rows in enumerate(lessons.rows) for row in rows.tolist()]
    assert set(places).isdisjoint(skipped) and len(places) == 1600 - len(skipped)
    starts = {0: 0, 2: 900}
    expected = [truth[starts[k] + row] for k, row in places]
    np.testing.assert_allclose(lessons.targets, expected, rtol=1e-6)
    few = Lessons.of(corpus, teacher, "ask_llm_ratio", 100, seed=0)
    assert len(few.targets) == 100
    assert set(np.round(few.targets, 6)) <= set(np.round(lessons.targets, 6))


def test_the_student_reads_what_the_teacher_read(tmp_path, write, column):
    """Beginnings that tell everything, endings that tell nothing and are longer."""
    random = np.random.default_rng(0)
    share = random.random(600)
    begun = ["".join(random.choice(["a", "b"], 20, p=[p, 1 - p])) for p in share]
    ended = ["".join(random.choice(list("abcdefgh"), 400)) for _ in share]
    corpus = write.corpus(tmp_path / "corpus", [[a + b for a, b in zip(begun, ended, strict=True)]])
    truth = np.array([text.count("a") for text in begun], np.float32)
    cut = np.full(600, 400, np.int32)
    write.scores(tmp_path / "teacher", corpus, {"taste": [truth], "truncated_tokens": [cut]})
    config = DistillConfig(
        str(tmp_path / "corpus"), str(tmp_path / "teacher"), str(tmp_path / "student"), workers=1,
        score="column:taste", n=1,
    )  # fmt: skip
    scores = ngram_student.run(config)
    assert scores.manifest.summary["tokens"] == 20
    assert scores.manifest.summary["spearman"] > 0.99
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"), tokens=420, places=0)
    assert ngram_student.run(whole).manifest.summary["spearman"] < 0.9


def test_places_are_learned_where_they_matter(tmp_path, write, column):
    """A teacher that likes a letter in the beginning, and dislikes it further on."""
    random = np.random.default_rng(0)
    made = ["".join(random.choice(list("abcd"), 40)) for _ in range(900)]
    corpus = write.corpus(tmp_path / "corpus", [made])
    taste = np.array([t[:20].count("a") - t[20:40].count("a") for t in made], np.float32)
    write.scores(tmp_path / "teacher", corpus, {"taste": [taste]})
    config = DistillConfig(
        str(tmp_path / "corpus"), str(tmp_path / "teacher"), str(tmp_path / "student"), workers=1,
        score="column:taste", n=1, tokens=40, places=2,
    )  # fmt: skip
    scores = ngram_student.run(config)
    assert scores.manifest.summary["places"] == 2 and scores.manifest.summary["spearman"] > 0.95
    # The model's file says what it needs: read again, it scores alike.
    student = NGramStudent.from_bytes(scores.file("student.npz"))
    assert student.features.places == 2
    applied = ngram_student.run(
        DistillConfig(str(tmp_path / "corpus"), output=str(tmp_path / "again"),
                      model=str(tmp_path / "student"), workers=1)
    )  # fmt: skip
    np.testing.assert_array_equal(column(applied, "student"), column(scores, "student"))
    without = dataclasses.replace(config, output=str(tmp_path / "without"), places=0)
    summary = ngram_student.run(without).manifest.summary
    assert summary["places"] == 0 and summary["spearman"] < 0.3


def test_models_of_earlier_versions_have_no_places():
    reads = Pieces(2, 1 << 17, first=8)
    model = Linear(reads, np.ones(reads.size, np.float32), 0.5)
    folded = FoldedLinear(Folds(Stream.STUDENT_FOLD, 0, 2), (model, model))
    with np.load(io.BytesIO(folded.to_bytes(np.zeros(0)))) as file:
        earlier = {name: file[name] for name in file.files if name != "places"}
    sink = io.BytesIO()
    np.savez(sink, **earlier)
    assert NGramStudent.from_bytes(sink.getvalue()).features == reads
    sink = io.BytesIO()
    np.savez(sink, **(earlier | {"scheme": np.array("pieces-3")}))
    with pytest.raises(LinearError, match=r"pieces-3.*fit it again"):
        NGramStudent.from_bytes(sink.getvalue())


@pytest.mark.parametrize("best", range(7))
def test_the_smallest_error_is_found_downhill(best):
    asked = []

    def error(value):
        asked.append(value)
        return abs(value - best)

    assert smallest(error, list(range(7))) == (0, best)
    assert len(asked) == len(set(asked)) <= 6


def test_agreement():
    teacher = np.arange(100.0)
    assert agreement(teacher, teacher) == {
        "held_out": 100,
        "spearman": pytest.approx(1.0),
        "spearman_interval": [pytest.approx(1.0), pytest.approx(1.0)],
        "best_tenth_overlap": 1.0,
    }
    assert agreement(-teacher, teacher)["spearman"] == pytest.approx(-1.0)
    assert agreement(-teacher, teacher)["best_tenth_overlap"] == 0.0
    shifted = np.where(teacher >= 95, -1.0, teacher)  # half of the best are lost
    assert agreement(shifted, teacher)["best_tenth_overlap"] == 0.5


def test_a_teacher_without_scores_teaches_nothing(world, write):
    path, corpus = world[:2]
    nothing = {(k, row): "empty" for k in range(3) for row in range(corpus.documents(k))}
    columns = {"ask_llm_yes": [np.zeros(corpus.documents(k), np.float32) for k in range(3)]}
    write.scores(path / "silent", corpus, columns, nothing)
    config = config_of(world, "x", score="ask_llm")
    with pytest.raises(ArtifactError, match="0 scores to learn from"):
        ngram_student.run(dataclasses.replace(config, teacher=str(path / "silent")))


def test_a_teacher_of_chance_is_not_remembered(tmp_path, write, column):
    """Scores are out of fold: those of a random teacher are predicted no better than chance.

    A model that had learned from these documents would rank them by their scores.
    """
    made, _ = texts(500, 3)
    corpus = write.corpus(tmp_path / "corpus", [made, made[:100]])
    random = np.random.default_rng(4)
    taste = random.normal(size=500).astype(np.float32)
    write.scores(tmp_path / "teacher", corpus, {"taste": [taste, taste[:100]]})
    config = DistillConfig(
        str(tmp_path / "corpus"), str(tmp_path / "teacher"), str(tmp_path / "student"),
        score="column:taste", l2=(0.1,), workers=1,
    )  # fmt: skip
    scores = ngram_student.run(config)
    found = column(scores, "student")
    assert abs(np.corrcoef(found[:500], taste)[0, 1]) < 0.15
    np.testing.assert_array_equal(found[500:], found[:100])  # a copy has the model of its fold
    low, high = scores.manifest.summary["spearman_interval"]
    assert low < 0.1 and high > -0.15

    # Applied to another corpus: the same documents have the same scores.
    other = write.corpus(tmp_path / "other", [made[200:300]])
    applied = ngram_student.run(
        DistillConfig(
            str(tmp_path / "other"),
            output=str(tmp_path / "applied"),
            model=str(tmp_path / "student"),
            workers=1,
        )
    )
    np.testing.assert_array_equal(column(applied, "student"), found[200:300])
    assert other.documents(0) == 100
    with pytest.raises(ValueError, match="set one of the three"):
        dataclasses.replace(config, model=str(tmp_path / "student"))


def test_a_column_of_the_corpus_is_a_teacher(make_corpus, tmp_path, column):
    made, share = texts(400, 5)
    records = [
        {"text": text, "score": None if i % 3 == 0 else float(np.log(0.05 + value))}
        for i, (text, value) in enumerate(zip(made, share, strict=True))
    ]
    corpus = make_corpus(tmp_path, [records], metadata=("score",), vocabulary="bytes")
    scores = ngram_student.run(
        DistillConfig(
            str(corpus.artifact.path),
            output=str(tmp_path / "student"),
            score="corpus:score",
            n=4,
            l2=(0.1,),
            workers=1,
        )
    )
    assert scores.manifest.summary["examples"] == 266
    assert scores.manifest.summary["spearman"] > 0.8
    assert not np.isnan(column(scores, "student")).any()
