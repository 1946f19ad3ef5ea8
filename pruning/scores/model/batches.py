"""Conversion of corpus shards to batches of packed rows.

Choices
- Documents are taken in chunks of a shard. A chunk is packed separately; batches may span chunks,
  but not shards. The documents that share a row and a batch therefore depend on the corpus and the
  settings alone, and a run that was killed ends with the same bytes, for any number of workers.
- A chunk's scores are passed on as soon as its last row is complete, so that memory does not grow
  with the shard.
- A document for which the scorer's host side fails is found by bisecting the chunk, reported on
  standard error, and has the status "failed". If more than a few fail, the error is raised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from models import packing
from models.packing import Packing, Windows, offsets_of, ranges
from models.terminal import say
from pruning.corpus.selection_reader import Selection
from pruning.scores.model.scorer import Documents, Prepared
from pruning.scores.score_set import FAILED
from pruning.store.manifest import ArtifactError

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus

Rows = Mapping[str, np.ndarray]

CHUNK_DOCUMENTS = 8192
CHUNK_TOKENS = 1 << 20
_READ_DOCUMENTS = 1024  # read at a time: a row group of the corpus

_MOST_FAILED = 16  # largest number of failed documents of a chunk


@dataclasses.dataclass
class Chunk:
    """Documents of a shard during processing by the engine.

    Attributes:
      shard, last: index of the shard, and whether the chunk is its last.
      doc_ids: int64 [chunk], all documents in this range of the corpus.
      taken: int64, indices of those to be scored; `documents` are those.
      failed: int64, indices of `documents` on which the scorer failed; they have no tokens here.
      windows, packing: windows of `documents` and their packing.
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
        """Return the number of documents whose last window is in each row, int64 [rows]."""
        last_row = np.full(len(self.documents), -1)
        np.maximum.at(last_row, self.windows.document, self.packing.row)
        return np.bincount(last_row[last_row >= 0], minlength=self.packing.num_rows)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of one or more chunks.

    Attributes:
      rows: feature -> int32 [batch rows, row length]; None if the chunks have no rows.
      parts: chunks, each with the number of its next rows in the batch.
      documents: number of documents that are complete after this batch.
    """

    rows: Rows | None
    parts: Sequence[tuple[Chunk, int]]
    documents: int


class _Part(NamedTuple):
    """Documents read together: their ids, those to be scored, their inputs, and the failed ones."""

    doc_ids: np.ndarray
    taken: np.ndarray
    documents: Documents
    failed: np.ndarray


class Reader:
    """Reader of a corpus that packs its documents into batches.

    Args:
      corpus: the corpus to read.
      within: a selection of the corpus, or None for all documents.
      prepared: the scorer.
      row_lengths: row lengths of the sides of its windows.
      batch_rows: number of rows of a batch.
      max_unknown: largest share of a document's tokens that may be unknown to the vocabulary; a
        document with more has the status "unknown_tokens".
    """

    def __init__(
        self,
        corpus: Corpus,
        within: Selection | None,
        prepared: Prepared,
        row_lengths: tuple[int, ...],
        batch_rows: int,
        max_unknown: float = 1.0,
    ):
        self.corpus = corpus
        self.within = within
        self.prepared = prepared
        self.row_lengths = row_lengths
        self.batch_rows = batch_rows
        self.max_unknown = max_unknown
        nothing = prepared.windows(self._no_documents())
        rows = packing.pack(nothing.lengths, row_lengths).fill(nothing)
        self.batch_shapes = {name: (batch_rows, *row.shape[1:]) for name, row in rows.items()}

    def batches(self, shards: Sequence[int]) -> Iterator[Batch]:
        """Yield all batches of the shards, in order."""
        for shard in shards:
            yield from self._batches(self._chunks(shard))

    def _batches(self, chunks: Iterator[Chunk]) -> Iterator[Batch]:
        rows, parts, filled, documents = self.empty_rows(), [], 0, 0
        for chunk in chunks:
            chunk_rows = chunk.packing.fill(chunk.windows)
            finished = chunk.finished()
            documents += len(chunk.doc_ids) - int(finished.sum())  # documents without windows
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
        # NOTE: new arrays each time, because the device may still read the last ones.
        return {name: np.zeros(shape, np.int32) for name, shape in self.batch_shapes.items()}

    def _chunks(self, shard: int) -> Iterator[Chunk]:
        selected = None
        if self.within is not None:
            selected = self.within.doc_ids(shard)
        read_ids = found = 0
        pending: list[_Part] = []
        documents = tokens = 0
        source = "tokens" if self.prepared.read is None else "text"
        for batch in self.corpus.iter_batches(shard, ["doc_id", source], _READ_DOCUMENTS):
            if documents >= CHUNK_DOCUMENTS or tokens >= CHUNK_TOKENS:
                yield self._chunk(shard, pending, last=False)
                pending, documents, tokens = [], 0, 0
            doc_ids = batch.column("doc_id").to_numpy()
            taken = np.arange(len(doc_ids))
            if selected is not None:
                taken = np.flatnonzero(_among(doc_ids, selected))
            read, failed = self._inputs(batch.column(source), taken, doc_ids)
            found += len(taken)
            read_ids += len(doc_ids)
            pending.append(_Part(doc_ids, taken, read, failed))
            documents += len(doc_ids)
            tokens += len(read.tokens)
        if read_ids != self.corpus.documents(shard):
            raise ArtifactError(
                f"shard {shard} of {self.corpus.artifact.path} holds {read_ids} documents, its "
                f"manifest says {self.corpus.documents(shard)}: it was changed after it was made."
            )
        if self.within is not None and selected is not None and found != len(selected):
            raise ArtifactError(
                f"{self.within.artifact.path}: {len(selected) - found} of the {len(selected)} "
                f"documents selected from shard {shard} are not in it: the selection is of another "
                "corpus."
            )
        yield self._chunk(shard, pending, last=True)

    def _no_documents(self) -> Documents:
        return Documents.of([]) if self.prepared.read is None else self.prepared.read([])

    def _inputs(
        self, column: pa.Array, taken: np.ndarray, doc_ids: np.ndarray
    ) -> tuple[Documents, np.ndarray]:
        """Return the model's inputs for some rows of a column of tokens or texts.

        Also return the rows on which the scorer fails, int64; they have no tokens.
        """
        read = self.prepared.read
        if read is None:
            return _documents(column).take(taken), np.zeros(0, np.int64)
        texts = column.take(pa.array(taken)).to_pylist()
        try:
            return read(texts), np.zeros(0, np.int64)
        except Exception as error:
            failed = self._failing(
                lambda some: read([texts[i] for i in some]), doc_ids[taken], error
            )
            for i in failed:
                texts[i] = ""
            return read(texts), np.array(failed, np.int64)

    def _chunk(self, shard: int, parts: list[_Part], last: bool) -> Chunk:
        if not parts:
            nothing = np.zeros(0, np.int64)
            parts = [_Part(nothing, nothing, self._no_documents(), nothing)]
        doc_ids, taken, read, unread = zip(*parts, strict=True)
        before = offsets_of(np.array([len(ids) for ids in doc_ids]))
        documents = Documents.join(read)
        ids = np.concatenate(doc_ids)
        chosen = np.concatenate([t + b for t, b in zip(taken, before[:-1], strict=True)])
        first = offsets_of(np.array([len(t) for t in taken]))[:-1]
        failed = np.concatenate([u + f for u, f in zip(unread, first, strict=True)])
        try:
            windows = self.prepared.windows(documents)
        except Exception as error:
            unfit = np.array(
                self._failing(
                    lambda some: self.prepared.windows(documents.take(some)), ids[chosen], error
                ),
                np.int64,
            )
            failed = np.union1d(failed, unfit)
            documents = _without(documents, unfit)
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

    def _failing(
        self, attempt: Callable[[np.ndarray], Any], doc_ids: np.ndarray, error: Exception
    ) -> list[int]:
        """Return the documents on which the scorer fails when given them alone, ascending.

        Args:
          attempt: raises if it fails on one of the documents with these indices.
          doc_ids: ids of all documents.
          error: the error for all of them together.

        Raises:
          Exception: `error`, if it is not caused by a few documents.
        """
        found: list[int] = []
        waiting = [np.arange(len(doc_ids))]
        while waiting:
            some = waiting.pop()
            try:
                attempt(some)
            except (MemoryError, OSError):
                raise
            except Exception as alone:
                if len(some) > 1:
                    middle = len(some) // 2
                    waiting += [some[middle:], some[:middle]]
                    continue
                found += some.tolist()
                if len(found) > _MOST_FAILED or len(found) == len(doc_ids) > 1:
                    raise error from None
                say(
                    f"document {int(doc_ids[some[0]])} of {self.corpus.artifact.path} cannot be "
                    f'scored and gets the status "{FAILED}": {type(alone).__name__}: {alone}',
                    error=True,
                )
        return found


def _without(documents: Documents, which: np.ndarray) -> Documents:
    """Return the same documents, with the tokens of some removed."""
    lengths = documents.lengths.copy()
    lengths[which] = 0
    tokens = documents.tokens[ranges(documents.offsets[:-1], lengths)]
    return dataclasses.replace(documents, tokens=tokens, offsets=offsets_of(lengths))


def _among(ids: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Return a mask of the ids that occur in an ascending array, bool."""
    if not len(ascending):
        return np.zeros(len(ids), bool)
    place = np.searchsorted(ascending, ids)
    return ascending[np.minimum(place, len(ascending) - 1)] == ids


def _documents(column: Any) -> Documents:
    """Return an Arrow list column as flat tokens."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    offsets = column.offsets.to_numpy().astype(np.int64)
    tokens = column.values.to_numpy()[offsets[0] : offsets[-1]]
    return Documents(tokens, offsets - offsets[0])
