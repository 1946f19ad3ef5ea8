"""The corpus: documents tokenised once, with their metadata, for every scorer and model to come.

    python -m pruning ingest --gin_file=configs/ingest/c4.gin
    corpus = load_corpus("runs/c4/corpus")

Choices
- One file of the source is one shard, so shards can be made in any order by anybody; many small
  files can share a shard (`files_per_shard`), many workers a large file (`shards_per_file`).
- `shard_tables` is a function of the plan and a shard's number alone. The local runner maps it.
- The configuration holds digests of the input files, not their paths: a moved source is the same
  source, a changed one is refused when work goes on. What only decides whether to stop (the share
  of bad rows, a cut file) stays out, so that it can be changed to go on.
- Every row of the input is counted once: as a document, or as dropped for a reason.
- Text is stored as it came. Duplicates stay: what to do about them is a selection's business.
- Token ids are written byte by byte apart (BYTE_STREAM_SPLIT), without a dictionary: 21% smaller
  and 35% faster to write than Parquet's default. Texts and hashes have no dictionary either.
- Counts and hashes are not compressed, metadata by LZ4: what `select` reads of a corpus is one or
  two small columns of every row group, and zstd takes two thirds of the time for a few bytes.
- Tokenising is all but a tenth of the work of a core, so a process does one thing after another:
  threads for reading or writing would take their time from another process's tokenising.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from etils import epath

from pruning import artefact, parallel, progress, sources
from pruning.artefact import Artefact, Build, Counts, config_of
from pruning.sources.document import (
    Document,
    Meter,
    Reject,
    Source,
    SourceError,
    TruncatedFile,
    invalid_utf8,
    lookup,
)
from pruning.sources.identity import identify
from pruning.vocabulary import FILE as VOCABULARY_FILE
from pruning.vocabulary import Vocabulary, load_from_corpus

KIND = "corpus"
NAME = "Ingest"

ROW_GROUP = 1024  # documents
_ROW_GROUP_BYTES = 1 << 26  # a row group of long documents ends early
_ENCODED_AT_ONCE = 1 << 20  # bytes of text
_MOST_SHARDS = 50_000
_JUDGED_FROM = 10_000  # rows before a file is given up in the middle


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """Settings of `ingest`.

    Attributes:
      source: where the documents come from: @JsonlSource(), @ParquetSource(), @TextSource(),
        @TfdsSource() or @PythonDocsSource().
      vocabulary: a SentencePiece .model file, the directory of a trained vocabulary, or "bytes".
      output: directory of the corpus.
      metadata: fields to keep beside the text, each a column of strings under the last part of its
        name ("meta.url" becomes `url`), null where a record lacks it. Where the record says
        nothing, `domain` is the host of `url`, and `source` the file's name up to its first dot.
      extra_ids: sentinels of the vocabulary.
      min_document_bytes: shorter documents are dropped and counted.
      max_document_bytes: longer documents are dropped and counted.
      max_bad_fraction: share of malformed rows in a file beyond which to stop.
      on_truncated: "error", or "keep" the rows before the place where a compressed file is cut off.
      files_per_shard: how many files make one shard.
      shards_per_file: over how many shards the rows of one file are dealt out.
      workers: local processes; 0 for one per CPU.
    """

    source: sources.AnySource
    vocabulary: str
    output: str
    metadata: tuple[str, ...] = ("url", "timestamp", "domain", "source")
    extra_ids: int = 100
    min_document_bytes: int = 1
    max_document_bytes: int = 4 << 20
    max_bad_fraction: float = 0.01
    on_truncated: Literal["error", "keep"] = "error"
    files_per_shard: int = 1
    shards_per_file: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.files_per_shard, self.shards_per_file) < 1:
            raise ValueError("files_per_shard and shards_per_file must be at least 1.")
        if self.files_per_shard > 1 and self.shards_per_file > 1:
            raise ValueError("set files_per_shard or shards_per_file, not both.")
        columns = [_column(field) for field in self.metadata]
        twice = {column for column in columns if columns.count(column) > 1}
        if twice := twice | (set(columns) & set(_FIXED)):
            raise ValueError(f"metadata: the column {min(twice)!r} would be there twice.")


CONFIGURABLES: dict[str, type] = {NAME: IngestConfig, **sources.CONFIGURABLES}

_FIXED: dict[str, pa.DataType] = {
    "doc_id": pa.int64(),
    "text": pa.large_string(),
    "tokens": pa.list_(pa.uint16()),
    "n_tokens": pa.int32(),
    "n_bytes": pa.int32(),
    "text_hash": pa.uint64(),
}


def doc_ids(shard: int, rows: np.ndarray) -> np.ndarray:
    """What documents are called everywhere: shard << 32 | row, int64, in the shape of `rows`."""
    return (np.int64(shard) << 32) + rows


def shards_of(doc_ids: np.ndarray) -> np.ndarray:
    """The corpus shards that documents are in."""
    return doc_ids >> 32


def rows_of(doc_ids: np.ndarray) -> np.ndarray:
    """The rows of documents within their corpus shards."""
    return doc_ids & 0xFFFF_FFFF


def _column(field: str) -> str:
    return field.rpartition(".")[2]


def schema_of(vocabulary: Vocabulary, metadata: Sequence[str]) -> pa.Schema:
    """Columns of a corpus; tokens are uint16 unless the vocabulary has more than 65,535 ids."""
    wide = vocabulary.size > np.iinfo(np.uint16).max
    fixed = _FIXED | {"tokens": pa.list_(pa.uint32() if wide else pa.uint16())}
    return pa.schema([*fixed.items(), *((_column(field), pa.string()) for field in metadata)])


def encoding_of(schema: pa.Schema) -> dict[str, Any]:
    """How Parquet writes these columns: see the module's head."""
    metadata = [name for name in schema.names if name not in _FIXED]
    zstd = dict.fromkeys(("doc_id", "text", "tokens.list.element"), "zstd")
    return {
        "use_dictionary": metadata,
        "compression": zstd | dict.fromkeys(metadata, "lz4"),
        "column_encoding": {"tokens.list.element": "BYTE_STREAM_SPLIT"},
        # The least and the greatest text of a row group would be of use to nobody.
        "write_statistics": [n for n in schema.names if n not in ("text", "tokens")],
    }


# --------------------------------------------------------------------------------------------------
# Ingest


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a worker needs to make any shard.

    Attributes:
      pieces: per shard, the files that it reads.
      n_bytes: per shard, their size.
    """

    config: IngestConfig
    vocabulary: Vocabulary
    build: Build
    pieces: tuple[tuple[str, ...], ...]
    n_bytes: tuple[int, ...]


def run(config: IngestConfig) -> Artefact:
    """Makes the corpus, or finishes it.

    Raises:
      SourceError: the input is damaged, or too large a share of it is malformed.
      VocabularyError: the vocabulary cannot be used.
      ConfigurationChanged: `output` was begun with other settings or other input.
    """
    plan = prepare(config)
    build = plan.build
    if build.finished:
        return artefact.load(build.path, KIND)
    pending = build.pending()
    total = sum(plan.n_bytes)
    done = total - sum(plan.n_bytes[shard] for shard in pending)
    documents = 0

    with progress.track("ingest", total >> 20, "MiB of input", initial=done >> 20) as task:

        def show(n_bytes: int, n_documents: int) -> None:
            nonlocal done, documents
            done += n_bytes
            documents += n_documents
            task.advance((done >> 20) - task.done, documents=documents)

        work = functools.partial(ingest_shard, plan)
        try:
            parallel.run_shards(work, pending, config.workers, show)
        except SourceError:
            if not any(build.records()):  # nothing is lost: the settings may be mended
                (build.path / artefact.UNFINISHED).rmtree()
            raise
    if plan.vocabulary.kind != "bytes":
        build.write_file(VOCABULARY_FILE, plan.vocabulary.model)
    corpus = build.finish(_summary(plan))
    assert corpus is not None  # every shard was ours
    return corpus


def prepare(config: IngestConfig) -> Plan:
    """Looks at the input and claims the output."""
    vocabulary = load_vocabulary(config.vocabulary, config.extra_ids)
    source: Source = config.source
    files = source.files()
    step = config.files_per_shard
    pieces = [tuple(files[i : i + step]) for i in range(0, len(files), step)]
    if len(pieces) * config.shards_per_file > _MOST_SHARDS:
        raise SourceError(
            f"{len(files):,} files would make {len(pieces) * config.shards_per_file:,} shards: set "
            f"Ingest.files_per_shard to {-(-len(files) // 1000):,} or so."
        )
    identity, sizes = identify(source, pieces)
    described = identity | {
        "vocabulary": vocabulary.digest,
        "metadata": list(config.metadata),
        "min_document_bytes": config.min_document_bytes,
        "max_document_bytes": config.max_document_bytes,
        "shards_per_file": config.shards_per_file,
    }
    repeats = range(config.shards_per_file)
    schema = schema_of(vocabulary, config.metadata)
    return Plan(
        config=config,
        vocabulary=vocabulary,
        build=Build(
            config.output,
            KIND,
            described,
            {},
            len(pieces) * len(repeats),
            schema,
            encoding_of(schema),
        ),
        pieces=tuple(piece for piece in pieces for _ in repeats),
        n_bytes=tuple(size for size in sizes for _ in repeats),
    )


def load_vocabulary(path: str, extra_ids: int = 100) -> Vocabulary:
    """From a .model file, a directory that holds vocabulary.model, or the word "bytes"."""
    inside = epath.Path(path) / VOCABULARY_FILE
    return Vocabulary.from_file(inside if inside.exists() else path, extra_ids)


def _summary(plan: Plan) -> dict[str, Any]:
    counts = artefact.merge_counts(*(record["counts"] for record in plan.build.records() if record))
    if not counts["documents"]:
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
        raise SourceError(
            f"no document is left of {counts['rows']:,} rows (dropped: {dropped or 'none'}): look "
            f"at the input, then delete {plan.build.path}."
        )
    return {
        "vocabulary": plan.vocabulary.describe(),
        "metadata": [_column(field) for field in plan.config.metadata],
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        "source": config_of(plan.config.source),
    }


def ingest_shard(plan: Plan, shard: int, report: parallel.Report) -> None:
    """Reads, tokenises and writes one shard."""
    started = time.perf_counter()
    tally = Tally()
    with plan.build.shard(shard) as writer:
        for table in shard_tables(plan, shard, tally, report):
            writer.write(table, ROW_GROUP)
            writer.tokens += pc.sum(table["n_tokens"]).as_py()
        writer.counts = tally.counts()
        writer.measured = {"seconds": time.perf_counter() - started}


@dataclasses.dataclass
class Tally:
    """What became of the rows of a shard: each is a document or was dropped for one reason."""

    rows: int = 0
    documents: int = 0
    n_bytes: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    files: Counter[str] = dataclasses.field(default_factory=Counter)
    without: Counter[str] = dataclasses.field(default_factory=Counter)

    def counts(self) -> Counts:
        return {
            "rows": self.rows,
            "documents": self.documents,
            "bytes": self.n_bytes,
            "dropped": dict(self.dropped),
            "files": {"read": 0, "empty": 0, "cut_off": 0} | self.files,
            "without": dict(self.without),  # documents that lack a metadata field
        }


class _Row(NamedTuple):
    text: str
    encoded: bytes
    metadata: tuple[str | None, ...]


def shard_tables(
    plan: Plan, shard: int, tally: Tally, report: parallel.Report
) -> Iterator[pa.Table]:
    """The rows of a shard, a row group at a time: a function of the plan and the input alone.

    Args:
      tally: counts what happens.
      report: told of the bytes read and the documents made.
    """
    taken = 0

    def meter(n_bytes: int) -> None:
        nonlocal taken
        taken += n_bytes

    rows: list[_Row] = []
    held = 0
    for row in itertools.chain(_accepted(plan, shard, tally, meter), [None]):
        if row is not None:
            rows.append(row)
            held += len(row.encoded)
        if row is None or len(rows) == ROW_GROUP or held >= _ROW_GROUP_BYTES:
            before = tally.documents
            if (table := _table(plan, shard, rows, tally)).num_rows:
                yield table
            report(taken, tally.documents - before)
            rows, held, taken = [], 0, 0


def _accepted(plan: Plan, shard: int, tally: Tally, meter: Meter) -> Iterator[_Row]:
    """The rows that are documents by the rules of the configuration."""
    config = plan.config
    part = shard % config.shards_per_file
    rules = _Rules.of(config)
    for file in plan.pieces[shard]:
        name = file.rpartition("/")[2].partition(".")[0]
        rows = malformed = 0
        first_bad = ""
        for number, item in _items(config, file, tally, meter):
            if number % config.shards_per_file != part:
                continue
            rows += 1
            row = _row(item, rules, name)
            if isinstance(row, _Row):
                yield row
                continue
            tally.dropped[row.reason] += 1
            if row.malformed:
                malformed += 1
                first_bad = first_bad or f"row {number + 1}: {row.detail}"
                if malformed > config.max_bad_fraction * max(rows, _JUDGED_FROM):
                    raise _too_bad(file, malformed, rows, first_bad)
        if malformed > config.max_bad_fraction * rows:
            raise _too_bad(file, malformed, rows, first_bad)
        tally.rows += rows
        tally.files["read"] += part == 0
        tally.files["empty"] += part == 0 and not rows


def _items(
    config: IngestConfig, file: str, tally: Tally, meter: Meter
) -> Iterator[tuple[int, Document | Reject]]:
    """The numbered rows of a file; one that is cut off ends there when it may."""
    rows = 0
    try:
        for item in config.source.read(file, config.metadata, meter):
            yield rows, item
            rows += 1
    except TruncatedFile as error:
        if config.on_truncated == "error":
            raise SourceError(
                f"{error}, in row {rows + 1}. Fetch the file again, or set "
                "Ingest.on_truncated=keep to take the rows before."
            ) from error
        tally.files["cut_off"] += 1


def _too_bad(file: str, malformed: int, rows: int, first_bad: str) -> SourceError:
    return SourceError(
        f"{file}, {first_bad}.\n{malformed:,} of {rows:,} rows are malformed, this is the first. "
        "To drop such rows and count them, set Ingest.max_bad_fraction higher and run the command "
        "again."
    )


class _Rules(NamedTuple):
    """What makes a row a document, looked up once and not for every row.

    Attributes:
      fields: dotted names of the metadata.
      url, domain, source: which of them these columns are, or -1.
    """

    shortest: int
    longest: int
    fields: tuple[str, ...]
    url: int
    domain: int
    source: int

    @classmethod
    def of(cls, config: IngestConfig) -> _Rules:
        columns = [_column(field) for field in config.metadata]
        places = (columns.index(c) if c in columns else -1 for c in ("url", "domain", "source"))
        return cls(config.min_document_bytes, config.max_document_bytes, config.metadata, *places)


def _row(item: Document | Reject, rules: _Rules, source: str) -> _Row | Reject:
    """Args: source: what to say where the record does not say it."""
    if isinstance(item, Reject):
        return item
    text, fields = item
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, from a JSON escape
        return invalid_utf8(error)
    if not encoded or text.isspace():
        return Reject("empty", "the text is empty", malformed=False)
    if len(encoded) < rules.shortest:
        return Reject("too_short", f"{len(encoded)} bytes", malformed=False)
    if len(encoded) > rules.longest:
        return Reject("too_long", f"{len(encoded):,} bytes", malformed=False)
    metadata = []
    for name in rules.fields:
        value = fields.get(name) if "." not in name else None
        # Mostly a string, or absent: all else takes the long way.
        if value.__class__ is not str and (value is not None or "." in name):
            value = lookup(fields, name)
        metadata.append(value)
    if rules.domain >= 0 and metadata[rules.domain] is None:
        url = metadata[rules.url] if rules.url >= 0 else None
        metadata[rules.domain] = _host(url or lookup(fields, "url"))
    if rules.source >= 0 and metadata[rules.source] is None:
        metadata[rules.source] = source
    return _Row(text, encoded, tuple(map(_storable, metadata)))


_PLAIN_HOST = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://([a-zA-Z0-9.-]+)(?::[0-9]*)?(?:[/?#]|\Z)")


def _host(url: str | None) -> str | None:
    if not url:
        return None
    if plain := _PLAIN_HOST.match(url):  # ten times faster than the next
        return plain[1].lower()
    try:
        return urlsplit(url).hostname
    except ValueError:  # what stands in the field is no address
        return None


def _storable(value: str | None) -> str | None:
    """Without half surrogate pairs, which JSON can express and UTF-8 cannot."""
    if value is None or value.isascii():
        return value
    return value.encode("utf-8", "replace").decode()


def _table(plan: Plan, shard: int, rows: Sequence[_Row], tally: Tally) -> pa.Table:
    """Tokenises the rows. One that gives no token at all (invisible characters) is dropped here."""
    dtype = plan.build.schema.field("tokens").type.value_type.to_pandas_dtype()
    lengths: list[int] = []
    flat: list[np.ndarray] = []
    for texts in _batches(rows):
        ids = plan.vocabulary.encode_batch(texts)
        lengths += map(len, ids)
        flat.append(np.fromiter(itertools.chain.from_iterable(ids), dtype, sum(map(len, ids))))
    n_tokens = np.asarray(lengths, np.int32)
    if dropped := int(np.count_nonzero(n_tokens == 0)):
        tally.dropped["no_tokens"] += dropped
        rows = [row for row, n in zip(rows, lengths, strict=True) if n]
        n_tokens = n_tokens[n_tokens > 0]
    encoded = [row.encoded for row in rows]
    n_bytes = np.asarray([len(text) for text in encoded], np.int32)
    first, tally.documents = tally.documents, tally.documents + len(rows)
    tally.n_bytes += int(n_bytes.sum())
    columns: list[Any] = [
        doc_ids(shard, first + np.arange(len(rows))),
        pa.LargeStringArray.from_buffers(
            len(rows), pa.py_buffer(_offsets(n_bytes, np.int64)), pa.py_buffer(b"".join(encoded))
        ),
        pa.ListArray.from_arrays(
            _offsets(n_tokens, np.int32), np.concatenate([np.empty(0, dtype), *flat])
        ),
        n_tokens,
        n_bytes,
        np.asarray([xxhash.xxh3_64_intdigest(text) for text in encoded], np.uint64),
    ]
    for i, field in enumerate(plan.build.schema.names[len(_FIXED) :]):
        values = [row.metadata[i] for row in rows]
        tally.without[field] += values.count(None)
        columns.append(pa.array(values, pa.string()))
    return pa.table(columns, schema=plan.build.schema)


def _batches(rows: Sequence[_Row]) -> Iterator[list[str]]:
    """Texts of about `_ENCODED_AT_ONCE` bytes: ids come as Python lists, which are large."""
    texts: list[str] = []
    held = 0
    for row in rows:
        texts.append(row.text)
        held += len(row.encoded)
        if held >= _ENCODED_AT_ONCE:
            yield texts
            texts, held = [], 0
    if texts:
        yield texts


def _offsets(lengths: np.ndarray, dtype: type) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


# --------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A finished corpus. Made by `load_corpus`."""

    artefact: Artefact

    @property
    def num_shards(self) -> int:
        return self.artefact.num_shards

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The one that it was tokenised with."""
        described = self.artefact.manifest.summary["vocabulary"]
        return load_from_corpus(self.artefact.path, described)

    @property
    def metadata(self) -> list[str]:
        """Names of the metadata columns."""
        return list(self.artefact.manifest.summary["metadata"])

    def documents(self, shard: int) -> int:
        return self.artefact.manifest.shards[shard].rows

    def columns(self, shard: int, names: Sequence[str]) -> pa.Table:
        """Some columns of a whole shard."""
        return self.artefact.read(shard, names)

    def iter_batches(
        self, shard: int, names: Sequence[str], batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """Some columns of a shard, `batch_size` documents at a time, in order."""
        with self.artefact.parquet(shard) as file:
            yield from file.iter_batches(batch_size, columns=list(names), use_threads=False)

    def tokens_of(self, shard: int, rows: np.ndarray) -> list[np.ndarray]:
        """The tokens of some documents of a shard, reading no more row groups than hold them.

        Args:
          rows: integers [n], rows within the shard, in any order.

        Returns:
          n arrays [n_tokens] of the corpus's integer type, in the order of `rows`.

        Raises:
          IndexError: the shard has no such row.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return []
        if rows.min() < 0 or rows.max() >= self.documents(shard):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} of shard {shard} of {self.artefact.path} are "
                f"wanted, it has {self.documents(shard)}."
            )
        starts = self._row_groups[shard]
        group_of = np.searchsorted(starts, rows, side="right") - 1
        tokens: list[np.ndarray] = [np.empty(0)] * len(rows)
        with self.artefact.parquet(shard) as file:
            for group in np.unique(group_of):
                column = file.read_row_group(int(group), columns=["tokens"], use_threads=False)
                lists = column["tokens"].combine_chunks()
                values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
                for i in np.flatnonzero(group_of == group):
                    row = rows[i] - starts[group]
                    tokens[i] = values[offsets[row] : offsets[row + 1]]
        return tokens

    @functools.cached_property
    def _row_groups(self) -> _RowGroups:
        return _RowGroups(self.artefact)


class _RowGroups(dict[int, np.ndarray]):
    """Shard -> first row of each of its row groups, int64; looked up when asked for."""

    def __init__(self, corpus: Artefact):
        super().__init__()
        self._corpus = corpus

    def __missing__(self, shard: int) -> np.ndarray:
        with self._corpus.parquet(shard) as file:
            groups = [
                file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
            ]
        self[shard] = _offsets(np.asarray(groups, np.int64), np.int64)[:-1]
        return self[shard]


def load_corpus(path: epath.PathLike) -> Corpus:
    """Opens a finished corpus.

    Raises:
      ArtefactError: there is none, or it is unfinished.
    """
    return Corpus(artefact.load(path, KIND))
