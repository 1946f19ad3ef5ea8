"""The stream: training examples as a pure function, example(i) = f(corpus, selection, seed, i).

Example of an epoch (blocks of 2 documents, windows of 2 blocks, chunks of 4 tokens):

    documents       aaa bb | cccc d | ee ffff | g hhh       blocks 0 | 1 | 2 | 3
    block order     2 0 | 3 1                               windows of two blocks
    within a block  ffffee, aaabb | hhhg, dcccc             documents shuffled, then concatenated
    chunks          ffff ee aaab b | hhhg dccc c            split; a block's last may be shorter
    in a window     aaab ee ffff b | c hhhg dccc            shuffled: examples 0 to 3 | 4 to 6

The next epoch has the same blocks in another order, with their documents and chunks in another
order. It has 7 examples again, since the number of chunks of a block does not depend on the order
within. So example 9 is number 2 of epoch 1. It is found by a running sum over the permuted blocks'
chunk counts, and made by reading one block.

Choices
- The only state is i. A resumed run starts at another i. Batches do not depend on the number of
  hosts, on earlier batches, or on what was read ahead.
- Two levels of shuffling stand for one shuffle of everything: blocks over the whole epoch, chunks
  within a window of 64 blocks: 8,192 documents from 64 places of the corpus (7,000 chunks of C4).
- Permutations are orders of hashes, not of a generator, so no library's version changes them.
- Every host reads the blocks of its own examples. A window's chunks are spread over all hosts, so
  with many hosts each reads nearly all blocks: about 45 microseconds of CPU per example of the
  global batch (benchmarks/stream.py), the price of batches that do not depend on the hosts.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pruning.corpus.blocks import Blocks
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.corpus.token_set import Tokenized, load_tokenized
from pruning.data import objectives
from pruning.data.objectives import Example, Objective, SpanCorruption
from pruning.store import randomness
from pruning.store.manifest import added_setting

NAME = "Stream"

# Streams of random numbers.

_READERS = 4  # threads that read blocks


class StreamError(ValueError):
    """A stream is not possible as configured."""


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """A stream in batches, for training or evaluation.

    Attributes:
      corpus: its directory.
      batch_size: examples of a global batch, over all hosts.
      selection: directory of a selection of the corpus; None for all documents.
      objective: @SpanCorruption(), @PrefixLM() or @CausalLM().
      input_length, target_length: of the padded features, in tokens. A decoder-only model has
        targets alone.
      seed: of all shuffling and corruption.
      window_blocks: blocks whose chunks are shuffled among one another.
      tokens: a token set of the corpus, for a model with another tokenizer; None for the corpus's
        own tokens.
    """

    corpus: str
    batch_size: int
    selection: str | None = None
    objective: Any = dataclasses.field(default_factory=SpanCorruption)
    input_length: int = 512
    target_length: int = 114
    seed: int = 0
    window_blocks: int = 64
    tokens: str | None = added_setting(None)

    def stream(self) -> Stream:
        """Open the examples.

        Raises:
          ArtifactError: corpus and selection are missing or do not belong together.
          ObjectiveError: the lengths do not fit the objective.
          StreamError: there is no text.
        """
        corpus = load_corpus(self.corpus)
        if self.tokens is not None:
            corpus = load_tokenized(self.corpus, self.tokens)
        selection = load_selection(self.selection, corpus.artifact) if self.selection else None
        return Stream(
            corpus,
            selection,
            objective=self.objective,
            input_length=self.input_length,
            target_length=self.target_length,
            seed=self.seed,
            window_blocks=self.window_blocks,
        )

    def open(self, process_index: int = 0, process_count: int = 1) -> Batches:
        """Open one process's part of the batches."""
        return Batches(self.stream(), self.batch_size, process_index, process_count)


CONFIGURABLES: dict[str, type] = {NAME: StreamConfig, **objectives.CONFIGURABLES}


class Stream:
    """The examples of a corpus, or of a selection of it.

    Attributes:
      blocks: what is shuffled.
      chunk_length: raw tokens of an example.
      examples_per_epoch: constant.
    """

    def __init__(
        self,
        corpus: Corpus,
        selection: Selection | None = None,
        *,
        objective: Objective | None = None,
        input_length: int = 512,
        target_length: int = 114,
        seed: int = 0,
        window_blocks: int = 64,
    ):
        self.corpus = corpus
        self.selection = selection
        self.objective = objective or SpanCorruption()
        self.input_length = input_length
        self.target_length = target_length
        self.seed = seed
        self.window_blocks = window_blocks
        self.blocks = Blocks.open(corpus, selection)
        self.chunk_length = self.objective.chunk_length(
            input_length, target_length, corpus.vocabulary
        )
        tokens = self.blocks.n_tokens + self.blocks.n_documents * self.objective.separates
        self._chunks = -(-tokens // self.chunk_length)  # of every block, int64 [blocks]
        self.examples_per_epoch = int(self._chunks.sum())
        if not self.examples_per_epoch:
            raise StreamError(f"{(selection or corpus).artifact.path} has no text to train on.")
        self._epoch = functools.lru_cache(2)(self._make_epoch)
        self._shuffled = functools.lru_cache(4)(self._shuffle_window)
        self._text = _Cache(self._read, 3 * window_blocks)

    @property
    def inputs(self) -> dict[str, dict[str, str]]:
        """Inputs of the examples: name -> path and digest."""
        inputs = {"corpus": self.corpus.artifact.as_input()}
        if isinstance(self.corpus, Tokenized):
            inputs["tokens"] = self.corpus.token_set.as_input()
        if self.selection:
            inputs["selection"] = self.selection.artifact.as_input()
        return inputs

    def locate(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the epoch, block and chunk within the block of examples, int64 [n] each."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and indices.min() < 0:
            raise IndexError(f"examples are numbered from 0, not from {indices.min()}.")
        epochs, places = np.divmod(indices, self.examples_per_epoch)
        blocks, chunks = np.empty_like(places), np.empty_like(places)
        for number in np.unique(epochs).tolist():
            epoch = self._epoch(number)
            rows = np.flatnonzero(epochs == number)
            windows = epoch.position_of(places[rows]) // self.window_blocks
            for window in np.unique(windows).tolist():
                inside = rows[windows == window]
                first, shuffled = self._shuffled(number, window)
                chunk = shuffled[places[inside] - first]
                position = epoch.position_of(chunk)
                blocks[inside] = epoch.order[position]
                chunks[inside] = chunk - epoch.starts[position]
        return epochs, blocks, chunks

    def chunks(self, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Return the raw tokens of examples: n arrays of `chunk_length` or fewer."""
        epochs, blocks, chunks = (part.tolist() for part in self.locate(indices))
        text = self._text.get(list(zip(epochs, blocks, strict=True)))
        size = self.chunk_length
        return [
            text[epoch, block][chunk * size : (chunk + 1) * size]
            for epoch, block, chunk in zip(epochs, blocks, chunks, strict=True)
        ]

    def examples(self, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Return examples by their indices, in the given order; indices run from 0 without end."""
        indices = np.asarray(indices, np.int64)
        chunks = self.chunks(indices)
        lengths = np.asarray([len(chunk) for chunk in chunks])
        examples: list[Example] = [{}] * len(chunks)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            alike = np.stack([chunks[row] for row in rows])
            made = self.objective.examples(alike, self.seed, indices[rows], self.corpus.vocabulary)
            for row, example in zip(rows, made, strict=True):
                examples[row] = example
        return examples

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return examples as padded features of the model, [examples, length] each."""
        return self.objective.batch(
            self.examples(indices), self.input_length, self.target_length, self.corpus.vocabulary
        )

    def _make_epoch(self, number: int) -> _Epoch:
        seed = int(
            randomness.hashed(randomness.Stream.EPOCH_SEED, self.seed, np.asarray([number])).view(
                np.int64
            )[0]
        )
        order = np.argsort(
            randomness.hashed(randomness.Stream.BLOCK_ORDER, seed, np.arange(len(self.blocks)))
        )
        return _Epoch(seed, order, np.concatenate([[0], np.cumsum(self._chunks[order])]))

    def _shuffle_window(self, number: int, window: int) -> tuple[int, np.ndarray]:
        """Return the first chunk of a window, and its chunks in shuffled order."""
        epoch = self._epoch(number)
        last = min((window + 1) * self.window_blocks, len(self.blocks))
        chunks = np.arange(epoch.starts[window * self.window_blocks], epoch.starts[last])
        return int(chunks[0]), chunks[
            np.argsort(randomness.hashed(randomness.Stream.CHUNK_ORDER, epoch.seed, chunks))
        ]

    def _read(self, epoch_and_block: tuple[int, int]) -> np.ndarray:
        """Return the tokens of a block, its documents in the order of the epoch."""
        number, block = epoch_and_block
        doc_ids, tokens = self.blocks.read(block)
        order = np.argsort(
            randomness.hashed(randomness.Stream.DOCUMENT_ORDER, self._epoch(number).seed, doc_ids)
        )
        ends = [objectives.end_id(self.corpus.vocabulary)] * self.objective.separates
        eos = np.asarray(ends, tokens[0].dtype)
        return np.concatenate([part for i in order for part in (tokens[i], eos)])


@dataclasses.dataclass(frozen=True, eq=False)
class _Epoch:
    """The order of an epoch.

    Attributes:
      seed: of its shuffles.
      order: int64 [blocks], the permuted blocks.
      starts: int64 [blocks + 1], how many chunks lie before each of them.
    """

    seed: int
    order: np.ndarray
    starts: np.ndarray

    def position_of(self, chunks: np.ndarray) -> np.ndarray:
        """Return the positions in `order` of the blocks that hold some chunks."""
        return np.searchsorted(self.starts, chunks, side="right") - 1


class _Cache:
    """Cache of blocks by (epoch, block); missing ones are read by several threads."""

    def __init__(self, read: Callable[[tuple[int, int]], np.ndarray], size: int):
        self._read = read
        self._size = size
        self._held: dict[tuple[int, int], np.ndarray] = {}  # the one used last comes last
        self._lock = threading.Lock()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="blocks")

    def get(self, keys: Iterable[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
        with self._lock:
            wanted = dict.fromkeys(keys)
            missing = [key for key in wanted if key not in self._held]
            read = dict(zip(missing, self._readers.map(self._read, missing), strict=True))
            found = {key: read[key] if key in read else self._held.pop(key) for key in wanted}
            self._held.update(found)
            for key in list(self._held)[: -self._size]:
                del self._held[key]
            return found


class Batches:
    """One process's part of a stream in global batches.

    Batch s holds the examples from s * batch_size on; process p of n has the p-th of n equal parts
    of its rows.

    Attributes:
      inputs: name -> path and digest of the artifacts that the examples are made of.
      num_batches: number of batches in an epoch, for evaluation; training continues without end.
      token_bytes: int32 [ids], the bytes of text that each id stands for.
      vocabulary: the tokenizer that made the ids, as a manifest describes it.
    """

    def __init__(
        self, stream: Stream, batch_size: int, process_index: int = 0, process_count: int = 1
    ):
        if batch_size < 1 or batch_size % process_count:
            raise StreamError(
                f"a batch of {batch_size} examples cannot be divided among {process_count} "
                "processes: make batch_size a multiple of their number."
            )
        if not 0 <= process_index < process_count:
            raise StreamError(f"there is no process {process_index} of {process_count}.")
        self.stream = stream
        self.inputs = stream.inputs
        self.num_batches = max(1, stream.examples_per_epoch // batch_size)
        self.token_bytes = stream.corpus.vocabulary.token_bytes()
        self.vocabulary = stream.corpus.vocabulary.describe()
        self._batch_size = batch_size
        self._rows = batch_size // process_count
        self._first = process_index * self._rows

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Return this process's rows of global batch `step`, [rows, length] each."""
        first = step * self._batch_size + self._first
        return self.stream.batch(np.arange(first, first + self._rows))
