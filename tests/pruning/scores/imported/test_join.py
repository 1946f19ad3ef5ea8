"""Imported scores: every row meets its document, what does not is counted, twins are errors."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pruning.corpus.sources.document import SourceError
from pruning.scores.imported import join
from pruning.scores.imported.join import ImportConfig, JoinError
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Top
from pruning.store import shuffle
from pruning.store.manifest import ArtifactError, ConfigurationChanged

COUNTS = (40, 3, 60)


@pytest.fixture(scope="module")
def corpus(make_corpus, records, tmp_path_factory):
    """Documents with a url each, but for every tenth, and a score in their own records."""
    shards = []
    for shard, count in enumerate(COUNTS):
        made = records(count, seed=shard + 1)
        for i, record in enumerate(made):
            record["text"] += f" {shard} {i}"
            record["url"] = None if i % 10 == 9 else f"http://{shard}.example/é{i}"
            record["score"] = [1.5 * i, None, "n/a"][0 if i % 4 else i % 3]
        shards.append(made)
    return make_corpus(
        tmp_path_factory.mktemp("corpus"), shards, metadata=("url", "score", "domain")
    )


@pytest.fixture(scope="module")
def documents(corpus) -> pa.Table:
    names = ["doc_id", "url", "text", "text_hash"]
    return pa.concat_tables([corpus.columns(k, names) for k in range(corpus.num_shards)])


@pytest.fixture
def config(corpus, tmp_path) -> ImportConfig:
    return ImportConfig(
        str(corpus.artifact.path),
        str(tmp_path / "scores"),
        (str(tmp_path / "given.*"),),
        ("a", "b"),
        workers=1,
    )


def expected(documents, keys: str, rows: dict) -> np.ndarray:
    """Join in a dictionary: float64 [documents, 2], NaN without a row."""
    nothing = (np.nan, np.nan)
    return np.array([rows.get(key, nothing) for key in documents[keys].to_pylist()], np.float64)


def found(scores) -> np.ndarray:
    tables = [scores.read(k, ["a", "b"]) for k in range(scores.num_shards)]
    return np.concatenate(
        [np.stack([t[n].to_numpy().astype(float) for n in ("a", "b")], axis=1) for t in tables]
    )


def given_rows(documents, keys: str) -> dict:
    """Rows for two documents of three, with a null among the values, and 25 rows of no document."""
    rng = np.random.default_rng(0)
    known = [key for key in documents[keys].to_pylist() if key is not None]
    rows = {key: (rng.normal(), rng.normal()) for key in known if rng.random() < 0.67}
    strangers = {"doc_id": range(1 << 40, (1 << 40) + 25), "text_hash": range(25)}
    unknown = strangers.get(keys, [f"http://unknown/{i}" for i in range(25)])
    rows |= dict.fromkeys(unknown, (1.0, 2.0))
    rows[next(iter(rows))] = (0.25, np.nan)
    return rows


def write(path, kind: str, key: str, rows: dict) -> None:
    """Write the rows in two files of a kind, in another order than the corpus's."""
    items = sorted(rows.items(), key=lambda item: hash(item[1]))
    null = [(k, *(None if np.isnan(v) else v for v in values)) for k, values in items]
    for number, part in enumerate((null[::2], null[1::2])):
        if kind == "parquet":
            columns = zip(*part, strict=True)
            table = pa.table(dict(zip((key, "a", "b"), map(list, columns), strict=True)))
            pq.write_table(table, path / f"given.{number}.parquet")
        elif kind == "jsonl":
            lines = (json.dumps({key: k, "a": a, "nested": {"b": b}}) for k, a, b in part)
            with gzip.open(path / f"given.{number}.jsonl.gz", "wt") as file:
                file.write("".join(f"{line}\n" for line in lines))
        else:
            with (path / f"given.{number}.tsv").open("w", newline="") as file:
                writer = csv.writer(file, delimiter="\t")
                writer.writerow(["other", "b", "a", key])
                writer.writerows(["x\ty", "" if b is None else b, a, k] for k, a, b in part)


@pytest.mark.parametrize(
    ("kind", "by"),
    [("parquet", "doc_id"), ("jsonl", "url"), ("csv", "text"), ("csv", "text_hash")],
)
def test_values_equal_those_of_a_dictionary(kind, by, config, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(join, "_PARTITION", 17)  # several partitions
    monkeypatch.setattr(shuffle, "RUN", 13)  # and runs
    rows = given_rows(documents, by)
    write(tmp_path, kind, by, rows)
    columns = ("a", "nested.b") if kind == "jsonl" else ("a", "b")
    scores = join.run(dataclasses.replace(config, by=by, columns=columns))
    np.testing.assert_array_equal(found(scores), expected(documents, by, rows))

    matched = sum(key in rows for key in documents[by].to_pylist())
    without_key = documents[by].null_count
    summary = scores.manifest.summary
    assert summary["rows"] == {
        "read": len(rows),
        "matched": matched,
        "without_document": 25,
        "without_key": 0,
    }
    assert summary["documents"] == {
        "matched": matched,
        "without_row": sum(COUNTS) - without_key - matched,
        "without_key": without_key,
    }
    statuses = scores.manifest.counts["documents"]
    assert statuses == {"ok": matched, "not_found": sum(COUNTS) - matched}


def test_an_interrupted_import_goes_on_to_the_same_bytes(
    config, documents, tmp_path, monkeypatch, corpus
):
    monkeypatch.setattr(join, "_PARTITION", 17)
    write(tmp_path, "parquet", "url", given_rows(documents, "url"))
    whole = join.run(config)
    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    joined = join._join
    calls = []

    def dies(plan, partition, report):
        if calls:
            raise KeyboardInterrupt
        calls.append(partition)
        joined(plan, partition, report)

    monkeypatch.setattr(join, "_join", dies)
    with pytest.raises(KeyboardInterrupt):
        join.run(again)
    rest = []
    monkeypatch.setattr(join, "_join", lambda p, k, r: (rest.append(k), joined(p, k, r)))
    monkeypatch.setattr(join, "_read_file", lambda *_: pytest.fail("was read already"))
    finished = join.run(again)
    assert finished.digest == whole.digest
    assert calls and rest and not set(calls) & set(rest)
    with pytest.raises(ConfigurationChanged):
        join.run(dataclasses.replace(again, columns=("a",)))


def test_keys_that_stand_twice_are_errors(config, documents, corpus, tmp_path):
    url = documents["url"][3].as_py()
    rows = pa.table({"url": [url, "x", None, url], "a": [1.0, 2, 3, 4], "b": [1, 2, 3, 4]})
    pq.write_table(rows, tmp_path / "given.parquet")
    with pytest.raises(JoinError, match=r"given.parquet, row 1, and .*given.parquet, row 4") as e:
        join.run(config)
    assert url in str(e.value)

    many = pa.table({"domain": ["1.example", "0.example"], "a": [1.0, 2], "b": [1, 2]})
    pq.write_table(many, tmp_path / "given.parquet")
    by_domain = dataclasses.replace(config, by="domain", output=str(tmp_path / "domains"))
    with pytest.raises(JoinError, match="shared_keys=share"):
        join.run(by_domain)
    shared = dataclasses.replace(by_domain, shared_keys="share", output=str(tmp_path / "shared"))
    scores = join.run(shared)
    assert scores.manifest.summary["documents"]["matched"] > 2
    assert scores.manifest.summary["rows"]["matched"] == 2


@pytest.mark.parametrize(
    ("columns", "content", "message"),
    [
        (("a",), "url,a\nx,1\ny,good\n", r"given.csv, column 'a', row 2: 'good' is no number"),
        (("c",), "url,a\nx,1\n", "no such column"),
        (("a",), "url,a\nx,1,2\n", "every row has"),
        (("a",), "url,a\nnowhere,1\n", "none of 1 rows belongs .* 'nowhere'"),
    ],
)
def test_files_that_cannot_be_used(columns, content, message, config, tmp_path):
    (tmp_path / "given.csv").write_text(content)
    with pytest.raises((SourceError, JoinError), match=message):
        join.run(dataclasses.replace(config, columns=columns))


def test_a_column_that_the_corpus_lacks(config, tmp_path):
    (tmp_path / "given.csv").write_text("url,a\nx,1\n")
    with pytest.raises(ArtifactError, match=r"no column 'link' to join by; it has .*url"):
        join.run(dataclasses.replace(config, by="link"))


def test_a_column_of_the_corpus_is_a_score(corpus, tmp_path):
    """The same documents as by a plain sort; nulls and other words are counted by reason."""
    made = select.run(
        SelectConfig(
            str(corpus.artifact.path),
            str(tmp_path / "top"),
            Top(),
            score="corpus:score",
            keep_documents=20,
        )
    )
    tables = [corpus.columns(k, ["doc_id", "score"]) for k in range(corpus.num_shards)]
    ids, texts = (pa.concat_tables(tables)[name].to_pylist() for name in ("doc_id", "score"))
    values = np.array([np.nan if t in (None, "n/a") else float(t) for t in texts])
    kept = np.concatenate([made.read(k, ["doc_id"])["doc_id"] for k in range(made.num_shards)])
    inside = np.isin(ids, kept)
    assert inside.sum() == 20
    assert np.nanmin(values[inside]) >= np.nanmax(values[~inside])
    unscored = made.manifest.counts["documents"]["unscored"]
    assert unscored == {"no_value": texts.count(None), "no_number": texts.count("n/a")}
