"""Splitting of long documents: exact, bounded, counted, and the same however it is made."""

from __future__ import annotations

import gzip
import json
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.corpus import ingest, splitting
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import load_corpus
from pruning.corpus.sources import JsonlSource
from pruning.corpus.vocabulary import Vocabulary
from pruning.store import parallel
from tests.pruning.corpus.test_corpus import all_columns, files_of

PARTS = ("source_document", "part", "parts")


def together(made) -> dict[str, str]:
    """Source document -> its parts in order, concatenated; checks that the numbers are whole."""
    rows = all_columns(made, "text", *PARTS)
    texts: dict[str, list[str]] = {}
    for text, origin, part, parts in zip(*rows.values(), strict=True):
        of = texts.setdefault(origin, [])
        of.append(text)
        assert int(part) == len(of) <= int(parts)
    ends = dict(zip(rows["source_document"], rows["parts"], strict=True))
    assert {origin: len(of) for origin, of in texts.items()} == {
        origin: int(parts) for origin, parts in ends.items()
    }
    return {origin: "".join(of) for origin, of in texts.items()}


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(["a word ", "\n\n", "\u200b" * 40, " " * 70, "字" * 90, "ﷺ", "End. ", "🙂"])
        | st.text(max_size=20),
        max_size=60,
    ).map("".join),
    most=st.integers(splitting.LEAST_TOKENS, 160),
    of_bytes=st.booleans(),
)
def test_parts_are_the_text_and_have_at_most_so_many_tokens(
    small_vocabulary_file, text, most, of_bytes
):
    vocabulary = Vocabulary.from_file("bytes" if of_bytes else small_vocabulary_file)

    def count(text: str) -> int:
        return len(vocabulary.encode(text))

    n = count(text)
    parts = splitting.split(text, n, most, count)
    assert "".join(parts) == text
    assert all(count(part) <= most for part in parts)
    assert all(map(count, parts)) or n == 0
    assert n > most or len(parts) <= 1


def test_the_least_number_of_tokens_holds_any_character():
    sizes = [
        len(unicodedata.normalize(form, chr(i)).encode("utf-8", "replace"))
        for form in ("NFKC", "NFKD")
        for i in range(sys.maxunicode + 1)
    ]
    assert max(sizes) == 33 < splitting.LEAST_TOKENS


def test_an_end_without_tokens_belongs_to_the_part_before():
    """Also where a tokenizer counts a token for many spaces, if they follow letters."""

    def count(text: str) -> int:
        letters = len(text.rstrip())
        return letters + (0 < letters < len(text) - 150)

    text = "x" * 64 + " " * 200
    assert splitting.split(text, count(text), 64, count) == [text]


def test_parts_end_with_paragraphs_and_are_about_equal():
    paragraph = " ".join(["word"] * 40) + ".\n\n"
    text = paragraph * 20
    parts = splitting.split(text, len(text.split()), 200, lambda t: len(t.split()))
    assert all(part.endswith(".\n\n") for part in parts)
    sizes = [len(part.split()) for part in parts]
    assert len(parts) <= 6 and min(sizes) >= 80


def test_a_split_corpus_leads_back_to_its_source(make_corpus, records, tmp_path):
    long = "A sentence of some words that goes on. " * 200
    shards = [[*records(5, 1), {"text": long, "url": "http://a.org/x"}], [{"text": long}]]
    whole = make_corpus(tmp_path / "whole", shards)
    assert not set(PARTS) & set(whole.metadata)
    made = make_corpus(tmp_path / "split", shards, max_document_tokens=128)
    assert made.metadata[-3:] == list(PARTS)
    assert max(all_columns(made, "n_tokens")["n_tokens"]) <= 128
    names = [f"part-00{i}.jsonl.gz:{row + 1}" for i in (0, 1) for row in range(len(shards[i]))]
    texts = [record["text"] for shard in shards for record in shard]
    assert list(together(made).values()) == texts
    assert [name.replace(".gz", "") for name in together(made)] == [
        name.replace(".gz", "") for name in names
    ]
    rows = all_columns(made, "doc_id", "url", "parts", "part", "tokens", "text")
    assert rows["doc_id"][:5] == [0, 1, 2, 3, 4] and rows["parts"][:5] == ["1"] * 5
    assert {u for u, p in zip(rows["url"][5:], rows["parts"][5:], strict=True) if u and p != "1"}
    for ids, text in zip(rows["tokens"], rows["text"], strict=True):
        assert ids == made.vocabulary.encode(text)
    counts = made.artifact.manifest.counts
    split = counts["split"]
    assert split["documents"] == 2
    assert counts["rows"] == counts["documents"] - split["parts"] + split["documents"]
    assert counts["bytes"] == whole.artifact.manifest.counts["bytes"]
    made.artifact.verify()


def test_only_the_parts_of_long_documents_are_encoded_again(
    make_corpus, records, tmp_path, monkeypatch
):
    encoded: list[str] = []
    encode_batch = Vocabulary.encode_batch

    def recorded(self, texts):
        encoded.extend(texts)
        return encode_batch(self, texts)

    monkeypatch.setattr(Vocabulary, "encode_batch", recorded)
    rows = [*records(5, 1), {"text": "some words of a text. " * 50}, *records(5, 2)]
    made = make_corpus(tmp_path, [rows], max_document_tokens=128, workers=1)
    shard = all_columns(made, "text", "tokens", "parts")
    parts = [t for t, n in zip(shard["text"], shard["parts"], strict=True) if n != "1"]
    assert len(parts) > 1
    assert sorted(encoded) == sorted([row["text"] for row in rows] + parts)
    assert shard["tokens"] == encode_batch(made.vocabulary, shard["text"])


def test_workers_and_beam_split_alike(records, small_vocabulary_file, tmp_path):
    for shard in range(3):
        texts = [
            record["text"] * (1 + 9 * (row % 5)) for row, record in enumerate(records(20, shard))
        ]
        with gzip.open(tmp_path / f"{shard}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)

    def made(name: str, **settings) -> dict[str, bytes]:
        config = IngestConfig(
            JsonlSource((str(tmp_path / "*.jsonl.gz"),)),
            str(small_vocabulary_file),
            str(tmp_path / name),
            max_document_tokens=64,
            **settings,
        )
        ingest.run(config)
        assert load_corpus(config.output).artifact.manifest.counts["split"]["documents"] > 0
        return files_of(tmp_path / name)

    alone = made("one", workers=1)
    assert made("three", workers=3) == alone
    pytest.importorskip("apache_beam")
    with parallel.using("beam"):
        assert made("beam") == alone


def test_a_setting_without_splitting_changes_no_identity(make_corpus, records, tmp_path):
    shard = [records(5, 1)]
    (tmp_path / "a").mkdir()
    first = make_corpus(tmp_path / "a", shard)
    assert "max_document_tokens" not in first.artifact.manifest.config
    with pytest.raises(ValueError, match="max_document_tokens is at least 64"):
        IngestConfig(JsonlSource(("x",)), "bytes", "out", max_document_tokens=3)
    with pytest.raises(ValueError, match="'part' would be there twice"):
        IngestConfig(
            JsonlSource(("x",)), "bytes", "out", metadata=("part",), max_document_tokens=64
        )
