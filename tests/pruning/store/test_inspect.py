"""Inspect: says what is there, also of unfinished work, and lets no text give orders."""

from __future__ import annotations

import json

import pytest

from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.sources import JsonlSource
from pruning.store import inspect
from pruning.store.artifact import is_finished
from pruning.store.manifest import ArtifactError


def test_a_corpus_is_shown_with_counts_and_rows(make_corpus, records, tmp_path):
    shard = [*records(9, 1), {"text": ""}]
    made = make_corpus(tmp_path, [records(20, 2), shard])
    shown = list(inspect.lines(made.artifact.path, rows=2, shard=1, verify=True))
    text = "\n".join(shown)
    manifest = made.artifact.manifest
    assert shown[0].endswith(f"corpus, 29 rows, {manifest.tokens:,} tokens in 2 shards")
    assert f"digest {manifest.digest}" in shown
    assert "  dropped:\n    empty: 1" in text
    assert "verified: 3 files are as they were written" in shown
    assert f"  doc_id: {1 << 32}" in shown and f"  doc_id: {(1 << 32) + 1}" in shown
    assert text.count("  doc_id: ") == 2
    assert f"  text: {shard[0]['text']}" in text
    with pytest.raises(ArtifactError, match="has shards 0 to 1, no 2"):
        list(inspect.lines(made.artifact.path, shard=2))


def test_unfinished_work_is_shown(make_corpus, records, tmp_path, monkeypatch):
    made_one = ingest.ingest_shard

    def fails(plan, shard, report):
        if shard == 2:
            raise OSError("the disk is full")
        made_one(plan, shard, report)

    monkeypatch.setattr(ingest, "ingest_shard", fails)
    with pytest.raises(OSError, match="full"):
        make_corpus(tmp_path, [records(5, i) for i in range(4)])
    shown = list(inspect.lines(tmp_path / "corpus", rows=1, verify=True))
    assert shown[0].endswith("corpus, unfinished: 2 of 4 shards are done")
    assert "so far 10 rows" in shown[1]
    assert "verified: 2 shards are as they were written" in shown
    assert any(line.startswith("  text: ") for line in shown)
    (tmp_path / "corpus" / "data-00001-of-00004.parquet").write_bytes(b"damage")
    with pytest.raises(ArtifactError, match=r"data-00001-of-00004\.parquet is damaged"):
        list(inspect.lines(tmp_path / "corpus", verify=True))


def test_damage_is_found_and_named(make_corpus, records, tmp_path):
    made = make_corpus(tmp_path, [records(50, 1)])
    file = made.artifact.path / made.artifact.manifest.shards[0].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=r"data-00000-of-00001\.parquet is damaged"):
        list(inspect.lines(made.artifact.path, rows=0, verify=True))


@pytest.mark.parametrize("what", ["nothing", "empty directory", "file"])
def test_what_is_no_artifact_is_said(tmp_path, what):
    path = tmp_path / "it"
    if what == "empty directory":
        path.mkdir()
    if what == "file":
        path.write_text("text")
    with pytest.raises(ArtifactError, match="it is not an artifact"):
        list(inspect.lines(path))


def test_text_gives_no_orders_to_the_terminal(make_corpus, tmp_path):
    evil = "\x1b[2J\x1b]0;title\x07 [bold]x[/] \x9b31m ünïcode 漢字 \u202egnp\r\n end"
    made = make_corpus(tmp_path, [[{"text": evil, "url": evil}]], metadata=("url",))
    shown = "\n".join(inspect.lines(made.artifact.path))
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "\\x1b[2J" in shown and "ünïcode 漢字" in shown and "\\u202e" in shown


def test_long_values_are_cut_and_say_so(small_vocabulary_file, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "river " * 5000}))
    config = IngestConfig(
        JsonlSource((str(tmp_path / "in.jsonl"),)),
        str(small_vocabulary_file),
        str(tmp_path / "out"),
        workers=1,
    )
    ingest.run(config)
    shown = list(inspect.lines(tmp_path / "out"))
    assert all(len(line) < 400 for line in shown)
    assert any("(30,000 characters)" in line for line in shown)
    assert any("in all)" in line for line in shown if line.startswith("  tokens: "))
    assert is_finished(tmp_path / "out")
