"""The real T5 vocabulary: known ids, sentinels counting down, round trips, clear refusals."""

from __future__ import annotations

import io

import pytest
import sentencepiece

from pruning import vocabulary
from pruning.vocabulary import Vocabulary, VocabularyError


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


def test_a_vocabulary_without_t5_ids_is_refused(tmp_path):
    model = io.BytesIO()
    text = ["the quick brown fox jumps over the lazy dog"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=30, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(VocabularyError, match=r"pad id -1 and EOS id 2; T5 has 0 and 1"):
        Vocabulary.from_file(tmp_path / "other.model")
    (tmp_path / "junk.model").write_bytes(b"not a model")
    with pytest.raises(VocabularyError, match=r"junk\.model is not a SentencePiece model"):
        Vocabulary.from_file(tmp_path / "junk.model")
    with pytest.raises(VocabularyError, match="does not exist"):
        Vocabulary.from_file(tmp_path / "absent.model")


def test_digests_tell_vocabularies_apart(t5, real_data):
    other = Vocabulary("sentencepiece", t5.model, extra_ids=0)
    assert other.digest != t5.digest
    with pytest.raises(VocabularyError, match="scores has the vocabulary"):
        vocabulary.require_same(other, t5.digest, "scores")
