"""Shows what an artefact is and holds, finished or not.

Text from the outside is escaped: a document may hold control sequences that a terminal would obey.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from pruning import artefact
from pruning.artefact import Artefact, ArtefactError, ShardRecord

_WIDTH = 240  # characters of a value that are shown
_LISTED = 16  # elements of a list


def lines(
    path: epath.PathLike, rows: int = 3, shard: int = 0, verify: bool = False
) -> Iterator[str]:
    """What there is to say of an artefact, line by line.

    Args:
      rows: how many of the first rows of `shard` to show.
      verify: read every file and compare its checksum.

    Raises:
      ArtefactError: it is none, or `verify` found a damaged file.
    """
    path = epath.Path(path)
    plan = path / artefact.UNFINISHED / "plan.json"
    if artefact.is_finished(path):
        yield from _finished(artefact.load(path), rows, shard, verify)
    elif plan.exists():
        yield from _unfinished(path, json.loads(plan.read_text()), rows, verify)
    else:
        artefact.load(path)  # says what is wrong


def _finished(found: Artefact, rows: int, shard: int, verify: bool) -> Iterator[str]:
    manifest = found.manifest
    yield f"{found.path}: {manifest.kind}, {manifest.size} in {found.num_shards} shards"
    yield f"digest {found.digest}"
    yield f"made by winnow {manifest.code['version']}, revision {manifest.code['revision']}"
    for name, value in manifest.inputs.items():
        yield f"input {name}: {value['path']} (digest {value['digest'][:12]})"
    yield from _block("counts", manifest.counts)
    yield from _block("summary", manifest.summary)
    yield from _block("configuration", manifest.config)
    measured = found.path / artefact.MEASURED
    if measured.exists():
        yield from _block("measured", json.loads(measured.read_text()))
    if verify:
        found.verify()
        yield f"verified: {found.num_shards + len(manifest.files)} files are as they were written"
    if rows and found.num_shards:
        if not 0 <= shard < found.num_shards:
            raise ArtefactError(f"{found.path} has shards 0 to {found.num_shards - 1}, no {shard}.")
        yield from _rows(found.path / manifest.shards[shard].file, rows)


def _unfinished(
    path: epath.Path, plan: Mapping[str, Any], rows: int, verify: bool
) -> Iterator[str]:
    total = plan["shards"]
    done = []
    for file in sorted((path / artefact.UNFINISHED).glob("data-*.json")):
        done.append(ShardRecord(**json.loads(file.read_text())["shard"]))
    yield f"{path}: {plan['kind']}, unfinished: {len(done)} of {total} shards are done"
    rows_done, tokens_done = sum(s.rows for s in done), sum(s.tokens for s in done)
    yield f"so far {artefact.size_in_words(rows_done, tokens_done)}"
    yield "run the command that makes it again, it will go on"
    yield from _block("configuration", plan["config"])
    if verify:
        for record in done:
            artefact.verify_file(path / record.file, record.checksum)
        yield f"verified: {len(done)} shards are as they were written"
    if rows and done:
        yield from _rows(path / done[0].file, rows)


def _rows(file: epath.Path, count: int) -> Iterator[str]:
    """The first rows of a data file, a value a line."""
    if file.suffix != ".parquet":
        return
    with artefact.open_parquet(file) as parquet:
        batch = next(parquet.iter_batches(count), None)
    yield f"first rows of {file.name}:"
    for row in batch.to_pylist() if batch is not None else ():
        yield ""
        for name, value in row.items():
            yield f"  {name}: {_shown(value)}"


def _block(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Nested values, indented."""
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
    text = escaped(value if isinstance(value, str) else str(value))
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}... ({len(text):,} characters)"


def escaped(text: str) -> str:
    """The text with all that is not printable as escapes: a terminal gets no orders."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
