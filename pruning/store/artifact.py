"""Artifacts: directories that one stage writes and the next one reads.

    corpus/
      manifest.json                  the description; written last: without it, work is unfinished
      data-00000-of-00016.parquet    the rows
      data-00000-of-00016.parquet.xxh3   digests of its blocks, compared on reading: digests.py
      vocabulary.model               further files, specific to the kind
      measured.json                  seconds, rates: values that differ from run to run
      unfinished/                    present only while the artifact is being built
        plan.json                    the configuration that the finished shards were made with
        data-00000-of-00016.json     the record of a finished shard
        worker-00001-of-00016.json   state of the worker on a shard: see heartbeat.py

Choices
- A shard is complete when its record, its digests and its data file exist. Each is written under a
  temporary name and renamed, the record last. A process killed at any moment leaves either a
  complete shard or one that is written again.
- A finished artifact that lost files is reopened by the command that made it. The missing shards
  are recomputed and must match the manifest.
- A directory without any finished shard is not bound to its configuration: another may replace it.
- Any number of processes may build one artifact. They share a plan and divide the shards by index.
  Any process that finds all records present writes the manifest; its bytes do not depend on which.
- The manifest holds nothing that varies between two runs of the same work (times are in
  measured.json), so that equality of artifacts can be tested by comparing bytes.
- A digest covers kind, configuration, inputs and data, not the code revision or the paths: two
  copies of a corpus have the same digest.
- Paths are `etils.epath`, so a directory may be on object storage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from pruning.store.digests import Digests, digests_of
from pruning.store.manifest import (
    FORMAT,
    MANIFEST,
    MEASURED,
    UNFINISHED,
    ArtifactError,
    Manifest,
    ShardRecord,
)
from pruning.store.verified import VerifiedParquet

# --------------------------------------------------------------------------------------------------
# Reading


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished artifact: its path and its manifest."""

    path: epath.Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    def as_input(self) -> dict[str, str]:
        """Return the path and digest by which another manifest refers to this artifact."""
        return {"path": os.fspath(self.path), "digest": self.digest}

    def parquet(self, shard: int, encoded: Sequence[str] = ()) -> VerifiedParquet:
        """Open one data file, whose bytes are compared with its digests as they are read."""
        return open_shard(self.path, self.manifest.shards[shard], encoded)

    def read(
        self,
        shard: int,
        columns: Sequence[str] | None = None,
        encoded: Sequence[str] = (),
        use_threads: bool = True,
    ) -> pa.Table:
        """Return all rows of one shard, or some of its columns.

        Args:
          columns: names of columns; None for all.
          encoded: columns of strings to be read in dictionary encoding, as stored in the file. This
            is many times faster where few distinct strings repeat.
          use_threads: read columns in parallel. False is faster when the caller reads several
            shards in parallel.
        """
        try:
            opened = self.parquet(shard, encoded)
        except KeyError:  # pyarrow's, for an unknown column in `encoded`; told below by its name
            opened = self.parquet(shard)
        with opened as file:
            absent = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if absent:
                path = self.path / self.manifest.shards[shard].file
                has = ", ".join(file.schema_arrow.names)
                raise ArtifactError(f"{path} has no column {', '.join(absent)}; it has: {has}")
            return file.read(columns, use_threads)

    def file(self, name: str) -> bytes:
        """Return the content of another file of the artifact, compared with its checksum.

        Raises:
          ArtifactError: the artifact has no file of this name, or the file is damaged.
        """
        checksum = self.manifest.files.get(name)
        if checksum is None:
            raise ArtifactError(f"{self.path} ({self.manifest.kind}) has no file {name}.")
        path = self.path / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing. {_again(self.path)}") from None
        if hashlib.sha256(content).hexdigest() != checksum:
            raise _not_as_written(path)
        return content

    def verify(self) -> None:
        """Compare every file with its checksum."""
        for shard in self.manifest.shards:
            verify_file(self.path / shard.file, shard.checksum)
            digests_of(self.path, shard)
        for name, checksum in self.manifest.files.items():
            verify_file(self.path / name, checksum)


def verify_file(path: epath.Path, checksum: str) -> None:
    """Raise ArtifactError unless the file exists and has this SHA-256."""
    if not path.exists():
        raise ArtifactError(f"{path} is missing. {_again(path.parent)}")
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    if hasher.hexdigest() != checksum:
        raise _not_as_written(path)


def _not_as_written(path: epath.Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged: its SHA-256 differs from the manifest's. Delete this file. "
        f"{_again(path.parent)}"
    )


def _again(directory: epath.Path) -> str:
    return f"Run the command that made {directory} again: it makes what is missing."


def open_shard(
    directory: epath.Path, shard: ShardRecord, encoded: Sequence[str] = ()
) -> VerifiedParquet:
    """Open a data file of an artifact, finished or not.

    Raises:
      ArtifactError: the file is missing, damaged, or does not have the rows of its record.
    """
    file = open_parquet(directory / shard.file, encoded, digests_of(directory, shard))
    if file.metadata.num_rows != shard.rows:
        raise ArtifactError(
            f"{directory / shard.file} holds {file.metadata.num_rows:,} rows, its manifest says "
            f"{shard.rows:,}: the file was changed after it was written. Delete it and run the "
            "command that made it again."
        )
    return file


def open_parquet(
    path: epath.PathLike, encoded: Sequence[str] = (), digests: Digests | None = None
) -> VerifiedParquet:
    """Open a Parquet file, local or remote. Damage raises an ArtifactError with its path."""
    return VerifiedParquet(path, encoded, digests)


def load_artifact(path: epath.PathLike, kind: str | None = None) -> Artifact:
    """Read the manifest of a finished artifact.

    Raises:
      ArtifactError: there is no artifact, or it is unfinished, or of another kind or format.
    """
    path = epath.Path(path)
    file = path / MANIFEST
    if not file.exists():
        if (path / UNFINISHED).exists():
            raise ArtifactError(
                f"{path} is unfinished: run the command that makes it again, it will go on."
            )
        what = "exists but holds no manifest.json" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {what}: it is not {_article(kind or 'artifact')}.")
    try:
        manifest = Manifest.from_json(file.read_text())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}): it is damaged. Delete {path} and run "
            "the command that made it again."
        ) from error
    if manifest.format != FORMAT:
        raise ArtifactError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}: build it again."
        )
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}.")
    return Artifact(path, manifest)


def measured(path: epath.PathLike) -> dict[str, Any]:
    """Return the content of measured.json; {} where it is missing or damaged."""
    try:
        found = json.loads((epath.Path(path) / MEASURED).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_finished(path: epath.PathLike) -> bool:
    """Return whether `path` holds a manifest."""
    return (epath.Path(path) / MANIFEST).exists()


def require_input(artifact: Artifact, name: str, given: Artifact) -> None:
    """Raise ArtifactError unless `artifact` was made from `given`.

    A score set names the corpus that it scored, so that the scores of another corpus are refused.
    """
    recorded = artifact.manifest.inputs.get(name)
    if recorded is None:
        raise ArtifactError(f"{artifact.path} names no input {name!r}.")
    if recorded["digest"] != given.digest:
        raise ArtifactError(
            f"{artifact.path} was made from the {name} at {recorded['path']} (digest "
            f"{recorded['digest'][:12]}), not from {given.path} (digest {given.digest[:12]}). "
            f"Give the {name} that belongs to it, or make it again from this one."
        )


def require_same_documents(expected: np.ndarray, found: np.ndarray, where: str) -> None:
    """Raise ArtifactError with the first row whose document ids differ.

    Args:
      expected: int64 [rows], the corpus shard's `doc_id`.
      found: int64 [rows], the joined table's.
      where: file or directory, for the message.
    """
    if len(expected) != len(found):
        raise ArtifactError(f"{where} has {len(found)} rows where its corpus has {len(expected)}.")
    unequal = np.flatnonzero(expected != found)
    if len(unequal):
        row = int(unequal[0])
        raise ArtifactError(
            f"{where}, row {row}: document {int(found[row])} stands where the corpus has "
            f"{int(expected[row])}. These rows do not belong to this corpus."
        )


# --------------------------------------------------------------------------------------------------
# Writing


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
