"""Training a vocabulary: T5's ids, a fair sample, the same model again, words that stay whole."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pruning.corpus import vocabulary_training
from pruning.corpus.sources import JsonlSource
from pruning.corpus.sources.document import SourceError
from pruning.corpus.vocabulary import EOS_ID, PAD_ID, UNKNOWN_ID, Vocabulary, load_vocabulary
from pruning.corpus.vocabulary_training import TrainVocabularyConfig, sample, train


@pytest.fixture(scope="module")
def source(tmp_path_factory, records) -> JsonlSource:
    directory = tmp_path_factory.mktemp("source")
    for shard in range(4):
        lines = [json.dumps({"text": f"{shard} {r['text']}"}) for r in records(400, shard)]
        (directory / f"{shard}.jsonl").write_text("\n".join([*lines, "no json"]))
    return JsonlSource((str(directory),))


def config_of(source, **settings) -> TrainVocabularyConfig:
    return TrainVocabularyConfig(source=source, **{"output": "unused", "size": 240} | settings)


def test_the_model_has_t5s_special_ids(small_vocabulary_file):
    vocabulary = Vocabulary.from_file(small_vocabulary_file)
    processor = vocabulary._processor
    assert [processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()] == [
        PAD_ID,
        EOS_ID,
        UNKNOWN_ID,
        -1,
    ]
    assert vocabulary.base_size == 240 and vocabulary.size == 340
    assert vocabulary.encode("river </s> <pad>").count(EOS_ID) == 0
    assert vocabulary.encode("漢") == [vocabulary.encode("漢")[0], UNKNOWN_ID]


def test_words_are_single_pieces_and_longer_words_stay_whole(small_vocabulary_file):
    vocabulary = Vocabulary.from_file(small_vocabulary_file)
    assert vocabulary.token("yes") != vocabulary.token("no")
    assert vocabulary.pieces(vocabulary.encode("not now")) != [" no", "t", " no", "w"]


def test_the_same_again_and_ingest_takes_the_directory(source, tmp_path, make_corpus):
    settings = {"size": 220, "sample_bytes": 40_000}
    made = [
        vocabulary_training.run(config_of(source, output=str(tmp_path / name), **settings))
        for name in "ab"
    ]
    assert made[0].digest == made[1].digest
    model = (tmp_path / "a" / "vocabulary.model").read_bytes()
    assert model == (tmp_path / "b" / "vocabulary.model").read_bytes()
    table = made[0].read(0)
    vocabulary = Vocabulary("sentencepiece", model)
    assert [piece.replace("▁", " ") for piece in table["piece"].to_pylist()] == vocabulary.pieces(
        range(220)
    )
    assert made[0].manifest.summary["vocabulary"] == vocabulary.describe()
    ingested = make_corpus(
        tmp_path / "c", [[{"text": "yes or no"}]], vocabulary=str(tmp_path / "a")
    )
    assert ingested.vocabulary.digest == load_vocabulary(str(tmp_path / "a")).digest
    other = vocabulary_training.run(
        config_of(source, output=str(tmp_path / "c2"), seed=1, **settings)
    )
    assert other.digest != made[0].digest


def test_the_sample_is_fair_and_counted(source):
    """Every document is as likely as any other, up to the size of the sample."""
    files = source.files()
    sizes = [source.fingerprint(file).n_bytes for file in files]
    shares = []
    for seed in range(200):
        texts, counts = sample(
            source, files, sizes, config_of(source, sample_bytes=8_000, seed=seed)
        )
        assert counts == {
            "seen": counts["seen"],
            "sampled": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "malformed": counts["malformed"],
        }
        assert 8_000 - 300 < counts["bytes"] <= 8_000
        assert counts["seen"] < 1600  # four times the sample is enough: not all files were read
        shares += [int(text.partition(" ")[0]) for text in texts]
    share = np.bincount(shares, minlength=4) / len(shares)
    np.testing.assert_allclose(share, 0.25, atol=0.1)
    everything, counts = sample(source, files, sizes, config_of(source, sample_bytes=10**9))
    assert counts["seen"] == counts["sampled"] == len(everything) == 1600
    assert counts["malformed"] == 4
    order = [int(text.partition(" ")[0]) for text in everything[:200]]
    assert len(set(order)) == 4  # mixed, not file after file


def test_too_little_text_is_said(source, tmp_path):
    with pytest.raises(
        SourceError, match=r"cannot train 5,000 pieces .* TrainVocabulary\.size lower"
    ):
        train(["a few words"] * 10, 5_000)
