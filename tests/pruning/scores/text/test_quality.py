"""The quality score: its lines, its folds, and its application to another corpus."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pytest

from pruning.corpus.sources.document import SourceError
from pruning.scores.text import examples as of_files
from pruning.scores.text import quality
from pruning.scores.text.hashing import Features
from pruning.scores.text.lines import FORMS, LineFeatures, Lines, split, words_of
from pruning.scores.text.main_text import Pages
from pruning.scores.text.quality import COLUMNS, QualityConfig
from pruning.store.manifest import ArtifactError

FEATURES = LineFeatures(Features(n=1, buckets=1 << 10))
MENU = ["Home", "Contact us", "Log in", "Site map 2019", "Privacy | Terms", "Share on Twitter"]


def prose(seed, sentences):
    random = np.random.default_rng(seed)
    nouns = ["mill", "river", "teacher", "garden", "letter", "mountain", "winter", "bridge"]
    lines = []
    for _ in range(sentences):
        a, b, c = random.choice(nouns, 3)
        lines.append(f"The {a} of the {b} was built in the {c}, and it has been there since then.")
    return "\n".join(lines)


def page(seed):
    random = np.random.default_rng(seed)
    main = prose(seed, 8)
    around = "\n".join(random.choice(MENU, 6))
    return {"raw_text": f"{around}\n{main}\n{around}", "gold_text": main}


@pytest.fixture
def examples(tmp_path):
    """Files of examples of every kind, and settings that name them."""

    def write(name, rows):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)

    write("pages", [page(seed) for seed in range(60)])
    write("edited", [{"text": prose(seed, 6)} for seed in range(100, 140)])
    more = (" now" * (i % 3) for i in range(40))
    shops = [
        f"Buy cheap shoes {i}! Free shipping!\nSale {i % 7}{end}" for i, end in enumerate(more)
    ]
    write("web", [{"text": text} for text in shops])
    scored = [{"text": prose(seed, 1 + seed % 9), "score": seed % 9} for seed in range(200, 260)]
    write("scored", scored)
    names = ("pages", "edited", "web", "scored")
    files = {name: (f"{name}.jsonl.gz",) for name in names}
    return {"directory": str(tmp_path), "workers": 1, "line_l2": 1.0} | files


def test_long_lines_are_sentences_and_rulers_are_no_lines():
    sentence = "It was a bright cold day in April, and the clocks were striking thirteen again. "
    assert split("  a line \n\n b\n") == ["a line", "b"]
    assert split(sentence * 3) == [sentence.strip()] * 3
    lines = Lines.of(["a line\n-----\n* * *", "", "B"])
    assert lines.texts == ["a line", "B"] and lines.offsets.tolist() == [0, 1, 1, 2]


def test_lines_do_not_depend_on_the_documents_around():
    """Neighbors are those of the same document."""
    documents = [page(1)["raw_text"], "One line.", "", page(2)["raw_text"]]
    together = Lines.of(documents).bags(FEATURES).matrix(FEATURES.size)
    alone = [Lines.of([text]) for text in documents]
    apart = [lines.bags(FEATURES).matrix(FEATURES.size).toarray() for lines in alone]
    np.testing.assert_array_equal(together.toarray(), np.concatenate(apart))
    # Each line has one interval of every feature of form, its own 9 and 2 of each neighbor or none.
    forms = together.toarray()[:, FEATURES.words.buckets :]
    assert forms.shape[1] == FORMS and set(np.unique(forms)) == {0, 1}
    assert forms[len(alone[0].texts)].sum() == 9 + 4  # "One line." has no neighbor


def test_labels_are_lines_of_the_main_text():
    one = page(3)
    lines = Lines.of([one["raw_text"]])
    labels = Pages([one["raw_text"]], [one["gold_text"]]).labels(lines)
    assert [line for line, good in zip(lines.texts, labels, strict=True) if good] == one[
        "gold_text"
    ].split("\n")
    assert words_of("It's a  Test.") == " it's a test "


def test_articles_score_higher_and_the_model_applies_elsewhere(tmp_path, examples, write, column):
    texts = [[prose(1, 9), "\n".join(MENU * 3)], [page(500)["raw_text"], "", "..."]]
    write.corpus(tmp_path / "corpus", texts)
    scores = quality.run(QualityConfig(str(tmp_path / "corpus"), str(tmp_path / "q"), **examples))
    found = column(scores, "main_text")
    assert found[0] > found[2] > found[1] and np.isnan(found[3:]).all()
    whole = column(scores, "quality")
    assert min(whole[[0, 2]]) > whole[1]
    assert scores.manifest.counts["documents"] == {"empty": 1, "ok": 3, "too_short": 1}
    assert scores.manifest.summary["main_text"]["line_auc_out_of_fold"] > 0.99
    np.testing.assert_allclose(
        column(scores, "length")[:1], np.log(len(prose(1, 9).split())), rtol=1e-6
    )
    write.corpus(tmp_path / "other", [[texts[1][0]], [texts[0][1], texts[0][0]]])
    model = QualityConfig(str(tmp_path / "other"), str(tmp_path / "a"), model=str(tmp_path / "q"))
    applied = quality.run(model)
    for name in COLUMNS:
        first, again = column(scores, name)[[2, 1, 0]], column(applied, name)
        np.testing.assert_array_equal(first, again)


def test_no_document_is_scored_by_a_model_that_it_taught(tmp_path, examples):
    """Labels at random: what is scored is chance, for the examples themselves too."""
    ids = np.random.default_rng(0).zipf(1.3, (600, 40)) % 3000
    texts = [" ".join(f"w{i}" for i in row[n % 3 :]) for n, row in enumerate(ids.tolist())]
    examples |= {"edited": ("one.jsonl",), "web": ("two.jsonl",)}
    for name, part in (("one", texts[:300]), ("two", texts[300:])):
        lines = "".join(f"{json.dumps({'text': text})}\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    model, summary = quality.learn(QualityConfig("corpus", "output", **examples))
    edited = model.parts(pa.array(texts, pa.large_string()))[:, 2]
    share = (edited[:300, None] > edited[None, 300:]).mean()
    assert abs(share - 0.5) < 0.07  # three standard errors
    np.testing.assert_allclose(summary["edited"]["auc_out_of_fold"], share, atol=1e-6)


def test_samples_do_not_depend_on_how_many_examples_are_held(tmp_path, examples, monkeypatch):
    config = QualityConfig("corpus", "output", **examples, examples=7, most_pages=5)

    def read():
        pages = Pages.read(
            config.files("pages"), "raw_text", "gold_text", config.most_pages, config.seed
        )
        texts, scores = config.read("scored", "score")
        return pages.visible, pages.main, texts, scores.tolist()

    few = read()
    assert [len(part) for part in few] == [5, 5, 7, 7]
    monkeypatch.setattr(of_files, "HELD", 1000)
    assert read() == few


def test_examples_that_give_no_scale_or_no_score_are_refused(tmp_path, examples):
    (tmp_path / "alike.jsonl").write_text(
        "".join(f"{json.dumps({'text': f'one two three {i}'})}\n" for i in range(9))
    )
    with pytest.raises(ArtifactError, match="no scale for length"):
        quality.learn(QualityConfig("c", "o", **examples | {"web": ("alike.jsonl",)}))
    (tmp_path / "nan.jsonl").write_text('{"text": "a b", "score": NaN}\n')
    with pytest.raises(SourceError, match="not a finite number"):
        quality.learn(QualityConfig("c", "o", **examples | {"scored": ("nan.jsonl",)}))


def test_settings_that_teach_nothing_are_refused(examples):
    with pytest.raises(ValueError, match="set the four, or"):
        QualityConfig("corpus", "output", **{**examples, "web": ()})
    with pytest.raises(ValueError, match="set the four, or"):
        QualityConfig("corpus", "output", model="model", **examples)
    QualityConfig("corpus", "output", model="model")
