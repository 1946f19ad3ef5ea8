"""Descriptions of an artifact and its content, finished or not.

External text is escaped, because a document may hold control sequences that a terminal would obey.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from models.terminal import escaped
from pruning.store.artifact import (
    Artifact,
    is_finished,
    load_artifact,
    measured,
    open_shard,
    verify_file,
)
from pruning.store.atomic import entries
from pruning.store.build import read_plan, read_record
from pruning.store.manifest import UNFINISHED, ArtifactError, ShardRecord, size_in_words

_WIDTH = 240  # largest number of characters shown of a value
_LISTED = 16  # largest number of elements shown of a list


def lines(
    path: epath.PathLike, rows: int = 3, shard: int = 0, verify: bool = False
) -> Iterator[str]:
    """Yield a description of an artifact, line by line.

    Args:
      rows: number of rows of `shard` to show, from the first.
      verify: read every file and compare its checksum.

    Raises:
      ArtifactError: there is no artifact, or `verify` found a damaged file.
    """
    if rows < 0:
        raise ArtifactError(f"the number of rows to show is 0 or more, not {rows}.")
    path = epath.Path(path)
    plan = path / UNFINISHED / "plan.json"
    if is_finished(path):
        yield from _finished(load_artifact(path), rows, shard, verify)
    elif plan.exists():
        yield from _unfinished(path, read_plan(path), rows, verify)
    else:
        load_artifact(path)  # raises the specific error


def _finished(found: Artifact, rows: int, shard: int, verify: bool) -> Iterator[str]:
    manifest = found.manifest
    yield f"{found.path}: {manifest.kind}, {manifest.size} in {found.num_shards} shards"
    yield f"digest {found.digest}"
    yield f"made by winnow {manifest.code['version']}, revision {manifest.code['revision']}"
    for name, value in manifest.inputs.items():
        yield f"input {name}: {value['path']} (digest {value['digest'][:12]})"
    yield from _block("counts", manifest.counts)
    yield from _block("summary", manifest.summary)
    yield from _block("configuration", manifest.config)
    yield from _block("measured", measured(found.path))
    if verify:
        found.verify()
        yield f"verified: {found.num_shards + len(manifest.files)} files are as they were written"
    if rows and found.num_shards:
        if not 0 <= shard < found.num_shards:
            raise ArtifactError(f"{found.path} has shards 0 to {found.num_shards - 1}, no {shard}.")
        yield from _rows(found.path, manifest.shards[shard], rows)


def _unfinished(
    path: epath.Path, plan: Mapping[str, Any], rows: int, verify: bool
) -> Iterator[str]:
    total = plan["shards"]
    done = []
    for file in entries(path / UNFINISHED, "data-", ".json"):
        done.append(read_record(file)[0])
    yield f"{path}: {plan['kind']}, unfinished: {len(done)} of {total} shards are done"
    rows_done, tokens_done = sum(s.rows for s in done), sum(s.tokens for s in done)
    yield f"so far {size_in_words(rows_done, tokens_done)}"
    yield "run the command that makes it again, it will go on"
    yield from _block("configuration", plan["config"])
    if verify:
        for record in done:
            verify_file(path / record.file, record.checksum)
        yield f"verified: {len(done)} shards are as they were written"
    if rows and done:
        yield from _rows(path, done[0], rows)


def _rows(directory: epath.Path, shard: ShardRecord, count: int) -> Iterator[str]:
    """Yield the first rows of a data file, one value per line."""
    if not shard.file.endswith(".parquet"):
        return
    with open_shard(directory, shard) as parquet:
        batch = next(parquet.iter_batches(count), None)
    yield f"first rows of {shard.file}:"
    for row in batch.to_pylist() if batch is not None else ():
        yield ""
        for name, value in row.items():
            yield f"  {name}: {_shown(value)}"


def _block(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield nested values, indented."""
    if values:
        yield f"{title}:"
        yield from _nested(values, "  ")


def _nested(values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"{indent}{escaped(name)}:"
            yield from _nested(value, indent + "  ")
        else:
            shown = f"{value:,}" if type(value) is int else _shown(value)
            yield f"{indent}{escaped(name)}: {shown}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        more = f", ... ({len(value):,} in all)" if len(value) > _LISTED else ""
        return f"[{', '.join(map(_shown, value[:_LISTED]))}{more}]"
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    text = escaped(value if isinstance(value, str) else str(value))
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}... ({len(text):,} characters)"
