"""Token sets: the tokens of a corpus for a tokenizer other than its own vocabulary.

    python -m pruning tokenize --gin.CORPUS=runs/corpus --gin.TOKENIZER=Qwen/Qwen3-8B \\
        --gin.OUTPUT=runs/qwen3_tokens

    corpus = load_tokenized("runs/corpus", "runs/qwen3_tokens")   # a Corpus of other tokens
    corpus = read_with(load_corpus("runs/corpus"), tokenizer)     # tokenized on reading

Choices
- Text is stored once, tokens once per tokenizer. Shard k of a token set has the documents of
  corpus shard k, in order, with the same doc_ids and in the same row groups, so that a document's
  tokens are read the same way as from the corpus.
- A token set holds its tokenizer, so that it can be read without the model.
- A stage that reads a corpus sequentially needs no token set: `read_with` tokenizes on reading, in
  the library's own threads. Random access (training) needs one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from pruning.corpus.layout import ROW_GROUP
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.tokenizers import Tokenizer, load_stored, load_tokenizer
from pruning.store import late, parallel, progress
from pruning.store.artifact import Artifact, load_artifact, require_input, require_same_documents
from pruning.store.build import Build

NAME = "Tokenize"
KIND = "tokens"
_COLUMNS = ("tokens", "n_tokens")


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Settings of `tokenize`.

    Attributes:
      corpus: directory of the corpus.
      tokenizer: a model's directory, a tokenizer.json, a SentencePiece file, or "bytes".
      output: directory of the token set.
      workers: number of local processes; 0 for one per CPU.
    """

    corpus: str
    tokenizer: str
    output: str
    workers: int = 0

    def __post_init__(self) -> None:
        parallel.require_processes(self.workers)


CONFIGURABLES: dict[str, type] = {NAME: TokenizeConfig}


@late.stage
def run(config: TokenizeConfig) -> Artifact:
    """Tokenize a corpus, or resume an interrupted run.

    Raises:
      ArtifactError: there is no corpus, or the output holds something else.
      VocabularyError: the tokenizer cannot be read.
      ConfigurationChanged: the output holds work of another tokenizer or corpus.
    """
    corpus = load_corpus(config.corpus)
    tokenizer = load_tokenizer(config.tokenizer)
    build = Build(
        config.output,
        KIND,
        {"tokenizer": tokenizer.digest},
        {"corpus": corpus.artifact},
        corpus.num_shards,
        schema_of(tokenizer),
        {"use_dictionary": False, "column_encoding": {"tokens.list.element": "BYTE_STREAM_SPLIT"}},
    )
    if not build.finished:
        pending = build.pending()
        total = corpus.artifact.manifest.rows
        done = total - sum(corpus.documents(shard) for shard in pending)
        with progress.track("tokenize", total, "documents", done) as task:
            work = functools.partial(_tokenize_shard, build, corpus, tokenizer)
            parallel.run_shards(work, pending, config.workers, lambda _, n: task.advance(n))
        for name, content in tokenizer.files().items():
            build.write_file(name, content)
    made = build.finish({"tokenizer": tokenizer.describe()})
    assert made is not None  # this process had every shard
    return made


def schema_of(tokenizer: Tokenizer) -> pa.Schema:
    """Return the columns; tokens are uint16 unless the tokenizer has more than 65,535 ids."""
    wide = tokenizer.size > np.iinfo(np.uint16).max
    tokens = pa.list_(pa.uint32() if wide else pa.uint16())
    return pa.schema([("doc_id", pa.int64()), ("tokens", tokens), ("n_tokens", pa.int32())])


def _tokenize_shard(
    build: Build, corpus: Corpus, tokenizer: Tokenizer, shard: int, report: parallel.Report
) -> None:
    started = time.perf_counter()
    tokens = 0
    with build.shard(shard) as writer:
        for batch in corpus.iter_batches(shard, ["doc_id", "text"], ROW_GROUP):
            lists = _encoded(tokenizer, batch.column("text"))
            counts = np.diff(lists.offsets.to_numpy())
            columns = {"doc_id": batch.column("doc_id"), "tokens": lists, "n_tokens": counts}
            writer.write(pa.table(columns, schema=build.schema), ROW_GROUP)
            tokens += int(counts.sum())
            report(0, len(counts))
        writer.tokens = tokens
        writer.counts = {"documents": writer.rows, "tokens": tokens}
        writer.measured = {"seconds": time.perf_counter() - started}


def _encoded(tokenizer: Tokenizer, texts: pa.Array) -> pa.ListArray:
    """Return the tokens of texts as an Arrow list of uint16 or uint32."""
    ids = tokenizer.encode_batch(texts.to_pylist())
    item = schema_of(tokenizer).field("tokens").type.value_type
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    flat = np.fromiter((i for row in ids for i in row), item.to_pandas_dtype(), int(offsets[-1]))
    return pa.ListArray.from_arrays(offsets, pa.array(flat, item))


def read_with(corpus: Corpus, tokenizer: Tokenizer) -> Corpus:
    """Return the corpus with this tokenizer's tokens: itself or a view that tokenizes."""
    if tokenizer.digest == corpus.vocabulary.digest:
        return corpus
    return _ReadWith(corpus.artifact, tokenizer)


def load_tokenized(corpus: epath.PathLike, tokens: epath.PathLike) -> Corpus:
    """Open a corpus with the tokens of a token set.

    Raises:
      ArtifactError: one of them is missing, or the token set is of another corpus.
    """
    opened = load_corpus(corpus)
    token_set = load_artifact(tokens, KIND)
    require_input(token_set, "corpus", opened.artifact)
    return Tokenized(opened.artifact, token_set)


class _OtherTokens(Corpus):
    """A corpus whose columns `tokens` and `n_tokens` come from another source."""

    def _tokens(self, shard: int, names: Sequence[str]) -> pa.Table:
        raise NotImplementedError

    def columns(self, shard: int, names: Sequence[str]) -> pa.Table:
        """Return some columns of a whole shard."""
        own = [name for name in names if name not in _COLUMNS]
        others = [name for name in names if name in _COLUMNS]
        if not others:
            return super().columns(shard, names)
        table = super().columns(shard, [*own, *(["doc_id"] if "doc_id" not in own else [])])
        found = self._tokens(shard, ["doc_id", *others])
        expected = table["doc_id"].to_numpy()
        require_same_documents(expected, found["doc_id"].to_numpy(), f"tokens of shard {shard}")
        return pa.table({name: (found if name in _COLUMNS else table)[name] for name in names})


@dataclasses.dataclass(frozen=True)
class _ReadWith(_OtherTokens):
    """A corpus that is tokenized on reading."""

    tokenizer: Tokenizer

    @property
    def vocabulary(self) -> Any:
        """The tokenizer of these tokens."""
        return self.tokenizer

    def _tokens(self, shard: int, names: Sequence[str]) -> pa.Table:
        batches = list(self.iter_batches(shard, names, ROW_GROUP))
        return pa.Table.from_batches(batches) if batches else self._empty(names)

    def _empty(self, names: Sequence[str]) -> pa.Table:
        schema = schema_of(self.tokenizer)
        return pa.schema([schema.field(name) for name in names]).empty_table()

    def iter_batches(
        self, shard: int, names: Sequence[str], batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a shard, `batch_size` documents at a time, in order."""
        if not set(names) & set(_COLUMNS):
            yield from super().iter_batches(shard, names, batch_size)
            return
        own = [name for name in names if name not in _COLUMNS]
        read = list(dict.fromkeys([*own, "text"]))
        for batch in super().iter_batches(shard, read, batch_size):
            lists = _encoded(self.tokenizer, batch.column("text"))
            made = {"tokens": lists, "n_tokens": pa.array(np.diff(lists.offsets.to_numpy()))}
            columns = [made[n] if n in _COLUMNS else batch.column(n) for n in names]
            yield pa.RecordBatch.from_arrays(columns, names=list(names))

    def lengths_of(self, shard: int, rows: np.ndarray) -> np.ndarray:
        """Return the token counts of some documents of a shard; tokenizes only these."""
        return np.array([len(tokens) for tokens in self.tokens_of(shard, rows)], np.int32)

    def tokens_of(self, shard: int, rows: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of some documents of a shard, tokenized on demand."""
        rows = np.asarray(rows, np.int64)
        texts = super().columns(shard, ["text"])["text"].take(pa.array(rows))
        lists = _encoded(self.tokenizer, texts.combine_chunks())
        values, offsets = lists.values.to_numpy(), lists.offsets.to_numpy()
        return [values[a:b] for a, b in itertools.pairwise(offsets)]


@dataclasses.dataclass(frozen=True)
class Tokenized(_OtherTokens):
    """A corpus with the tokens of a token set."""

    token_set: Artifact

    @functools.cached_property
    def vocabulary(self) -> Any:
        """The tokenizer of the token set."""
        return load_stored(self.token_set.path, self.token_set.manifest.summary["tokenizer"])

    @functools.cached_property
    def _stored(self) -> Corpus:
        """The token set as a corpus: the same rows, without text."""
        return Corpus(self.token_set)

    def _tokens(self, shard: int, names: Sequence[str]) -> pa.Table:
        return self._stored.columns(shard, names)

    def iter_batches(
        self, shard: int, names: Sequence[str], batch_size: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield some columns of a shard, `batch_size` documents at a time, in order."""
        others = [name for name in names if name in _COLUMNS]
        if not others:
            yield from super().iter_batches(shard, names, batch_size)
            return
        own = [name for name in names if name not in (*_COLUMNS, "doc_id")]
        mine = super().iter_batches(shard, ["doc_id", *own], batch_size)
        theirs = self._stored.iter_batches(shard, ["doc_id", *others], batch_size)
        for ours, found in zip(mine, theirs, strict=True):
            expected, ids = (batch.column("doc_id").to_numpy() for batch in (ours, found))
            require_same_documents(expected, ids, f"tokens of shard {shard}")
            columns = [(found if n in _COLUMNS else ours).column(n) for n in names]
            yield pa.RecordBatch.from_arrays(columns, names=list(names))

    def tokens_of(self, shard: int, rows: np.ndarray) -> list[np.ndarray]:
        """Return the tokens of some documents of a shard."""
        return self._stored.tokens_of(shard, rows)
