"""The real T5 vocabulary: known ids, sentinels counting down, round trips, clear refusals."""

from __future__ import annotations

import io

import numpy as np
import pytest
import sentencepiece

from models.config import T5Config
from models.model import Model
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.data.objectives import SpanCorruption
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.scorer import Documents


@pytest.fixture(scope="module")
def t5(t5_vocabulary_file):
    return Vocabulary.from_file(t5_vocabulary_file)


def test_t5_has_its_published_ids(t5):
    assert t5.size == 32_100
    assert t5.token("yes") == 4273 and t5.token("no") == 150
    assert [t5.sentinel(i) for i in (0, 1, 99)] == [32_099, 32_098, 32_000]
    assert t5.encode("Hello world") == [8774, 296]


def test_decoding_shows_sentinels_and_padding_rows(t5):
    ids = [*t5.encode("Hello"), t5.sentinel(0), *t5.encode("world"), 32_127]
    assert t5.decode(ids) == "Hello<extra_id_0>world<?>"
    assert t5.pieces(t5.encode("Hello world")) == [" Hello", " world"]


def test_batches_agree_with_single_texts(t5):
    texts = ["One text.", "", "Another\none, with ünïcode 漢字", "  spaces  "]
    assert t5.encode_batch(texts) == [t5.encode(text) for text in texts]


def test_answers_must_be_single_tokens(t5):
    with pytest.raises(VocabularyError, match="'antidisestablishment' is not a single token"):
        t5.token("antidisestablishment")
    with pytest.raises(VocabularyError, match="not a single token"):
        t5.token("漢")
    with pytest.raises(VocabularyError, match="sentinel 100 is wanted"):
        t5.sentinel(100)


def test_bytes_are_byt5():
    byt5 = Vocabulary.from_file("bytes")
    assert byt5.size == 384
    assert byt5.encode("aé") == [100, 198, 172]
    assert byt5.decode(byt5.encode("aé漢")) == "aé漢"


def test_other_layouts_have_other_special_ids_and_no_sentinels(t5, tmp_path):
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=30, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    other = Vocabulary.from_file(tmp_path / "other.model")
    assert (other.pad_id, other.bos_id, other.eos_id) == (None, 1, 2)
    assert (other.num_sentinels, other.start_id, other.size) == (0, 1, 30)
    with pytest.raises(VocabularyError, match="no sentinels"):
        other.sentinel(0)
    assert (t5.pad_id, t5.bos_id, t5.eos_id, t5.start_id) == (0, None, 1, 0)
    (tmp_path / "junk.model").write_bytes(b"not a model")
    with pytest.raises(VocabularyError, match=r"junk\.model is not a SentencePiece model"):
        Vocabulary.from_file(tmp_path / "junk.model")
    with pytest.raises(VocabularyError, match="does not exist"):
        Vocabulary.from_file(tmp_path / "absent.model")


def test_digests_tell_vocabularies_apart(t5, real_data):
    other = Vocabulary("sentencepiece", t5.model, extra_ids=0)
    assert other.digest != t5.digest


def trained_with(symbols, **more) -> bytes:
    model = io.BytesIO()
    text = [f"the quick brown fox {i} jumps over the lazy dog" for i in range(80)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=60 + len(symbols),
        user_defined_symbols=symbols, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        hard_vocab_limit=False, **more,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("layout", ["mt5", "umt5", "byt5"])
def test_span_training_and_likelihood_use_the_sentinels_of_the_layout(layout, tmp_path):
    """mT5's are pieces of its model, umT5's 300 ids behind it."""
    if layout == "byt5":
        vocabulary = Vocabulary.from_file("bytes")
        expected = [383 - i for i in range(9)]
        assert vocabulary.num_sentinels == 125
    else:
        symbols = [f"<extra_id_{i}>" for i in reversed(range(100))] if layout == "mt5" else []
        (tmp_path / "spiece.model").write_bytes(trained_with(symbols))
        vocabulary = Vocabulary.from_file(
            tmp_path / "spiece.model", 300 if layout == "umt5" else None
        )
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
        if layout == "mt5":
            expected = [pieces.PieceToId(f"<extra_id_{i}>") for i in range(9)]
            assert vocabulary.num_sentinels == 100 and vocabulary.extra_ids == 0
        else:
            expected = [pieces.GetPieceSize() + 299 - i for i in range(9)]
            assert vocabulary.num_sentinels == 300
    names = set(range(vocabulary.sentinel(vocabulary.num_sentinels - 1), expected[0] + 1))

    text = np.tile(vocabulary.encode("the lazy dog jumps over"), 20)[:100].astype(np.int32)
    assert not names & set(text.tolist())
    (example,) = SpanCorruption().examples(text[None], 0, np.array([7]), vocabulary)
    for side in example.values():
        assert [i for i in side.tolist() if i in names] == expected[:5]
        assert side[-1] == vocabulary.eos_id == 1

    config = T5Config(
        vocab_size=vocabulary.size, d_model=8, d_ff=8, num_heads=1, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    scorer = Likelihood("span", window=100, overlap=20)  # 7 masks, of 5 spans at most
    windows = scorer.prepare(Model(config), vocabulary).windows(Documents.of([text]))
    encoder, decoder = windows.sides
    for w in range(len(windows)):
        read = encoder.features["encoder_input_tokens"][encoder.offsets[w] : encoder.offsets[w + 1]]
        at = slice(decoder.offsets[w], decoder.offsets[w + 1])
        targets = decoder.features["decoder_target_tokens"][at]
        shown = [i for i in read.tolist() if i in names]
        assert shown == [i for i in targets.tolist() if i in names] == expected[: len(shown)]
        assert read[-1] == 1
    assert np.array_equal(np.sort(windows.source[windows.source >= 0]), np.arange(len(text)))


def test_sentinels_that_count_up_are_not_taken_for_mt5s(tmp_path):
    symbols = [f"<extra_id_{i}>" for i in range(100)]
    (tmp_path / "up.model").write_bytes(trained_with(symbols))
    vocabulary = Vocabulary.from_file(tmp_path / "up.model")
    assert vocabulary.num_sentinels == 1
    with pytest.raises(VocabularyError, match="sentinel 1 is wanted"):
        vocabulary.sentinel(1)
