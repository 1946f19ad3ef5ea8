"""From corpus shards to batches of packed rows, and from answers back to rows of the score set.

Choices
- Documents are taken in chunks of a shard. A chunk is packed by itself; batches run on over its
  borders, but never over a shard's. So what shares a row and a batch with a document depends on the
  corpus and the settings alone, and a run that was killed ends with the same bytes, whatever the
  number of workers.
- A chunk's scores are handed on as soon as its last row is back, so that memory does not grow with
  the shard.
- One document's NaN can reach its neighbours in a row (0 x NaN is NaN). Windows without a finite
  answer are asked again, each alone in its row. What is still not finite has the status
  "not_finite"; its neighbours have their scores.
- A document that the scorer's host side fails on is found by halving the chunk, named on standard
  error, and has the status "failed". More than a few are no accident: then the error is raised.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pruning.artefact import Artefact, ArtefactError, Counts
from pruning.scorers import (
    EMPTY,
    FAILED,
    NOT_FINITE,
    NOT_SELECTED,
    OK,
    TOO_SHORT,
    Column,
    Documents,
    Prepared,
)
from pruning.scoring import packing
from pruning.scoring.packing import Packing, Windows, offsets_of, ranges

if TYPE_CHECKING:
    from pruning.corpus import Corpus

Rows = Mapping[str, np.ndarray]
Ask = Callable[[Rows], Any]  # packed rows [batch rows, ...] -> answers [batch rows, positions, ...]

CHUNK_DOCUMENTS = 8192
CHUNK_TOKENS = 1 << 20
_READ_DOCUMENTS = 1024  # at a time: a row group of the corpus

_DOUBTFUL = 64  # windows without one finite answer, which are not asked again
_MOST_FAILED = 16  # documents of a chunk

STATUSES = (OK, EMPTY, TOO_SHORT, NOT_SELECTED, NOT_FINITE, FAILED)
_STATUS_TYPE = pa.dictionary(pa.int8(), pa.string())


def schema_of(columns: Mapping[str, Column]) -> pa.Schema:
    """Of a score set: doc_id, status, and the scorer's columns, null unless the status is "ok"."""
    fields = [pa.field("doc_id", pa.int64()), pa.field("status", _STATUS_TYPE)]
    return pa.schema(fields + [pa.field(name, column.type) for name, column in columns.items()])


@dataclasses.dataclass
class Chunk:
    """Some documents of a shard on their way through the engine.

    Attributes:
      shard, last: where it comes from, and whether the shard ends with it.
      doc_ids: int64 [chunk], every document of this stretch of the corpus.
      taken: int64, which of them are to be scored; `documents` are those.
      failed: int64, which of `documents` the scorer failed on; they have no tokens here.
      windows, packing: of `documents`.
      answers: [rows so far, positions, ...] each, in row order.
    """

    shard: int
    last: bool
    doc_ids: np.ndarray
    taken: np.ndarray
    documents: Documents
    failed: np.ndarray
    windows: Windows
    packing: Packing
    answers: list[np.ndarray] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        return sum(map(len, self.answers)) == self.packing.num_rows

    def finished(self) -> np.ndarray:
        """Documents whose last window stands in each row, int64 [rows]."""
        last_row = np.full(len(self.documents), -1)
        np.maximum.at(last_row, self.windows.document, self.packing.row)
        return np.bincount(last_row[last_row >= 0], minlength=self.packing.num_rows)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one or more chunks.

    Attributes:
      rows: feature -> int32 [batch rows, row length]; None where the chunks give no row.
      parts: chunk, and how many of the batch's rows are its next ones.
      documents: how many documents are done with this batch.
    """

    rows: Rows | None
    parts: Sequence[tuple[Chunk, int]]
    documents: int


class Reader:
    """Reads and packs.

    Args:
      corpus: what is read.
      within: a selection of it, or None for all.
      prepared: the scorer.
      row_lengths: per side of its windows.
      batch_rows: rows of a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        within: Artefact | None,
        prepared: Prepared,
        row_lengths: tuple[int, ...],
        batch_rows: int,
    ):
        self.corpus = corpus
        self.within = within
        self.prepared = prepared
        self.row_lengths = row_lengths
        self.batch_rows = batch_rows
        nothing = prepared.windows(Documents.of([]))
        rows = packing.pack(nothing.lengths, row_lengths).fill(nothing)
        self.batch_shapes = {name: (batch_rows, *row.shape[1:]) for name, row in rows.items()}

    def batches(self, shards: Sequence[int]) -> Iterator[Batch]:
        """All of the shards, in order."""
        for shard in shards:
            yield from self._batches(self._chunks(shard))

    def _batches(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        rows, parts, filled, documents = self.empty_rows(), [], 0, 0
        for chunk in chunks:
            chunk_rows = chunk.packing.fill(chunk.windows)
            finished = chunk.finished()
            documents += len(chunk.doc_ids) - int(finished.sum())  # those without windows
            first, left = 0, chunk.packing.num_rows
            if not left:
                parts.append((chunk, 0))
            while left:
                count = min(left, self.batch_rows - filled)
                for name, values in chunk_rows.items():
                    rows[name][filled : filled + count] = values[first : first + count]
                parts.append((chunk, count))
                documents += int(finished[first : first + count].sum())
                first, left, filled = first + count, left - count, filled + count
                if filled == self.batch_rows:
                    yield Batch(rows, parts, documents)
                    rows, parts, filled, documents = self.empty_rows(), [], 0, 0
        if parts:
            yield Batch(rows if filled else None, parts, documents)

    def empty_rows(self) -> dict[str, np.ndarray]:
        # NOTE: new arrays each time; the device may still read the last ones, without a copy.
        return {name: np.zeros(shape, np.int32) for name, shape in self.batch_shapes.items()}

    def _chunks(self, shard: int) -> Iterator[Chunk]:
        selected = None
        if self.within is not None:
            selected = self.within.read(shard, ["doc_id"])["doc_id"].to_numpy()
        read_ids = found = 0
        pending: list[tuple[np.ndarray, np.ndarray, Documents]] = []
        documents = tokens = 0
        for batch in self.corpus.iter_batches(shard, ["doc_id", "tokens"], _READ_DOCUMENTS):
            if documents >= CHUNK_DOCUMENTS or tokens >= CHUNK_TOKENS:
                yield self._chunk(shard, pending, last=False)
                pending, documents, tokens = [], 0, 0
            doc_ids = batch.column("doc_id").to_numpy()
            read = _documents(batch.column("tokens"))
            taken = np.arange(len(doc_ids))
            if selected is not None:
                taken = np.flatnonzero(_among(doc_ids, selected))
                read = read.take(taken)
            found += len(taken)
            read_ids += len(doc_ids)
            pending.append((doc_ids, taken, read))
            documents += len(doc_ids)
            tokens += len(read.tokens)
        if read_ids != self.corpus.documents(shard):
            raise ArtefactError(
                f"shard {shard} of {self.corpus.artefact.path} holds {read_ids} documents, its "
                f"manifest says {self.corpus.documents(shard)}: it was changed after it was made."
            )
        if selected is not None and found != len(selected):
            raise ArtefactError(
                f"{self.within.path}: {len(selected) - found} of the {len(selected)} documents "
                f"selected from shard {shard} are not in it: the selection is of another corpus."
            )
        yield self._chunk(shard, pending, last=True)

    def _chunk(
        self, shard: int, parts: list[tuple[np.ndarray, np.ndarray, Documents]], last: bool
    ) -> Chunk:
        if not parts:
            parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64), Documents.of([]))]
        doc_ids, taken, read = zip(*parts, strict=True)
        before = offsets_of([len(ids) for ids in doc_ids])
        documents = Documents(
            np.concatenate([part.tokens for part in read]),
            offsets_of(np.concatenate([part.lengths for part in read])),
        )
        ids = np.concatenate(doc_ids)
        chosen = np.concatenate([t + b for t, b in zip(taken, before[:-1], strict=True)])
        failed = np.zeros(0, np.int64)
        try:
            windows = self.prepared.windows(documents)
        except Exception as error:
            failed = np.array(self._failing(documents, ids[chosen], error), np.int64)
            documents = _without(documents, failed)
            windows = self.prepared.windows(documents)
        return Chunk(
            shard=shard,
            last=last,
            doc_ids=ids,
            taken=chosen,
            documents=documents,
            failed=failed,
            windows=windows,
            packing=packing.pack(windows.lengths, self.row_lengths),
        )

    def _failing(self, documents: Documents, doc_ids: np.ndarray, error: Exception) -> list[int]:
        """The documents that the scorer fails on by themselves, ascending.

        Raises:
          Exception: `error`, when it is not a matter of a few documents.
        """
        found: list[int] = []
        waiting = [np.arange(len(documents))]
        while waiting:
            some = waiting.pop()
            try:
                self.prepared.windows(documents.take(some))
            except (MemoryError, OSError):
                raise
            except Exception as alone:
                if len(some) > 1:
                    middle = len(some) // 2
                    waiting += [some[middle:], some[:middle]]
                    continue
                found += some.tolist()
                if len(found) > _MOST_FAILED or len(found) == len(documents) > 1:
                    raise error from None
                print(
                    f"document {int(doc_ids[some[0]])} of {self.corpus.artefact.path} cannot be "
                    f'scored and gets the status "{FAILED}": {type(alone).__name__}: {alone}',
                    file=sys.stderr,
                )
        return found

    def finish(self, chunk: Chunk, ask: Ask) -> tuple[pa.Table, Counts]:
        """The rows of the score set for a complete chunk, and what is to be counted.

        Args:
          ask: asks once more, where an answer was not finite.

        Raises:
          FloatingPointError: no answer is finite, of many.
        """
        windows = chunk.windows
        if chunk.answers:
            answers = chunk.packing.gather(windows, np.concatenate(chunk.answers))
        else:
            answers = np.zeros((0, *self.prepared.answer_shape), np.float32)
        bad = _not_finite(windows, answers)
        if len(bad) == len(windows) >= _DOUBTFUL:
            raise FloatingPointError(
                f"not one of {len(windows):,} answers of shard {chunk.shard} is finite: the "
                "weights are damaged, or the model overflows in this dtype. Try "
                "--gin.Score.dtype=float32."
            )
        if len(bad):
            answers, bad = self._ask_alone(windows, answers, bad, ask)
        scores = self.prepared.finish(chunk.documents, windows, answers)

        status = np.full(len(chunk.doc_ids), STATUSES.index(NOT_SELECTED), np.int8)
        of_taken = np.full(len(chunk.documents), STATUSES.index(OK), np.int8)
        for name, where in scores.statuses.items():
            of_taken[where] = STATUSES.index(name)
        of_taken[windows.document[bad]] = STATUSES.index(NOT_FINITE)
        of_taken[chunk.documents.lengths == 0] = STATUSES.index(EMPTY)
        of_taken[chunk.failed] = STATUSES.index(FAILED)
        status[chunk.taken] = of_taken

        # Row of `documents` for every document of the chunk; -1 for those without scores.
        row = np.full(len(chunk.doc_ids), -1)
        row[chunk.taken] = np.where(of_taken == STATUSES.index(OK), np.arange(len(of_taken)), -1)
        columns = {
            name: spread(scores.columns[name], row, column.type)
            for name, column in self.prepared.columns.items()
        }
        table = pa.table(
            {
                "doc_id": chunk.doc_ids,
                "status": pa.DictionaryArray.from_arrays(status, pa.array(STATUSES)),
                **columns,
            },
            schema=schema_of(self.prepared.columns),
        )
        counts: Counts = {
            "documents": {
                name: int(np.sum(status == code))
                for code, name in enumerate(STATUSES)
                if np.any(status == code)
            },
            **scores.counts,
        }
        counts["tokens"] = int(chunk.documents.lengths[of_taken == STATUSES.index(OK)].sum())
        if "truncated_tokens" in scores.columns:
            cut = np.asarray(scores.columns["truncated_tokens"])[of_taken == STATUSES.index(OK)]
            counts["truncated"] = {"documents": int(np.sum(cut > 0)), "tokens": int(cut.sum())}
        return table, counts

    def _ask_alone(
        self, windows: Windows, answers: np.ndarray, bad: np.ndarray, ask: Ask
    ) -> tuple[np.ndarray, np.ndarray]:
        """Answers with those of the windows `bad` replaced, and which are still not finite."""
        answers = answers.copy()
        for begin in range(0, len(bad), self.batch_rows):
            some = bad[begin : begin + self.batch_rows]
            few = windows.take(some)
            alone = packing.one_per_row(few.lengths, self.row_lengths)
            rows = self.empty_rows()
            for name, values in alone.fill(few).items():
                rows[name][: len(some)] = values
            side = windows.sides[-1]
            at = packing.ranges(side.offsets[some], side.lengths[some])
            answers[at] = alone.gather(few, np.asarray(ask(rows)))
        return answers, _not_finite(windows, answers)


def _without(documents: Documents, which: np.ndarray) -> Documents:
    """The same documents, some of them without their tokens."""
    lengths = documents.lengths.copy()
    lengths[which] = 0
    return Documents(documents.tokens[ranges(documents.offsets[:-1], lengths)], offsets_of(lengths))


def _among(ids: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which ids occur in an ascending array, bool."""
    if not len(ascending):
        return np.zeros(len(ids), bool)
    place = np.searchsorted(ascending, ids)
    return ascending[np.minimum(place, len(ascending) - 1)] == ids


def _documents(column: Any) -> Documents:
    """An Arrow list column as flat tokens."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    tokens = column.values.to_numpy()[offsets[0] : offsets[-1]]
    return Documents(tokens, offsets - offsets[0])


def _not_finite(windows: Windows, answers: np.ndarray) -> np.ndarray:
    """The windows with an answer that is NaN or infinite, int64."""
    finite = np.isfinite(answers).all(axis=tuple(range(1, answers.ndim)))
    if windows.source is not None:
        finite |= windows.source < 0  # nobody reads these
    if finite.all():
        return np.zeros(0, np.int64)
    window = np.repeat(np.arange(len(windows)), windows.sides[-1].lengths)
    return np.unique(window[~finite])


def spread(values: Any, row: np.ndarray, kind: pa.DataType) -> pa.Array:
    """values[row], null where row is -1."""
    if pa.types.is_fixed_size_list(kind):
        # NOTE: Arrow cannot read null vectors of a fixed length back from Parquet: NaN instead.
        spread = np.full((len(row), kind.list_size), np.nan, values.dtype)
        spread[row >= 0] = values[row[row >= 0]]
        flat = pa.array(spread.reshape(-1), kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, kind.list_size)
    array = values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)
    return array.take(pa.array(row, mask=row < 0))
