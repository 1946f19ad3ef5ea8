"""DSIR and the quality classifier as stages, on planted text and on real text."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest

from pruning.corpus.reader import load_corpus
from pruning.scores.text import classifier, dsir
from pruning.scores.text.classifier import ClassifierConfig, auc
from pruning.scores.text.dsir import DSIRConfig
from pruning.scores.text.hashing import Features
from pruning.selection.select import SelectConfig
from pruning.selection.select import run as select
from pruning.selection.strategies import Softmax, Split, Threshold, Top
from pruning.store.artifact import load_artifact
from pruning.store.manifest import ArtifactError


def texts_about(topic: str, n: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    own = [f"{topic}{i}" for i in range(60)]
    common = [f"word{i}" for i in range(200)]
    return [
        " ".join(random.choice(own if random.random() < 0.3 else common) for _ in range(30))
        for _ in range(n)
    ]


@pytest.fixture
def world(tmp_path, write):
    """A corpus of which every third document is about cats, and a target about cats."""
    cats, dogs = texts_about("cat", 60, 0), texts_about("dog", 120, 1)
    mixed = [cats[i // 3] if i % 3 == 0 else dogs[i - i // 3 - 1] for i in range(180)]
    corpus = write.corpus(tmp_path / "corpus", [mixed[:100], [], [*mixed[100:], ""]])
    write.corpus(tmp_path / "target", [texts_about("cat", 40, 2)])
    return tmp_path, corpus, mixed


def test_dsir_is_its_definition(world, column):
    path, _, mixed = world
    scores = dsir.run(
        DSIRConfig(str(path / "corpus"), str(path / "target"), str(path / "scores"), features=
        Features(buckets=1 << 20), smoothing=0.5, workers=1)
    )  # fmt: skip

    def grams(text):
        words = re.findall(r"\w+|[^\w\s]+", text.lower())
        return words + list(itertools.pairwise(words))

    raw = Counter(gram for text in mixed for gram in grams(text))
    wanted = Counter(gram for text in texts_about("cat", 40, 2) for gram in grams(text))
    buckets = 1 << 20

    def log_ratio(gram):
        p = (wanted[gram] + 0.5) / (wanted.total() + 0.5 * buckets)
        q = (raw[gram] + 0.5) / (raw.total() + 0.5 * buckets)
        return math.log(p / q)

    expected = [sum(map(log_ratio, grams(text))) for text in mixed]
    found = column(scores, "dsir_sum")
    # Of some 20,000 kinds of n-grams a few hundred share a bucket of a million.
    assert np.corrcoef(found[:-1], expected)[0, 1] > 0.999
    np.testing.assert_allclose(np.median(found[:-1] - expected), 0, atol=0.2)
    lengths = [len(grams(text)) for text in mixed]
    np.testing.assert_array_equal(column(scores, "n_ngrams")[:-1], lengths)
    np.testing.assert_allclose(column(scores, "dsir_mean")[:-1], found[:-1] / lengths, rtol=1e-4)
    assert np.isnan(found[-1])  # the empty document
    assert scores.manifest.counts["documents"] == {"empty": 1, "ok": 180}
    assert scores.manifest.summary["ngrams"]["raw"] == sum(lengths)


def test_dsir_picks_the_planted_topic(world, column):
    path, _, _mixed = world
    dsir.run(DSIRConfig(str(path / "corpus"), str(path / "target"), str(path / "dsir"), workers=1))
    for strategy, least in ((Top(), 0.95), (Softmax(1.0), 0.95)):
        kept = select(
            SelectConfig(
                corpus=str(path / "corpus"),
                output=str(path / type(strategy).__name__),
                strategy=strategy,
                scores=str(path / "dsir"),
                score="column:dsir_sum",
                keep_documents=60,
            )
        )
        rows = [kept.read(k)["doc_id"].to_numpy() for k in range(3)]
        places = np.concatenate([rows[0], (rows[2] & 0xFFFF_FFFF) + 100])
        assert (places % 3 == 0).mean() >= least  # a third by chance


def test_processes_and_restarts_do_not_matter(world):
    path = world[0]
    config = DSIRConfig(str(path / "corpus"), str(path / "target"), str(path / "one"), workers=1)
    one = dsir.run(config)
    two = dsir.run(dataclasses.replace(config, output=str(path / "two"), workers=2))
    assert one.manifest.shards == two.manifest.shards
    assert dsir.run(config).digest == one.digest


def test_within_leaves_the_others_out(world, column):
    path, corpus, _ = world
    half = select(SelectConfig(str(path / "corpus"), str(path / "half"), Split(0.0, 0.5)))
    scores = dsir.run(
        DSIRConfig(
            str(path / "corpus"), str(path / "target"), str(path / "dsir"),
            within=str(path / "half"), workers=1,
        )
    )  # fmt: skip
    assert scores.manifest.counts["documents"].get("ok") == half.manifest.rows
    kept = np.concatenate([half.read(k)["doc_id"].to_numpy() for k in range(3)])
    ids = np.concatenate(
        [corpus.columns(k, ["doc_id"])["doc_id"].to_numpy() for k in range(3)]
    )  # fmt: skip
    np.testing.assert_array_equal(~np.isnan(column(scores, "dsir_sum")), np.isin(ids, kept))


def test_classifier_learns_what_is_good(world, column):
    path = world[0]
    config = ClassifierConfig(
        str(path / "corpus"), str(path / "quality"), good=str(path / "target"), workers=1
    )
    scores = classifier.run(config)
    found = column(scores, "quality")[:180]
    is_cat = np.arange(180) % 3 == 0
    assert auc(found[is_cat], found[~is_cat]) > 0.95
    summary = scores.manifest.summary
    assert summary["examples"] == {"good": 40, "random": 181}
    assert "not how good a document is" in summary["held_out_auc_tells"]
    # A third of the random documents are cats: of as many good and random cats, 3 in 4 are good.
    p = column(scores, "quality_probability")[:180]
    assert 0.6 < p[is_cat].mean() < 0.9 and p[~is_cat].mean() < 0.4
    # The model applied to the same texts in another corpus gives the same scores.
    again = classifier.run(
        ClassifierConfig(
            str(path / "corpus"), str(path / "again"), model=str(scores.path), workers=2
        )
    )
    np.testing.assert_array_equal(column(again, "quality"), column(scores, "quality"))


def test_examples_have_no_advantage(tmp_path, write, column):
    """Random documents called good: the top tenth holds a chance share of them."""
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in random.integers(0, 500, 60)) for _ in range(2000)]
    corpus = write.corpus(tmp_path / "corpus", [texts])
    called = random.random(2000) < 0.3
    write.scores(tmp_path / "called", corpus, {"good": [called.astype(np.float32)]})
    select(
        SelectConfig(
            str(tmp_path / "corpus"), str(tmp_path / "good"), Threshold(low=0.5),
            scores=str(tmp_path / "called"), score="column:good",
        )
    )  # fmt: skip
    config = ClassifierConfig(
        str(tmp_path / "corpus"), str(tmp_path / "quality"), good_within=str(tmp_path / "good"),
        examples=400, workers=1,
    )  # fmt: skip
    scores = classifier.run(config)
    found = column(scores, "quality")
    top = np.argsort(-found)[:200]
    error = np.sqrt(called.mean() * (1 - called.mean()) / 200)
    assert abs(called[top].mean() - called.mean()) < 3 * error
    assert abs(scores.manifest.summary["held_out_auc"] - 0.5) < 0.08


def test_explicit_negatives(world, column, write):
    path = world[0]
    write.corpus(path / "bad", [texts_about("dog", 50, 3)])
    scores = classifier.run(
        ClassifierConfig(
            str(path / "corpus"), str(path / "quality"), good=str(path / "target"),
            bad=str(path / "bad"), workers=1,
        )
    )  # fmt: skip
    assert scores.manifest.summary["examples"] == {"good": 40, "bad": 50}
    found = column(scores, "quality")[:180]
    is_cat = np.arange(180) % 3 == 0
    assert auc(found[is_cat], found[~is_cat]) > 0.95


def test_good_documents_of_the_corpus_itself_are_no_random_ones(world, column, write):
    path, corpus, _ = world
    asked = [
        np.where(np.arange(n) % 3 == first, 1.0, 0.0) for n, first in ((100, 0), (0, 0), (81, 2))
    ]
    write.scores(path / "ask", corpus, {"ask": asked})
    select(
        SelectConfig(
            str(path / "corpus"), str(path / "best"), Top(), scores=str(path / "ask"),
            score="column:ask", keep_documents=30,
        )
    )  # fmt: skip
    config = ClassifierConfig(
        str(path / "corpus"), str(path / "quality"), good_within=str(path / "best"), workers=1
    )
    scores = classifier.run(config)
    assert scores.manifest.summary["examples"] == {"good": 30, "random": 151}
    found = column(scores, "quality")[:180]
    is_cat = np.arange(180) % 3 == 0
    assert auc(found[is_cat], found[~is_cat]) > 0.9
    everything = select(SelectConfig(str(path / "corpus"), str(path / "all"), Split(0.0, 1.0)))
    with pytest.raises(ArtifactError, match="both kinds"):
        classifier.run(
            dataclasses.replace(
                config, good_within=str(everything.path), output=str(path / "nothing")
            )
        )
    with pytest.raises(ValueError, match="say what is good"):
        ClassifierConfig(str(path / "corpus"), str(path / "x"))


def test_auc_counts_pairs():
    good, others = np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0])
    assert auc(good, others) == (2 + 1.5 + 1) / 6
    assert auc(good, others[:0]) is None


# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_mix(real_data):
    """A thousand pieces each of novels, film reviews and web pages; another 300 of each."""

    def records(file):
        with gzip.open(real_data / "corpus" / file, "rt") as lines:
            yield from map(json.loads, lines)

    def pieces(texts, n):
        cut = (t[i : i + 1500] for t in texts for i in range(0, min(len(t), 60_000), 1500))
        return [piece for piece, _ in zip(cut, range(n), strict=False)]

    novels = pieces((r["text"] for r in records("books/english_novels_a.jsonl.gz")), 1300)
    reviews = pieces((r["text"][:1500] for r in records("imdb/aclImdb_test_lab.jsonl.gz")), 1300)
    kept = (r["gold_text"] for r in records("web_pages/html_cleaning_pages.jsonl.gz"))
    pages = pieces((text[:1500] for text in kept if text), 1300)
    return {"books": novels, "reviews": reviews, "pages": pages}


@pytest.mark.parametrize("target", ["books", "reviews", "pages"])
def test_dsir_picks_a_domain_out_of_real_text(real_mix, tmp_path, write, column, target):
    corpus = write.corpus(tmp_path / "corpus", [texts[:1000] for texts in real_mix.values()])
    write.corpus(tmp_path / "target", [real_mix[target][1000:]])
    scores = dsir.run(
        DSIRConfig(
            str(tmp_path / "corpus"), str(tmp_path / "target"), str(tmp_path / "dsir"), workers=1
        )
    )
    assert load_corpus(corpus.artifact.path).num_shards == 3
    domain = np.repeat(np.arange(3), 1000)
    for name in ("dsir_sum", "dsir_mean"):
        value = column(scores, name)
        best = np.argsort(-np.nan_to_num(value, nan=-np.inf))[:1000]
        precision = (domain[best] == list(real_mix).index(target)).mean()
        print(f"{target}, {name}: precision {precision:.3f} at a third of the documents")
        assert precision > 0.8  # 0.33 by chance
    load_artifact(tmp_path / "dsir", "scores").verify()
