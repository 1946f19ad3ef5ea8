"""Entropy: how rare a document's words are, by nothing but counting.

    python -m pruning entropy --gin_file=configs/score/entropy.gin --gin.CORPUS=...

Kim and Baek (arXiv 2406.14124) rank documents by H_q + H_f: the mean surprisal under a small
language model, which is a likelihood score set (`nll_mean`), and the mean surprisal under the
corpus's own word frequencies, which is made here. The sum is two terms of a selection
(configs/select/entropy.gin).

Choices
- What a word is the summary of the paper that we have leaves open. With unit="token" it is a token
  of the corpus's vocabulary: H_f is then in nats per token, as H_q is, and the two add up to one
  number in one unit. With unit="word" it is a lower-cased word, hashed into 2**22 buckets.
- Frequencies are those of the corpus, or of the selection that is scored; they are counted in a
  first pass, and add up over shards. No word of a scored document can have frequency 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa

from pruning import artefact, derived, parallel, progress
from pruning.artefact import Artefact, Build
from pruning.ngrams import passes
from pruning.ngrams.hashing import SCHEME, Features, NGrams
from pruning.ngrams.passes import Texts
from pruning.parts import Parts
from pruning.scorers import Column

NAME = "Entropy"

COLUMNS = {
    "h_f": Column(
        pa.float32(), "mean of -log f(word) over the document, f the corpus's frequency, in nats"
    )
}

_WORDS = Features(n=1, buckets=1 << 22)
_READ = 4096  # documents at a time


@dataclasses.dataclass(frozen=True)
class EntropyConfig:
    """Settings of `entropy`.

    Attributes:
      corpus: the corpus to score.
      output: the score set's directory.
      within: a selection of the corpus; other documents get the status "not_selected" and are not
        counted.
      unit: what a word is: "token" or "word".
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    within: str | None = None
    unit: Literal["token", "word"] = "token"
    workers: int = 0


CONFIGURABLES: dict[str, type] = {NAME: EntropyConfig}


def run(config: EntropyConfig) -> Artefact:
    """Makes the score set, or goes on with it.

    Raises:
      ArtefactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output was begun with other settings.
    """
    texts = Texts.open(config.corpus, config.within)
    hashes = SCHEME if config.unit == "word" else None
    build = derived.begin(
        config.output,
        {"unit": config.unit, "hashes": hashes},
        texts.inputs("corpus"),
        texts.corpus,
        COLUMNS,
    )
    if build.finished:
        return artefact.load(build.path, derived.KIND)
    if config.unit == "word":
        counts = passes.count(build, "words", texts, _WORDS, config.workers)
        surprisals = Surprisals(surprisal(counts))
        passes.score(build, texts, _WORDS, surprisals, COLUMNS, config.workers)
    else:
        counts = _count_tokens(build, texts, config.workers)
        _score_tokens(build, texts, surprisal(counts), config.workers)
    summary = {
        "unit": config.unit,
        "words": int(counts.sum()),
        "kinds": int(np.count_nonzero(counts)),
        "corpus_entropy": entropy(counts),
    }
    scores = derived.finish(build, "entropy", COLUMNS, summary)
    assert scores is not None  # every shard was ours
    return scores


def surprisal(counts: np.ndarray) -> np.ndarray:
    """-log frequency of every word, float64 [words], in nats; infinite where the count is 0."""
    with np.errstate(divide="ignore"):
        return np.log(counts.sum()) - np.log(counts)


def entropy(counts: np.ndarray) -> float:
    """Entropy of the frequencies in nats: the mean of H_f over all words of the corpus."""
    some = counts[counts > 0]
    return float((some / some.sum()) @ surprisal(some)) if len(some) else 0.0


@dataclasses.dataclass(frozen=True)
class Surprisals:
    """Hashed words -> the column. `table`: float64 [buckets]."""

    table: np.ndarray

    def __call__(self, grams: NGrams) -> dict[str, np.ndarray]:
        return {"h_f": grams.sums(self.table) / np.maximum(grams.lengths, 1)}


# --------------------------------------------------------------------------------------------------
# Tokens, which the corpus holds ready


def _tokens(texts: Texts, shard: int) -> Iterator[NGrams]:
    """All tokens of a shard, as if they were buckets."""
    for batch in texts.corpus.iter_batches(shard, ["tokens"], _READ):
        column = batch.column(0)
        offsets = column.offsets.to_numpy().astype(np.int64)
        tokens = column.values.to_numpy()[offsets[0] : offsets[-1]]
        yield NGrams(tokens.astype(np.int64), offsets - offsets[0])


def _count_tokens(build: Build, texts: Texts, workers: int) -> np.ndarray:
    size = texts.corpus.vocabulary.size
    parts = Parts(build, "tokens", texts.corpus.num_shards)
    with progress.track("count tokens", texts.documents, "documents") as task:
        parallel.run_shards(
            functools.partial(_count_shard, parts, texts, size),
            parts.missing(),
            workers,
            lambda documents, _: task.advance(documents),
        )
    counts = (np.frombuffer(parts.read(k), np.int64) for k in range(parts.count))
    return sum(counts, np.zeros(size, np.int64))


def _count_shard(
    parts: Parts, texts: Texts, size: int, shard: int, report: parallel.Report
) -> None:
    counts = np.zeros(size, np.int64)
    wanted = np.zeros(texts.corpus.documents(shard), bool)
    wanted[texts.rows(shard)] = True
    first = 0
    for tokens in _tokens(texts, shard):
        some = wanted[first : first + len(tokens.lengths)]
        first += len(some)
        counts += np.bincount(tokens.buckets[np.repeat(some, tokens.lengths)], minlength=size)
        report(int(some.sum()), int(some.sum()))
    parts.write(shard, counts.tobytes())


def _score_tokens(build: Build, texts: Texts, table: np.ndarray, workers: int) -> None:
    with progress.track("score", texts.documents, "documents") as task:
        parallel.run_shards(
            functools.partial(_score_shard, build, texts, table),
            build.pending(),
            workers,
            lambda documents, _: task.advance(documents),
        )


def _score_shard(
    build: Build, texts: Texts, table: np.ndarray, shard: int, report: parallel.Report
) -> None:
    of = Surprisals(table)
    parts = [of(tokens)["h_f"] for tokens in _tokens(texts, shard)]
    status = derived.status_within(texts.corpus, shard, texts.within)
    h_f = np.concatenate([np.zeros(0), *parts])
    derived.write(build, shard, texts.corpus, COLUMNS, status, {"h_f": h_f})
    report(int(derived.ok(status).sum()), len(status))
