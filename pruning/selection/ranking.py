"""The pass over a corpus that ranks its documents, shard by shard.

It joins the scores to the documents, counts those that have none, and leaves what finding the cut
and writing the selection need, 13 bytes a document (14 or 15 with quotas): key, length, domain,
group.

Choices
- Every column is read once. Which groups there are is known only when all shards have been read;
  until then a shard has its own numbers for them.
- Nothing is copied that need not be: at hundreds of millions of documents the time goes into
  reading, and into memory that is asked of the system and given back.
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

from pruning import artefact, progress, randomness
from pruning.artefact import Artefact
from pruning.corpus import doc_ids
from pruning.selection import Selection, cut, diagnostics, load_selection, scores
from pruning.selection.config import SelectConfig, SelectError
from pruning.selection.strategies import Filter, Ranking, SetOperation, Weighted

# Streams of random numbers, one per purpose.
DRAWS, TIES, SPLITS, SAMPLE, RESTS = 1, 2, 3, 4, 5

_SAMPLE_SIZE = 1 << 20  # scores that a strategy is fitted to
_SAMPLE_SHARDS, _SAMPLE_ROW_GROUPS = 1 << 8, 1 << 10  # in which the largest domains are looked for
_DOMAINS_SHOWN = 24
_MOST_GROUPS = (1 << 16) - 1
_RUNS_PER_WORKER = 8  # what the threads take in turn when they look for the cut
_EVERYTHING = "(all)"  # the group without quotas

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
      domains: the values of the domain column that are counted; none where the corpus has no such
        column.
    """

    config: SelectConfig
    corpus: Artefact
    within: Selection | None
    score_sets: Mapping[str, Artefact]
    joined: Sequence[Selection]
    domains: Sequence[str]

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
            _largest(config, corpus) if config.domain_column in columns else (),
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

    def map(self, function: Callable[[int], R], per_worker: int = 1) -> Iterator[R]:
        """`function(shard)` for every shard, in order, computed in threads.

        Args:
          per_worker: threads; more than one where they wait for the disk.
        """
        return _in_threads(function, self.shards, per_worker * self.config.workers)

    def map_runs(self, function: Callable[[Sequence[int]], R]) -> Iterator[R]:
        """`function(shards)` for runs of neighbouring shards, in order, computed in threads."""
        runs = min(len(self.shards), _RUNS_PER_WORKER * self.config.workers)
        edges = [len(self.shards) * i // runs for i in range(runs + 1)]
        parts = [self.shards[a:b] for a, b in itertools.pairwise(edges)]
        return _in_threads(function, parts, self.config.workers)

    def documents(self, shard: int) -> Documents:
        """Reads a shard and joins its scores."""
        config = self.config
        domain = config.domain_column if self.domains else None
        group = config.quotas.column if config.quotas else None
        strings = sorted({name for name in (domain, group) if name})
        table = self.corpus.read(shard, ["n_tokens", *strings], strings, use_threads=False)
        ids = doc_ids(shard, np.arange(table.num_rows))
        found = scores.read(config.terms, self.score_sets, shard, ids)
        considered = np.ones(len(ids), bool)
        if self.within:
            considered = self.within.mask(shard, len(ids))
        if scores.NOT_SELECTED in found.reasons:
            considered &= found.reason != found.reasons.index(scores.NOT_SELECTED)
        encoded = {name: diagnostics.encode(table[name]) for name in strings}
        return Documents(
            ids,
            table["n_tokens"].to_numpy(),
            considered,
            considered & (found.reason == scores.OK),
            found,
            encoded[domain] if domain else None,
            encoded[group] if group else None,
        )

    def sample(self) -> np.ndarray:
        """Scores of about a million documents, float64: those with the lowest draws."""
        share = _SAMPLE_SIZE / max(self.corpus.manifest.rows, 1)

        def of(shard: int) -> np.ndarray:
            documents = self.documents(shard)
            draws = randomness.uniform(self.config.seed, documents.ids, SAMPLE)
            return documents.found.score[documents.scored & (draws < share)]

        return np.concatenate([np.zeros(0), *self.map(of)])


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of a shard.

    Attributes:
      ids: int64 [n].
      n_tokens: int32 [n].
      considered: bool [n], those of the pool.
      scored: bool [n], those of the pool that have a score.
      found: their scores, or why they have none.
      domain, group: columns by which to count and to divide, encoded.
    """

    ids: np.ndarray
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
        reasons = self.found.reason[self.considered & ~self.scored]
        counts = np.bincount(reasons, minlength=len(self.found.reasons))
        return {
            name: int(count)
            for name, count in zip(self.found.reasons, counts, strict=True)
            if count
        }


def _largest(config: SelectConfig, corpus: Artefact) -> list[str]:
    """The domains with the most tokens in a sample of about a million documents."""
    column = config.domain_column
    shards = range(0, corpus.num_shards, max(1, corpus.num_shards // _SAMPLE_SHARDS))

    def of(shard: int) -> Counter[str]:
        with corpus.parquet(shard, [column]) as file:
            step = max(1, file.num_row_groups * len(shards) // _SAMPLE_ROW_GROUPS)
            row_groups = list(range(0, file.num_row_groups, step))
            table = file.read_row_groups(row_groups, columns=[column, "n_tokens"])
        return diagnostics.sums(diagnostics.encode(table[column]), table["n_tokens"].to_numpy())

    tokens: Counter[str] = Counter()
    for found in _in_threads(of, shards, config.workers):
        tokens.update(found)
    ranked = sorted(tokens.items(), key=lambda item: (-item[1], item[0]))
    return [name for name, _ in ranked[:_DOMAINS_SHOWN]]


# --------------------------------------------------------------------------------------------------
# Their ranking


@dataclasses.dataclass(frozen=True)
class Tally:
    """What is added up over the shards.

    Attributes:
      pool: documents and tokens that are considered.
      included: documents and tokens that are kept whatever the budget.
      cost: of the ranked documents, by group.
      draws: int64 [buckets], what the pool costs by the documents' draws.
      weights: of a weighted strategy.
    """

    pool: Counter[str]
    included: Counter[str]
    cost: Counter[str]
    draws: np.ndarray
    weights: diagnostics.Weights

    def __add__(self, other: Tally) -> Tally:
        names = [field.name for field in dataclasses.fields(self)]
        return Tally(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclasses.dataclass(frozen=True)
class RankedShard:
    """A shard's part of the ranking.

    Attributes:
      values: uint64 [n], `cut.ordered` keys, EXCLUDED or INCLUDED.
      n_tokens: int32 [n].
      groups: unsigned integers [n], or None without quotas: places in the ranking's `groups`.
      domains: uint8 [n], places in the pool's `domains`.
      packed: the pool's documents as packed bits.
      unscored: documents of the pool without a score, by reason.
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

    def chunk(self, config: SelectConfig) -> cut.Chunk:
        """The shard as it is cut."""
        one = np.broadcast_to(np.int32(1), self.n_tokens.shape)
        costs = self.n_tokens if config.unit == "tokens" else one

        def hashes(rows: np.ndarray) -> np.ndarray:
            return randomness.hashed(config.seed, doc_ids(self.shard, rows), TIES)

        return cut.Chunk(self.values, costs, self.groups, hashes)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The ranking of a corpus.

    Attributes:
      groups: the values that quotas tell apart; the last stands for all others.
      cost: int64 [groups], of the ranked documents.
      shard: gives the part of a shard, from memory or by ranking it again.
    """

    tally: Tally
    groups: Sequence[str]
    cost: np.ndarray
    shard: Callable[[int], RankedShard]


def rank(pool: Pool) -> Ranked:
    """Ranks all documents of the pool."""
    _keep_freed_memory()
    strategy = pool.config.strategy
    if isinstance(strategy, Ranking) and strategy.needs_fit:
        strategy = strategy.fit(pool.sample())
    of = functools.partial(_rank_shard, pool, strategy)
    held: list[_Unplaced] = []
    total: Tally | None = None
    with progress.track("rank", len(pool.shards), "shards") as task:
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
            task.advance()
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
    """A shard's part of the ranking before it is known which groups there are."""

    shard: RankedShard
    groups: diagnostics.Encoded | None

    def place(self, groups: Sequence[str]) -> RankedShard:
        if self.groups is None:
            return self.shard
        places = diagnostics.codes_among(groups[:-1], self.groups)
        return dataclasses.replace(self.shard, groups=places)


def _groups(config: SelectConfig, found: Iterable[str]) -> list[str]:
    """What quotas tell apart: the named values, or all that have something to be ranked."""
    if config.quotas is None:
        return [_EVERYTHING]
    return [*sorted(config.quotas.shares or found), diagnostics.OTHER]


def _rank_shard(pool: Pool, strategy: Ranking | Filter, shard: int) -> tuple[_Unplaced, Tally]:
    config = pool.config
    documents = pool.documents(shard)
    considered, scored = documents.considered, documents.scored
    draws = randomness.uniform(config.seed, documents.ids, DRAWS)

    values = np.full(len(draws), cut.EXCLUDED)
    weights = diagnostics.Weights.of(np.zeros(0))
    if isinstance(strategy, Filter):
        splits = randomness.uniform(config.seed, documents.ids, SPLITS)
        masks = [selection.mask(shard, len(draws)) for selection in pool.joined]
        values[considered & strategy.keeps(splits, masks)] = cut.INCLUDED
    else:
        rows = slice(None) if scored.all() else np.flatnonzero(scored)  # spares copies
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
    tally = Tally(
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
    """The column in integers of as few bytes as do; with named shares, the named values alone."""
    if config.quotas and config.quotas.shares:
        named = sorted(config.quotas.shares)
        return diagnostics.codes_among(named, column), pa.array([*named, diagnostics.OTHER])
    codes, meanings = column
    return codes.astype(np.min_scalar_type(len(meanings))), meanings


def _keep_freed_memory() -> None:
    """Has glibc keep what is freed for what is asked next, up to 32 MB.

    It takes its measure from the largest block that was freed, and gives larger ones back to the
    system: with arrays of some megabytes half of the time went into pages given and taken.
    """
    np.empty(31 << 20, np.uint8)


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
