"""The pass over a corpus that ranks its documents, shard by shard.

It joins the scores to the documents, counts those that have none, and leaves 12 bytes a document
(16 with quotas): the key, what the document costs, its group.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from pruning import artefact, progress, randomness
from pruning.artefact import Artefact
from pruning.selection import Selection, cut, diagnostics, load_selection, scores
from pruning.selection.config import SelectConfig, SelectError
from pruning.selection.strategies import Filter, Ranking, SetOperation, Weighted

# Streams of random numbers, one per purpose.
DRAWS, TIES, SPLITS, SAMPLE, RESTS = 1, 2, 3, 4, 5

_SAMPLE_SIZE = 1 << 20  # scores that a strategy is fitted to
_MOST_GROUPS = 1 << 16

T = TypeVar("T")
R = TypeVar("R")


# --------------------------------------------------------------------------------------------------
# The documents


@dataclasses.dataclass(frozen=True)
class Pool:
    """The inputs of a selection, opened and found to belong together.

    Attributes:
      score_sets: by name.
      joined: what a set operation joins.
      groups: the values that quotas tell apart; the last stands for all others.
      domain_column: None where the corpus has none.
    """

    config: SelectConfig
    corpus: Artefact
    within: Selection | None
    score_sets: Mapping[str, Artefact]
    joined: Sequence[Selection]
    groups: Sequence[str]
    domain_column: str | None

    @classmethod
    def open(cls, config: SelectConfig) -> Pool:
        """Raises ArtefactError when an input is missing or belongs to another corpus."""
        corpus = artefact.load(config.corpus, "corpus")
        score_sets = {name: artefact.load(at, "scores") for name, at in config.score_sets.items()}
        for score_set in score_sets.values():
            artefact.require_input(score_set, "corpus", corpus)
        paths = config.strategy.selections if isinstance(config.strategy, SetOperation) else ()
        columns = corpus.parquet(0).schema_arrow.names if corpus.num_shards else []
        if config.quotas and config.quotas.column not in columns:
            raise SelectError(
                f"{corpus.path} has no column {config.quotas.column!r} to divide the budget by; it "
                f"has {', '.join(columns)}."
            )
        return cls(
            config,
            corpus,
            load_selection(config.within, corpus) if config.within else None,
            score_sets,
            [load_selection(path, corpus) for path in paths],
            _groups(config, corpus),
            config.domain_column if config.domain_column in columns else None,
        )

    @property
    def shards(self) -> range:
        return range(self.corpus.num_shards)

    @property
    def inputs(self) -> dict[str, Artefact]:
        inputs = {"corpus": self.corpus}
        if self.within:
            inputs["within"] = self.within.artefact
        for name, score_set in self.score_sets.items():
            inputs["scores" if name == "scores" else f"scores_{name}"] = score_set
        for number, selection in enumerate(self.joined):
            inputs[f"selection_{number}"] = selection.artefact
        return inputs

    def map(self, function: Callable[[int], R]) -> Iterator[R]:
        """`function(shard)` for every shard, in order, computed in threads."""
        return _in_threads(function, self.shards, self.config.workers)

    def doc_ids(self, shard: int) -> np.ndarray:
        return self.corpus.read(shard, ["doc_id"])["doc_id"].to_numpy()

    def documents(self, shard: int) -> Documents:
        """Reads a shard and joins its scores."""
        config = self.config
        columns = {"doc_id", "n_tokens", self.domain_column, config.quotas and config.quotas.column}
        table = self.corpus.read(shard, sorted(columns - {None}))
        doc_ids = table["doc_id"].to_numpy()
        found = scores.read(config.terms, self.score_sets, shard, doc_ids)
        considered = np.ones(len(doc_ids), bool)
        if self.within:
            considered = self.within.mask(shard, len(doc_ids))
        if scores.NOT_SELECTED in found.reasons:
            considered &= found.reason != found.reasons.index(scores.NOT_SELECTED)
        return Documents(
            doc_ids,
            table["n_tokens"].to_numpy(),
            considered,
            considered & (found.reason == scores.OK),
            found,
            diagnostics.encode(table[self.domain_column]) if self.domain_column else None,
            diagnostics.encode(table[config.quotas.column]) if config.quotas else None,
        )

    def sample(self) -> np.ndarray:
        """Scores of about a million documents, float64: those with the lowest draws."""
        share = _SAMPLE_SIZE / max(self.corpus.manifest.rows, 1)

        def of(shard: int) -> np.ndarray:
            documents = self.documents(shard)
            draws = randomness.uniform(self.config.seed, documents.doc_ids, SAMPLE)
            return documents.found.score[documents.scored & (draws < share)]

        return np.concatenate([np.zeros(0), *self.map(of)])


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a shard.

    Attributes:
      doc_ids: int64 [n].
      n_tokens: int32 [n].
      considered: bool [n], those of the pool.
      scored: bool [n], those of the pool that have a score.
      found: their scores, or why they have none.
      domain, group: columns by which to count and to divide, encoded.
    """

    doc_ids: np.ndarray
    n_tokens: np.ndarray
    considered: np.ndarray
    scored: np.ndarray
    found: scores.ShardScores
    domain: diagnostics.Encoded | None
    group: diagnostics.Encoded | None

    def costs(self, unit: str) -> np.ndarray:
        """int32 [n], what the documents cost a budget in `unit`."""
        return self.n_tokens if unit == "tokens" else np.ones_like(self.n_tokens)

    def size(self, mask: np.ndarray) -> Counter[str]:
        """How many documents and tokens."""
        tokens = self.n_tokens[mask].sum(dtype=np.int64)
        return Counter(documents=int(np.count_nonzero(mask)), tokens=int(tokens))

    def unscored(self) -> dict[str, int]:
        """How many documents of the pool have no score, by reason."""
        reasons = self.found.reason[self.considered]
        counts = np.bincount(reasons, minlength=len(self.found.reasons))
        return {
            name: int(count)
            for name, count in zip(self.found.reasons[1:], counts[1:], strict=True)
            if count
        }


def _groups(config: SelectConfig, corpus: Artefact) -> list[str]:
    """What quotas tell apart: the named values, or all that there are."""
    if config.quotas is None:
        return ["(all)"]
    if config.quotas.shares:
        return [*sorted(config.quotas.shares), diagnostics.OTHER]
    column = config.quotas.column
    found: set[str] = set()
    for shard in range(corpus.num_shards):
        codes, names = diagnostics.encode(corpus.read(shard, [column])[column])
        found.update(names[code] for code in np.unique(codes))
        if len(found) > _MOST_GROUPS:
            raise SelectError(
                f"the column {column!r} has more than {_MOST_GROUPS:,} values: divide by a coarser "
                "one, or name those that matter in Quotas.shares."
            )
    return [*sorted(found), diagnostics.OTHER]


# --------------------------------------------------------------------------------------------------
# Their ranking


@dataclasses.dataclass(frozen=True)
class Tally:
    """What is added up over the shards.

    Attributes:
      pool: documents and tokens that are considered.
      included: documents and tokens that are kept whatever the budget.
      cost: int64 [groups], of the ranked documents.
      draws: int64 [buckets], what the pool costs by the documents' draws.
      weights: of a weighted strategy.
      domains: tokens of the largest.
    """

    pool: Counter[str]
    included: Counter[str]
    cost: np.ndarray
    draws: np.ndarray
    weights: diagnostics.Weights
    domains: Counter[str]

    def __add__(self, other: Tally) -> Tally:
        names = [field.name for field in dataclasses.fields(self)]
        return Tally(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclasses.dataclass(frozen=True)
class RankedShard:
    """A shard's part of the ranking.

    Attributes:
      considered: bool [n] as packed bits.
      unscored: documents of the pool without a score, by reason.
    """

    chunk: cut.Chunk
    considered: np.ndarray
    unscored: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The ranking of a corpus.

    Attributes:
      shard: gives the part of a shard, from memory or by ranking it again.
    """

    tally: Tally
    shard: Callable[[int], RankedShard]


def rank(pool: Pool) -> Ranked:
    """Ranks all documents of the pool."""
    strategy = pool.config.strategy
    if isinstance(strategy, Ranking) and strategy.needs_fit:
        strategy = strategy.fit(pool.sample())
    of = functools.partial(_rank_shard, pool, strategy)
    held: list[RankedShard] = []
    total: Tally | None = None
    with progress.track("rank", len(pool.shards), "shards") as task:
        for ranked, tally in pool.map(of):
            total = tally if total is None else total + tally
            if pool.config.in_memory:
                held.append(ranked)
            task.advance()
    if total is None:
        raise SelectError(f"{pool.corpus.path} has no documents.")
    return Ranked(total, held.__getitem__ if held else lambda shard: of(shard)[0])


def _rank_shard(pool: Pool, strategy: Ranking | Filter, shard: int) -> tuple[RankedShard, Tally]:
    config = pool.config
    documents = pool.documents(shard)
    doc_ids, scored = documents.doc_ids, documents.scored
    draws = randomness.uniform(config.seed, doc_ids, DRAWS)

    values = np.full(len(doc_ids), cut.EXCLUDED)
    costs = np.zeros(len(doc_ids), np.int32)
    weights = diagnostics.Weights.of(np.zeros(0))
    if isinstance(strategy, Filter):
        splits = randomness.uniform(config.seed, doc_ids, SPLITS)
        masks = [selection.mask(shard, len(doc_ids)) for selection in pool.joined]
        values[documents.considered & strategy.keeps(splits, masks)] = cut.INCLUDED
    else:
        rows = slice(None) if scored.all() else scored  # spares the copies where it can
        score = documents.found.score[rows]
        values[rows] = cut.ordered(strategy.keys(score, draws[rows]))
        costs[rows] = documents.costs(config.unit)[rows]
        if config.keep_unscored:
            values[documents.considered & ~scored] = cut.INCLUDED
        if isinstance(strategy, Weighted):
            weights = diagnostics.Weights.of(strategy.log_weights(score))

    groups = None
    cost = np.asarray([costs.sum(dtype=np.int64)])
    if documents.group:
        groups = diagnostics.codes_among(pool.groups[:-1], documents.group)
        cost = np.bincount(groups, weights=costs, minlength=len(pool.groups)).astype(np.int64)

    def hashes(rows: np.ndarray) -> np.ndarray:
        # Few rows ever tie at a cut: better to read their ids again than to hold all.
        return randomness.hashed(config.seed, pool.doc_ids(shard)[rows], TIES)

    considered, domain = documents.considered, documents.domain
    tally = Tally(
        documents.size(considered),
        documents.size(values == cut.INCLUDED),
        cost,
        diagnostics.draw_histogram(draws[considered], documents.costs(config.unit)[considered]),
        weights,
        diagnostics.frequent(domain, documents.n_tokens) if domain else Counter(),
    )
    chunk = cut.Chunk(values, costs, groups, hashes)
    return RankedShard(chunk, np.packbits(considered), documents.unscored()), tally


def _in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Results in order; no more than two per thread wait to be taken."""
    pool = ThreadPoolExecutor(threads)
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
