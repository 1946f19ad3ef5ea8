"""Artefacts: the directories that one stage leaves and the next one reads.

    corpus/
      manifest.json                  what this is; written last: without it, work is unfinished
      data-00000-of-00016.parquet    the rows
      vocabulary.model               files of the kind's own
      measured.json                  seconds, rates: what differs from run to run
      unfinished/                    only while the work goes on
        plan.json                    the configuration that the finished shards were made with
        data-00000-of-00016.json     the record of a finished shard
        worker-00001-of-00016.json   who has a shard in hand, or failed on it: see heartbeat.py

Choices
- A shard exists when its record does. The data file is written under a temporary name and renamed,
  then the record likewise: a process killed at any moment leaves either a whole shard or nothing.
- Any number of processes may build one artefact. They agree through the plan, take shards by index,
  and whoever finds every record present writes the manifest, whose bytes do not depend on who did.
- The manifest holds nothing that varies between two runs of the same work (times stand in
  measured.json), so that "the same artefact" can be tested by comparing bytes.
- A digest covers kind, configuration, inputs and data, not the code revision or the paths: two
  copies of a corpus are the same corpus.
- Paths are `etils.epath`, so a directory may be on object storage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from pruning import heartbeat

FORMAT = 1
MANIFEST = "manifest.json"
MEASURED = "measured.json"
UNFINISHED = "unfinished"

Counts = dict[str, Any]  # leaves are integers; inner nodes are dictionaries


class ArtefactError(ValueError):
    """A directory is not the artefact that it was taken for."""


class ConfigurationChanged(ArtefactError):
    """Work was begun in this directory with another configuration."""


# --------------------------------------------------------------------------------------------------
# What a manifest says


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """One data file: its name, its rows, its tokens (0 where the kind has none), its SHA-256."""

    file: str
    rows: int
    tokens: int
    checksum: str


def size_in_words(rows: int, tokens: int) -> str:
    """ "1,000 rows, 250,000 tokens"; no word of tokens where nothing counts them."""
    return f"{rows:,} rows" + (f", {tokens:,} tokens" if tokens else "")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      kind: "corpus", "scores", "selection", ...
      config: the operative configuration that made the data, as JSON values.
      inputs: for every input its `path` (to be read by people) and its `digest`.
      shards: a record per data file, in shard order.
      files: checksum of every other file of the artefact.
      counts: everything read, kept, dropped or cut, by reason.
      summary: what the kind wants to say of itself (vocabulary, threshold, ...).
      code: version and revision of the code that finished it.
    """

    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    shards: Sequence[ShardRecord]
    files: Mapping[str, str]
    counts: Counts
    summary: Mapping[str, Any]
    code: Mapping[str, str]
    format: int = FORMAT

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def size(self) -> str:
        return size_in_words(self.rows, self.tokens)

    @functools.cached_property
    def digest(self) -> str:
        """Names the content: equal for equal work, wherever and whenever it was done."""
        return digest_of(
            {
                "kind": self.kind,
                "format": self.format,
                "config": self.config,
                "inputs": {name: value["digest"] for name, value in self.inputs.items()},
                "shards": [dataclasses.asdict(shard) for shard in self.shards],
                "files": self.files,
            }
        )

    def to_json(self) -> str:
        value = {"digest": self.digest, "rows": self.rows, "tokens": self.tokens}
        return _pretty(value | dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        value = json.loads(text)
        for derived in ("digest", "rows", "tokens"):
            value.pop(derived, None)
        value["shards"] = [ShardRecord(**shard) for shard in value["shards"]]
        return cls(**value)


def digest_of(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def config_of(configuration: Any) -> dict[str, Any]:
    """A (nested) dataclass as JSON values; the names of nested classes are kept under "class"."""
    return json.loads(json.dumps(_plain(configuration), ensure_ascii=False))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def merge_counts(*counts: Counts) -> Counts:
    """Adds nested counts, key by key; keys come out sorted, so the order of merging is not seen."""
    merged: Counts = {}
    for count in counts:
        for key, value in count.items():
            if isinstance(value, dict):
                merged[key] = merge_counts(merged.get(key, {}), value)
            else:
                merged[key] = merged.get(key, 0) + int(value)
    return dict(sorted(merged.items()))


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Names every leaf in which two JSON values differ, as `a.b: 1 -> 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted(set(old) | set(new)):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), inner)
        return found
    return [] if old == new else [f"{name}: {_short(old)} -> {_short(new)}"]


@functools.cache
def code_revision() -> dict[str, str]:
    """Version of the distribution and, in a checkout, the commit ("+": with changes)."""
    try:
        version = metadata.version("winnow-lm")
    except metadata.PackageNotFoundError:
        version = "unknown"
    root = Path(__file__).resolve().parent.parent
    revision = "none"
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            head = subprocess.run(
                [*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True
            )
            dirty = subprocess.run(
                [*git, "status", "--porcelain", "-uno"], capture_output=True, check=True, text=True
            )
            revision = head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    return {"version": version, "revision": revision}


# --------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class Artefact:
    """A finished artefact: its place and its manifest."""

    path: epath.Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    def as_input(self) -> dict[str, str]:
        """How another artefact's manifest refers to this one."""
        return {"path": os.fspath(self.path), "digest": self.digest}

    def parquet(self, shard: int, encoded: Sequence[str] = ()) -> pq.ParquetFile:
        """Opens one data file; raises ArtefactError, naming it, when it is missing or damaged."""
        return open_parquet(self.path / self.manifest.shards[shard].file, encoded)

    def read(
        self,
        shard: int,
        columns: Sequence[str] | None = None,
        encoded: Sequence[str] = (),
        use_threads: bool = True,
    ) -> pa.Table:
        """All rows of one shard, or some of its columns.

        Args:
          columns: their names; None for all.
          encoded: columns of strings to be read as codes and a dictionary, as the file has them,
            which is many times faster where few strings repeat.
          use_threads: whether Arrow reads columns side by side; who reads shards side by side is
            faster without.
        """
        record = self.manifest.shards[shard]
        path = self.path / record.file
        with self.parquet(shard, encoded) as file:
            absent = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if absent:
                has = ", ".join(file.schema_arrow.names)
                raise ArtefactError(f"{path} has no column {', '.join(absent)}; it has: {has}")
            wanted = None if columns is None else list(columns)
            table = file.read(columns=wanted, use_threads=use_threads)
        if table.num_rows != record.rows:
            raise ArtefactError(
                f"{path} holds {table.num_rows} rows, its manifest says {record.rows}: the file "
                "was changed after it was written. Delete the directory and build it again."
            )
        return table

    def verify(self) -> None:
        """Compares every file with its checksum; raises ArtefactError naming the first bad one."""
        expected = {shard.file: shard.checksum for shard in self.manifest.shards}
        for name, checksum in (expected | dict(self.manifest.files)).items():
            verify_file(self.path / name, checksum)


def verify_file(path: epath.Path, checksum: str) -> None:
    """Raises ArtefactError unless the file is there and has this SHA-256."""
    if not path.exists():
        raise ArtefactError(f"{path} is missing. Build {path.parent} again.")
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    if hasher.hexdigest() != checksum:
        raise ArtefactError(
            f"{path} is damaged: its SHA-256 differs from the manifest's. "
            f"Build {path.parent} again."
        )


def open_parquet(path: epath.PathLike, encoded: Sequence[str] = ()) -> pq.ParquetFile:
    """Opens a Parquet file, local or remote; a damaged one is an ArtefactError that names it."""
    path = epath.Path(path)
    try:
        local = not os.fspath(path).startswith(("gs://", "s3://", "hdfs://"))
        source = os.fspath(path) if local else path.open("rb")
        return pq.ParquetFile(source, memory_map=local, read_dictionary=list(encoded))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path} does not exist.") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtefactError(
            f"{path} is not a whole Parquet file ({error}). It was cut off or damaged: delete it "
            "and run the command that made it again."
        ) from error


def load(path: epath.PathLike, kind: str | None = None) -> Artefact:
    """Reads the manifest of a finished artefact.

    Raises:
      ArtefactError: nothing is there, the work is unfinished, it is of another kind or format.
    """
    path = epath.Path(path)
    file = path / MANIFEST
    if not file.exists():
        if (path / UNFINISHED).exists():
            raise ArtefactError(
                f"{path} is unfinished: run the command that makes it again, it will go on."
            )
        what = "exists but holds no manifest.json" if path.exists() else "does not exist"
        raise ArtefactError(f"{path} {what}: it is not {_article(kind or 'artefact')}.")
    try:
        manifest = Manifest.from_json(file.read_text())
    except (ValueError, TypeError, KeyError) as error:
        raise ArtefactError(f"{file} cannot be read ({error}).") from error
    if manifest.format != FORMAT:
        raise ArtefactError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}: build it again."
        )
    if kind is not None and manifest.kind != kind:
        raise ArtefactError(f"{path} holds {manifest.kind}, not {kind}.")
    return Artefact(path, manifest)


def is_finished(path: epath.PathLike) -> bool:
    """Whether a manifest stands in `path`."""
    return (epath.Path(path) / MANIFEST).exists()


def require_input(artefact: Artefact, name: str, given: Artefact) -> None:
    """Raises ArtefactError unless `artefact` was made from `given`.

    A score set names the corpus that it scored: this is what refuses the scores of another corpus.
    """
    recorded = artefact.manifest.inputs.get(name)
    if recorded is None:
        raise ArtefactError(f"{artefact.path} names no input {name!r}.")
    if recorded["digest"] != given.digest:
        raise ArtefactError(
            f"{artefact.path} was made from the {name} at {recorded['path']} (digest "
            f"{recorded['digest'][:12]}), not from {given.path} (digest {given.digest[:12]}). "
            f"Give the {name} that belongs to it, or make it again from this one."
        )


def require_same_documents(expected: np.ndarray, found: np.ndarray, where: str) -> None:
    """Raises ArtefactError naming the first row whose document ids differ.

    Args:
      expected: int64 [rows], the corpus shard's `doc_id`.
      found: int64 [rows], the joined table's.
      where: file or directory, for the message.
    """
    if len(expected) != len(found):
        raise ArtefactError(f"{where} has {len(found)} rows where its corpus has {len(expected)}.")
    unequal = np.flatnonzero(expected != found)
    if len(unequal):
        row = int(unequal[0])
        raise ArtefactError(
            f"{where}, row {row}: document {int(found[row])} stands where the corpus has "
            f"{int(expected[row])}. These rows do not belong to this corpus."
        )


# --------------------------------------------------------------------------------------------------
# Writing


def numbers(schema: pa.Schema) -> dict[str, Any]:
    """`Build`'s encoding for rows of numbers: scores, selections.

    Arrow tries a dictionary for every column. For numbers that are all different it takes five
    times as long to write and twice the room; document ids are best kept as differences.
    """
    words = [
        field.name
        for field in schema
        if pa.types.is_dictionary(field.type)
        or pa.types.is_string(field.type)
        or pa.types.is_large_string(field.type)
    ]
    differences = {"doc_id": "DELTA_BINARY_PACKED"} if "doc_id" in schema.names else {}
    return {"use_dictionary": words, "column_encoding": differences}


class ShardWriter:
    """Writes one data file row group by row group. Made by `Build.shard`.

    Attributes:
      tokens: set or add to it, for the record.
      counts: everything dropped or cut in this shard, by reason.
      measured: seconds and the like; kept apart from the manifest.
    """

    def __init__(
        self, sink: _HashingFile, schema: pa.Schema, encoding: Mapping[str, Any] | None = None
    ):
        """`encoding`: further settings of `pyarrow.parquet.ParquetWriter`."""
        self.tokens = 0
        self.counts: Counts = {}
        self.measured: dict[str, float] = {}
        self.rows = 0
        self._schema = schema
        settings = {"compression": "zstd"} | dict(encoding or {})
        self._writer = pq.ParquetWriter(sink, schema, **settings)

    def write(self, table: pa.Table | Mapping[str, Any], row_group_size: int | None = None) -> None:
        """Appends rows: an Arrow table, or columns (arrays, lists) that fit the schema."""
        if not isinstance(table, pa.Table):
            table = pa.table(dict(table), schema=self._schema)
        self.rows += table.num_rows
        self._writer.write_table(table, row_group_size=row_group_size)

    def close(self) -> None:
        self._writer.close()


class BytesWriter:
    """Writes one data file of another format. Made by `Build.bytes_shard`; see `ShardWriter`.

    Attributes:
      rows: to be set or added to, like `tokens`.
    """

    def __init__(self, sink: _HashingFile):
        self.rows = 0
        self.tokens = 0
        self.counts: Counts = {}
        self.measured: dict[str, float] = {}
        self._sink = sink

    def write(self, data: bytes) -> None:
        self._sink.write(data)

    def close(self) -> None:
        pass


class Build:
    """An artefact in the making.

    Args:
      path: its directory; created when absent.
      kind: "corpus", "scores", "selection", ...
      config: the operative configuration, as JSON values (see `config_of`): whatever would change
        the data. What does not (number of workers, progress) stays out.
      inputs: name -> artefact it is made from.
      num_shards: how many data files there will be; the shards of a score set and of a selection
        are those of the corpus.
      schema: of the rows.
      encoding: how Parquet is to write them, where its defaults do not suit: further arguments of
        `pyarrow.parquet.ParquetWriter`.

    Raises:
      ConfigurationChanged: the directory holds work done with another configuration or inputs.
      ArtefactError: the directory holds something else.
      OSError: it cannot be written.

    Example:
      build = Build(out, "scores", config_of(config), {"corpus": corpus}, corpus.num_shards, schema)
      for k in build.pending():
          with build.shard(k) as shard:
              shard.write(columns)
      artefact = build.finish()
    """

    def __init__(
        self,
        path: epath.PathLike,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artefact],
        num_shards: int,
        schema: pa.Schema,
        encoding: Mapping[str, Any] | None = None,
    ):
        self.path = epath.Path(path)
        self.kind = kind
        self.config = config
        self.inputs = {name: artefact.as_input() for name, artefact in inputs.items()}
        self.num_shards = num_shards
        self.schema = schema
        self.encoding = encoding
        self._beating: heartbeat.Heartbeat | None = None
        self._files: dict[str, str] = {}
        self._claim()

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": FORMAT,
            "config": self.config,
            "inputs": {name: value["digest"] for name, value in self.inputs.items()},
            "shards": self.num_shards,
        }

    def _claim(self) -> None:
        """Takes the directory: new, or begun with this same configuration."""
        plan = self.path / UNFINISHED / "plan.json"
        if self.finished:
            done = load(self.path, self.kind).manifest
            begun = {
                "kind": done.kind,
                "format": done.format,
                "config": done.config,
                "inputs": {name: value["digest"] for name, value in done.inputs.items()},
                "shards": len(done.shards),
            }
        elif plan.exists():
            begun = json.loads(plan.read_text())
        else:
            present = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
            # Another process of the same job may have claimed it between the two looks.
            if present and UNFINISHED not in present:
                raise ArtefactError(
                    f"{self.path} is not empty and not an artefact (it holds {present[0]}): "
                    "give an empty or a new directory."
                )
            try:
                (self.path / UNFINISHED).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(
                    f"{self.path} cannot be created ({error.strerror or error}): give a directory "
                    "that you may write to."
                ) from error
            write_text(plan, _pretty(self._identity()))
            begun = json.loads(plan.read_text())  # another process may have written last
        if changes := differences(begun, json.loads(json.dumps(self._identity()))):
            raise ConfigurationChanged(
                f"{self.path} was {'made' if self.finished else 'begun'} with another "
                "configuration:"
                + "".join(f"\n  {change}" for change in changes)
                + "\nGive another output directory, or delete this one."
            )

    @property
    def finished(self) -> bool:
        return is_finished(self.path)

    def _name(self, shard: int) -> str:
        return f"data-{shard:05d}-of-{self.num_shards:05d}"

    def _record(self, shard: int) -> epath.Path:
        return self.path / UNFINISHED / f"{self._name(shard)}.json"

    def pending(self, worker: int = 0, workers: int = 1) -> list[int]:
        """The shards that `worker` of `workers` has still to write, in order."""
        if self.finished:
            return []
        mine = range(worker, self.num_shards, workers)
        return [shard for shard in mine if not self._record(shard).exists()]

    def _heartbeat(self, worker: str | None = None) -> heartbeat.Heartbeat:
        return heartbeat.Heartbeat(self.path / UNFINISHED, self.num_shards, worker)

    @contextlib.contextmanager
    def beating(self, worker: str | None = None) -> Iterator[heartbeat.Heartbeat]:
        """One heartbeat for all shards of this process, for a stage that tells itself how it does.

        Without it every shard has one of its own while it is written. Within itself, the same one.
        """
        if self._beating is not None:
            yield self._beating
            return
        with self._heartbeat(worker) as self._beating:
            try:
                yield self._beating
            finally:
                self._beating = None

    @contextlib.contextmanager
    def shard(self, shard: int) -> Iterator[ShardWriter]:
        """Writes shard number `shard`: it comes into being when the block ends without an error."""
        with self._shard(shard, "parquet", self._parquet_writer) as writer:
            yield writer

    def _parquet_writer(self, sink: _HashingFile) -> ShardWriter:
        return ShardWriter(sink, self.schema, self.encoding)

    @contextlib.contextmanager
    def bytes_shard(self, shard: int, suffix: str) -> Iterator[BytesWriter]:
        """The same in a format of the caller's own, such as "jsonl.zst"."""
        with self._shard(shard, suffix, BytesWriter) as writer:
            yield writer

    @contextlib.contextmanager
    def _shard(self, shard: int, suffix: str, open_writer: Callable[..., Any]) -> Iterator[Any]:
        file = f"{self._name(shard)}.{suffix}"
        started = time.time()
        stage = self._beating  # which tells of its shards in its own words
        # Otherwise not by `beating`: several threads may have a shard in hand each.
        with contextlib.nullcontext(stage) if stage is not None else self._heartbeat() as beat:
            if stage is None:
                beat.on(shard, "writes")
            with atomic_file(self.path / file) as sink:
                writer = open_writer(sink)
                if stage is None:
                    beat.on(shard, "writes", lambda: {"done": writer.rows, "unit": "rows"})
                try:
                    yield writer
                except BaseException:
                    sink.discard()  # what the Parquet writer still wants to say goes nowhere
                    writer.close()
                    raise
                writer.close()
            record = ShardRecord(file, writer.rows, int(writer.tokens), sink.hexdigest())
            value = {
                "shard": dataclasses.asdict(record),
                "counts": writer.counts,
                "measured": writer.measured,
                "began": started,
                "ended": time.time(),
            }
            # Before the record: with the last one somebody may clear the directory.
            beat.off(shard)
            write_text(self._record(shard), _pretty(value))

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a file of the artefact's own; call it before `finish`, in every process alike."""
        with atomic_file(self.path / name) as sink:
            sink.write(content)
        self._files[name] = sink.hexdigest()

    def records(self) -> list[dict[str, Any] | None]:
        """Per shard: its record (`shard`, `counts`, `measured`), or None while it is missing."""
        found: list[dict[str, Any] | None] = []
        for shard in range(self.num_shards):
            try:
                found.append(json.loads(self._record(shard).read_text()))
            except FileNotFoundError:
                found.append(None)
        return found

    def finish(self, summary: Mapping[str, Any] | None = None) -> Artefact | None:
        """Writes the manifest once all shards are there; None while other workers' are missing.

        Args:
          summary: the kind's own words for the manifest; must not depend on who finishes.
        """
        if not self.finished:
            try:
                records = self.records()
            except (ValueError, KeyError) as error:
                raise ArtefactError(f"{self.path / UNFINISHED} is damaged ({error}).") from error
            if (
                not self.finished
            ):  # else another worker finished, and cleared the records, meanwhile
                present = [record for record in records if record is not None]
                if len(present) < self.num_shards:
                    return None
                self._write_manifest(present, dict(summary or {}))
        # Also after a kill between the manifest and this line.
        if (self.path / UNFINISHED).exists():
            (self.path / UNFINISHED).rmtree(missing_ok=True)
            clear_temporary(self.path)
        return load(self.path, self.kind)

    def _write_manifest(self, records: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        manifest = Manifest(
            kind=self.kind,
            config=json.loads(json.dumps(self.config)),
            inputs=self.inputs,
            shards=[ShardRecord(**record["shard"]) for record in records],
            files=dict(sorted(self._files.items())),
            counts=merge_counts(*(record["counts"] for record in records)),
            summary=json.loads(json.dumps(summary)),
            code=code_revision(),
        )
        measured: dict[str, float] = {}
        for record in records:
            for key, value in record["measured"].items():
                measured[key] = measured.get(key, 0.0) + value
        write_text(self.path / MEASURED, _pretty(measured))
        write_text(self.path / MANIFEST, manifest.to_json())


class _HashingFile(io.RawIOBase):
    """Passes writes on and hashes them, so that the checksum costs no second reading."""

    def __init__(self, path: epath.Path, file: Any):
        self._path = path
        self._file = file
        self._hasher = hashlib.sha256()
        self._position = 0
        self._discarded = False

    def discard(self) -> None:
        self._discarded = True

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self._discarded:
            with _naming(self._path):
                self._file.write(view)
        self._hasher.update(view)
        self._position += view.nbytes
        return view.nbytes

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """Turns the system's error into one that names the file and the mend."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write {path} ({error.strerror or error}). Nothing half-written is left: make "
            "room or give another output, and run the same command again",
        ) from error


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[_HashingFile]:
    """A binary file that appears whole or not at all.

    Raises:
      OSError: naming the path and the mend, when it cannot be written (full disk, no permission).
    """
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with _naming(path):
            file = temporary.open("wb")
        try:
            sink = _HashingFile(path, file)
            yield sink
            with _naming(path):
                file.flush()
                with contextlib.suppress(AttributeError, io.UnsupportedOperation):
                    os.fsync(file.fileno())
        finally:
            with _naming(path):
                file.close()
        with _naming(path):
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a small text file atomically."""
    with atomic_file(path) as sink:
        sink.write(text.encode())


def clear_temporary(path: epath.PathLike) -> None:
    """Removes what killed processes left under temporary names; only when nobody else writes."""
    for file in epath.Path(path).glob(".*.tmp"):
        file.unlink(missing_ok=True)


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
