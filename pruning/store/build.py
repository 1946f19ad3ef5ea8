"""Construction of an artifact shard by shard, by any number of processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from pruning.store import heartbeat
from pruning.store.artifact import Artifact, is_finished, load_artifact
from pruning.store.atomic import (
    HashingFile,
    atomic_file,
    clear_temporary,
    entries,
    pretty_json,
    write_bytes,
    write_text,
)
from pruning.store.block_hasher import checksum
from pruning.store.digests import file_of, is_whole
from pruning.store.manifest import (
    FORMAT,
    MANIFEST,
    MEASURED,
    UNFINISHED,
    ArtifactError,
    Counts,
    FinishedElsewhere,
    Manifest,
    ShardRecord,
    code_revision,
    digest_of,
    merge_counts,
    require_same_configuration,
    sealed,
    unsealed,
)

_THREADS = 32  # bound by latency of object storage, not by CPU
_CLAIMS = 20
_TIDIES = 20
_MOST_SHARDS = 10_000_000


def encoding_of_numbers(schema: pa.Schema) -> dict[str, Any]:
    """Return the argument `encoding` of `Build` for numeric rows: scores, selections.

    Arrow tries dictionary encoding for every column. For numbers that are mostly distinct, this
    takes five times as long to write and twice the space. Document ids compress best as deltas.
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
    """Writer of one data file, one row group at a time. Made by `Build.shard`.

    Attributes:
      tokens: number of tokens for the record; the caller sets it or adds to it.
      counts: numbers of dropped or truncated items in this shard, by reason.
      measured: seconds and other measurements; kept apart from the manifest.
      read: description of what was read for this shard; kept in its record alone.
    """

    def __init__(
        self, sink: HashingFile, schema: pa.Schema, encoding: Mapping[str, Any] | None = None
    ):
        """Open the writer; `encoding` has more settings of `pyarrow.parquet.ParquetWriter`."""
        self.tokens = 0
        self.counts: Counts = {}
        self.measured: dict[str, float] = {}
        self.read: dict[str, Any] = {}
        self.rows = 0
        self._schema = schema
        settings = {"compression": "zstd"} | dict(encoding or {})
        self._writer = pq.ParquetWriter(sink, schema, **settings)

    def write(self, table: pa.Table | Mapping[str, Any], row_group_size: int | None = None) -> None:
        """Append rows: an Arrow table, or columns (arrays, lists) that match the schema."""
        if not isinstance(table, pa.Table):
            table = pa.table(dict(table), schema=self._schema)
        self.rows += table.num_rows
        self._writer.write_table(table, row_group_size=row_group_size)

    def close(self) -> None:
        self._writer.close()

    @property
    def footer(self) -> pq.FileMetaData:
        """Parquet metadata that was written on closing."""
        return self._writer.writer.metadata


class BytesWriter:
    """Writer of one data file of another format. Made by `Build.bytes_shard`.

    Attributes:
      rows: number of rows; the caller sets it or adds to it, as `tokens`.
    """

    def __init__(self, sink: HashingFile):
        self.rows = 0
        self.tokens = 0
        self.counts: Counts = {}
        self.measured: dict[str, float] = {}
        self._sink = sink

    def write(self, data: bytes) -> None:
        self._sink.write(data)

    def close(self) -> None:
        pass

    @property
    def footer(self) -> None:
        """None: only Parquet files have a footer."""


def tidy(path: epath.PathLike) -> None:
    """Remove the files of unfinished work. Late processes may still write there."""
    path = epath.Path(path)
    for attempt in range(_TIDIES):
        if not (path / UNFINISHED).exists():
            return
        try:
            clear_temporary(path)
            (path / UNFINISHED).rmtree(missing_ok=True)
        except OSError:
            if attempt == _TIDIES - 1:
                raise
            time.sleep(0.05)


def read_plan(path: epath.Path) -> dict[str, Any]:
    """Return the plan of the unfinished work in a directory: kind, number of shards, configuration.

    Raises:
      FileNotFoundError: there is none.
      ArtifactError: it is damaged.
    """
    file = path / UNFINISHED / "plan.json"
    try:
        plan = unsealed(json.loads(file.read_text()))
        kinds = {"kind": str, "shards": int, "config": dict}
        if any(not isinstance(plan.get(name), kind) for name, kind in kinds.items()):
            raise ValueError("it lacks the kind, the number of shards or the configuration")
        if not 0 <= plan["shards"] <= _MOST_SHARDS:
            raise ValueError(f"it speaks of {plan['shards']:,} shards")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file} is damaged ({error}): delete {path} and run the command again."
        ) from error
    return plan


def read_record(file: epath.Path) -> tuple[ShardRecord, dict[str, Any]]:
    """Return the description of a finished shard of unfinished work, and its whole record.

    Raises:
      ArtifactError: the file is damaged.
    """
    try:
        record = unsealed(json.loads(file.read_text()))
        described = ShardRecord(**record["shard"])
        if described.file.partition(".")[0] != file.name.partition(".")[0]:
            raise ValueError(f"it is the record of {described.file}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{file} is damaged ({error}). Delete this file and run the same command again: it "
            "makes that shard anew."
        ) from error
    return described, record


def begun_configuration(path: epath.PathLike, kind: str) -> Mapping[str, Any] | None:
    """Return the configuration of the artifact in a directory, begun or finished; None if none.

    An artifact that `Build` would refuse, such as one of another kind, has none either.
    """
    path = epath.Path(path)
    try:
        if is_finished(path):
            return load_artifact(path, kind).manifest.config
        plan = read_plan(path)
    except (OSError, ValueError):
        return None
    return plan["config"] if plan["kind"] == kind else None


class Build:
    """An artifact under construction.

    Args:
      path: its directory; created when absent.
      kind: "corpus", "scores", "selection", ...
      config: the operative configuration, as JSON values (see `config_of`): every setting that
        affects the data. Other settings (number of workers, progress) are left out.
      inputs: artifacts that it is made from, by name.
      num_shards: number of data files. Score sets and selections have the shards of their corpus.
      schema: Arrow schema of the rows.
      encoding: additional arguments of `pyarrow.parquet.ParquetWriter`, where its defaults do not
        suit the rows.

    Raises:
      ConfigurationChanged: the directory holds work of another configuration or other inputs.
      ArtifactError: the directory holds something else.
      OSError: the directory cannot be written.

    Example:
      build = Build(out, "scores", config_of(config), {"corpus": corpus}, corpus.num_shards, schema)
      for k in build.pending():
          with build.shard(k) as shard:
              shard.write(columns)
      artifact = build.finish()
    """

    def __init__(
        self,
        path: epath.PathLike,
        kind: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, Artifact],
        num_shards: int,
        schema: pa.Schema,
        encoding: Mapping[str, Any] | None = None,
    ):
        self.path = epath.Path(path)
        self.kind = kind
        self.config = config
        self.inputs = {name: artifact.as_input() for name, artifact in inputs.items()}
        self.num_shards = num_shards
        self.schema = schema
        self.encoding = encoding
        self._beating: heartbeat.Heartbeat | None = None
        self._files: dict[str, str] = {}
        self._repairs: Manifest | None = None  # manifest of a finished artifact that lost files
        self._claim()

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "format": FORMAT,
            "config": json.loads(json.dumps(self.config)),  # as parsed from JSON: tuples are lists
            "inputs": {name: value["digest"] for name, value in self.inputs.items()},
            "shards": self.num_shards,
        }

    def _claim(self) -> None:
        """Claim the directory: a new one, or one with unfinished work of this configuration."""
        for _ in range(_CLAIMS):  # other processes may claim, finish and tidy up meanwhile
            if is_finished(self.path):
                return self._claim_finished()
            begun = self._plan()
            if begun is None:
                begun = self._claim_new()
            if begun is None or is_finished(self.path):
                continue
            if begun != self._identity() and (self._refused.exists() or self._nothing_done()):
                self._release()
                continue
            require_same_configuration(self.path, begun, self._identity())
            self._refused.unlink(missing_ok=True)
            return None
        raise ArtifactError(f"{self.path} changes all the time: does another command write to it?")

    def _claim_finished(self) -> None:
        done = load_artifact(self.path, self.kind).manifest
        begun = {
            "kind": done.kind,
            "format": done.format,
            "config": done.config,
            "inputs": {name: value["digest"] for name, value in done.inputs.items()},
            "shards": len(done.shards),
        }
        require_same_configuration(self.path, begun, self._identity(), "made")
        self._repairs = done
        if self._lost():
            self._inside.mkdir(exist_ok=True)
        else:
            self._repairs = None
            tidy(self.path)  # after a kill between the manifest and the end

    def _claim_new(self) -> dict[str, Any] | None:
        """Write the plan into an empty directory; return None if another process was first."""
        present = [entry.name for entry in self.path.iterdir()] if self.path.is_dir() else []
        present = [name for name in present if not name.startswith(".")]
        if present and not {UNFINISHED, MANIFEST} & set(present):
            if any(name.startswith("data-") for name in present):
                raise ArtifactError(
                    f"{self.path} has lost its manifest.json: delete {self.path} and run the "
                    "command again, or give another directory."
                )
            raise ArtifactError(
                f"{self.path} is not empty and not an artifact (it holds {present[0]}): "
                "give an empty or a new directory."
            )
        try:
            self._inside.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be created ({error.strerror or error}): give a directory "
                "that you may write to."
            ) from error
        if is_finished(self.path):
            return None  # its process tidies up
        try:
            write_text(self._inside / "plan.json", pretty_json(sealed(self._identity())))
        except FileNotFoundError:
            return None  # another process finished and removed it
        return self._plan()

    def _plan(self) -> dict[str, Any] | None:
        """Return the identity in the plan of the unfinished work; None where there is none."""
        try:
            return read_plan(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _nothing_done(self) -> bool:
        """Return whether the unfinished work has no results and no live worker."""
        for entry in self._inside.iterdir():
            if entry.name.startswith("worker-"):
                if heartbeat.is_alive(entry):
                    return False
            elif entry.name != "plan.json" and not entry.name.endswith(".tmp"):
                return False
        # A directory beside it, such as the rounds of a cascade, is work as well.
        return all(e.name.startswith(".") or e.name == UNFINISHED for e in self.path.iterdir())

    def _release(self) -> None:
        """Remove unfinished work that no process can resume."""
        for file in entries(self.path, "data-"):
            file.unlink(missing_ok=True)
        tidy(self.path)

    def refuse(self) -> None:
        """Record that the input of this work was refused, so that other work may replace it.

        The input is part of the configuration. Existing shards are useless once it is corrected.
        """
        with contextlib.suppress(OSError):
            write_text(self._refused, "")

    @property
    def _refused(self) -> epath.Path:
        return self._inside / "refused"

    @property
    def _inside(self) -> epath.Path:
        return self.path / UNFINISHED

    @property
    def finished(self) -> bool:
        """True if the manifest exists and none of its files was missing at the start."""
        return self._repairs is None and is_finished(self.path)

    def require_at_work(self) -> None:
        """Raise FinishedElsewhere when no work is left for this process."""
        if self.finished:
            raise FinishedElsewhere(os.fspath(self.path))

    def require_wanted(self) -> None:
        """Raise FinishedElsewhere as `require_at_work`, or when another process made the repair."""
        self.require_at_work()
        if self._repairs is not None and not self._lost():
            raise FinishedElsewhere(os.fspath(self.path))

    @contextlib.contextmanager
    def yielding(self) -> Iterator[None]:
        """Raise FinishedElsewhere for errors caused by another process having finished."""
        try:
            yield
        except (OSError, ArtifactError):
            self.require_wanted()
            raise

    def _name(self, shard: int) -> str:
        return f"data-{shard:05d}-of-{self.num_shards:05d}"

    def _record(self, shard: int) -> epath.Path:
        return self._inside / f"{self._name(shard)}.json"

    def pending(self, worker: int = 0, workers: int = 1) -> list[int]:
        """Return the shards that `worker` of `workers` has yet to write, in order.

        Raises:
          ArtifactError: a record is damaged.
        """
        mine = range(worker, self.num_shards, workers)
        if self._repairs is not None:
            lost = self._lost()
            return [shard for shard in mine if self._repairs.shards[shard].file in lost]
        if self.finished:
            return []
        records = self._read_records(mine)
        return [shard for shard, record in zip(mine, records, strict=True) if record is None]

    def _lost(self) -> set[str]:
        """Return the files of the manifest that are incomplete.

        Shards are checked by presence and size, other files by their SHA-256.
        """
        assert self._repairs is not None
        shards, files = self._repairs.shards, self._repairs.files
        with ThreadPoolExecutor(_THREADS) as pool:
            whole = pool.map(functools.partial(is_whole, self.path), shards)
            lost = {s.file for s, there in zip(shards, whole, strict=True) if not there}
            same = pool.map(self._is_whole_file, files)
            lost |= {name for name, there in zip(files, same, strict=True) if not there}
        return lost

    def _is_whole_file(self, name: str) -> bool:
        assert self._repairs is not None
        try:
            content = (self.path / name).read_bytes()
        except FileNotFoundError:
            return False
        return hashlib.sha256(content).hexdigest() == self._repairs.files[name]

    def _read_records(self, shards: Iterable[int]) -> list[dict[str, Any] | None]:
        """Return the records of shards; None for a shard without one, or with incomplete files."""
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(self._read_record, shards))

    def _read_record(self, shard: int) -> dict[str, Any] | None:
        try:
            described, record = read_record(self._record(shard))
        except FileNotFoundError:
            return None
        own = record.pop("plan", None) in (None, digest_of(self._identity()))
        return record if own and is_whole(self.path, described) else None

    def _heartbeat(self, worker: str | None = None) -> heartbeat.Heartbeat:
        return heartbeat.Heartbeat(self.path / UNFINISHED, self.num_shards, worker)

    @contextlib.contextmanager
    def beating(self, worker: str | None = None) -> Iterator[heartbeat.Heartbeat]:
        """Keep one heartbeat for all shards of this process, for a stage that reports its progress.

        Without it, every shard has a heartbeat of its own. Nested calls use the outer heartbeat.
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
        """Write one shard, which appears when the block ends without an error."""
        with self._shard(shard, "parquet", self._parquet_writer) as writer:
            yield writer

    def _parquet_writer(self, sink: HashingFile) -> ShardWriter:
        return ShardWriter(sink, self.schema, self.encoding)

    @contextlib.contextmanager
    def bytes_shard(self, shard: int, suffix: str) -> Iterator[BytesWriter]:
        """Write one shard in another format, such as "jsonl.zst"."""
        with self._shard(shard, suffix, BytesWriter) as writer:
            yield writer

    @contextlib.contextmanager
    def _shard(self, shard: int, suffix: str, open_writer: Callable[..., Any]) -> Iterator[Any]:
        file = f"{self._name(shard)}.{suffix}"
        started = time.time()
        stage = self._beating  # the stage reports the progress of its shards itself
        self.require_at_work()
        # Not by `beating` otherwise: several threads may each be writing a shard.
        with contextlib.nullcontext(stage) if stage is not None else self._heartbeat() as beat:
            if stage is None:
                beat.on(shard, "writes")
            with self.yielding(), atomic_file(self.path / file) as sink:
                writer = open_writer(sink)
                if stage is None:
                    beat.on(shard, "writes", lambda: {"done": writer.rows, "unit": "rows"})
                try:
                    yield writer
                except BaseException:
                    sink.discard()  # discard what the Parquet writer writes on closing
                    writer.close()
                    raise
                writer.close()
                blocks = sink.blocks.to_bytes(writer.footer)
                record = ShardRecord(
                    file, writer.rows, int(writer.tokens), sink.hexdigest(), checksum(blocks)
                )
                self._require_own(shard, record)
            # Before the record: after the last one, another process may clear the directory.
            beat.off(shard)
            with self.yielding():
                self._publish(shard, record, blocks, writer, started)

    def _require_own(self, shard: int, record: ShardRecord) -> None:
        """Raise an error unless this shard is wanted, before it gets its name."""
        if self._repairs is None:
            self.require_at_work()
            if (begun := self._plan()) is not None:
                require_same_configuration(self.path, begun, self._identity())
        elif record.identity() != self._repairs.shards[shard].identity():
            raise ArtifactError(
                f"{self.path / record.file} was made again and differs from what the manifest "
                "describes: the input has changed, or the version of a library. Delete "
                f"{self.path} and run the command again, and then what was made from it."
            )

    def _publish(
        self, shard: int, record: ShardRecord, blocks: bytes, writer: Any, started: float
    ) -> None:
        """Write the files that accompany a data file: its digests and its record."""
        digests = file_of(self.path, record.file)
        if self._repairs is None:
            write_bytes(digests, blocks)
            value = {
                "shard": record.to_json(),
                "counts": writer.counts,
                "measured": writer.measured,
                "began": started,
                "ended": time.time(),
                "plan": digest_of(self._identity()),
            }
            if read := getattr(writer, "read", None):
                value["read"] = read
            write_text(self._record(shard), pretty_json(sealed(value)))
        elif self._repairs.shards[shard].blocks:  # earlier versions wrote none
            write_bytes(digests, blocks)

    def write_file(self, name: str, content: bytes) -> None:
        """Write another file of the artifact; every process calls this, before `finish`."""
        self.require_at_work()
        self._files[name] = hashlib.sha256(content).hexdigest()
        if self._repairs is not None and self._files[name] != self._repairs.files.get(name):
            raise ArtifactError(
                f"{self.path / name} was made again and differs from what the manifest describes: "
                f"delete {self.path} and run the command again, and then what was made from it."
            )
        with self.yielding():
            write_bytes(self.path / name, content)

    def records(self) -> list[dict[str, Any] | None]:
        """Return each shard's record (`shard`, `counts`, `measured`), None while it is missing.

        Raises:
          FinishedElsewhere: another process has finished the work.
          ArtifactError: a record is damaged.
        """
        if self._repairs is not None:  # the manifest has only the sum of the counts
            rows = [{"shard": s.to_json(), "counts": {}, "measured": {}} for s in self._made()]
            for row in rows[:1]:
                row["counts"] = dict(self._repairs.counts)
            return [*rows]
        found = self._read_records(range(self.num_shards))
        self.require_at_work()
        return found

    def complete_records(self) -> list[dict[str, Any]]:
        """Return the records of all shards.

        Raises:
          ArtifactError: a shard is missing, or a record is damaged.
        """
        found = self.records()
        present = [record for record in found if record is not None]
        if len(present) < self.num_shards:
            self._require_not_lost(found)
            raise ArtifactError(f"{self.path} lacks shards: run the same command again.")
        return present

    def _made(self) -> Sequence[ShardRecord]:
        assert self._repairs is not None
        return self._repairs.shards

    def finish(self, summary: Mapping[str, Any] | None = None) -> Artifact | None:
        """Write the manifest once all shards are there; None while other workers' are missing.

        Args:
          summary: values specific to the kind; must not depend on the process that finishes.

        Raises:
          ArtifactError: a shard that was present is missing.
        """
        if self._repairs is not None:
            if self._lost():
                return None
            self._repairs = None
        if not self.finished:
            records = self._read_records(range(self.num_shards))
            if not self.finished:  # otherwise another process has finished meanwhile
                present = [record for record in records if record is not None]
                if len(present) < self.num_shards:
                    self._require_not_lost(records)
                    return None
                with self.yielding():
                    self._write_manifest(present, dict(summary or {}))
        tidy(self.path)
        return load_artifact(self.path, self.kind)

    def _require_not_lost(self, records: Sequence[dict[str, Any] | None]) -> None:
        lost = [k for k, r in enumerate(records) if r is None and self._record(k).exists()]
        if lost and not self.finished:
            raise ArtifactError(
                f"{self.path / self._name(lost[0])} was written and is gone or not whole "
                f"({len(lost)} such shards): run the same command again, it makes them anew."
            )

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
        write_text(self.path / MEASURED, pretty_json(measured))
        write_text(self.path / MANIFEST, manifest.to_json())
