"""Score sets: their statuses and columns, and functions to write one without a model.

Shard k of a score set has the documents of corpus shard k in order, each with a status, and null
where there is no score.

Choices
- A document without a value in an input score set keeps the status that it has there.
- With `within`, other documents get the status "not_selected", as in the engine.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pruning.corpus.reader import Corpus
from pruning.corpus.selection_reader import Selection
from pruning.scores import vectors
from pruning.store.artifact import Artifact, require_same_documents
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

KIND = "scores"
_ROW_GROUP = 8192

OK = "ok"
EMPTY = "empty"  # no tokens
TOO_SHORT = "too_short"  # has tokens, but none that this scorer can score
NOT_SELECTED = "not_selected"  # outside of the selection to be scored
NOT_FINITE = "not_finite"  # the model returned NaN or infinity, also in a batch of its own
FAILED = "failed"  # windows could not be made, also in a batch of its own
UNKNOWN = "unknown_tokens"  # too large a share of its tokens is the unknown token
NOT_LISTED = "not_listed"  # a server listed none of the answers among the most probable tokens

STATUSES = (OK, EMPTY, TOO_SHORT, NOT_SELECTED, NOT_FINITE, FAILED)

NOT_FOUND = "not_found"  # no imported row matches it
NO_VALUE = "no_value"  # an imported row matches it, without a number

# NOTE: the dictionary of statuses is part of the bytes of a shard: six, unless it has a later one.
ALL_STATUSES = (*STATUSES, NOT_FOUND, NO_VALUE, UNKNOWN, NOT_LISTED)

_STATUS_TYPE = pa.dictionary(pa.int8(), pa.string())

_OK, _EMPTY, _NOT_SELECTED = (STATUSES.index(name) for name in (OK, EMPTY, NOT_SELECTED))


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the score set: its Arrow type and its meaning."""

    type: pa.DataType
    meaning: str


def status_array(codes: np.ndarray) -> pa.DictionaryArray:
    """Return a status column for codes of `ALL_STATUSES`, int8 [n]."""
    named = STATUSES if codes.max(initial=0) < len(STATUSES) else ALL_STATUSES
    return pa.DictionaryArray.from_arrays(codes.astype(np.int8), pa.array(named))


def schema_of(columns: Mapping[str, Column]) -> pa.Schema:
    """Return the schema: doc_id, status, and the scorer's columns, null unless "ok"."""
    fields = [pa.field("doc_id", pa.int64()), pa.field("status", _STATUS_TYPE)]
    own = (vectors.stored_field(name, column.type) for name, column in columns.items())
    return pa.schema([*fields, *own])


def begin(
    output: str,
    identity: Mapping,
    inputs: Mapping[str, Artifact],
    corpus: Corpus,
    columns: Mapping[str, Column],
) -> Build:
    """Claim the directory of a score set of `corpus`."""
    inputs = {"corpus": corpus.artifact, **inputs}
    schema = schema_of(columns)
    return Build(
        output, KIND, identity, inputs, corpus.num_shards, schema, vectors.encoding_of(schema)
    )


def table_of(
    columns: Mapping[str, Column], status: np.ndarray, values: Mapping[str, np.ndarray]
) -> pa.Table:
    """Return the status and the columns as a table, null in rows with a status other than "ok".

    Args:
      status: int8 [n], codes of `ALL_STATUSES`.
      values: column -> [n], or vectors [n, width].
    """
    row = np.where(status == _OK, np.arange(len(status)), -1)
    arrays = {
        name: spread(_array(values[name]), row, column.type) for name, column in columns.items()
    }
    return pa.table({"status": status_array(status), **arrays})


def write(
    build: Build,
    shard: int,
    corpus: Corpus,
    columns: Mapping[str, Column],
    status: np.ndarray,
    values: Mapping[str, np.ndarray | pa.Array],
    seconds: float = 0.0,
    counts: Mapping[str, Any] = types.MappingProxyType({}),
    measured: Mapping[str, float] = types.MappingProxyType({}),
) -> None:
    """Write one shard.

    Args:
      status: int8 [n], codes of `ALL_STATUSES`.
      values: column -> [n], or vectors [n, width]. Values in rows with a status other than "ok" are
        discarded.
      seconds: computing time, for measured.json.
      counts, measured: further counts for the manifest, and measurements for measured.json.
    """
    table = corpus.columns(shard, ["doc_id", "n_tokens"])
    ok = status == _OK
    scores = table_of(columns, status, values)
    with build.shard(shard) as writer:
        writer.write(
            pa.table([table["doc_id"], *scores.columns], schema=build.schema),
            _ROW_GROUP,
        )
        codes, of_codes = np.unique(status, return_counts=True)
        tokens = int(table["n_tokens"].to_numpy()[ok].sum(dtype=np.int64))
        writer.tokens = tokens
        writer.measured = {"seconds": seconds, **measured}
        writer.counts = {
            "documents": {
                ALL_STATUSES[code]: int(count)
                for code, count in zip(codes.tolist(), of_codes.tolist(), strict=True)
            },
            "tokens": tokens,
            **counts,
        }


def _array(values: np.ndarray | pa.Array) -> np.ndarray | pa.Array:
    return values if isinstance(values, pa.Array) else np.asarray(values)


def finish(
    build: Build, scorer: str, columns: Mapping[str, Column], summary: Mapping | None = None
) -> Artifact | None:
    """Write the manifest; None while other workers' shards are missing."""
    return build.finish(
        {
            "scorer": scorer,
            "columns": {name: column.meaning for name, column in columns.items()},
            **(summary or {}),
        }
    )


def status_of(scores: Artifact, shard: int, doc_ids: np.ndarray) -> np.ndarray:
    """Return the statuses in a shard of another score set, as codes of `ALL_STATUSES`, int8 [n].

    Raises:
      ArtifactError: its rows are not these documents, or it has an unknown status.
    """
    table = scores.read(shard, ["doc_id", "status"])
    where = f"{scores.path}/{scores.manifest.shards[shard].file}"
    require_same_documents(doc_ids, table["doc_id"].to_numpy(), where)
    codes = pc.index_in(table["status"].cast(pa.string()), pa.array(ALL_STATUSES))
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy())[0])
        raise ArtifactError(f"{where}, row {row}: unknown status {table['status'][row]}.")
    return codes.to_numpy().astype(np.int8)


def status_within(corpus: Corpus, shard: int, within: Selection | None) -> np.ndarray:
    """Return initial statuses, "ok", "empty" or "not_selected", as codes, int8 [n]."""
    n_tokens = corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()
    status = np.where(n_tokens > 0, _OK, _EMPTY).astype(np.int8)
    if within is not None:
        status[~within.mask(shard, len(status))] = _NOT_SELECTED
    return status


def ok(status: np.ndarray) -> np.ndarray:
    """Return a mask of the documents with status "ok", bool [n]."""
    return status == _OK


def spread(values: Any, row: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return values[row], null where row is -1, as a stored column of type `kind`."""
    if pa.types.is_fixed_size_list(kind):
        dtype = np.dtype(kind.value_type.to_pandas_dtype())
        spread = np.zeros((len(row), kind.list_size), dtype)
        spread[row >= 0] = values[row[row >= 0]]
        return vectors.stored(spread, row >= 0, dtype)
    array = values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
    return array.take(pa.array(row, mask=row < 0))
