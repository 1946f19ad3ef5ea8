"""Odd names, links, bombs and losses: each is read once, or counted, or refused by name."""

from __future__ import annotations

import functools
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.sources import JsonlSource, ParquetSource, TextSource
from pruning.corpus.sources import files as input_files
from pruning.corpus.sources.document import SourceError

REPOSITORY = Path(__file__).resolve().parents[3]
TEXT = "The river has been there for a long time. "


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def names(paths, base: Path, suffixes=(".jsonl",)) -> list[str]:
    found = input_files.expand([str(path) for path in paths], suffixes)
    return [str(Path(file).relative_to(base)) for file in found]


def test_every_file_is_read_once_whatever_links_lead_to_it(tmp_path):
    write(tmp_path / "data" / "z" / "one.jsonl", TEXT)
    write(tmp_path / "data" / "two.jsonl", TEXT)
    (tmp_path / "data" / "z" / "up").symlink_to(tmp_path / "data")  # a circle
    (tmp_path / "data" / "a").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "data" / "also.jsonl").symlink_to("two.jsonl")
    os.link(tmp_path / "data" / "two.jsonl", tmp_path / "data" / "zwei.jsonl")
    expected = ["data/two.jsonl", "data/z/one.jsonl"]
    assert names([tmp_path / "data"], tmp_path) == expected
    everything = [tmp_path / "data", tmp_path / "data" / "a", tmp_path / "data" / "*.jsonl"]
    assert names(everything, tmp_path) == expected
    [said] = JsonlSource((str(tmp_path / "data"),)).left_out()
    assert said.startswith("2 further names")


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab[]*?!-{}' ,=%", min_size=1, max_size=8).filter(
        lambda name: name.strip() == name and name != "." * len(name) and "**" not in name
    )
)
def test_a_file_that_exists_is_itself_whatever_its_name(tmp_path_factory, name):
    base = tmp_path_factory.mktemp("names")
    for other in ("a", "b", "ab", "ba", "a1"):
        write(base / f"{other}.jsonl", TEXT)
    write(base / f"{name}.jsonl", TEXT)
    write(base / name / "in.jsonl", TEXT)
    assert names([base / f"{name}.jsonl"], base) == [f"{name}.jsonl"]
    assert names([base / name], base) == [f"{name}/in.jsonl"]
    assert names([base / name / "*.jsonl"], base) == [f"{name}/in.jsonl"]


def test_what_other_formats_a_directory_holds_is_said(tmp_path, small_vocabulary_file, capsys):
    write(tmp_path / "data" / "one.jsonl", TEXT)
    for name in ("a.csv", "b.csv", "in/c.parquet", "LICENSE", ".hidden", "_SUCCESS"):
        write(tmp_path / "data" / name)
    os.mkfifo(tmp_path / "data" / "pipe.jsonl")  # nobody waits for what it may bring
    ingest.run(
        IngestConfig(JsonlSource((str(tmp_path / "data"),)), str(small_vocabulary_file),
                     str(tmp_path / "corpus"), workers=1)
    )  # fmt: skip
    assert (
        "ingest: 4 files of other formats are passed over (1 .parquet, 2 .csv, 1 without a suffix)"
        in capsys.readouterr().err.replace("2 .csv, 1 .parquet", "1 .parquet, 2 .csv")
    )


@pytest.mark.parametrize("path", ["x" * 5000, "", "no\0where", "nowhere/[*", "~nobody-here/x"])
def test_what_cannot_be_looked_for_is_named(path):
    for source in (JsonlSource, ParquetSource, TextSource):
        with pytest.raises(
            (SourceError, RuntimeError), match=r"is empty|stands for no|cannot be look"
        ):
            source((path,)).files()


def test_a_file_that_is_written_to_meanwhile_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", *[TEXT * 1000] * 20)
    rows = JsonlSource((str(path),)).read(str(path), (), lambda n: None)
    next(rows)
    with path.open("r+b") as file:
        file.seek(800_000)
        file.write(b"Z")
    with pytest.raises(SourceError, match=r"a\.jsonl was changed while it was read"):
        list(rows)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \n"])
@pytest.mark.parametrize("document", ["json", "line"])
def test_a_run_of_blank_lines_is_counted_at_once(tmp_path, end, document):
    """Five million lines in a few kB, between two documents; parts of a file count each once."""
    path = tmp_path / "blank.jsonl.gz"
    line = json.dumps({"text": TEXT}).encode()
    run = gzip.compress(end * 100_000, 1)
    path.write_bytes(gzip.compress(line + b"\n") + run * 50 + gzip.compress(line))
    source = JsonlSource if document == "json" else functools.partial(TextSource, document="line")
    corpora = [
        ingest.run(
            IngestConfig(
                source((str(path),)),
                "bytes",
                str(tmp_path / f"corpus-{parts}"),
                shards_per_file=parts,
                max_lost_fraction=1.0,
                workers=1,
            )
        )
        for parts in (1, 3)
    ]
    for corpus in corpora:
        counts = corpus.manifest.counts
        assert counts["rows"] == 5_000_002 and counts["documents"] == 2
        reason = "blank_line" if document == "json" else "empty"
        assert counts["dropped"] == {reason: 5_000_000}
        spaces = 5_000_000 if end == b" \n" else 0
        assert counts["dropped_bytes"][reason] == spaces


BOMB = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
from pruning.corpus.sources import JsonlSource, TextSource
source = {"jsonl": JsonlSource, "txt": TextSource}[sys.argv[2]]((sys.argv[1],))
for row in source.read(sys.argv[1], (), lambda n: None):
    print(row.reason, row.n_bytes)
"""


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_bomb_is_rejected_in_bounded_memory(tmp_path, kind):
    """A GiB of zeros in 1 MB, within 1.5 GiB of addresses in all."""
    bomb = tmp_path / f"bomb.{kind}.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as file:
        for _ in range(4):
            file.write(bytes(1 << 24))
    member = bomb.read_bytes()
    bomb.write_bytes(member * 16)
    done = subprocess.run(
        [sys.executable, "-c", BOMB, str(bomb), kind],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    reason, n_bytes = done.stdout.split() or pytest.fail(done.stderr)
    assert reason == "line_too_long" and int(n_bytes) > input_files.LONGEST_LINE


def test_losses_are_counted_in_rows_and_bytes_and_said(make_corpus, tmp_path, capsys):
    records = [{"text": TEXT, "label": "x" * (200_000 if i == 7 else 2)} for i in range(400)]
    records += [{"text": TEXT * 2500}, {"text": "\u6c34\u5c71" * 40}]
    with pytest.raises(
        SourceError, match=r"1 of 402 \(0\.2%\) rows and .* bytes of the input .*\(1 too_long\)"
    ):
        make_corpus(tmp_path, [records], max_document_bytes=5000)
    metadata = ("label", "lable", "url")
    made = make_corpus(
        tmp_path / "more", [records], max_document_bytes=5000, max_lost_fraction=1.0,
        metadata=metadata,
    )  # fmt: skip
    counts = made.artifact.manifest.counts
    total = sum(len(record["text"].encode()) for record in records)
    assert counts["dropped"] == {"too_long": 1}
    assert counts["dropped_bytes"] == {"too_long": len(TEXT) * 2500}
    assert counts["bytes"] + counts["dropped_bytes"]["too_long"] == total
    assert counts["unknown"]["documents"] == 1 and counts["too_long_metadata"] == {"label": 1}
    assert counts["without"] == {"label": 2, "lable": 401, "url": 401}
    said = [line for line in capsys.readouterr().err.splitlines() if "MiB of input" not in line]
    assert said == [
        f"ingest: dropped 1 of 402 (0.2%) rows and {len(TEXT) * 2500:,} of {total:,} "
        f"({len(TEXT) * 2500 / total:.1%}) bytes: 1 too_long",
        "ingest: 1 of 401 (0.2%) documents have over 10% tokens unknown to the vocabulary",
        "ingest: no document has a value for the metadata column 'lable': all are null",
        "ingest: 1 values of the metadata column 'label' are over 64 KiB: null",
    ]


def test_malformed_rows_count_by_their_bytes_too(make_corpus, tmp_path):
    rows = [{"text": TEXT}] * 999 + [{"other": "x" * 9000}]
    with pytest.raises(SourceError, match=r"1 of 1,000 rows are malformed, 9,\d+ of 5"):
        make_corpus(tmp_path, [rows])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_bad_fraction", 1.5), ("max_lost_fraction", -1), ("workers", -2),
     ("max_document_bytes", 1 << 31), ("min_document_bytes", -1), ("files_per_shard", 0)],
)  # fmt: skip
def test_settings_are_checked_where_they_are_set(setting, value):
    with pytest.raises(ValueError, match=setting):
        IngestConfig(JsonlSource(("x",)), "bytes", "out", **{setting: value})
