"""Chunks of documents that a server is asked about, and their intermediate files."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from models.terminal import say
from pruning.scores.model.served.asking import Answered, Judge, Usage
from pruning.scores.model.served.server import ServerError
from pruning.scores.score_set import FAILED
from pruning.store import progress
from pruning.store.intermediate import Parts

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus
    from pruning.store.build import Build

CHUNK = 1024  # documents of an intermediate file
_MOST_REPORTED = 8  # failed documents whose error is shown
_FEW = 8  # of fewer documents, all may fail


class Failures:
    """Reports of documents that the server refused."""

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self._said = 0

    def say(self, shard: int, row: int, message: str) -> None:
        self._said += 1
        if self._said <= _MOST_REPORTED:
            say(
                f"document {(shard << 32) + row} of {self._corpus.artifact.path} cannot be scored "
                f'and gets the status "{FAILED}": {message}',
                error=True,
            )


@dataclasses.dataclass(frozen=True)
class Pending:
    """Documents of a chunk that are being asked about."""

    shard: int
    chunk: int
    futures: Sequence[Future[Answered] | None]

    @classmethod
    def of(
        cls,
        shard: int,
        chunk: int,
        documents: Sequence[tuple[int, str | None]],
        pool: ThreadPoolExecutor,
        judge: Judge,
    ) -> Pending:
        made = [None if text is None else pool.submit(judge.ask, text) for _, text in documents]
        return cls(shard, chunk, made)

    def collect(self, task: progress.Task, said: Failures) -> list[Answered | None]:
        """Wait for all answers.

        Raises:
          ServerError: the server is gone, or refuses every document.
        """
        found: list[Answered | None] = []
        for row, future in enumerate(self.futures, self.chunk * CHUNK):
            answered = None if future is None else future.result()
            found.append(answered)
            task.advance()
            if answered is not None and answered.failed:
                said.say(self.shard, row, answered.failed)
        asked = [answered for answered in found if answered is not None]
        if len(asked) >= _FEW and all(answered.failed for answered in asked):
            raise ServerError(f"the server refuses every document: {asked[0].failed}")
        return found


class Chunks:
    """Intermediate files of answers, numbered through all shards."""

    def __init__(self, build: Build, corpus: Corpus):
        sizes = [corpus.documents(shard) for shard in range(corpus.num_shards)]
        self._sizes = sizes
        self._first = np.cumsum([0, *(-(-size // CHUNK) for size in sizes)]).tolist()
        self._parts = Parts(build, "answers", self._first[-1])
        self._last = time.perf_counter()
        self._retries = 0

    def number(self, shard: int) -> int:
        """Return the number of chunks of a shard."""
        return self._first[shard + 1] - self._first[shard]

    def size(self, shard: int, chunk: int) -> int:
        """Return the number of documents of a chunk."""
        return min(CHUNK, self._sizes[shard] - chunk * CHUNK)

    def holds(self, shard: int, chunk: int) -> bool:
        """Return whether the file of a chunk exists."""
        return self._parts.path(self._first[shard] + chunk).exists()

    def write(self, pending: Pending, answers: Sequence[Answered | None], judge: Judge) -> None:
        """Write the answers about a chunk."""
        now, retries = time.perf_counter(), judge.connection.retries
        none = np.zeros((0, judge.slots))
        blank = Answered(none, none.astype(bool), np.zeros(0, np.int64), 0, None, Usage())
        found = [blank if answered is None else answered for answered in answers]
        arrays: dict[str, Any] = {
            "windows": np.array([len(a.tokens) for a in found], np.int64),
            "lost": np.array([a.lost for a in found], np.int64),
            "failed": np.array([a.failed is not None for a in found], bool),
            "tokens": np.concatenate([a.tokens for a in found]),
            "values": np.concatenate([a.values for a in found]),
            "listed": np.concatenate([a.listed for a in found]),
            "requests": np.int64(sum(a.usage.requests for a in found)),
            "prompt_tokens": np.int64(sum(a.usage.prompt_tokens for a in found)),
            "retries": np.int64(retries - self._retries),
            "seconds": np.float64(now - self._last),
        }
        self._last, self._retries = now, retries
        content = io.BytesIO()
        np.savez(content, **arrays)
        self._parts.write(self._first[pending.shard] + pending.chunk, content.getvalue())

    def read(self, shard: int, chunk: int) -> dict[str, np.ndarray]:
        """Return the arrays of a chunk."""
        content = self._parts.read(self._first[shard] + chunk)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
