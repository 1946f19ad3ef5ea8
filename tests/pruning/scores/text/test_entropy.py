"""H_f against its definition, and H_q + H_f as a selection."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from pruning.corpus.reader import load_corpus
from pruning.scores.terms import Term
from pruning.scores.text import entropy
from pruning.scores.text.entropy import EntropyConfig
from pruning.selection.select import SelectConfig
from pruning.selection.select import run as select
from pruning.selection.strategies import Split, Top

TEXTS = [
    ["the cat sat on the mat", "The the the the", "a zymurgist zigzagged", ""],
    ["on the mat, on the cat!", "rare quokka"],
]


def surprisal_of(documents):
    """-log frequency by counting, for lists of words."""
    counts = Counter(word for words in documents for word in words)
    total = counts.total()
    return {word: -np.log(count / total) for word, count in counts.items()}


def split(unit, text):
    return re.findall(r"\w+|[^\w\s]+", text.lower()) if unit == "word" else list(text.encode())


@pytest.mark.parametrize("unit", ["token", "word"])
@pytest.mark.parametrize("workers", [1, 2])
def test_h_f_is_the_mean_surprisal_of_the_words(tmp_path, write, column, unit, workers):
    write.corpus(tmp_path / "corpus", TEXTS)
    scores = entropy.run(
        EntropyConfig(str(tmp_path / "corpus"), str(tmp_path / "h_f"), unit=unit, workers=workers)
    )
    documents = [split(unit, text) for texts in TEXTS for text in texts]
    table = surprisal_of(documents)
    expected = [np.mean([table[w] for w in words]) if words else np.nan for words in documents]
    np.testing.assert_allclose(column(scores, "h_f"), expected, rtol=1e-6)
    # The entropy of the corpus is the mean of H_f over words.
    lengths = [len(words) for words in documents]
    mean = np.nansum(np.multiply(expected, lengths)) / sum(lengths)
    assert scores.manifest.summary["corpus_entropy"] == pytest.approx(mean, rel=1e-9)


def test_frequencies_are_those_of_the_selection(tmp_path, write, column):
    corpus = write.corpus(tmp_path / "corpus", TEXTS)
    kept = select(SelectConfig(str(tmp_path / "corpus"), str(tmp_path / "half"), Split(0.0, 0.5)))
    ids = {i for k in range(2) for i in kept.read(k)["doc_id"].to_pylist()}
    config = EntropyConfig(
        str(tmp_path / "corpus"), str(tmp_path / "h_f"), within=str(tmp_path / "half"), workers=1
    )
    scores = entropy.run(config)
    all_ids = np.concatenate(
        [corpus.columns(k, ["doc_id"])["doc_id"].to_numpy() for k in range(2)]
    ).tolist()  # fmt: skip
    texts = dict(zip(all_ids, [t for part in TEXTS for t in part], strict=True))
    table = surprisal_of([split("token", texts[i]) for i in ids])
    expected = [
        np.mean([table[w] for w in split("token", texts[i])]) if i in ids and texts[i] else np.nan
        for i in all_ids
    ]
    np.testing.assert_allclose(column(scores, "h_f"), expected, rtol=1e-6)


def test_the_sum_with_h_q_is_two_terms_of_a_selection(tmp_path, write, column):
    corpus = write.corpus(tmp_path / "corpus", TEXTS)
    h_f = entropy.run(EntropyConfig(str(tmp_path / "corpus"), str(tmp_path / "h_f"), workers=1))
    random = np.random.default_rng(0)
    nll = [random.uniform(5, 60, corpus.documents(k)).astype(np.float32) for k in range(2)]
    counts = [corpus.columns(k, ["n_tokens"])["n_tokens"].to_numpy() for k in range(2)]
    probe = write.scores(
        tmp_path / "probe", corpus, {"nll": nll, "n_scored_tokens": counts}, {(0, 3): "empty"}
    )
    total = column(h_f, "h_f") + column(probe, "nll") / column(probe, "n_scored_tokens")
    kept = select(
        SelectConfig(
            corpus=str(tmp_path / "corpus"),
            output=str(tmp_path / "kept"),
            strategy=Top(),
            scores={"probe": str(tmp_path / "probe"), "words": str(tmp_path / "h_f")},
            score=(Term("nll_mean", scores="probe"), Term("column:h_f", scores="words")),
            keep_documents=3,
        )
    )
    ids = np.concatenate(
        [
            load_corpus(corpus.artifact.path).columns(k, ["doc_id"])["doc_id"].to_numpy()
            for k in range(2)
        ]
    )
    best = np.sort(ids[np.argsort(-np.nan_to_num(total, nan=-1.0))[:3]])
    found = np.concatenate([kept.read(k)["doc_id"].to_numpy() for k in range(2)])
    np.testing.assert_array_equal(found, best)
