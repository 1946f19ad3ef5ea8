"""Floors of a study: n-gram models of the pool's tokens on the evaluation sets.

Nothing is concluded from a neural model that does worse than the pool's token frequencies
(Cell.below_floor in comparison.py).

Choices
- The n-gram models are fitted to the tokens of the pool, which are those of the full-data run. They
  score exactly the tokens of the models' perplexity: the same documents, cut at the same token, the
  same first tokens left out. So losses compare document by document.
- Of a pool of more than MOST_TOKENS, evenly spaced shards are counted, because order 3 sorts all
  tokens in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.report.results import Floor
from evaluation.statistics import ngram_model
from evaluation.statistics.ngram_model import NgramModel
from pruning.corpus.reader import Corpus
from pruning.corpus.selection_reader import Selection
from pruning.scores.score_set import OK
from pruning.store.artifact import Artifact

ORDERS = {1: "Unigram", 3: "Trigram"}
MOST_TOKENS = 20_000_000


def fit(corpus: Corpus, pool: Selection) -> dict[int, NgramModel]:
    """Return n-gram models of the pool by order."""
    shown = max(1, min(pool.num_shards, pool.num_shards * MOST_TOKENS // max(pool.tokens, 1)))
    shards = np.unique(np.linspace(0, pool.num_shards - 1, shown).astype(int)).tolist()
    documents = [tokens for shard in shards for tokens in corpus.tokens_of(shard, pool.rows(shard))]
    size = corpus.vocabulary.size
    return {order: ngram_model.fit(documents, order, size) for order in ORDERS}


def evaluate(models: dict[int, NgramModel], scores: Artifact, corpus: Corpus) -> tuple[Floor, ...]:
    """Return the floors on one evaluation set.

    Args:
      models: by order.
      scores: a model's likelihood on the set, which says which tokens are scored.
      corpus: of the set.
    """
    documents: list[np.ndarray] = []
    skipped: list[int] = []
    for shard in range(corpus.num_shards):
        found = scores.read(shard, ["status", "n_scored_tokens", "truncated_tokens"])
        rows = np.flatnonzero(np.asarray(found["status"].to_pylist(), dtype=object) == OK)
        cut = found["truncated_tokens"].to_numpy()[rows].astype(np.int64)  # null where not "ok"
        counts = found["n_scored_tokens"].to_numpy()[rows].astype(np.int64)
        for tokens, lost, count in zip(corpus.tokens_of(shard, rows), cut, counts, strict=True):
            documents.append(tokens[: len(tokens) - lost])
            skipped.append(len(documents[-1]) - count)  # first tokens without a score
    lengths = np.asarray([len(one) for one in documents])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    scored = place >= np.repeat(skipped, lengths)
    owner = np.repeat(np.arange(len(documents)), lengths)
    flat = np.concatenate(documents)
    return tuple(
        Floor(
            title=ORDERS[order],
            nats=np.bincount(
                owner,
                np.where(scored, -model.log_probabilities(flat, offsets), 0.0),
                minlength=len(documents),
            ),
            tokens=np.bincount(owner, scored, minlength=len(documents)),
            fitted_on=model.tokens,
        )
        for order, model in models.items()
    )


def surprisal(
    unigram: NgramModel, corpus: Corpus, pool: Selection, shards: Sequence[int]
) -> np.ndarray:
    """Return the mean unigram surprisal of the pool's documents, float64 [documents] in nats."""
    parts = []
    for shard in shards:
        documents = corpus.tokens_of(shard, pool.rows(shard))
        lengths = np.asarray([len(one) for one in documents], np.int64)
        if not lengths.sum():
            parts.append(np.full(len(documents), np.nan))
            continue
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        nats = -unigram.log_probabilities(np.concatenate(documents), offsets)
        owner = np.repeat(np.arange(len(documents)), lengths)
        sums = np.bincount(owner, nats, minlength=len(documents))
        parts.append(np.where(lengths > 0, sums / np.maximum(lengths, 1), np.nan))
    return np.concatenate(parts) if parts else np.zeros(0)
