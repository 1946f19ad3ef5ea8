"""Ranking: the pass over a corpus that ranks its documents, shard by shard.

It joins the scores to the documents, counts those without a score, and holds what is needed to find
the cut and to write the selection, 13 bytes a document (14 or 15 with quotas): key, length, domain,
group.

Choices
- Every column is read once. The set of groups is known only when all shards have been read; until
  then, each shard has its own codes of groups.
- Copies are avoided: at hundreds of millions of documents most of the time is spent on reading, and
  on requesting memory from the system and returning it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import pyarrow as pa

from pruning.corpus.layout import doc_ids
from pruning.corpus.reader import require_own_documents
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.scores.score_set import NOT_SELECTED
from pruning.scores.terms import (
    SCORED,
    Combination,
    ShardScores,
    TermValues,
    read_scores,
    read_terms,
)
from pruning.selection import cut, diagnostics
from pruning.selection.config import SelectConfig, SelectError
from pruning.selection.strategies import Filter, Ranking, SetOperation, Weighted
from pruning.store import randomness
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.randomness import Stream

_SAMPLE_SIZE = 1 << 20  # number of scores that a strategy is fitted to
_SAMPLE_SHARDS, _SAMPLE_ROW_GROUPS = 1 << 8, 1 << 10  # sample for the largest domains
_DOMAINS_SHOWN = 24
_MOST_GROUPS = (1 << 16) - 1
_RUNS_PER_WORKER = 8  # runs of shards that a thread processes in the search for the cut
_EVERYTHING = "(all)"  # the only group without quotas

T = TypeVar("T")
R = TypeVar("R")


# --------------------------------------------------------------------------------------------------
# The documents


@dataclasses.dataclass(frozen=True)
class Pool:
    """Inputs of a selection, opened and checked for consistency.

    Attributes:
      score_sets: score sets by name.
      score: the score by which documents are ranked; its scales are fitted by `fitted`.
      joined: inputs of a set operation.
      domains: the values of the domain column that are counted; empty if the corpus has no such
        column.
    """

    config: SelectConfig
    corpus: Artifact
    within: Selection | None
    score_sets: Mapping[str, Artifact]
    score: Combination
    joined: Sequence[Selection]
    domains: Sequence[str]

    @classmethod
    def open(cls, config: SelectConfig) -> Pool:
        """Open the inputs; raise ArtifactError if one is missing or belongs to another corpus."""
        corpus = load_artifact(config.corpus, "corpus")
        score_sets = {name: load_artifact(at, "scores") for name, at in config.score_sets.items()}
        for score_set in score_sets.values():
            require_input(score_set, "corpus", corpus)
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
            config.combined,
            [load_selection(path, corpus) for path in paths],
            _largest(config, corpus) if config.domain_column in columns else (),
        )

    @property
    def shards(self) -> range:
        return range(self.corpus.num_shards)

    @property
    def inputs(self) -> dict[str, Artifact]:
        inputs = {"corpus": self.corpus}
        if self.within:
            inputs["within"] = self.within.artifact
        for name, score_set in self.score_sets.items():
            inputs["scores" if name == "scores" else f"scores_{name}"] = score_set
        for number, selection in enumerate(self.joined):
            inputs[f"selection_{number}"] = selection.artifact
        return inputs

    def map(self, function: Callable[[int], R], per_worker: int = 1) -> Iterator[R]:
        """Yield `function(shard)` for every shard, in order, computed in threads.

        Args:
          per_worker: number of threads; more than one if they wait for the disk.
        """
        return _in_threads(function, self.shards, per_worker * self.config.workers)

    def map_runs(self, function: Callable[[Sequence[int]], R]) -> Iterator[R]:
        """Yield `function(shards)` for runs of adjacent shards, in order, computed in threads."""
        runs = min(len(self.shards), _RUNS_PER_WORKER * self.config.workers)
        edges = [len(self.shards) * i // runs for i in range(runs + 1)]
        parts = [self.shards[a:b] for a, b in itertools.pairwise(edges)]
        return _in_threads(function, parts, self.config.workers)

    def documents(self, shard: int) -> ShardDocuments:
        """Read a shard and join its scores."""
        config = self.config
        domain = config.domain_column if self.domains else None
        group = config.quotas.column if config.quotas else None
        strings = sorted({name for name in (domain, group) if name})
        require_own_documents(self.corpus, shard)
        table = self.corpus.read(shard, ["n_tokens", *strings], strings, use_threads=False)
        ids = doc_ids(shard, np.arange(table.num_rows))
        found = read_scores(self.score, self.corpus, self.score_sets, shard, ids)
        considered = np.ones(len(ids), bool)
        if self.within:
            considered = self.within.mask(shard, len(ids))
        if NOT_SELECTED in found.reasons:
            considered &= found.reason != found.reasons.index(NOT_SELECTED)
        encoded = {name: diagnostics.encode(table[name]) for name in strings}
        return ShardDocuments(
            ids,
            table["n_tokens"].to_numpy(),
            considered,
            considered & (found.reason == SCORED),
            found,
            encoded[domain] if domain else None,
            encoded[group] if group else None,
        )

    def fitted(self) -> Pool:
        """Return the pool with the scales of its terms fitted to about a million documents."""
        if not self.score.needs_fit:
            return self

        def of(shard: int) -> list[np.ndarray]:
            ids, found = self.terms(shard)
            chosen = self._sampled(ids) & (found.reason == SCORED)
            if self.within:
                chosen &= self.within.mask(shard, len(ids))
            return [values[chosen] for values in found.values]

        samples = [np.concatenate(parts) for parts in zip(*self.map(of), strict=True)]
        return dataclasses.replace(self, score=self.score.fitted(samples))

    def terms(self, shard: int) -> tuple[np.ndarray, TermValues]:
        """Return the ids of a shard's documents, int64 [n], and the values of the terms."""
        ids = doc_ids(shard, np.arange(self.corpus.manifest.shards[shard].rows))
        return ids, read_terms(self.score.terms, self.corpus, self.score_sets, shard, ids)

    @property
    def rows(self) -> int:
        """Number of documents of the corpus."""
        return self.corpus.manifest.rows

    def _sampled(self, ids: np.ndarray) -> np.ndarray:
        """Return a mask of the documents in the sample for fitting, bool [n]."""
        share = _SAMPLE_SIZE / max(self.rows, 1)
        return randomness.uniform(Stream.SELECTION_SAMPLE, self.config.seed, ids) < share

    def sample(self) -> np.ndarray:
        """Return scores of about a million documents, float64: those with the lowest draws."""

        def of(shard: int) -> np.ndarray:
            documents = self.documents(shard)
            return documents.found.score[documents.scored & self._sampled(documents.ids)]

        return np.concatenate([np.zeros(0), *self.map(of)])


@dataclasses.dataclass(frozen=True)
class ShardDocuments:
    """The documents of a shard.

    Attributes:
      ids: int64 [n].
      n_tokens: int32 [n].
      considered: bool [n], True for documents of the pool.
      scored: bool [n], True for documents of the pool with a score.
      found: their scores, or the reasons for missing ones.
      domain, group: columns by which to count and to divide, encoded.
    """

    ids: np.ndarray
    n_tokens: np.ndarray
    considered: np.ndarray
    scored: np.ndarray
    found: ShardScores
    domain: diagnostics.Encoded | None
    group: diagnostics.Encoded | None

    def costs(self, unit: str) -> np.ndarray:
        """Return the cost of each document in `unit`, int32 [n]."""
        return self.n_tokens if unit == "tokens" else np.ones_like(self.n_tokens)

    def size(self, mask: np.ndarray) -> Counter[str]:
        """Return the numbers of documents and tokens."""
        tokens = self.n_tokens[mask].sum(dtype=np.int64)
        return Counter(documents=int(np.count_nonzero(mask)), tokens=int(tokens))

    def unscored(self) -> dict[str, int]:
        """Return the number of documents of the pool without a score, by reason."""
        reasons = self.found.reason[self.considered & ~self.scored]
        counts = np.bincount(reasons, minlength=len(self.found.reasons))
        return {
            name: int(count)
            for name, count in zip(self.found.reasons, counts, strict=True)
            if count
        }


def _largest(config: SelectConfig, corpus: Artifact) -> list[str]:
    """Return the domains with the most tokens in a sample of about a million documents."""
    column = config.domain_column
    shards = range(0, corpus.num_shards, max(1, corpus.num_shards // _SAMPLE_SHARDS))

    def of(shard: int) -> Counter[str]:
        with corpus.parquet(shard, [column]) as file:
            step = max(1, file.num_row_groups * len(shards) // _SAMPLE_ROW_GROUPS)
            row_groups = list(range(0, file.num_row_groups, step))
            table = file.read_row_groups(row_groups, [column, "n_tokens"])
        return diagnostics.sums(diagnostics.encode(table[column]), table["n_tokens"].to_numpy())

    tokens: Counter[str] = Counter()
    for found in _in_threads(of, shards, config.workers):
        tokens.update(found)
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    return [name for name, _ in ranked[:_DOMAINS_SHOWN]]


# --------------------------------------------------------------------------------------------------
# Their ranking


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the shards.

    Attributes:
      pool: numbers of documents and tokens that are considered.
      included: numbers of documents and tokens that are kept regardless of the budget.
      cost: cost of the ranked documents, by group.
      draws: int64 [buckets], cost of the pool by buckets of the documents' draws.
      weights: diagnostics of a weighted strategy.
    """

    pool: Counter[str]
    included: Counter[str]
    cost: Counter[str]
    draws: np.ndarray
    weights: diagnostics.Weights

    def __add__(self, other: Totals) -> Totals:
        names = [field.name for field in dataclasses.fields(self)]
        return Totals(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclasses.dataclass(frozen=True)
class RankedShard:
    """A shard's part of the ranking.

    Attributes:
      values: uint64 [n], `cut.ordered` keys, EXCLUDED or INCLUDED.
      n_tokens: int32 [n].
      groups: unsigned integers [n], indices of the ranking's `groups`; None without quotas.
      domains: uint8 [n], indices of the pool's `domains`.
      packed: mask of the pool's documents as packed bits.
      unscored: number of documents of the pool without a score, by reason.
    """

    shard: int
    values: np.ndarray
    n_tokens: np.ndarray
    groups: np.ndarray | None
    domains: np.ndarray | None
    packed: np.ndarray
    unscored: Mapping[str, int]

    @property
    def considered(self) -> np.ndarray:
        """bool [n], the pool's documents."""
        return np.unpackbits(self.packed, count=len(self.values)).astype(bool)

    def chunk(self, config: SelectConfig) -> cut.RankedKeys:
        """Return the shard in the form that `cut` takes."""
        one = np.broadcast_to(np.int32(1), self.n_tokens.shape)
        costs = self.n_tokens if config.unit == "tokens" else one

        def hashes(rows: np.ndarray) -> np.ndarray:
            return randomness.hashed(Stream.SELECTION_TIE, config.seed, doc_ids(self.shard, rows))

        return cut.RankedKeys(self.values, costs, self.groups, hashes)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The ranking of a corpus.

    Attributes:
      groups: the values that quotas distinguish; the last represents all others.
      cost: int64 [groups], cost of the ranked documents.
      shard: returns the ranking of a shard, from memory or by recomputing it.
    """

    tally: Totals
    groups: Sequence[str]
    cost: np.ndarray
    shard: Callable[[int], RankedShard]


def rank(pool: Pool, advance: Callable[[], None] = lambda: None) -> Ranked:
    """Rank all documents of the pool.

    Args:
      advance: called after every shard.
    """
    _keep_freed_memory()
    strategy = pool.config.strategy
    if isinstance(strategy, Ranking) and strategy.needs_fit:
        strategy = strategy.fit(pool.sample())
    of = functools.partial(_rank_shard, pool, strategy)
    held: list[_Unplaced] = []
    total: Totals | None = None
    for ranked, tally in pool.map(of):
        total = tally if total is None else total + tally
        if len(total.cost) > _MOST_GROUPS:
            assert pool.config.quotas
            raise SelectError(
                f"the column {pool.config.quotas.column!r} has more than {_MOST_GROUPS:,} "
                "values: divide by a coarser one, or name those that matter in Quotas.shares."
            )
        if pool.config.in_memory:
            held.append(ranked)
        advance()
    if total is None:
        raise SelectError(f"{pool.corpus.path} has no documents.")
    groups = _groups(pool.config, total.cost)
    cost = np.asarray([total.cost[name] for name in groups])

    def again(shard: int) -> RankedShard:
        return of(shard)[0].place(groups)

    if not pool.config.in_memory:
        return Ranked(total, groups, cost, again)
    placed = list(pool.map(lambda shard: held[shard].place(groups)))
    return Ranked(total, groups, cost, placed.__getitem__)


@dataclasses.dataclass(frozen=True)
class _Unplaced:
    """A shard's part of the ranking before the set of groups is known."""

    shard: RankedShard
    groups: diagnostics.Encoded | None

    def place(self, groups: Sequence[str]) -> RankedShard:
        if self.groups is None:
            return self.shard
        places = diagnostics.codes_among(groups[:-1], self.groups)
        return dataclasses.replace(self.shard, groups=places)


def _groups(config: SelectConfig, found: Iterable[str]) -> list[str]:
    """Return the values that quotas distinguish: the named ones, or all with ranked documents."""
    if config.quotas is None:
        return [_EVERYTHING]
    return [*sorted(config.quotas.shares or found), diagnostics.OTHER]


def _rank_shard(pool: Pool, strategy: Ranking | Filter, shard: int) -> tuple[_Unplaced, Totals]:
    config = pool.config
    documents = pool.documents(shard)
    considered, scored = documents.considered, documents.scored
    draws = randomness.uniform(Stream.SELECTION_DRAW, config.seed, documents.ids)

    values = np.full(len(draws), cut.EXCLUDED)
    weights = diagnostics.Weights.of(np.zeros(0))
    if isinstance(strategy, Filter):
        splits = randomness.uniform(Stream.SELECTION_SPLIT, config.seed, documents.ids)
        masks = [selection.mask(shard, len(draws)) for selection in pool.joined]
        values[considered & strategy.keeps(splits, masks)] = cut.INCLUDED
    else:
        rows = slice(None) if scored.all() else np.flatnonzero(scored)  # avoids copies
        score = documents.found.score[rows]
        values[rows] = cut.ordered(strategy.keys(score, draws[rows]))
        if config.keep_unscored:
            values[considered & ~scored] = cut.INCLUDED
        if isinstance(strategy, Weighted):
            weights = diagnostics.Weights.of(strategy.log_weights(score))

    domains = groups = None
    if documents.domain:
        domains = diagnostics.codes_among(pool.domains, documents.domain)
    if documents.group:
        groups = _grouped(config, documents.group)
    ranked = RankedShard(
        shard,
        values,
        documents.n_tokens,
        None,
        domains,
        np.packbits(considered),
        documents.unscored(),
    )
    costs = documents.costs(config.unit)
    rows = slice(None) if considered.all() else np.flatnonzero(considered)
    own = np.where((values != cut.EXCLUDED) & (values != cut.INCLUDED), costs, 0)
    tally = Totals(
        documents.size(considered),
        documents.size(values == cut.INCLUDED),
        diagnostics.sums(groups, own)
        if groups
        else Counter({_EVERYTHING: int(own.sum(dtype=np.int64))}),
        diagnostics.draw_histogram(draws[rows], costs[rows]),
        weights,
    )
    return _Unplaced(ranked, groups), tally


def _grouped(config: SelectConfig, column: diagnostics.Encoded) -> diagnostics.Encoded:
    """Return the column as codes of the narrowest integer type, of the named values if given."""
    if config.quotas and config.quotas.shares:
        named = sorted(config.quotas.shares)
        return diagnostics.codes_among(named, column), pa.array([*named, diagnostics.OTHER])
    codes, meanings = column
    return codes.astype(np.min_scalar_type(len(meanings))), meanings


def _keep_freed_memory() -> None:
    """Make glibc keep up to 32 MB of freed memory for reuse.

    glibc adapts its threshold to the largest block freed so far, and returns larger blocks to the
    system. With arrays of some megabytes, half of the time was spent on mapping pages.
    """
    np.empty(31 << 20, np.uint8)


def _in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield results in order; at most two per thread are held."""
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
