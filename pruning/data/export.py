"""Export of a selection, or of scores, as a plain dataset with a card.

    dataset/
      README.md                        the card: content, origin, and how to read it
      data-00000-of-00016.parquet      or .jsonl.zst, .array_record, .tfrecord

Choices
- With a selection, the kept documents are exported; without one, all documents. With `text = False`
  and a score set this gives a dataset of scores, which can be published where the text cannot;
  `text_hash` (xxh3-64 of the UTF-8 text) and the url identify the documents.
- Scores are joined by position and their `doc_id`s compared: those of another corpus are refused.
- A shard of the corpus becomes a file, so the files are made in parallel and kept on restart.
- Records (ArrayRecord, TFRecord) hold one tf.train.Example a document, as TFDS's do. Their writers
  want a local file: it is copied to where the dataset is.
- A new format is a function from tables to bytes in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pruning.corpus.layout import ROW_GROUP
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.data.tf_example import example
from pruning.scores import vectors
from pruning.store import late, parallel, progress
from pruning.store.artifact import Artifact, load_artifact, require_input, require_same_documents
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

KIND = "dataset"
NAME = "Export"
CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Settings of `export`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the dataset.
      selection: directory of a selection of it; None exports every document.
      scores: directory of a score set of it, or of several by name; their columns then get the name
        in front ("small_ask_llm_yes").
      text: whether to write the text.
      columns: further columns of the corpus; None for its metadata and `text_hash`.
      format: "parquet", "jsonl.zst", "array_record" (wants the extra of that name) or "tfrecord"
        (wants TensorFlow: the extra "seqio").
      title, licence: for the card; the licence of the texts is not known here.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    selection: str | None = None
    scores: str | Mapping[str, str] = dataclasses.field(default_factory=dict)
    text: bool = True
    columns: tuple[str, ...] | None = None
    format: Literal["parquet", "jsonl.zst", "array_record", "tfrecord"] = "parquet"
    title: str = "A pruned corpus"
    licence: str = "unknown"
    workers: int = 0

    def __post_init__(self) -> None:
        parallel.require_processes(self.workers)


CONFIGURABLES: dict[str, type] = {NAME: ExportConfig}


@late.stage
def run(config: ExportConfig) -> Artifact:
    """Write the dataset, or go on where an earlier run stopped.

    Raises:
      ArtifactError: selection or scores belong to another corpus; a column is missing.
    """
    exported = Exported.open(config)
    _require_library(config.format)
    build = Build(
        config.output,
        KIND,
        {
            "columns": exported.columns,
            "scores": {name: sorted(_score_columns(s)) for name, s in exported.scores.items()},
            "format": config.format,
            **({"uint64": "decimal strings"} if config.format == "jsonl.zst" else {}),
            "title": config.title,
            "licence": config.licence,
        },
        exported.inputs,
        exported.corpus.num_shards,
        exported.schema,
    )
    if build.finished:
        return load_artifact(build.path, KIND)
    pending = build.pending()
    done = build.num_shards - len(pending)
    with progress.track("export", build.num_shards, "shards", done) as task:
        work = functools.partial(export_shard, config, build)
        parallel.run_shards(work, pending, config.workers, lambda shards, _: task.advance(shards))
    shards = [record["shard"] for record in build.complete_records()]
    card = _card(exported, sum(s["rows"] for s in shards), sum(s["tokens"] for s in shards))
    build.write_file(CARD, card.encode())
    dataset = build.finish()
    assert dataset is not None  # every shard was ours
    return dataset


@dataclasses.dataclass(frozen=True)
class Exported:
    """Inputs of an export: corpus, selection and score sets, checked to belong together."""

    config: ExportConfig
    corpus: Corpus
    selection: Selection | None
    scores: Mapping[str, Artifact]  # by the prefix of their columns

    @classmethod
    def open(cls, config: ExportConfig) -> Exported:
        corpus = load_corpus(config.corpus)
        selection = config.selection and load_selection(config.selection, corpus.artifact)
        named = {"": config.scores} if isinstance(config.scores, str) else config.scores
        scores = {name: load_artifact(path, "scores") for name, path in named.items()}
        for score_set in scores.values():
            require_input(score_set, "corpus", corpus.artifact)
        exported = cls(config, corpus, selection or None, scores)
        names = exported.schema.names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ArtifactError(
                f"the dataset would have the column {twice[0]!r} twice: name the score sets apart, "
                "or change Export.columns."
            )
        return exported

    @property
    def inputs(self) -> dict[str, Artifact]:
        inputs = {"corpus": self.corpus.artifact}
        if self.selection is not None:
            inputs["selection"] = self.selection.artifact
        return inputs | {f"scores {name}".strip(): found for name, found in self.scores.items()}

    @property
    def columns(self) -> list[str]:
        """Of the corpus."""
        further = self.config.columns
        if further is None:
            further = (*self.corpus.metadata, "text_hash")
        return ["doc_id", *(["text"] if self.config.text else []), *further]

    @functools.cached_property
    def schema(self) -> pa.Schema:
        corpus = _schema_of(self.corpus.artifact)
        if absent := sorted(set(self.columns) - set(corpus.names)):
            raise ArtifactError(
                f"{self.config.corpus} has no column {absent[0]!r}; it has: "
                f"{', '.join(corpus.names)}. Change Export.columns."
            )
        fields = [corpus.field(name) for name in self.columns]
        for prefix, score_set in self.scores.items():
            for name, kind in _score_columns(score_set).items():
                fields.append(pa.field(f"{prefix}_{name}" if prefix else name, kind))
        return pa.schema(fields)

    def tables(self, shard: int) -> Iterator[tuple[pa.Table, int]]:
        """Yield the kept documents of a shard and their token counts, a row group at a time."""
        documents = self.corpus.documents(shard)
        kept = np.ones(documents, bool)
        if self.selection is not None:
            kept = self.selection.mask(shard, documents)
        scores = [self._scores(score_set, shard) for score_set in self.scores.values()]
        first = 0
        names = list(dict.fromkeys([*self.columns, "n_tokens"]))
        for batch in self.corpus.iter_batches(shard, names, ROW_GROUP):
            mask = pa.array(kept[first : first + len(batch)])
            rows = pa.table(batch).filter(mask)
            columns = [rows[name] for name in self.columns]
            for table in scores:
                columns += table.slice(first, len(batch)).filter(mask).columns
            first += len(batch)
            yield pa.table(columns, schema=self.schema), int(np.sum(rows["n_tokens"].to_numpy()))

    def _scores(self, score_set: Artifact, shard: int) -> pa.Table:
        kinds = _score_columns(score_set)
        table = score_set.read(shard, ["doc_id", *kinds])
        expected = self.corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
        where = f"{score_set.path}/{score_set.manifest.shards[shard].file}"
        require_same_documents(expected, table["doc_id"].to_numpy(), where)
        columns = [
            vectors.as_lists(table[name], table.schema.field(name))
            if vectors.is_vector(table.schema.field(name))
            else table[name].cast(kind)
            for name, kind in kinds.items()
        ]
        return pa.table(columns, names=list(kinds))


def _schema_of(found: Artifact) -> pa.Schema:
    with found.parquet(0) as file:
        return file.schema_arrow


def _score_columns(score_set: Artifact) -> dict[str, pa.DataType]:
    """Return status and scores, with dictionary columns decoded and vectors as lists."""
    kinds = {}
    for field in _schema_of(score_set):
        if vectors.is_vector(field):
            kinds[field.name] = vectors.list_type(field)
        elif field.name != "doc_id":
            decode = pa.types.is_dictionary(field.type)
            kinds[field.name] = field.type.value_type if decode else field.type
    return kinds


# --------------------------------------------------------------------------------------------------
# Files


def export_shard(config: ExportConfig, build: Build, shard: int, report: parallel.Report) -> None:
    """Write one file."""
    tables = Exported.open(config).tables(shard)
    rows = FORMATS[config.format](build, shard, tables)
    report(1, rows)


def _parquet(build: Build, shard: int, tables: Iterator[tuple[pa.Table, int]]) -> int:
    with build.shard(shard) as writer:
        for table, tokens in tables:
            writer.write(table)
            writer.tokens += tokens
        return writer.rows


def _jsonl_zst(build: Build, shard: int, tables: Iterator[tuple[pa.Table, int]]) -> int:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    with build.bytes_shard(shard, "jsonl.zst") as writer:
        for table, tokens in tables:
            rows = _exact(table).to_pylist()
            lines = [json.dumps(_jsonable(row), ensure_ascii=False) for row in rows]
            writer.write(compressor.compress("".join(f"{line}\n" for line in lines).encode()))
            writer.rows += table.num_rows
            writer.tokens += tokens
        writer.write(compressor.flush())
        return writer.rows


def _exact(table: pa.Table) -> pa.Table:
    """Return the table with unsigned 64-bit integers as decimal strings.

    NOTE: pyarrow and datasets read a JSON number above 2^63 as a float, which loses its last bits.
    """
    fields = [
        pa.field(field.name, pa.string()) if pa.types.is_uint64(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _jsonable(value: Any) -> Any:
    """Return a JSON value, null for NaN and infinity."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _array_record(build: Build, shard: int, tables: Iterator[tuple[pa.Table, int]]) -> int:
    from array_record.python import array_record_module

    def opened(path: Path) -> Any:
        # One record a group: any document can be read alone.
        return array_record_module.ArrayRecordWriter(os.fspath(path), "group_size:1")

    return _records(build, shard, "array_record", opened, tables)


def _tfrecord(build: Build, shard: int, tables: Iterator[tuple[pa.Table, int]]) -> int:
    import tensorflow as tf

    def opened(path: Path) -> Any:
        return tf.io.TFRecordWriter(os.fspath(path))

    return _records(build, shard, "tfrecord", opened, tables)


def _records(
    build: Build,
    shard: int,
    suffix: str,
    opened: Callable[[Path], Any],
    tables: Iterator[tuple[pa.Table, int]],
) -> int:
    """Write one tf.train.Example a document to a local file."""
    with tempfile.TemporaryDirectory() as directory, build.bytes_shard(shard, suffix) as writer:
        path = Path(directory) / f"records.{suffix}"
        records = opened(path)
        for table, tokens in tables:
            for row in table.to_pylist():
                records.write(example(row))
            writer.rows += table.num_rows
            writer.tokens += tokens
        records.close()
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                writer.write(block)
        return writer.rows


_LIBRARIES = {"array_record": ("array_record", "array_record"), "tfrecord": ("tensorflow", "seqio")}


def _require_library(format: str) -> None:
    """Raise ArtifactError where a format cannot be written here, before anything is."""
    library, extra = _LIBRARIES.get(format, (None, None))
    if library and importlib.util.find_spec(library) is None:
        raise ArtifactError(
            f"the format {format!r} wants {library}: pip install 'winnow-lm[{extra}]', or export "
            "as parquet or jsonl.zst."
        )


FORMATS: dict[str, Callable[[Build, int, Iterator[tuple[pa.Table, int]]], int]] = {
    "parquet": _parquet,
    "jsonl.zst": _jsonl_zst,
    "array_record": _array_record,
    "tfrecord": _tfrecord,
}

_LOAD_DATASET = """from pathlib import Path

from datasets import load_dataset

# In this directory; from the hub, its name there: "owner/name".
documents = load_dataset(str(Path.cwd()), split="train")"""
_IS_PLACE = re.compile(r"/|~|\.\.?/|\w+://")
_READING = {
    "array_record": """import glob

from array_record.python.array_record_data_source import ArrayRecordDataSource

documents = ArrayRecordDataSource(sorted(glob.glob("data-*.array_record")))
documents[0]  # a serialized tf.train.Example; a null is a feature that is not there""",
    "tfrecord": """import glob

import tensorflow as tf

documents = tf.data.TFRecordDataset(sorted(glob.glob("data-*.tfrecord")))
tf.train.Example.FromString(next(iter(documents)).numpy())  # a null is not there""",
}


# --------------------------------------------------------------------------------------------------
# The card


def _card(exported: Exported, rows: int, tokens: int) -> str:
    """Return the dataset card, README.md: front matter, then prose and tables."""
    config = exported.config
    corpus = exported.corpus.artifact.manifest
    meanings = _descriptions(exported)
    if config.format == "jsonl.zst":
        meanings["text_hash"] += ", as a decimal string"
    columns = "\n".join(
        f"| `{field.name}` | {field.type} | {_cell(meanings.get(field.name, ''))} |"
        for field in exported.schema
    )
    files = ""  # dataset hubs read these formats only
    if config.format in ("parquet", "jsonl.zst"):
        files = f'configs:\n- config_name: default\n  data_files: "data-*.{config.format}"\n'
    parts = [
        f"""---
pretty_name: {json.dumps(config.title)}
license: {json.dumps(config.licence)}
tags: [data-pruning, pretraining]
{files}---

# {_cell(config.title)}

{rows:,} documents, {tokens:,} tokens, {exported.corpus.num_shards:,} files; from a corpus of
{corpus.rows:,} documents and {corpus.tokens:,} tokens.

```python
{_READING.get(config.format, _LOAD_DATASET)}
```

## Columns

| name | type | meaning |
|---|---|---|
{columns}"""
    ]
    if exported.selection is not None:
        found = exported.selection.artifact.manifest
        parts.append(f"## How the documents were chosen\n\n{_json(_public(found.summary))}")
    for name, score_set in exported.scores.items():
        title = f"## Scores {name}".strip()
        parts.append(f"{title}\n\n{_json(_public(score_set.manifest.summary))}")
    # Without the paths of the machine that it was made on.
    described = {key: corpus.config[key] for key in ("source", "files") if key in corpus.config}
    parts.append(f"## Source of the corpus\n\n{_json(described)}")
    made = "\n".join(
        f"| {_cell(name)} | `{found.digest}` |" for name, found in exported.inputs.items()
    )
    parts.append(
        "## Provenance\n\nMade with Winnow from these artifacts. The texts belong to their "
        "authors, the licence above is the word of whoever exported them.\n\n"
        f"| input | digest |\n|---|---|\n{made}"
    )
    return "\n\n".join(parts) + "\n"


def _descriptions(exported: Exported) -> dict[str, str]:
    described = {
        "doc_id": "the document in its corpus: shard << 32 | row",
        "text": "as it came from the source",
        "tokens": "ids of the corpus's vocabulary, without end-of-sequence",
        "n_tokens": "how many",
        "n_bytes": "of the UTF-8 text",
        "text_hash": "xxh3-64 of the UTF-8 text",
    }
    for prefix, score_set in exported.scores.items():
        front = f"{prefix}_" if prefix else ""
        described[f"{front}status"] = "ok, or why there is no score"
        for name, meaning in score_set.manifest.summary.get("columns", {}).items():
            described[f"{front}{name}"] = str(meaning)
    return described


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _public(value: Any) -> Any:
    """Return a JSON value with the last names of absolute paths, and without addresses of servers.

    Names on a hub ("owner/name") and relative paths stay.
    """
    if isinstance(value, list):
        return [_public(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _public(item) for key, item in value.items() if key != "endpoint"}
    for key in ("path", "model"):
        place = found.get(key)
        if isinstance(place, str) and _IS_PLACE.match(place):
            found[key] = place.rstrip("/").rpartition("/")[2]
    return found


def _json(value: Any) -> str:
    """Return a Markdown block of JSON, with back quotes escaped so that none can end it."""
    text = json.dumps(value, indent=1, ensure_ascii=False).replace("`", "\\u0060")
    return f"```json\n{text}\n```"
