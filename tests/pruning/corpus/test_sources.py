"""Sources: every row comes once and in order, byte for byte, however the file is packed."""

from __future__ import annotations

import ast
import csv
import gzip
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import textwrap
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.corpus.sources import (
    CsvSource,
    JsonlSource,
    ParquetSource,
    PythonDocsSource,
    TextSource,
    TfdsSource,
    files,
)
from pruning.corpus.sources.document import Document, Reject, SourceError, TruncatedFile, lookup
from pruning.corpus.sources.identity import identify
from pruning.store.manifest import config_of

PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(source, fields=()):
    items = []
    for file in source.files():
        items += source.read(file, fields, lambda n_bytes: None)
    return items


def reasons(items):
    return [item.reason if isinstance(item, Reject) else "document" for item in items]


# --------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("packing", PACKERS)
@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(max_size=300) | st.text("a\n\r", max_size=80).map(str.encode),
    members=st.integers(1, 3),
    piece=st.sampled_from([1, 2, 7, 1 << 17]),
)
def test_lines_are_those_of_the_whole_content(tmp_path_factory, packing, content, members, piece):
    """Whatever the packing, the members of a packed file and the size of the pieces read."""
    path = tmp_path_factory.mktemp("lines") / f"file{packing}"
    step = len(content) // members + 1
    parts = [content[i : i + step] for i in range(0, len(content), step)]
    path.write_bytes(b"".join(PACKERS[packing](part) for part in parts))
    expected = content.split(b"\n")
    if not expected[-1]:
        expected.pop()
    expected = [line.removesuffix(b"\r") for line in expected]
    if expected and content.startswith(files.BYTE_ORDER_MARK):
        expected[0] = expected[0].removeprefix(files.BYTE_ORDER_MARK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_READ", piece)
        taken = []
        assert list(files.lines(str(path), taken.append)) == expected
    assert sum(taken) == path.stat().st_size


def test_a_line_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"x" * 5000 + b'\n{"text": "b"}\n')
    assert reasons(read(JsonlSource((str(path),)))) == ["document", "line_too_long", "document"]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_cut_and_damaged_files_are_told_apart(tmp_path, packing):
    lines = "".join(json.dumps({"text": f"text number {i} {i * i}"}) + "\n" for i in range(5000))
    packed = PACKERS[packing](lines.encode())
    path = tmp_path / f"file.jsonl{packing}"
    path.write_bytes(packed[: len(packed) // 2])
    source = JsonlSource((str(path),))
    with pytest.raises(TruncatedFile, match="is cut off"):
        read(source)
    damaged = {".gz": packed[:-8] + bytes(8), ".zst": packed[:99] + b"\xff" * len(packed)}
    path.write_bytes(damaged[packing])
    with pytest.raises(SourceError, match=f"{path.name} is damaged after"):
        read(source)
    path.write_bytes(b"plain text")
    with pytest.raises(SourceError, match="rename it if it is not compressed"):
        read(source)


def test_rows_before_a_cut_are_whole(tmp_path):
    lines = [json.dumps({"text": f"text number {i} {i * i}"}) + "\n" for i in range(5000)]
    path = tmp_path / "file.jsonl.gz"
    packed = gzip.compress("".join(lines).encode())
    path.write_bytes(packed[: len(packed) * 2 // 3])
    seen = []
    with pytest.raises(TruncatedFile):
        for item in JsonlSource().read(str(path), (), lambda n_bytes: None):
            seen.append(item.text)
    assert 1000 < len(seen) < 5000
    assert seen == [json.loads(line)["text"] for line in lines[: len(seen)]]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_blank_lines_are_one_item_also_before_a_cut(tmp_path, kind, end):
    source, before, line = {
        "jsonl": (JsonlSource(), b"", b'{"text": "a"}\n'),
        "csv": (CsvSource(), b"text\n", b'"a\n\n\nb"\n'),
    }[kind]
    packer = zlib.compressobj(wbits=31)
    path = tmp_path / f"file.{kind}.gz"
    content = before + line + end * 1000 + line + end * 10 + line[:4]
    path.write_bytes(packer.compress(content) + packer.flush(zlib.Z_SYNC_FLUSH))
    seen = []
    with pytest.raises(TruncatedFile):
        for item in source.read(str(path), (), lambda n_bytes: None):
            seen.append(item)
    assert reasons(seen) == ["document", "blank_line"] * 2
    assert [item.rows for item in seen[1::2]] == [1000, 10]
    assert seen[0].text == ("a" if kind == "jsonl" else "a\n\n\nb")


def test_paths_are_files_directories_and_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.jsonl.zst", ".hidden.jsonl", "_tmp/d.jsonl", "e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    everything = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl", "deep/c.jsonl.zst")]
    assert JsonlSource((str(tmp_path),)).files() == everything
    assert JsonlSource((str(tmp_path / "b.jsonl"), str(tmp_path))).files() == everything
    assert JsonlSource((str(tmp_path / "*" / "*.zst"),)).files() == everything[2:]
    assert JsonlSource((str(tmp_path / "e"),)).files() == [str(tmp_path / "e")]
    for missing in ("nowhere", "*.csv"):
        with pytest.raises(SourceError, match=r"stands for no file"):
            JsonlSource((str(tmp_path / missing), str(tmp_path))).files()
    with pytest.raises(SourceError, match="no paths"):
        JsonlSource().files()


def test_a_fingerprint_is_of_the_content_not_of_the_place(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 64)
    content = bytes(range(256)) * 40  # ten times what is read of a large file
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(content)
    original = files.fingerprint(str(tmp_path / "one"))
    assert files.fingerprint(str(tmp_path / "two")) == original
    assert original.n_bytes == len(content)
    for place in (0, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "two").write_bytes(bytes(changed))
        assert files.fingerprint(str(tmp_path / "two")) != original
    (tmp_path / "two").write_bytes(content + b"\n")
    assert files.fingerprint(str(tmp_path / "two")) != original


def test_identity_forgets_the_place_and_names_each_file(tmp_path):
    described = []
    for place in ("here", "there"):
        (tmp_path / place / "sub").mkdir(parents=True)
        for name in ("a.jsonl", "sub/b.jsonl"):
            (tmp_path / place / name).write_text(name)
        source = JsonlSource((str(tmp_path / place),))
        listed = source.files()
        described.append(identify(source, [(file,) for file in listed]))
        together, sizes = identify(source, [tuple(listed)])
        assert list(together["files"]) == ["a.jsonl to sub/b.jsonl (2 files)"]
        assert sizes == [len("a.jsonl") + len("sub/b.jsonl")]
    assert described[0] == described[1]
    assert list(described[0][0]["files"]) == ["a.jsonl", "sub/b.jsonl"]
    assert "paths" not in described[0][0]["source"]


# --------------------------------------------------------------------------------------------------
# JSON lines


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(), max_size=8))
def test_json_texts_come_as_they_were(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("jsonl") / "file.jsonl"
    lines = [
        json.dumps({"n": i, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)
    ]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    items = read(JsonlSource((str(path),)))
    assert [item.text for item in items] == texts
    assert [item.fields["n"] for item in items] == list(range(len(texts)))


def test_every_bad_line_is_rejected_for_its_own_reason(tmp_path):
    path = tmp_path / "file.jsonl"
    lines = {
        b'\xef\xbb\xbf{"text": "with a mark"}': "document",
        b'{"text": "fine"}\r': "document",
        b"": "blank_line",
        b"  \t": "blank_line",
        b'{"text": "\xff\xfe"}': "invalid_utf8",
        b'{"text": "\xed\xa0\x80"}': "invalid_utf8",  # a surrogate, which json.loads would take
        b'{"text": "cut': "invalid_json",
        b"[" * 100_000: "invalid_json",
        b'["text"]': "not_an_object",
        b'"text"': "not_an_object",
        b'{"txet": "misspelt"}': "no_text",
        b'{"text": null}': "no_text",
        b'{"text": 7}': "text_not_a_string",
        b'{"text": {"inner": "nested"}}': "text_not_a_string",
    }
    path.write_bytes(b"\n".join(lines))
    items = read(JsonlSource((str(path),)))
    assert reasons(items) == list(lines.values())
    assert "it has: txet" in items[10].detail and "JsonlSource.text_field" in items[10].detail
    assert [item.malformed for item in items if isinstance(item, Reject)] == [False] * 2 + [
        True
    ] * 10


def test_nested_fields():
    fields = {"meta": {"url": "u", "n": 3, "tags": ["a", "ü"], "none": None}, "raw": b"\xffb"}
    assert lookup(fields, "meta.url") == "u"
    assert lookup(fields, "meta.n") == "3"
    assert lookup(fields, "meta.tags") == '["a", "ü"]'
    assert lookup(fields, "raw") == "\ufffdb"
    for absent in ("meta.none", "meta.other", "other", "meta.url.deeper"):
        assert lookup(fields, absent) is None


# --------------------------------------------------------------------------------------------------
# Parquet and text


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "string_view", "dictionary"])
def test_parquet_texts_come_as_they_were(tmp_path, kind):
    texts = ["plain", "ünïcode 漢字 \x00 \r\n", "", "x" * 100_000] * 100
    column = pa.array(texts)
    column = (
        column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    )
    table = pa.table({"other": range(400), "content": column, "url": texts})
    pq.write_table(table, tmp_path / "file.parquet", row_group_size=150)
    source = ParquetSource((str(tmp_path),), "content")
    taken = []
    items = list(source.read(source.files()[0], ("url",), taken.append))
    assert [item.text for item in items] == texts
    assert [lookup(item.fields, "url") for item in items] == texts
    assert set(items[0].fields) == {"content", "url"}  # no more than was wanted
    assert sum(taken) == (tmp_path / "file.parquet").stat().st_size


def test_parquet_rejects_rows_not_batches(tmp_path):
    broken = pa.StringArray.from_buffers(
        3, pa.array([0, 2, 4, 6], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff\xfecd")
    )
    nested = pa.StructArray.from_arrays([broken], names=["body"])
    whole = pa.array(["x", None, "y"])
    pq.write_table(pa.table({"a": broken, "b": nested, "c": whole}), tmp_path / "file.parquet")
    paths = (str(tmp_path / "file.parquet"),)
    for field in ("a", "b.body"):
        items = read(ParquetSource(paths, field), ("b.body", "c"))
        assert reasons(items) == ["document", "invalid_utf8", "document"]
    assert reasons(read(ParquetSource(paths, "c"))) == ["document", "no_text", "document"]
    with pytest.raises(SourceError, match="no column 'text'; it has: a, b, c"):
        read(ParquetSource(paths))


def test_a_cut_parquet_file_is_named(tmp_path):
    path = tmp_path / "file.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"file\.parquet is not a whole Parquet file"):
        read(ParquetSource((str(path),)))


def test_text_files_are_documents_or_lines(tmp_path):
    content = "First line.\r\nSecond, ünïcode.\n\nFourth.\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfpacked\n"))
    (tmp_path / "c.md").write_bytes(b"latin-1: \xfc")
    (tmp_path / "empty.txt").touch()
    whole = read(TextSource((str(tmp_path),)))
    assert [getattr(item, "text", item[0]) for item in whole] == [
        content,
        "packed\n",
        "invalid_utf8",
    ]
    lines = read(TextSource((str(tmp_path / "a.txt"),), "line"))
    assert [getattr(item, "text", item[0]) for item in lines] == [
        "First line.",
        "Second, ünïcode.",
        "empty",
        "Fourth.",
    ]


# --------------------------------------------------------------------------------------------------
# TFDS


def test_tfds_gives_what_its_records_hold(real_data):
    """Against the same documents as another tool wrote them to JSON lines."""
    if importlib.util.find_spec("tensorflow_datasets") is None:
        pytest.skip("TensorFlow Datasets is not installed")
    source = TfdsSource("c4/en", "validation", data_dir=str(real_data / "tfds"))
    taken: list[int] = []
    items = []
    for file in source.files():
        items += source.read(file, (), taken.append)
    assert len(source.files()) == 2
    assert sum(taken) == sum(source.fingerprint(file).n_bytes for file in source.files())
    merged = JsonlSource((str(real_data / "corpus" / "c4" / "c4_real_merged.jsonl.gz"),))
    known = [item.text for item in read(merged)]
    texts = [item.text for item in items]
    assert len(texts) == 200
    start = known.index(texts[0])
    assert known[start : start + 200] == texts


def test_tfds_reads_the_first_shards_alone(real_data):
    pytest.importorskip("tensorflow_datasets")
    root = str(real_data / "tfds")
    every = TfdsSource("c4/en", "validation", data_dir=root)
    part = TfdsSource("c4/en", "validation", data_dir=root, shards=1)
    (file,) = part.files()
    assert file == every.files()[0]
    found, known = (list(source.read(file, (), lambda _: None)) for source in (part, every))
    assert found and found == known
    assert "shards" in config_of(part) and "shards" not in config_of(every)


TFDS_FIRST = """
import sys
from pruning.corpus.sources import TfdsSource
source = TfdsSource("c4/en", "validation", data_dir=sys.argv[1])
assert next(iter(source.read(source.files()[0], (), lambda n: None))).text
"""


def test_tfds_does_not_print_how_tensorflow_starts(real_data):
    """In a process of its own: in this one, another test may have started TensorFlow, or JAX, which
    sets the log level that a user would."""
    pytest.importorskip("tensorflow_datasets")
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    ran = subprocess.run(
        [sys.executable, "-c", TFDS_FIRST, real_data / "tfds"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = ran.stderr
    assert not any(word in said for word in ("oneDNN", "cudart", "cuInit", "InitializeLog"))


def test_tfds_says_what_is_there(real_data, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    root = str(real_data / "tfds")
    with pytest.raises(SourceError, match=r"no split 'test'; it has: train, validation"):
        TfdsSource("c4/en:3.0.1", "test", data_dir=root).files()
    with pytest.raises(SourceError, match="at least 1, not 0"):
        TfdsSource("c4/en", shards=0)
    with pytest.raises(SourceError, match=r"holds the versions 3\.0\.1"):
        TfdsSource("c4/en:2.0.0", data_dir=root).files()
    with pytest.raises(SourceError, match="no prepared dataset"):
        TfdsSource("c4/de", data_dir=root).files()


# --------------------------------------------------------------------------------------------------
# Python documentation


def test_python_docs_are_those_of_the_modules():
    """Against docstrings as the interpreter itself reports them."""
    found = {}
    for item in read(PythonDocsSource(packages=("python",))):
        if isinstance(item, Document):
            found.setdefault(item.text.partition("\n")[0], item)
    function = found["textwrap.dedent"]
    assert function.text == f"textwrap.dedent\n\n{inspect.getdoc(textwrap.dedent)}"
    assert function.fields == {"source": "docstring", "domain": "python", "url": "textwrap.py"}
    cls = found["ast.NodeVisitor"].text
    assert cls.startswith(f"ast.NodeVisitor\n\n{inspect.getdoc(ast.NodeVisitor)}")
    assert f"NodeVisitor.generic_visit\n\n{inspect.getdoc(ast.NodeVisitor.generic_visit)}" in cls
    module = found["textwrap"].text
    assert module == f"textwrap\n\n{inspect.getdoc(textwrap)}"
    urls = {item.fields["url"] for item in found.values()}
    assert not any("/test/" in f"/{url}" for url in urls)


def test_parts_divide_the_documentation():
    packages = ("numpy", "rich", "jinja2")
    together = read(PythonDocsSource(parts=1, packages=packages))
    divided = PythonDocsSource(parts=5, packages=packages)
    apart = read(divided)
    assert sorted(map(repr, apart)) == sorted(map(repr, together))
    assert read(divided) == apart  # the same again
    kinds = {item.fields["source"] for item in apart if isinstance(item, Document)}
    assert {"docstring", "description", "licence"} <= kinds
    assert {item.fields["domain"] for item in apart if isinstance(item, Document)} == set(packages)
    with pytest.raises(SourceError, match="not-a-package is not installed"):
        PythonDocsSource(packages=("not-a-package",)).files()


# --------------------------------------------------------------------------------------------------
# CSV


def test_csv_rows_are_those_that_the_csv_module_wrote(tmp_path):
    """Quotes, line ends, other scripts and long fields come back; wrong rows are told apart."""
    texts = ['say "x", y', "two\nlines\r\nthree", "漢字", "a" * 300_000, "tab\there", ""]
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["url", "text", "n"])
            writer.writerows([f"http://{i}", text, i] for i, text in enumerate(texts))
        items = list(CsvSource().read(str(tmp_path / name), ["url"], lambda n: None))
        assert [item.text for item in items] == texts
        assert items[2].fields["url"] == "http://2"
    content = b"\xef\xbb\xbfurl,text\nu,\xff\n\nu,a,b\n\xfe,good\n"
    (tmp_path / "c.csv").write_bytes(content)
    items = list(CsvSource().read(str(tmp_path / "c.csv"), ["url"], lambda n: None))
    assert [item.reason for item in items[:3]] == [
        "invalid_utf8",
        "blank_line",
        "wrong_number_of_fields",
    ]
    assert items[3] == Document("good", {"url": "\ufffd", "text": "good"})
    with pytest.raises(SourceError, match="no column 'body'; its first row has: url, text"):
        list(CsvSource(text_field="body").read(str(tmp_path / "c.csv"), [], lambda n: None))
