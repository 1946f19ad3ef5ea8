"""Ingest: every row counted once, tokens those of the text, the same corpus however it was made."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.sources import JsonlSource, TextSource, TfdsSource
from pruning.corpus.sources.document import SourceError
from pruning.corpus.vocabulary import Vocabulary
from pruning.store import parallel
from pruning.store.manifest import ArtifactError, ConfigurationChanged


def files_of(directory: Path) -> dict[str, bytes]:
    """Everything that two runs of the same work must have in common."""
    found = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "measured.json"
    }
    # Somebody may commit between the two.
    manifest = json.loads(found["manifest.json"]) | {"code": None}
    return found | {"manifest.json": json.dumps(manifest).encode()}


def all_columns(made: Corpus, *names: str) -> dict[str, list]:
    tables = [made.columns(shard, names).to_pydict() for shard in range(made.num_shards)]
    return {name: [value for table in tables for value in table[name]] for name in names}


# --------------------------------------------------------------------------------------------------
# What is in it


def test_columns_say_the_same_as_the_text(make_corpus, records, tmp_path):
    shards = [records(30, 1), [], records(2500, 2)]
    made = make_corpus(tmp_path, shards)
    assert made.num_shards == 3
    assert [made.documents(shard) for shard in range(3)] == [30, 0, 2500]
    for shard, expected in enumerate(shards):
        names = ["doc_id", "text", "tokens", "n_tokens", "n_bytes", "text_hash", "source"]
        rows = made.columns(shard, names).to_pylist()
        assert [row["text"] for row in rows] == [record["text"] for record in expected]
        for index, row in enumerate(rows):
            encoded = row["text"].encode()
            assert row["doc_id"] == shard << 32 | index
            assert row["tokens"] == made.vocabulary.encode(row["text"])
            assert row["n_tokens"] == len(row["tokens"]) and 0 not in row["tokens"]
            assert row["n_bytes"] == len(encoded)
            assert row["text_hash"] == xxhash.xxh3_64_intdigest(encoded)
            assert row["source"] == f"part-{shard:03d}"
    manifest = made.artifact.manifest
    assert manifest.rows == manifest.summary["documents"] == manifest.counts["documents"] == 2530
    n_bytes = sum(len(record["text"].encode()) for shard in shards for record in shard)
    assert manifest.summary["bytes"] == n_bytes
    assert manifest.tokens == sum(map(len, all_columns(made, "tokens")["tokens"]))
    assert manifest.counts["files"] == {"read": 3, "empty": 1, "cut_off": 0}
    made.artifact.verify()


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=20))
def test_every_row_is_a_document_or_counted_by_reason(make_corpus, tmp_path_factory, texts):
    """Any text that JSON can hold: what is kept comes back byte for byte, the rest is counted."""
    shard = [{"text": text} for text in ["a document that is kept", *texts]]
    made = make_corpus(
        tmp_path_factory.mktemp("any"),
        [shard],
        max_bad_fraction=1.0,
        max_lost_fraction=1.0,
        max_document_bytes=60,
    )
    counts = made.artifact.manifest.counts
    assert counts["rows"] == len(shard) == counts["documents"] + sum(counts["dropped"].values())
    kept = [
        text
        for text in (record["text"] for record in shard)
        if text.strip() and len(text.encode()) <= 60 and made.vocabulary.encode(text)
    ]
    assert all_columns(made, "text")["text"] == kept


def test_what_is_dropped_is_counted_by_reason(make_corpus, tmp_path):
    texts = ["", " \n", "\u200b", "abc", "x" * 999, "\ud800 half a pair", "long enough"]
    made = make_corpus(
        tmp_path,
        [[{"text": text} for text in texts] + [{"texts": "none"}]],
        min_document_bytes=3,
        max_document_bytes=500,
        max_bad_fraction=0.5,
        max_lost_fraction=1.0,
    )
    manifest = made.artifact.manifest
    assert all_columns(made, "text")["text"] == ["abc", "long enough"]
    dropped = {"empty": 2, "no_tokens": 1, "too_long": 1, "invalid_utf8": 1, "no_text": 1}
    assert manifest.counts["dropped"] == dropped
    assert manifest.counts["rows"] == 8 and manifest.rows == 2


def test_metadata_comes_as_it_was_and_the_domain_from_the_url(make_corpus, tmp_path):
    shard = [
        {"text": "one", "meta": {"url": "https://User@WWW.Example.org:80/a?b"}, "n": 5},
        {"text": "two", "meta": {"url": "no address [", "lang": "dé"}, "domain": "given"},
        {"text": "three", "meta": {"lang": "\ud800"}, "source": "hand"},
    ]
    made = make_corpus(
        tmp_path, [shard], metadata=("meta.url", "domain", "meta.lang", "n", "source")
    )
    assert made.metadata == ["url", "domain", "lang", "n", "source"]
    assert all_columns(made, *made.metadata) == {
        "url": ["https://User@WWW.Example.org:80/a?b", "no address [", None],
        "domain": ["www.example.org", "given", None],
        "lang": [None, "dé", "?"],
        "n": ["5", None, None],
        "source": ["part-000", "part-000", "hand"],
    }
    without = {"url": 1, "domain": 1, "lang": 1, "n": 2, "source": 0}
    assert made.artifact.manifest.counts["without"] == without


def test_a_column_cannot_be_there_twice():
    for metadata in (("url", "meta.url"), ("tokens",)):
        with pytest.raises(ValueError, match="would be there twice"):
            IngestConfig(JsonlSource(("x",)), "bytes", "out", metadata=metadata)


def test_vocabularies_of_bytes_and_of_many_ids(make_corpus, small_vocabulary_file, tmp_path):
    shard = [{"text": "añb"}]
    made = make_corpus(tmp_path / "bytes", [shard], vocabulary="bytes")
    assert all_columns(made, "tokens")["tokens"] == [[100, 198, 180, 101]]
    assert made.vocabulary == Vocabulary.from_file("bytes")
    assert str(made.columns(0, ["tokens"]).schema.field("tokens").type) == "list<element: uint16>"
    made = make_corpus(tmp_path / "wide", [shard], extra_ids=70_000)
    assert str(made.columns(0, ["tokens"]).schema.field("tokens").type) == "list<element: uint32>"


# --------------------------------------------------------------------------------------------------
# However it is made


def test_shards_of_one_file_hold_its_rows_once(make_corpus, records, tmp_path):
    shard = records(101, 3)
    for number, record in enumerate(shard):
        if number % 10 == 0:
            record["text"] = ""
    texts = [record["text"] for record in shard]
    whole = make_corpus(tmp_path / "whole", [shard])
    split = make_corpus(tmp_path / "split", [shard], shards_per_file=4)
    assert split.num_shards == 4
    for part in range(4):
        expected = [text for text in texts[part::4] if text]
        assert split.columns(part, ["text"])["text"].to_pylist() == expected
    for key in ("rows", "documents", "bytes", "dropped", "files"):
        a, b = whole.artifact.manifest.counts, split.artifact.manifest.counts
        assert a[key] == b[key]


def test_files_can_share_a_shard(make_corpus, records, tmp_path):
    shards = [records(3 + i, i) for i in range(5)]
    apart = make_corpus(tmp_path / "apart", shards)
    shared = make_corpus(tmp_path / "shared", shards, files_per_shard=2)
    assert shared.num_shards == 3
    assert all_columns(shared, "text", "source") == all_columns(apart, "text", "source")
    with pytest.raises(ValueError, match="not both"):
        IngestConfig(JsonlSource(("x",)), "bytes", "out", files_per_shard=2, shards_per_file=2)


def test_workers_do_not_change_a_byte(make_corpus, records, tmp_path):
    shards = [records(40, i) for i in range(5)]
    (tmp_path / "a").mkdir()
    make_corpus(tmp_path / "a", shards)
    make_corpus(tmp_path / "a", shards, output=str(tmp_path / "b"), workers=3)
    assert files_of(tmp_path / "a" / "corpus") == files_of(tmp_path / "b")


def test_row_groups_of_long_documents_end_early(make_corpus, records, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_ROW_GROUP_BYTES", 5_000)
    monkeypatch.setattr(ingest, "_ENCODED_AT_ONCE", 700)
    made = make_corpus(tmp_path, [records(300, 5)])
    with made.artifact.parquet(0) as file:
        assert file.metadata.num_row_groups > 3
    rows = np.random.default_rng(0).integers(0, 300, 50)
    tokens = made.columns(0, ["tokens"])["tokens"].to_pylist()
    assert [found.tolist() for found in made.tokens_of(0, rows)] == [tokens[row] for row in rows]


def test_finished_work_is_not_done_again(make_corpus, records, tmp_path, monkeypatch):
    shards = [records(10, 1)]
    made = make_corpus(tmp_path, shards)
    before = files_of(tmp_path / "corpus")
    monkeypatch.setattr(ingest, "ingest_shard", None)
    again = make_corpus(tmp_path, shards, max_bad_fraction=0.5, on_truncated="keep", workers=2)
    assert again.artifact.digest == made.artifact.digest
    assert files_of(tmp_path / "corpus") == before


def test_changed_input_is_refused_and_moved_input_is_not(make_corpus, records, tmp_path):
    shards = [records(10, 1), records(10, 2)]
    made = make_corpus(tmp_path / "here", shards)
    moved = make_corpus(tmp_path / "there", shards, output=str(tmp_path / "here" / "corpus"))
    assert moved.artifact.digest == made.artifact.digest
    shards[1][3]["text"] += " changed"
    with pytest.raises(ConfigurationChanged, match=r"files\.part-001\.jsonl\.bytes: \d+ -> \d+"):
        make_corpus(tmp_path / "here", shards)
    shards[1][3]["text"] = shards[1][3]["text"].removesuffix(" changed")
    with pytest.raises(ConfigurationChanged, match="min_document_bytes: 1 -> 20"):
        make_corpus(tmp_path / "here", shards, min_document_bytes=20)


_INGEST = """
import sys, time
from pruning.corpus import ingest
from pruning.corpus.sources import JsonlSource

class Slow(JsonlSource):
    def read(self, file, fields, meter):
        for item in super().read(file, fields, meter):
            time.sleep(0.0005)
            yield item

if __name__ == "__main__":
    source, vocabulary, output = sys.argv[1:]
    ingest.run(ingest.IngestConfig(Slow((source,)), vocabulary, output, workers=2))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_run_again_it_is_the_same(make_corpus, records, small_vocabulary_file, tmp_path):
    """SIGKILL at several moments of a real ingest; its workers must end too."""
    shards = [records(300, i) for i in range(8)]
    (tmp_path / "in").mkdir()
    make_corpus(tmp_path / "in", shards, output=str(tmp_path / "undisturbed"))
    script = tmp_path / "slow_ingest.py"
    script.write_text(_INGEST)
    output = tmp_path / "killed"
    command = [sys.executable, script, tmp_path / "in", small_vocabulary_file, output]
    seen = set()
    for done_before_the_kill in (0, 1, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            seen.add(len(list(output.glob("unfinished/data-*.json"))))
            if max(seen) >= done_before_the_kill and list(output.glob(".*.tmp")):
                break
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while _processes_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _processes_of(process.pid), "workers outlived their parent"
    assert not (output / "manifest.json").exists()
    # The source's class has another name in the script: the same settings otherwise.
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    finished, undisturbed = load_corpus(output), load_corpus(tmp_path / "undisturbed")
    assert finished.artifact.manifest.shards == undisturbed.artifact.manifest.shards
    again = tmp_path / "again"
    subprocess.run([*command[:-1], again], check=True, stderr=subprocess.DEVNULL)
    assert files_of(output) == files_of(again)


def _processes_of(session: int) -> list[int]:
    """Processes of a session that are not yet gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


# --------------------------------------------------------------------------------------------------
# Workers


def _die(shard: int, report: parallel.Report) -> None:
    if shard == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    report(1, 0)


def _fail(shard: int, report: parallel.Report) -> None:
    report(1, 0)
    if shard == 3:
        raise SourceError("file three is bad")


def _write(directory: Path, shard: int, report: parallel.Report) -> None:
    (directory / f"{shard}-{os.getpid()}").touch()
    report(1, shard)


def test_a_worker_that_dies_is_an_error_not_a_wait():
    with pytest.raises(parallel.WorkerDied, match="signal 9 in shard 3"):
        parallel.run_shards(_die, range(6), 2, lambda *_: None)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_workers_come_through(workers):
    with pytest.raises(SourceError, match="file three is bad"):
        parallel.run_shards(_fail, range(6), workers, lambda *_: None)


def test_every_shard_is_worked_on_once(tmp_path):
    from functools import partial

    total = []
    parallel.run_shards(
        partial(_write, tmp_path), range(7), 3, lambda amount, shard: total.append(shard)
    )
    done = sorted(int(path.name.partition("-")[0]) for path in tmp_path.iterdir())
    assert done == sorted(total) == list(range(7))


# --------------------------------------------------------------------------------------------------
# Reading


def test_tokens_of_reads_what_was_asked_in_the_order_asked(make_corpus, records, tmp_path):
    made = make_corpus(tmp_path, [records(2100, 1), []])
    tokens = made.columns(0, ["tokens"])["tokens"].to_pylist()
    for rows in ([], [0], [2099, 0, 1023, 1024, 2047, 2048, 0]):
        found = made.tokens_of(0, np.asarray(rows))
        assert [array.tolist() for array in found] == [tokens[row] for row in rows]
        assert all(array.dtype == np.uint16 for array in found)
    assert made.tokens_of(1, np.asarray([], int)) == []
    for row in (-1, 2100):
        with pytest.raises(IndexError, match="it has 2100"):
            made.tokens_of(0, np.asarray([row]))
    batches = list(made.iter_batches(0, ["doc_id", "tokens"], 500))
    assert [len(batch) for batch in batches] == [500, 500, 500, 500, 100]
    assert [row for batch in batches for row in batch["tokens"].to_pylist()] == tokens
    assert list(made.iter_batches(1, ["doc_id"], 500)) == []


def test_an_unfinished_corpus_is_not_read(make_corpus, records, tmp_path):
    made = make_corpus(tmp_path, [records(5, 1)])
    (made.artifact.path / "manifest.json").unlink()
    (made.artifact.path / "unfinished").mkdir()
    with pytest.raises(ArtifactError, match="unfinished: run the command that makes it again"):
        load_corpus(made.artifact.path)


# --------------------------------------------------------------------------------------------------
# Real text


def test_real_c4_in_t5_tokens(real_data, t5_vocabulary_file, tmp_path):
    """C4 from JSON lines and from TFDS: the same documents get the same rows."""
    path = real_data / "corpus" / "c4" / "c4_real_merged.jsonl.gz"
    config = IngestConfig(
        JsonlSource((str(path),)), str(t5_vocabulary_file), str(tmp_path / "jsonl"), workers=1
    )
    merged = Corpus(ingest.run(config))
    with gzip.open(path) as file:
        texts = [json.loads(line)["text"] for line in file]
    columns = all_columns(merged, "text", "tokens", "text_hash")
    assert columns["text"] == texts
    vocabulary = Vocabulary.from_file(t5_vocabulary_file)
    for row in range(0, len(texts), 97):
        assert columns["tokens"][row] == vocabulary.encode(texts[row])

    pytest.importorskip("tensorflow_datasets")
    tfds = TfdsSource("c4/en:3.0.1", "validation", data_dir=str(real_data / "tfds"))
    config = IngestConfig(tfds, str(t5_vocabulary_file), str(tmp_path / "tfds"), workers=1)
    validation = Corpus(ingest.run(config))
    assert [validation.documents(shard) for shard in range(validation.num_shards)] == [100, 100]
    found = all_columns(validation, "text", "tokens", "text_hash")
    first = texts.index(found["text"][0])
    assert found == {name: columns[name][first : first + 200] for name in found}


def test_text_files_make_a_corpus(records, small_vocabulary_file, tmp_path):
    for number, record in enumerate(records(10, 4)):
        (tmp_path / f"{number}.txt").write_text(record["text"])
    source = TextSource((str(tmp_path / "*.txt"),))
    config = IngestConfig(
        source, str(small_vocabulary_file), str(tmp_path / "out"), files_per_shard=4, workers=1
    )
    made = Corpus(ingest.run(config))
    assert [made.documents(shard) for shard in range(made.num_shards)] == [4, 4, 2]
    assert all_columns(made, "source")["source"] == [str(number) for number in range(10)]


def exchanged(corpus, first: int, second: int) -> None:
    """Exchange two data files of a corpus."""
    names = [
        corpus.artifact.path / corpus.artifact.manifest.shards[k].file for k in (first, second)
    ]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)


def test_exchanged_files_are_refused_by_whoever_reads(make_corpus, records, tmp_path):
    """Two shards of one size: every row number exists in both, and means another document."""
    from pruning.data.export import ExportConfig
    from pruning.data.export import run as export
    from pruning.data.stream import StreamConfig
    from pruning.selection import select
    from pruning.selection.config import SelectConfig
    from pruning.selection.strategies import Random

    made = make_corpus(tmp_path / "in", [records(60, 1), records(60, 2), records(30, 3)])
    path = str(made.artifact.path)
    config = SelectConfig(path, str(tmp_path / "half"), strategy=Random(), keep_documents=0.5)
    select.run(config)
    exchanged(made, 0, 1)
    again = load_corpus(path)
    other, out = str(tmp_path / "other"), str(tmp_path / "out")
    stream = StreamConfig(path, selection=str(tmp_path / "half"), batch_size=4)
    for read in (
        lambda: again.columns(0, ["text"]),
        lambda: list(again.iter_batches(1, ["tokens"], 16)),
        lambda: again.tokens_of(0, np.array([3])),
        lambda: select.run(dataclasses.replace(config, output=other)),
        lambda: export(ExportConfig(path, out, selection=str(tmp_path / "half"), workers=1)),
        lambda: stream.open().batch(0),
    ):
        with pytest.raises(ArtifactError, match="belongs to another shard or corpus"):
            read()
    assert again.columns(2, ["text"]).num_rows == 30
