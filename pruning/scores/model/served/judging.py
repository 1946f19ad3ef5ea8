"""Scores by a judge behind a server: the part of `score` that asks instead of computing.

    winnow score --recipe=ask_llm --model=Qwen/Qwen2.5-72B-Instruct --corpus=runs/corpus \\
        --gin.Score.server=@Server() --gin.Server.endpoint=http://localhost:8000/v1

Choices
- Questions, answers, windows and columns are those of `AskLLM` and `Rubric`, which are given as for
  a local model.
- Answers are kept in intermediate files of at most 1,024 documents, so that a killed run asks only
  about documents of unfinished files again. A shard is written when its files are complete.
- The next file's documents are handed out before those of the last one are finished, so that the
  server always has as many requests as it is allowed.
- A judge is known by its name at the server. Number of requests at a time, URL and time-outs may
  change on resume.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pruning.scores import score_set
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.document_windows import aggregated, judged
from pruning.scores.model.inquiry import Wording
from pruning.scores.model.loading import CORPUS, find_tokenizer
from pruning.scores.model.served import asking
from pruning.scores.model.served.asking import Judge
from pruning.scores.model.served.chunks import CHUNK, Chunks, Failures, Pending
from pruning.scores.model.served.first_contact import first_answer, model_at
from pruning.scores.model.served.prompts import IdPrompts, Prompts, TextPrompts
from pruning.scores.model.served.questions import Asked, columns_of, questions_of
from pruning.scores.model.served.server import Connection, Server
from pruning.scores.model.stored_questions import Spans
from pruning.scores.score_set import FAILED, NOT_LISTED, STATUSES, Column
from pruning.store import progress
from pruning.store.manifest import config_of
from pruning.store.progress import duration

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus
    from pruning.corpus.selection_reader import Selection
    from pruning.corpus.tokenizers import Tokenizer
    from pruning.store.build import Build

_READ = 1024
_SAMPLE = 64  # documents of a dry run


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run: corpus, questions, and the judge that answers them.

    Attributes:
      server, scorer, output: as in `ScoreConfig`.
      tokenizer: of the model; None if the server tokenizes the prompts.
    """

    server: Server
    scorer: Any
    output: str
    corpus: Corpus
    within: Selection | None
    asked: Sequence[Asked]
    judge: Judge
    tokenizer: Tokenizer | None

    @classmethod
    def of(
        cls,
        server: Server,
        scorer: Any,
        model: str,
        tokenizer: str | None,
        output: str,
        corpus: Corpus,
        within: Selection | None,
    ) -> Plan:
        """Prepare the questions, and find the model on the server.

        Args: see `ScoreConfig`.

        Raises:
          ScoreError: settings are unsuitable.
          ServerError: the server is absent, lacks the model, or gives no log-probabilities.
        """
        asked = questions_of(scorer)
        wording = Wording(scorer.max_tokens, scorer.chat, scorer.system, scorer.thinking)
        questions = [each.question for each in asked]
        own: Tokenizer | None = None
        prompts: Prompts
        if tokenizer is not None:
            own = corpus.vocabulary if tokenizer == CORPUS else find_tokenizer("", tokenizer)
            prompts = IdPrompts(questions, wording, own, scorer.windows)
        else:
            prompts = TextPrompts(questions, wording, corpus.vocabulary, scorer.windows)
        connection = Connection(server)
        judge = Judge(connection, model_at(connection, model), prompts)
        judge = first_answer(judge, wording)
        return cls(server, scorer, output, corpus, within, asked, judge, own)

    @property
    def columns(self) -> dict[str, Column]:
        """Columns of the score set."""
        return columns_of(self.asked, self.scorer.keep_windows)

    def claim(self) -> Build:
        """Claim the output directory, or reopen the work of an earlier run."""
        identity = {
            "scorer": config_of(self.scorer),
            "model": {"served": self.judge.model},
            "top": self.server.top,
            **({} if self.tokenizer is None else {"tokenizer": self.tokenizer.digest}),
        }
        inputs = {} if self.within is None else {"within": self.within.artifact}
        return score_set.begin(self.output, identity, inputs, self.corpus, self.columns)

    @property
    def summary(self) -> dict[str, Any]:
        """The manifest's description of scorer and model."""
        kind = "ask_llm" if isinstance(self.scorer, AskLLM) else "rubric"
        return {
            "scorer": kind,
            "columns": {name: column.meaning for name, column in self.columns.items()},
            "model": {"served": self.judge.model, "endpoint": self.server.address},
            "prompts": "text" if self.tokenizer is None else "ids",
        }

    def score(self, build: Build, shards: Sequence[int], mine: Sequence[int], worker: str) -> None:
        """Ask about the documents of pending shards, and write them.

        Args:
          mine: all shards of this worker, the finished ones included.
          worker: "0 of 4", for `status`.
        """
        total = sum(map(self.corpus.documents, mine))
        done = total - sum(map(self.corpus.documents, shards))
        parts = Chunks(build, self.corpus)
        with (
            build.beating(worker) as beat,
            progress.track("ask", total, "documents", done) as task,
            _threads(self.judge.connection) as pool,
        ):
            names = ("done", "total", "unit", "rate", "seconds_left")
            pending: collections.deque[Pending] = collections.deque()
            said = Failures(self.corpus)
            shard_of = dict.fromkeys(shards, 0)

            def collect() -> None:
                first = pending.popleft()
                answered = first.collect(task, said)
                parts.write(first, answered, self.judge)
                end(first.shard)

            def end(shard: int) -> None:
                shard_of[shard] += 1
                if shard_of[shard] == parts.number(shard):
                    self._write(build, shard, parts)
                    beat.off(shard)

            for shard in shards:
                beat.on(shard, "asks", lambda: {name: getattr(task, name) for name in names})
                if not parts.number(shard):
                    self._write(build, shard, parts)
                    beat.off(shard)
                for chunk, documents in self._chunks(shard):
                    if parts.holds(shard, chunk):
                        task.advance(parts.size(shard, chunk))
                        while pending:  # in order, so that a shard is written after its last file
                            collect()
                        end(shard)
                        continue
                    pending.append(Pending.of(shard, chunk, documents, pool, self.judge))
                    if len(pending) > 1:
                        collect()
            while pending:
                collect()

    def _chunks(self, shard: int) -> Iterator[tuple[int, list[tuple[int, str | None]]]]:
        """Yield number and documents of every chunk: row and text; None if not asked about."""
        status = score_set.status_within(self.corpus, shard, self.within)
        wanted = score_set.ok(status)
        row, chunk = 0, 0
        gathered: list[tuple[int, str | None]] = []
        for batch in self.corpus.iter_batches(shard, ["text"], _READ):
            for text in batch.column("text").to_pylist():
                gathered.append((row, text if wanted[row] else None))
                row += 1
                if len(gathered) == CHUNK:
                    yield chunk, gathered
                    gathered, chunk = [], chunk + 1
        if gathered:
            yield chunk, gathered

    def _write(self, build: Build, shard: int, parts: Chunks) -> None:
        """Write a shard from its intermediate files."""
        found = [parts.read(shard, chunk) for chunk in range(parts.number(shard))]
        status = score_set.status_within(self.corpus, shard, self.within)
        counts = np.concatenate([np.zeros(0, np.int64), *(part["windows"] for part in found)])
        lost = np.concatenate([np.zeros(0, np.int64), *(part["lost"] for part in found)])
        failed = np.concatenate([np.zeros(0, bool), *(part["failed"] for part in found)])
        tokens = np.concatenate([np.zeros(0, np.int64), *(part["tokens"] for part in found)])
        empty = np.zeros((0, self.judge.slots))
        upper = np.concatenate([empty, *(part["values"] for part in found)])
        listed = np.concatenate([empty.astype(bool), *(part["listed"] for part in found)])
        owner = np.repeat(np.arange(len(counts)), counts)
        values, unlisted = self._values(upper, listed)
        logs = [name for each in self.asked for name in each.logarithms]
        spans = Spans(owner, tokens, lost)
        columns = dict(
            judged(spans, values, logs, self.scorer.aggregate, self.scorer.keep_windows).columns
        )
        if self.scorer.aggregate != "mean":  # the answers may be of different windows
            windows = np.bincount(owner, minlength=len(lost))
            for name in (f"{each.question.name}_unlisted" for each in self.asked):
                columns[name] = aggregated(values[name], tokens, windows, "max", logarithms=False)
        status[failed & score_set.ok(status)] = STATUSES.index(FAILED)
        none = np.zeros(len(status), bool)
        none[owner[unlisted]] = True
        status[none & score_set.ok(status)] = score_set.ALL_STATUSES.index(NOT_LISTED)
        ok = score_set.ok(status)
        cut = lost[ok]
        bounded = np.zeros(len(status), bool)
        bounded[owner[~listed.all(axis=1)]] = True
        sums = {
            name: sum(part[name].item() for part in found) for name in ("requests", "prompt_tokens")
        }
        measured = {
            name: sum(part[name].item() for part in found) for name in ("seconds", "retries")
        }
        score_set.write(
            build,
            shard,
            self.corpus,
            self.columns,
            status,
            columns,
            counts={
                "truncated": {"documents": int((cut > 0).sum()), "tokens": int(cut.sum())},
                "bounded": int((bounded & ok).sum()),
                "judge_tokens": int(tokens[ok[owner]].sum() + cut.sum()),
                **sums,
            },
            measured=measured | {name: float(value) for name, value in sums.items()},
        )

    def _values(
        self, upper: np.ndarray, listed: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return the columns of all windows, and a mask of those without a listed answer."""
        prompts = self.judge.prompts
        values: dict[str, np.ndarray] = {}
        none = np.zeros(len(upper), bool)
        of_questions = asking.answers(
            prompts.readings,
            asking.by_question(upper, prompts),
            asking.by_question(listed, prompts),
        )
        for each, (high, low) in zip(self.asked, of_questions, strict=True):
            values |= each.values(high)
            least, most = np.exp(low).sum(axis=1), np.exp(high).sum(axis=1)
            gap = np.minimum(most - least, np.maximum(1 - least, 0.0))
            values[f"{each.question.name}_unlisted"] = gap
            none |= np.isneginf(low).all(axis=1)
        return values, none

    def estimate(self) -> str:
        """Ask about a sample of the corpus, and return lines on the cost of all of it."""
        total = self.corpus.artifact.manifest.rows if self.within is None else self.within.documents
        texts = _sample(self.corpus, self.within)
        if not texts:
            return "there are no documents to ask about"
        started = time.perf_counter()
        with _threads(self.judge.connection) as pool:
            found = list(pool.map(self.judge.ask, texts))
        seconds = time.perf_counter() - started
        requests = np.array([answered.usage.requests for answered in found], float)
        tokens = np.array([answered.usage.prompt_tokens for answered in found], float)
        error = 1.96 * tokens.std() / np.sqrt(len(tokens)) / max(tokens.mean(), 1.0)
        left = sum(not answered.listed.all() for answered in found)
        lines = [
            f"judge: {self.judge.model} at {self.server.address}",
            f"documents: {total:,} (estimated from {len(texts)})",
            f"requests: {requests.mean() * total:,.0f}",
            f"prompt tokens: {tokens.mean() * total:,.0f} (95% interval: {error:.0%} more or less)",
            f"time: {duration(seconds / len(texts) * total)} at {tokens.sum() / seconds:,.0f} "
            f"prompt tokens/s, with {self.server.concurrency} documents at a time",
            f"answers not listed: for {left} of {len(texts)} documents some answers were not among "
            f"the {self.server.top} most probable tokens",
        ]
        if failed := [answered.failed for answered in found if answered.failed]:
            lines.append(f"failed: {len(failed)} of {len(texts)} documents ({failed[0]})")
        return "\n".join(lines)


def report(measured: Mapping[str, float], counts: Mapping[str, Any]) -> str:
    """Return lines on the measured cost of a score set; what was not measured counts as 0."""
    names = ("seconds", "prompt_tokens", "requests", "retries")
    seconds, tokens, requests, retries = (measured.get(name, 0.0) for name in names)
    rate = f"{tokens / seconds:,.0f} prompt tokens/s" if seconds else "no rate"
    return (
        f"asked: {requests:,.0f} requests, {tokens:,.0f} prompt tokens, {retries:,.0f} repeated, "
        f"{duration(seconds)} ({rate})\n"
        f"bounds: {counts.get('bounded', 0):,} documents have an answer that was not listed, whose "
        "probability is an upper bound"
    )


@contextlib.contextmanager
def _threads(connection: Connection) -> Iterator[ThreadPoolExecutor]:
    """Yield threads for requests; an error ends all of them."""
    pool = ThreadPoolExecutor(connection.server.concurrency, "ask")
    try:
        yield pool
    except BaseException:
        connection.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _sample(corpus: Corpus, within: Selection | None) -> list[str]:
    """Return the texts of documents that are evenly spread over some shards."""
    shards = np.unique(np.linspace(0, corpus.num_shards - 1, min(corpus.num_shards, 8)).astype(int))
    each = -(-_SAMPLE // len(shards))
    texts: list[str] = []
    for shard in shards.tolist():
        rows = np.flatnonzero(score_set.ok(score_set.status_within(corpus, shard, within)))
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int))]
        column = corpus.columns(shard, ["text"])["text"]
        texts += column.take(pa.array(chosen)).to_pylist()
    return texts
