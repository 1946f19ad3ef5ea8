"""Export: the kept documents with their own scores, in either format, and a readable card."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import yaml
import zstandard

from pruning.corpus.selection_reader import load_selection
from pruning.data import export
from pruning.data.export import ExportConfig
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Random
from pruning.store.artifact import Artifact
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

_STATUS = pa.dictionary(pa.int8(), pa.string())
_SCORES = pa.schema(
    [
        ("doc_id", pa.int64()),
        ("status", _STATUS),
        ("nll", pa.float32()),
        ("token_nll", pa.list_(pa.float16())),
    ]
)


def write_scores(path, corpus, offset: float = 0.0) -> Artifact:
    """nll = row + offset; every tenth document has no score."""
    build = Build(path, "scores", {}, {"corpus": corpus.artifact}, corpus.num_shards, _SCORES)
    for shard in range(corpus.num_shards):
        doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        rows = np.arange(len(doc_ids))
        nll = [None if row % 10 == 0 else float(row) + offset for row in rows]
        status = pa.array(["too_short" if row % 10 == 0 else "ok" for row in rows], pa.string())
        token_nll = [None if value is None else np.full(2, value, np.float16) for value in nll]
        with build.shard(shard) as writer:
            columns = [pa.array(doc_ids), status.cast(_STATUS), nll, token_nll]
            writer.write(dict(zip(_SCORES.names, columns, strict=True)))
    return build.finish({"scorer": "likelihood", "columns": {"nll": "sum | of the `nll`"}})


@pytest.fixture
def made(make_corpus, records, tmp_path):
    corpus = make_corpus(tmp_path / "c", [records(1500, 1), records(40, 2), []])
    select.run(
        SelectConfig(
            corpus=str(corpus.artifact.path),
            output=str(tmp_path / "selection"),
            strategy=Random(),
            keep_documents=0.3,
        )
    )
    write_scores(tmp_path / "scores", corpus)
    return corpus


def rows_of(dataset: Artifact) -> list[dict]:
    if dataset.manifest.shards[0].file.endswith(".parquet"):
        return [row for k in range(dataset.num_shards) for row in dataset.read(k).to_pylist()]
    rows = []
    if dataset.manifest.shards[0].file.endswith("record"):
        return [row for shard in dataset.manifest.shards for row in records_of(dataset, shard)]
    for shard in dataset.manifest.shards:
        with zstandard.open(dataset.path / shard.file, "rt", encoding="utf-8") as file:
            found = [json.loads(line, parse_constant=pytest.fail) for line in file]
        assert len(found) == shard.rows
        rows += [row | {"text_hash": int(row["text_hash"])} for row in found]
    return rows


def records_of(dataset: Artifact, shard) -> list[dict]:
    """The rows of a file of tf.train.Examples; what is not there is None."""
    tf = pytest.importorskip("tensorflow", reason="reads the records: install [seqio]")
    path = str(dataset.path / shard.file)
    if path.endswith("array_record"):
        module = pytest.importorskip("array_record.python.array_record_module")
        reader = module.ArrayRecordReader(path)
        found = reader.read_all() if reader.num_records() else []
        reader.close()
    else:
        found = [record.numpy() for record in tf.data.TFRecordDataset(path)]
    assert len(found) == shard.rows
    described = dataset.manifest.config
    names = [*described["columns"], *(n for of in described["scores"].values() for n in of)]
    rows = []
    for record in found:
        features = tf.train.Example.FromString(record).features.feature
        row: dict = dict.fromkeys(names)
        for name, feature in features.items():
            values = list(getattr(feature, feature.WhichOneof("kind")).value)
            values = [v.decode() if isinstance(v, bytes) else v for v in values]
            row[name] = values if name == "token_nll" else values[0]
        row["text_hash"] %= 2**64
        rows.append(row)
    return rows


@pytest.mark.parametrize("format", export.FORMATS)
def test_the_kept_documents_come_with_their_own_scores(made, tmp_path, format):
    config = ExportConfig(
        corpus=str(made.artifact.path),
        output=str(tmp_path / "out"),
        selection=str(tmp_path / "selection"),
        scores=str(tmp_path / "scores"),
        format=format,
        workers=1,
    )
    dataset = export.run(config)
    dataset.verify()
    selection = load_selection(tmp_path / "selection", made.artifact)
    expected = []
    for shard in range(made.num_shards):
        table = made.columns(shard, ["doc_id", "text", *made.metadata, "text_hash"]).to_pylist()
        for row in selection.rows(shard).tolist():
            unscored = row % 10 == 0
            nll = None if unscored else float(row)
            scores = {
                "status": "too_short" if unscored else "ok",
                "nll": nll,
                "token_nll": nll and [float(np.float16(nll))] * 2,
            }
            expected.append(table[row] | scores)
    assert rows_of(dataset) == expected
    assert dataset.manifest.rows == selection.documents == len(expected) == 462
    assert dataset.manifest.tokens == selection.tokens


@pytest.mark.parametrize("format", export.FORMATS)
def test_workers_do_not_change_a_byte(made, tmp_path, format):
    for workers in (1, 2):
        config = ExportConfig(
            corpus=str(made.artifact.path),
            output=str(tmp_path / f"out{workers}"),
            scores={"a": str(tmp_path / "scores")},
            format=format,
            workers=workers,
        )
        export.run(config)
    names = [path.name for path in (tmp_path / "out1").iterdir() if path.name != "measured.json"]
    assert len(names) == 8  # three files with their digests, card, manifest
    for name in names:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_scores_alone_can_be_published(made, tmp_path):
    """Without the texts; two score sets side by side under their names."""
    write_scores(tmp_path / "more", made, offset=0.5)
    config = ExportConfig(
        corpus=str(made.artifact.path),
        output=str(tmp_path / "out"),
        scores={"small": str(tmp_path / "scores"), "large": str(tmp_path / "more")},
        text=False,
        columns=("text_hash",),
        workers=1,
    )
    dataset = export.run(config)
    table = dataset.read(0)
    assert table.column_names == [
        "doc_id",
        "text_hash",
        *("small_status", "small_nll", "small_token_nll"),
        *("large_status", "large_nll", "large_token_nll"),
    ]
    assert dataset.manifest.rows == made.artifact.manifest.rows
    rows = table.slice(1, 5).to_pylist()
    assert [row["large_nll"] - row["small_nll"] for row in rows] == [0.5] * 5
    with pytest.raises(ArtifactError, match="the column 'doc_id' twice"):
        export.run(ExportConfig(str(made.artifact.path), str(tmp_path / "x"), columns=("doc_id",)))
    with pytest.raises(ArtifactError, match="has no column 'lang'; it has: doc_id, text"):
        export.run(ExportConfig(str(made.artifact.path), str(tmp_path / "x"), columns=("lang",)))


def test_the_card_can_be_read_by_machines_and_people(made, tmp_path):
    config = ExportConfig(
        corpus=str(made.artifact.path),
        output=str(tmp_path / "out"),
        selection=str(tmp_path / "selection"),
        scores=str(tmp_path / "scores"),
        title='A "pruned": corpus | of mine',
        licence="odc-by",
        workers=1,
    )
    dataset = export.run(config)
    card = (dataset.path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["pretty_name"] == config.title and front["license"] == "odc-by"
    data_files = front["configs"][0]["data_files"]
    assert len(list(dataset.path.glob(data_files))) == dataset.num_shards == 3
    for name in dataset.read(0).column_names:
        assert f"| `{name}` |" in body
    assert "sum \\| of the `nll`" in body
    assert f"{dataset.manifest.rows:,} documents, {dataset.manifest.tokens:,} tokens" in body
    assert made.artifact.digest in body and "Random" in body
    assert str(tmp_path) not in card  # a published card names no directory of ours
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.count("|") - line.count("\\|") in (3, 4) for line in table)


def test_a_card_names_no_place_of_the_machine():
    local = {"model": {"path": "/home/me/models/judge/", "family": "t5"}, "scorer": "ask_llm"}
    served = {"model": {"served": "Qwen/Qwen3-8B", "endpoint": "http://10.1.2.3:8000/v1"}}
    other = {"score": {"model": "gs://mine/lid.176.ftz"}, "parts": [{"path": "google/flan-t5-xl"}]}
    assert export._public(local) == {
        "model": {"path": "judge", "family": "t5"},
        "scorer": "ask_llm",
    }
    assert export._public(served) == {"model": {"served": "Qwen/Qwen3-8B"}}
    assert export._public(other) == {
        "score": {"model": "lid.176.ftz"},
        "parts": [{"path": "google/flan-t5-xl"}],
    }


def test_a_format_without_its_library_is_refused_before_anything_is_written(
    made, tmp_path, monkeypatch
):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    config = ExportConfig(
        corpus=str(made.artifact.path), output=str(tmp_path / "out"), format="array_record"
    )
    with pytest.raises(ArtifactError, match=r"winnow-lm\[array_record\]"):
        export.run(config)
    assert not (tmp_path / "out").exists()


def test_json_has_no_nan():
    row = {"a": math.nan, "b": [1.0, math.inf], "c": {"d": -math.inf}, "e": "NaN"}
    assert export._jsonable(row) == {"a": None, "b": [1.0, None], "c": {"d": None}, "e": "NaN"}


@pytest.mark.parametrize("format", export.FORMATS)
def test_the_code_of_the_card_reads_the_dataset(made, tmp_path, format, monkeypatch):
    for module in ("datasets", "array_record", "tensorflow"):
        pytest.importorskip(module)
    config = ExportConfig(
        corpus=str(made.artifact.path),
        output=str(tmp_path / "out"),
        selection=str(tmp_path / "selection"),
        format=format,
        workers=1,
    )
    expected = rows_of(export.run(config))
    card = (tmp_path / "out" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    documents = list(names["documents"])
    assert len(documents) == len(expected) == 462
    if format in ("parquet", "jsonl.zst"):
        assert [row["text"] for row in documents] == [row["text"] for row in expected]
        hashes = [int(row["text_hash"]) for row in documents]
        assert hashes == [row["text_hash"] for row in expected] and max(hashes) > 2**63
