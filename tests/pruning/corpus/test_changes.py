"""Edits of input files that their fingerprints, which sample large files, do not show."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pruning.corpus import ingest
from pruning.corpus.sources import JsonlSource
from pruning.corpus.sources.document import SourceError
from pruning.corpus.sources.files import SAMPLED_FROM, fingerprint

EDITED_AT = 1 << 20 | 1 << 17  # between the first two blocks of a fingerprint


@pytest.fixture
def large(tmp_path) -> Path:
    file = tmp_path / "input" / "large.jsonl"
    file.parent.mkdir()
    line = json.dumps({"text": "word " * 100_000}) + "\n"
    file.write_text(line * (5 * SAMPLED_FROM // 4 // len(line)))
    return file


def edit(file: Path) -> None:
    before = fingerprint(str(file))
    with file.open("r+b") as stream:
        stream.seek(EDITED_AT)
        stream.write(b"x" if stream.read(1) != b"x" else b"y")
    assert fingerprint(str(file)) == before


def config(file: Path, **settings) -> ingest.IngestConfig:
    output = str(file.parents[1] / "corpus")
    return ingest.IngestConfig(JsonlSource((str(file),)), "bytes", output, workers=1, **settings)


def test_an_edit_after_the_end_is_noticed_and_a_copy_is_the_same(large):
    made = ingest.run(config(large))
    shutil.copy(large, large.with_name("copy"))
    large.with_name("copy").replace(large)
    assert ingest.run(config(large)) == made
    edit(large)
    with pytest.raises(SourceError, match=r"large\.jsonl was edited after"):
        ingest.run(config(large))


def test_an_edit_between_two_runs_is_noticed(large):
    halves = config(large, shards_per_file=2)
    ingest.ingest_shard(ingest.prepare(halves), 0, lambda *_: None)
    edit(large)
    with pytest.raises(SourceError, match=r"large\.jsonl was edited after"):
        ingest.run(halves)


def test_an_edit_between_two_workers_is_noticed(large):
    halves = config(large, shards_per_file=2)
    plan = ingest.prepare(halves)
    ingest.ingest_shard(plan, 0, lambda *_: None)
    edit(large)
    ingest.ingest_shard(plan, 1, lambda *_: None)
    with pytest.raises(SourceError, match="between the shards"):
        ingest._summary(plan)
