"""Ingestion: documents tokenized once, with their metadata, into a corpus for all later stages.

    python -m pruning ingest --gin_file=configs/ingest/c4.gin
    corpus = load_corpus("runs/c4/corpus")

Choices
- By default one input file is one shard, so shards can be made in any order by any worker. Many
  small files can share a shard (`files_per_shard`), many workers a large file (`shards_per_file`).
- `shard_tables` is a function of the plan and a shard's index alone. The runner maps it over them.
- The configuration holds digests of the input files, not their paths. A source that was moved is
  the same source; one that was changed is refused on resume. Limits that only decide whether to
  stop (share of bad rows, truncated files) are left out, so that they can be changed on resume.
- Every row of the input is counted once, in rows and in bytes: as a document, or as dropped for a
  reason. Exceeding a limit on either is an error (`max_bad_fraction`, `max_lost_fraction`).
- A long document is split after its batch was tokenized (`max_document_tokens`), so that others
  cost nothing. Its parts are documents with stable ids and three columns that lead back to it.
- Text is stored unchanged. Duplicates stay; a selection decides what to do about them.
- Token ids are written as BYTE_STREAM_SPLIT, without a dictionary: 21% smaller and 35% faster to
  write than Parquet's default. Texts and hashes have no dictionary either.
- Counts and hashes are not compressed, and metadata is compressed by LZ4. `select` reads one or two
  small columns of every row group, and zstd would be two thirds of its time for few bytes.
- Tokenizing takes nine tenths of the CPU time, so each process works sequentially. Threads for
  reading or writing would compete with the tokenizing of other processes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from models.terminal import say
from pruning.corpus import sources, splitting
from pruning.corpus.layout import (
    FIXED,
    KIND,
    PARTS,
    ROW_GROUP,
    column_of,
    doc_ids,
    encoding_of,
    schema_of,
)
from pruning.corpus.sources import changes
from pruning.corpus.sources.document import (
    EMPTY,
    Document,
    ReadCallback,
    Reject,
    Source,
    SourceError,
    TruncatedFile,
    invalid_utf8,
    lookup,
)
from pruning.corpus.sources.identity import identify, names_of
from pruning.corpus.tokenizers import Tokenizer, load_tokenizer
from pruning.store import late, parallel, progress
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build
from pruning.store.manifest import Counts, config_of, merge_counts

NAME = "Ingest"

_ROW_GROUP_BYTES = 1 << 26  # a row group of long documents ends early
_ENCODED_AT_ONCE = 1 << 20  # bytes of text
_MOST_SHARDS = 50_000
_MOST_EXTRA_IDS = 1 << 20
_JUDGED_FROM = 10_000  # least number of rows read before a file is given up
_LONGEST_METADATA = 1 << 16  # bytes of a value
_MANY_UNKNOWN = 0.1  # share of a document's tokens, above which the document is counted
_LOST = ("too_long", "no_tokens")  # dropped, though well-formed


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """Settings of `ingest`.

    Attributes:
      source: source of the documents: @JsonlSource(), @ParquetSource(), @CsvSource(),
        @TextSource(), @TfdsSource(), @PythonDocsSource(), or a user-defined `Source`
        (docs/examples/paragraphs.py).
      vocabulary: a SentencePiece .model file, a tokenizer.json, the directory of a model or of a
        trained vocabulary, or "bytes".
      output: directory of the corpus.
      metadata: fields to keep beside the text, each a column of strings under the last part of its
        name ("meta.url" becomes `url`). A field is null where a record lacks it or where it is
        longer than 64 KiB; both are counted. By default, `domain` is the host of `url`, and
        `source` the file's name up to its first dot.
      extra_ids: number of sentinels after the ids of the vocabulary; None: the number of its
        layout (100 for T5, 300 for umT5, 0 for mT5, Llama and Gemma).
      min_document_bytes: shorter documents are dropped and counted.
      max_document_bytes: longer documents are dropped and counted.
      max_document_tokens: longer documents are split into parts of at most so many tokens, each a
        document of the corpus. The columns `source_document` ("FILE:ROW", rows counted from 1),
        `part` (from 1) and `parts` lead back; concatenated, the parts are the text. None: no
        document is split.
      max_bad_fraction: largest share of malformed rows of a file, or of their bytes; beyond it,
        ingestion stops.
      max_lost_fraction: largest share of well-formed rows of the corpus, or of their bytes, that
        are dropped (longer than `max_document_bytes`, or without tokens); beyond it, ingestion
        stops.
      on_truncated: "error", or "keep" the rows before the point where a compressed file is cut off.
      files_per_shard: number of files per shard.
      shards_per_file: number of shards over which the rows of one file are distributed.
      workers: number of local processes; 0 for one per CPU.
    """

    source: Source
    vocabulary: str
    output: str
    metadata: tuple[str, ...] = ("url", "timestamp", "domain", "source")
    extra_ids: int | None = None
    min_document_bytes: int = 1
    max_document_bytes: int = 4 << 20
    max_document_tokens: int | None = None
    max_bad_fraction: float = 0.01
    max_lost_fraction: float = 0.01
    on_truncated: Literal["error", "keep"] = "error"
    files_per_shard: int = 1
    shards_per_file: int = 1
    workers: int = 0

    def __post_init__(self) -> None:
        if min(self.files_per_shard, self.shards_per_file) < 1:
            raise ValueError("files_per_shard and shards_per_file must be at least 1.")
        if self.files_per_shard > 1 and self.shards_per_file > 1:
            raise ValueError("set files_per_shard or shards_per_file, not both.")
        for name in ("max_bad_fraction", "max_lost_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, not {getattr(self, name)}.")
        if not 0 <= self.min_document_bytes <= self.max_document_bytes < 1 << 31:
            raise ValueError(
                f"min_document_bytes ({self.min_document_bytes}) must not be negative or above "
                f"max_document_bytes ({self.max_document_bytes}), nor this 2 GiB or more."
            )
        parallel.require_processes(self.workers)
        if self.extra_ids is not None and not 0 <= self.extra_ids <= _MOST_EXTRA_IDS:
            raise ValueError(f"extra_ids is 0 to {_MOST_EXTRA_IDS:,}, not {self.extra_ids:,}.")
        most = self.max_document_tokens
        if most is not None and most < splitting.LEAST_TOKENS:
            raise ValueError(
                f"max_document_tokens is at least {splitting.LEAST_TOKENS}, not {most:,}."
            )
        columns = self.columns
        if "" in columns:
            raise ValueError("metadata: a field without a name.")
        twice = {column for column in columns if columns.count(column) > 1}
        if twice := twice | (set(columns) & set(FIXED)):
            raise ValueError(f"metadata: the column {min(twice)!r} would be there twice.")

    @property
    def columns(self) -> list[str]:
        """Columns beside those that every corpus has."""
        parts = PARTS if self.max_document_tokens is not None else ()
        return [*(column_of(field) for field in self.metadata), *parts]


CONFIGURABLES: dict[str, type] = {NAME: IngestConfig, **sources.CONFIGURABLES}


# --------------------------------------------------------------------------------------------------
# Ingest


@dataclasses.dataclass(frozen=True)
class Plan:
    """All inputs of a worker for any shard.

    Attributes:
      pieces: for every shard, the files that it reads.
      n_bytes: for every shard, the size of its files.
    """

    config: IngestConfig
    vocabulary: Tokenizer
    build: Build
    pieces: tuple[tuple[str, ...], ...]
    n_bytes: tuple[int, ...]

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Path -> name in the configuration, of every file."""
        return names_of(list(dict.fromkeys(file for piece in self.pieces for file in piece)))

    def large_files(self) -> dict[str, str]:
        """Return name -> path of the files that the configuration knows by samples alone."""
        names = self.names
        return {names[file]: file for file in changes.stamps(self.config.source, names)}


@late.stage
def run(config: IngestConfig) -> Artifact:
    """Make the corpus, or resume an interrupted run.

    Raises:
      SourceError: the input is damaged, or too large a share of it is malformed.
      VocabularyError: the vocabulary cannot be used.
      ConfigurationChanged: `output` holds work of other settings or other input.
    """
    plan = prepare(config)
    build = plan.build
    large = plan.large_files()
    if build.finished:
        corpus = load_artifact(build.path, KIND)
        digests = corpus.manifest.summary.get("read", {})
        changes.require_as_made(digests, large, os.fspath(build.path))
        return corpus
    if large:
        changes.require_unchanged(build.records(), large, os.fspath(build.path))
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
            build.refuse()
            raise
    for name, content in plan.vocabulary.files().items():
        build.write_file(name, content)
    try:
        summary = _summary(plan)
    except SourceError:
        build.refuse()
        raise
    made = build.finish(summary)
    assert made is not None  # this process had every shard
    corpus = made
    for line in losses(corpus.manifest.counts, _requested(config)):
        say(f"ingest: {line}", error=True)
    return corpus


def prepare(config: IngestConfig) -> Plan:
    """Inspect the input and claim the output directory."""
    vocabulary = load_tokenizer(config.vocabulary, config.extra_ids)
    source = config.source
    files = source.files()
    for line in left_out(source):
        say(f"ingest: {line}", error=True)
    step = config.files_per_shard
    pieces = [tuple(files[i : i + step]) for i in range(0, len(files), step)]
    if len(pieces) * config.shards_per_file > _MOST_SHARDS:
        fewer = f"Ingest.files_per_shard to {-(-len(files) // 1000):,} or so"
        if config.shards_per_file > 1:
            fewer = f"Ingest.shards_per_file to {max(_MOST_SHARDS // len(files), 1):,} at most"
        raise SourceError(
            f"{len(files):,} files would make {len(pieces) * config.shards_per_file:,} shards: set "
            f"{fewer}."
        )
    identity, sizes = identify(source, pieces)
    described = identity | {
        "vocabulary": vocabulary.digest,
        "metadata": list(config.metadata),
        "min_document_bytes": config.min_document_bytes,
        "max_document_bytes": config.max_document_bytes,
        "shards_per_file": config.shards_per_file,
    }
    if config.max_document_tokens is not None:
        described["max_document_tokens"] = config.max_document_tokens
    repeats = range(config.shards_per_file)
    schema = schema_of(vocabulary, config.columns)
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


def _summary(plan: Plan) -> dict[str, Any]:
    records = plan.build.complete_records()
    counts = merge_counts(*(record["counts"] for record in records))
    if not counts["documents"]:
        dropped = ", ".join(f"{n:,} {reason}" for reason, n in counts["dropped"].items())
        raise SourceError(
            f"no document is left of {counts['rows']:,} rows (dropped: {dropped or 'none'}): look "
            "at the input and the settings, and run the command again."
        )
    _require_few_lost(plan.config, counts)
    return {
        "vocabulary": plan.vocabulary.describe(),
        "metadata": plan.config.columns,
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        "source": config_of(plan.config.source),
        **({"read": digests} if (digests := changes.together(records)) else {}),
    }


def left_out(source: Source) -> list[str]:
    """Return sentences on files under its paths that the source does not read, where known."""
    tell = getattr(source, "left_out", None)
    return tell() if tell is not None else []


def _requested(config: IngestConfig) -> set[str]:
    """Return the metadata columns that were requested by name."""
    return {column_of(field) for field in config.metadata if field not in IngestConfig.metadata}


def losses(counts: Counts, requested: Collection[str] = ()) -> Iterator[str]:
    """Yield lines on input that the corpus lost: rows, values, and characters without a token.

    Args:
      requested: columns of metadata that should have values.
    """
    blank = ("blank_line",)
    dropped = {reason: n for reason, n in counts["dropped"].items() if reason not in blank}
    if dropped:
        lost = counts.get("dropped_bytes", {})
        n_bytes = sum(lost.get(reason, 0) for reason in dropped)
        total = counts["bytes"] + sum(lost.values())
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())
        yield (
            f"dropped {_share(sum(dropped.values()), counts['rows'])} rows and "
            f"{_share(n_bytes, total)} bytes: {reasons}"
        )
    if cut := counts["files"].get("cut_off"):
        yield f"{cut:,} files end in the middle; the rows before are kept"
    if split := counts.get("split"):
        yield (f"{split['documents']:,} long documents are split into {split['parts']:,} parts")
    unknown = counts.get("unknown", {})
    if unknown.get("documents"):
        yield (
            f"{_share(unknown['documents'], counts['documents'])} documents have over "
            f"{_MANY_UNKNOWN:.0%} tokens unknown to the vocabulary"
        )
    for column, n in counts["without"].items():
        if n == counts["documents"] and column in requested:
            yield f"no document has a value for the metadata column {column!r}: all are null"
    for column, n in counts.get("too_long_metadata", {}).items():
        yield f"{n:,} values of the metadata column {column!r} are over 64 KiB: null"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / max(whole, 1):.1%})"


def _require_few_lost(config: IngestConfig, counts: Counts) -> None:
    """Raise SourceError if too large a share of well-formed documents was dropped."""
    dropped_bytes = counts.get("dropped_bytes", {})  # earlier versions did not count them
    rows, n_bytes = counts["rows"], counts["bytes"] + sum(dropped_bytes.values())
    lost = sum(counts["dropped"].get(reason, 0) for reason in _LOST)
    lost_bytes = sum(dropped_bytes.get(reason, 0) for reason in _LOST)
    limit = config.max_lost_fraction
    if lost > limit * rows or lost_bytes > limit * n_bytes:
        reasons = [f"{counts['dropped'][r]:,} {r}" for r in _LOST if r in counts["dropped"]]
        raise SourceError(
            f"{_share(lost, rows)} rows and {_share(lost_bytes, n_bytes)} bytes of the input would "
            f"be dropped though whole ({', '.join(reasons)}): over {limit:.1%} of either. To keep "
            f"long documents, set Ingest.max_document_bytes higher (now "
            f"{config.max_document_bytes:,}); to do without them, set Ingest.max_lost_fraction "
            "higher. Then run the command again."
        )


def ingest_shard(plan: Plan, shard: int, report: parallel.Report) -> None:
    """Read, tokenize and write one shard."""
    started = time.perf_counter()
    tally = Tally()
    before = changes.stamps(plan.config.source, plan.pieces[shard])
    with plan.build.shard(shard) as writer:
        for table in shard_tables(plan, shard, tally, report):
            writer.write(table, ROW_GROUP)
            writer.tokens += pc.sum(table["n_tokens"]).as_py()
        writer.counts = tally.counts()
        writer.read = changes.read(before, plan.names) if before else {}
        writer.measured = {"seconds": time.perf_counter() - started}


@dataclasses.dataclass
class Tally:
    """Counts of a shard's rows; each is a document, or dropped for one reason."""

    rows: int = 0
    documents: int = 0
    n_bytes: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    dropped_bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    unknown: Counter[str] = dataclasses.field(default_factory=Counter)
    too_long_metadata: Counter[str] = dataclasses.field(default_factory=Counter)
    files: Counter[str] = dataclasses.field(default_factory=Counter)
    without: Counter[str] = dataclasses.field(default_factory=Counter)
    split: Counter[str] = dataclasses.field(default_factory=Counter)

    def counts(self) -> Counts:
        return {
            "rows": self.rows,
            "documents": self.documents,
            "bytes": self.n_bytes,
            "dropped": dict(self.dropped),
            "dropped_bytes": dict(self.dropped_bytes),
            "unknown": dict(self.unknown),  # tokens, and documents with many
            "too_long_metadata": dict(self.too_long_metadata),
            "files": {"read": 0, "empty": 0, "cut_off": 0} | self.files,
            "without": dict(self.without),  # documents that lack a metadata field
            **({"split": dict(self.split)} if self.split else {}),  # documents, and their parts
        }


class _Row(NamedTuple):
    text: str
    encoded: bytes
    metadata: tuple[str | None, ...]


def shard_tables(
    plan: Plan, shard: int, tally: Tally, report: parallel.Report
) -> Iterator[pa.Table]:
    """Yield the rows of a shard, one row group at a time; a function of plan and input alone.

    Args:
      tally: incremented by the numbers of documents and drops.
      report: called with the numbers of bytes read and documents made.
    """
    taken = 0

    def on_read(n_bytes: int) -> None:
        nonlocal taken
        taken += n_bytes

    rows: list[_Row] = []
    held = 0
    for row in itertools.chain(_accepted(plan, shard, tally, on_read), [None]):
        if row is not None:
            rows.append(row)
            held += len(row.encoded)
        if row is None or len(rows) == ROW_GROUP or held >= _ROW_GROUP_BYTES:
            before = tally.documents
            if (table := _table(plan, shard, rows, tally)).num_rows:
                yield table
            report(taken, tally.documents - before)
            rows, held, taken = [], 0, 0


def _accepted(plan: Plan, shard: int, tally: Tally, on_read: ReadCallback) -> Iterator[_Row]:
    """Yield the rows that the configuration accepts as documents."""
    config = plan.config
    part = shard % config.shards_per_file
    rules = _Rules.of(config)
    names = plan.names if config.max_document_tokens is not None else {}
    for file in plan.pieces[shard]:
        name = file.rpartition("/")[2].partition(".")[0]
        rows = n_bytes = malformed = malformed_bytes = 0
        first_bad = ""
        for number, item in _items(config, file, tally, on_read):
            of_part = _rows_of_part(number, item, part, config.shards_per_file)
            if not of_part:
                continue
            rows += of_part
            row = _row(item, rules, name, tally)
            if isinstance(row, _Row):
                n_bytes += len(row.encoded)
                if names:
                    origin = (_storable(f"{names[file]}:{number + 1}"), "1", "1")
                    row = row._replace(metadata=row.metadata + origin)
                yield row
                continue
            n_bytes += row.n_bytes * of_part
            tally.dropped[row.reason] += of_part
            tally.dropped_bytes[row.reason] += row.n_bytes * of_part
            if row.malformed:
                malformed += of_part
                malformed_bytes += row.n_bytes * of_part
                first_bad = first_bad or f"row {number + 1}: {row.detail}"
                if malformed > config.max_bad_fraction * max(rows, _JUDGED_FROM):
                    raise _too_bad(file, malformed, rows, malformed_bytes, n_bytes, first_bad)
        limit = config.max_bad_fraction
        if malformed > limit * rows or malformed_bytes > limit * n_bytes:
            raise _too_bad(file, malformed, rows, malformed_bytes, n_bytes, first_bad)
        tally.rows += rows
        tally.files["read"] += part == 0
        tally.files["empty"] += part == 0 and not rows


def _rows_of_part(number: int, item: Document | Reject, part: int, parts: int) -> int:
    """Return how many rows of an item, which begins with row `number`, a part of the file has."""
    rows = item.rows if item.__class__ is Reject else 1
    return (number + rows - 1 - part) // parts - (number - 1 - part) // parts


def _items(
    config: IngestConfig, file: str, tally: Tally, on_read: ReadCallback
) -> Iterator[tuple[int, Document | Reject]]:
    """Yield the rows of a file by number; a truncated file ends early if that is allowed."""
    rows = 0
    try:
        for item in config.source.read(file, config.metadata, on_read):
            yield rows, item
            rows += item.rows if item.__class__ is Reject else 1
    except TruncatedFile as error:
        if config.on_truncated == "error":
            raise SourceError(
                f"{error}, in row {rows + 1}. Fetch the file again, or set "
                "Ingest.on_truncated=keep to take the rows before."
            ) from error
        tally.files["cut_off"] += 1


def _too_bad(
    file: str, malformed: int, rows: int, bad_bytes: int, n_bytes: int, first_bad: str
) -> SourceError:
    return SourceError(
        f"{file}, {first_bad}. {malformed:,} of {rows:,} rows are malformed, "
        f"{bad_bytes:,} of {n_bytes:,} bytes; this is the first. "
        "To drop such rows and count them, set Ingest.max_bad_fraction higher and run the command "
        "again."
    )


class _Rules(NamedTuple):
    """Rules by which a row is a document, computed once instead of for every row.

    Attributes:
      fields: dotted names of the metadata.
      columns: their names in the corpus.
      url, domain, source: indices of these columns, or -1.
    """

    shortest: int
    longest: int
    fields: tuple[str, ...]
    columns: tuple[str, ...]
    url: int
    domain: int
    source: int

    @classmethod
    def of(cls, config: IngestConfig) -> _Rules:
        columns = tuple(column_of(field) for field in config.metadata)
        places = (columns.index(c) if c in columns else -1 for c in ("url", "domain", "source"))
        shortest, longest = config.min_document_bytes, config.max_document_bytes
        return cls(shortest, longest, config.metadata, columns, *places)


def _row(item: Document | Reject, rules: _Rules, source: str, tally: Tally) -> _Row | Reject:
    """Return the row of an item, or its reject; `source` is the default of records without one."""
    if isinstance(item, Reject):
        return item
    text, fields = item
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, from a JSON escape
        return invalid_utf8(error)._replace(n_bytes=len(text))
    n_bytes = len(encoded)
    if not encoded or text.isspace():
        return EMPTY._replace(n_bytes=n_bytes)
    if n_bytes < rules.shortest:
        return Reject("too_short", f"{n_bytes} bytes", False, n_bytes)
    if n_bytes > rules.longest:
        return Reject("too_long", f"{n_bytes:,} bytes", False, n_bytes)
    metadata: list[str | None] = []
    for name in rules.fields:
        value = fields.get(name) if "." not in name else None
        # Fast path: a string, or absent. All other types are converted.
        if value.__class__ is not str and (value is not None or "." in name):
            value = lookup(fields, name)
        if value is not None and len(value) > _LONGEST_METADATA >> 2 and _is_too_long(value):
            tally.too_long_metadata[rules.columns[len(metadata)]] += 1
            value = None
        metadata.append(value)
    if rules.domain >= 0 and metadata[rules.domain] is None:
        url = metadata[rules.url] if rules.url >= 0 else None
        metadata[rules.domain] = _host(url or lookup(fields, "url"))
    if rules.source >= 0 and metadata[rules.source] is None:
        metadata[rules.source] = source
    return _Row(text, encoded, tuple(map(_storable, metadata)))


def _is_too_long(value: str) -> bool:
    return len(value.encode("utf-8", "replace")) > _LONGEST_METADATA


_PLAIN_HOST = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://([a-zA-Z0-9.-]+)(?::[0-9]*)?(?:[/?#]|\Z)")


def _host(url: str | None) -> str | None:
    if not url or len(url) > _LONGEST_METADATA:
        return None
    if plain := _PLAIN_HOST.match(url):  # ten times faster than urlsplit
        return plain[1].lower()
    try:
        return urlsplit(url).hostname
    except ValueError:  # the field holds no valid address
        return None


def _storable(value: str | None) -> str | None:
    """Return the text without lone surrogates, which are valid in JSON and invalid in UTF-8."""
    if value is None or value.isascii():
        return value
    return value.encode("utf-8", "replace").decode()


def _table(plan: Plan, shard: int, rows: Sequence[_Row], tally: Tally) -> pa.Table:
    """Tokenize the rows. Rows without any token (invisible characters) are dropped here."""
    dtype = plan.build.schema.field("tokens").type.value_type.to_pandas_dtype()
    unknown_id = plan.vocabulary.unknown_id
    lengths: list[int] = []
    flat: list[np.ndarray] = []
    made: list[_Row] = []
    for batch in _batches(rows):
        batch, ids = _encoded(plan, batch, tally)
        made += batch
        lengths += map(len, ids)
        flat.append(np.fromiter(itertools.chain.from_iterable(ids), dtype, sum(map(len, ids))))
        if unknown_id is not None:
            _count_unknown(tally, flat[-1] == unknown_id, np.asarray([len(of) for of in ids]))
    rows = made
    n_tokens = np.asarray(lengths, np.int32)
    if dropped := int(np.count_nonzero(n_tokens == 0)):
        tally.dropped["no_tokens"] += dropped
        tally.dropped_bytes["no_tokens"] += sum(
            len(row.encoded) for row, n in zip(rows, lengths, strict=True) if not n
        )
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
    for i, field in enumerate(plan.build.schema.names[len(FIXED) :]):
        values = [row.metadata[i] for row in rows]
        tally.without[field] += values.count(None)
        columns.append(pa.array(values, pa.string()))
    return pa.table(columns, schema=plan.build.schema)


def _count_unknown(tally: Tally, unknown: np.ndarray, lengths: np.ndarray) -> None:
    """Count unknown tokens, and documents with many unknown tokens.

    Args:
      unknown: bool [tokens], over the concatenated documents.
      lengths: int [documents].
    """
    if total := int(np.count_nonzero(unknown)):
        before = np.concatenate([[0], np.cumsum(unknown)])
        counts = np.diff(before[np.concatenate([[0], np.cumsum(lengths)])])
        tally.unknown["tokens"] += total
        tally.unknown["documents"] += int(np.count_nonzero(counts > _MANY_UNKNOWN * lengths))


def _encoded(plan: Plan, rows: list[_Row], tally: Tally) -> tuple[list[_Row], list[list[int]]]:
    """Return the rows and their token ids, with the parts of long documents in their place."""
    vocabulary, most = plan.vocabulary, plan.config.max_document_tokens
    ids = vocabulary.encode_batch([row.text for row in rows])
    if most is None or all(len(of) <= most for of in ids):
        return rows, ids
    made: list[_Row] = []
    made_ids: list[list[int]] = []
    for row, of in zip(rows, ids, strict=True):
        texts = [row.text]
        if len(of) > most:
            texts = splitting.split(row.text, len(of), most, lambda t: len(vocabulary.encode(t)))
        if len(texts) == 1:
            made.append(row)
            made_ids.append(of)
            continue
        tally.split.update(documents=1, parts=len(texts))
        *metadata, origin, _, _ = row.metadata
        made += (
            _Row(text, text.encode(), (*metadata, origin, str(i), str(len(texts))))
            for i, text in enumerate(texts, 1)
        )
        made_ids += vocabulary.encode_batch(texts)
    return made, made_ids


def _batches(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Yield batches of about `_ENCODED_AT_ONCE` bytes, because ids are returned as Python lists."""
    batch: list[_Row] = []
    held = 0
    for row in rows:
        batch.append(row)
        held += len(row.encoded)
        if held >= _ENCODED_AT_ONCE:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _offsets(lengths: np.ndarray, dtype: type) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)
