"""Score sets that no model makes: columns computed from text, tokens or other score sets.

They are score sets like any other: shard k has the documents of corpus shard k in order, a status
each, and null where there is no score.

Choices
- A document that another score set has no value for keeps the status that it has there.
- `within` leaves the other documents out, under the status "not_selected", as the engine does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pruning import artefact
from pruning.artefact import Artefact, ArtefactError, Build
from pruning.corpus import Corpus
from pruning.scorers import EMPTY, NOT_SELECTED, OK, Column
from pruning.scoring.batches import STATUSES, schema_of, spread
from pruning.selection import Selection

KIND = "scores"
_ROW_GROUP = 8192

_OK, _EMPTY, _NOT_SELECTED = (STATUSES.index(name) for name in (OK, EMPTY, NOT_SELECTED))


def begin(
    output: str,
    identity: Mapping,
    inputs: Mapping[str, Artefact],
    corpus: Corpus,
    columns: Mapping[str, Column],
) -> Build:
    """Claims the directory of a score set of `corpus`."""
    inputs = {"corpus": corpus.artefact, **inputs}
    schema = schema_of(columns)
    return Build(
        output, KIND, identity, inputs, corpus.num_shards, schema, artefact.numbers(schema)
    )


def write(
    build: Build,
    shard: int,
    corpus: Corpus,
    columns: Mapping[str, Column],
    status: np.ndarray,
    values: Mapping[str, np.ndarray],
    seconds: float = 0.0,
) -> None:
    """Writes one shard.

    Args:
      status: int8 [n], codes of `STATUSES`.
      values: column -> [n], vectors [n, width]; what stands beside a status other than "ok" is
        not kept.
      seconds: that it took to compute, for measured.json.
    """
    table = corpus.columns(shard, ["doc_id", "n_tokens"])
    ok = status == _OK
    row = np.where(ok, np.arange(len(status)), -1)
    arrays = {
        name: spread(np.asarray(values[name]), row, column.type) for name, column in columns.items()
    }
    with build.shard(shard) as writer:
        writer.write(
            pa.table(
                {
                    "doc_id": table["doc_id"],
                    "status": pa.DictionaryArray.from_arrays(
                        status.astype(np.int8), pa.array(STATUSES)
                    ),
                    **arrays,
                },
                schema=build.schema,
            ),
            _ROW_GROUP,
        )
        codes, counts = np.unique(status, return_counts=True)
        tokens = int(table["n_tokens"].to_numpy()[ok].sum(dtype=np.int64))
        writer.tokens = tokens
        writer.measured = {"seconds": seconds}
        writer.counts = {
            "documents": {
                STATUSES[code]: int(count)
                for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
            },
            "tokens": tokens,
        }


def finish(
    build: Build, scorer: str, columns: Mapping[str, Column], summary: Mapping | None = None
) -> Artefact | None:
    """Writes the manifest; None while other workers' shards are missing."""
    return build.finish(
        {
            "scorer": scorer,
            "columns": {name: column.meaning for name, column in columns.items()},
            **(summary or {}),
        }
    )


def status_of(scores: Artefact, shard: int, doc_ids: np.ndarray) -> np.ndarray:
    """The statuses of another score set's shard, as codes of `STATUSES`, int8 [n].

    Raises:
      ArtefactError: its rows are not these documents, or it has a status that nobody knows.
    """
    table = scores.read(shard, ["doc_id", "status"])
    where = f"{scores.path}/{scores.manifest.shards[shard].file}"
    artefact.require_same_documents(doc_ids, table["doc_id"].to_numpy(), where)
    codes = pc.index_in(table["status"].cast(pa.string()), pa.array(STATUSES))
    if codes.null_count:
        row = int(np.flatnonzero(codes.is_null().to_numpy())[0])
        raise ArtefactError(f"{where}, row {row}: unknown status {table['status'][row]}.")
    return codes.to_numpy().astype(np.int8)


def status_within(corpus: Corpus, shard: int, within: Selection | None) -> np.ndarray:
    """Statuses to begin with: "ok", "empty", or "not_selected", as codes, int8 [n]."""
    n_tokens = corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()
    status = np.where(n_tokens > 0, _OK, _EMPTY).astype(np.int8)
    if within is not None:
        status[~within.mask(shard, len(status))] = _NOT_SELECTED
    return status


def ok(status: np.ndarray) -> np.ndarray:
    """bool [n]: which statuses are "ok"."""
    return status == _OK
