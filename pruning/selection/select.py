"""Select: a corpus, a score, a strategy and a budget make a selection.

    python -m pruning select --gin_file=configs/select/top.gin --gin.CORPUS=... --gin.SCORES=...

Two passes over the shards: the first ranks (`ranking.py`), the second writes what is kept and says
what became of every domain. Between them `cut.py` finds the exact thresholds.

Choices
- Everything drawn about a document is a hash of (seed, doc_id), and ties are broken by such a hash:
  the same documents are kept whatever the number of shards, threads or restarts.
- Budgets are in tokens first. Documents are taken in the order of their rank as long as they fit:
  a selection never exceeds its budget, and falls short of it by less than one document. With quotas
  this holds of the whole, and of every group to within one document.
- A share is of the *pool*: the documents of `within` (or of the corpus), less those that the score
  set was told to leave alone. Documents without a score belong to the pool. They are never kept,
  except with `keep_unscored`, and then before all others.
- A random selection of the same seed uses the same draws as a weighted one: the overlap with it in
  the summary says how far the weights move the sample. By chance it is the share kept.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pruning import artefact, progress, randomness
from pruning.artefact import Artefact
from pruning.corpus import doc_ids
from pruning.selection import ROW_GROUP, cut, diagnostics, strategies
from pruning.selection.config import Quotas, SelectConfig, SelectError, validate
from pruning.selection.ranking import DRAWS, RESTS, Pool, Ranked, RankedShard, rank
from pruning.selection.scores import Term
from pruning.selection.strategies import Ranking, Weighted
from pruning.stream import blocks

NAME = "Select"
CONFIGURABLES: dict[str, type] = {
    NAME: SelectConfig,
    "Quotas": Quotas,
    "Term": Term,
    **strategies.CONFIGURABLES,
}

SCHEMA = pa.schema([("doc_id", pa.int64()), ("n_tokens", pa.int32())])

_GROUPS_SHOWN = 64


def run(config: SelectConfig) -> Artefact:
    """Makes the selection, or finishes it.

    Raises:
      SelectError, StrategyError, ScoreError: the configuration makes no sense, or keeps nothing.
      ArtefactError: an input is missing, damaged, or belongs to another corpus.
      ConfigurationChanged: the output holds another selection.
    """
    validate(config)
    pool = Pool.open(config)
    build = artefact.Build(
        config.output,
        "selection",
        config.identity,
        pool.inputs,
        len(pool.shards),
        SCHEMA,
        artefact.numbers(SCHEMA),
    )
    if build.finished:
        return artefact.load(build.path, "selection")
    ranked = rank(pool)
    cuts = _find_cuts(pool, ranked)
    kept = _write(pool, ranked, cuts, build)
    build.write_file(blocks.FILE, blocks.to_parquet(kept.blocks))
    selection = build.finish(_summary(pool, ranked, cuts, kept))
    assert selection is not None  # every shard was ours
    return selection


# --------------------------------------------------------------------------------------------------
# The cut


@dataclasses.dataclass(frozen=True)
class _Cuts:
    """The stretch of the ranking that is kept.

    Attributes:
      start: None for the first document.
      stop: the first document left out.
      budget: int64 [groups], in tokens or documents.
    """

    start: cut.Cut | None
    stop: cut.Cut
    budget: np.ndarray

    def keeps(self, chunk: cut.Chunk) -> np.ndarray:
        return cut.between(chunk, self.start, self.stop)

    @property
    def cost(self) -> np.ndarray:
        """int64 [groups], of the ranked documents that are kept."""
        return self.stop.cost - (0 if self.start is None else self.start.cost)


def _find_cuts(pool: Pool, ranked: Ranked) -> _Cuts:
    config, total = pool.config, ranked.cost
    budget = _budget(config, ranked)
    start, stop = np.zeros_like(total), total
    if isinstance(config.strategy, Ranking):
        start, stop = config.strategy.interval(total, budget)

    def find(target: np.ndarray) -> cut.Cut:
        def each(work: Callable[[Iterable[cut.Chunk]], Any]) -> Iterable[Any]:
            return pool.map_runs(lambda run: work(ranked.shard(k).chunk(config) for k in run))

        return cut.find(each, target)

    start_cut = find(start) if start.any() else None
    if start_cut and config.strategy.takes_budget:
        stop = start_cut.cost + budget  # a late start must not lengthen the stretch
    stop_cut = find(stop)
    if config.quotas:
        stop_cut = _share_rest(config.seed, stop_cut, stop)
    cuts = _Cuts(start_cut, stop_cut, budget)
    if not (cuts.cost.any() or ranked.tally.included["documents"]):
        size = ranked.tally.pool
        raise SelectError(
            f"{type(config.strategy).__name__} keeps nothing of {size['documents']:,} documents "
            f"with {size['tokens']:,} tokens: look at the budget, at the statuses of the score "
            "set, or at the selections that are joined."
        )
    return cuts


def _share_rest(seed: int, stop: cut.Cut, targets: np.ndarray) -> cut.Cut:
    """Lets some groups have one document more, from what all groups left of their budgets.

    Without this a domain of one document would never keep it. The document that no longer fitted is
    taken with a probability of about the share of it that did.
    """
    rest = np.where(stop.next_cost > 0, targets - stop.cost, 0)
    share = rest / np.maximum(stop.next_cost, 1)
    draws = randomness.uniform(seed, stop.tie.view(np.int64), RESTS)
    order = np.argsort(draws / np.maximum(share, 1e-12), kind="stable")
    order = order[share[order] > 0]
    taken = np.zeros(len(rest), bool)
    taken[order] = np.cumsum(stop.next_cost[order]) <= rest.sum()
    return stop.moved(taken)


def _budget(config: SelectConfig, ranked: Ranked) -> np.ndarray:
    """The budget of every group, int64 [groups]; everything where the strategy takes none."""
    total = ranked.cost
    if config.budget is None:
        return total
    share = config.budget if config.budget <= 1 else 0
    amount = round(share * ranked.tally.pool[config.unit] if share else config.budget)
    included = ranked.tally.included[config.unit]
    if included > amount:
        raise SelectError(
            f"the documents without a score alone have {included:,} {config.unit}, the budget is "
            f"{amount:,}: raise it, or leave keep_unscored off."
        )
    amount -= included
    if config.quotas is None:
        return np.asarray([amount])
    if named := dict(sorted(config.quotas.shares.items())):
        shares = np.asarray([*named.values(), max(1 - sum(named.values()), 0.0)])
    else:
        shares = total / max(total.sum(), 1)
    through = np.floor(amount * np.cumsum(shares) + 1e-6).astype(np.int64)
    return np.diff(through, prepend=0)  # adds up to the amount


# --------------------------------------------------------------------------------------------------
# Second pass: write


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What is kept of a shard, or of several.

    Attributes:
      size: documents and tokens.
      shared: how much of it, in the unit of the budget, a random selection of this size keeps too.
      domains: see `diagnostics.domain_counts`.
      blocks: of the stream.
    """

    size: Counter[str]
    shared: int
    domains: np.ndarray | None
    blocks: tuple[pa.Table, ...]

    def __add__(self, other: _Kept) -> _Kept:
        return _Kept(
            self.size + other.size,
            self.shared + other.shared,
            None if self.domains is None else self.domains + other.domains,
            self.blocks + other.blocks,
        )


def _write(pool: Pool, ranked: Ranked, cuts: _Cuts, build: artefact.Build) -> _Kept:
    """Writes the shards that have not been written before; counts what is kept of all of them."""
    pending = set(build.pending())
    bucket = diagnostics.random_bucket(ranked.tally.draws, _kept_cost(pool, ranked, cuts))

    def of(number: int) -> _Kept:
        shard = ranked.shard(number)
        kept = cuts.keeps(shard.chunk(pool.config))
        if number in pending:
            _write_shard(pool.config, shard, kept, build)
        return _count(pool, shard, kept, bucket)

    parts = []
    with progress.track("write", len(pool.shards), "shards") as task:
        for part in pool.map(of, per_worker=3):
            parts.append(part)
            task.advance()
    return functools.reduce(operator.add, parts)


def _write_shard(
    config: SelectConfig, shard: RankedShard, kept: np.ndarray, build: artefact.Build
) -> None:
    rows = np.flatnonzero(kept)
    n_tokens = shard.n_tokens[rows]
    with build.shard(shard.shard) as writer:
        writer.write({"doc_id": doc_ids(shard.shard, rows), "n_tokens": n_tokens}, ROW_GROUP)
        writer.tokens = int(n_tokens.sum(dtype=np.int64))
        writer.counts = _counts(config, shard, len(rows))


def _count(pool: Pool, shard: RankedShard, kept: np.ndarray, random_bucket: int) -> _Kept:
    rows = np.flatnonzero(kept)
    n_tokens = shard.n_tokens[rows]
    draws = randomness.uniform(pool.config.seed, doc_ids(shard.shard, rows), DRAWS)
    shared = diagnostics.draw_bucket(draws) >= random_bucket
    cost = n_tokens if pool.config.unit == "tokens" else np.ones_like(n_tokens)
    domains = None
    if shard.domains is not None:
        domains = diagnostics.domain_counts(
            shard.domains, len(pool.domains), shard.n_tokens, shard.considered, kept
        )
    return _Kept(
        Counter(documents=len(rows), tokens=int(n_tokens.sum(dtype=np.int64))),
        int(cost[shared].sum(dtype=np.int64)),
        domains,
        (blocks.cut(shard.shard, n_tokens),),
    )


def _counts(config: SelectConfig, shard: RankedShard, kept: int) -> artefact.Counts:
    """Counts every document of the shard once."""
    pool = int(np.count_nonzero(shard.considered))
    unscored = {} if config.keep_unscored else dict(shard.unscored)
    documents = {
        "kept": kept,
        "not_kept": pool - kept - sum(unscored.values()),
        "outside_of_pool": len(shard.values) - pool,
        "unscored": unscored,
    }
    of_the_kept = {"kept_unscored": dict(shard.unscored)} if config.keep_unscored else {}
    return {"documents": documents} | of_the_kept


def _kept_cost(pool: Pool, ranked: Ranked, cuts: _Cuts) -> int:
    """What is kept, in the unit of the budget."""
    return int(cuts.cost.sum()) + ranked.tally.included[pool.config.unit]


def _summary(pool: Pool, ranked: Ranked, cuts: _Cuts, kept: _Kept) -> dict[str, Any]:
    config, tally = pool.config, ranked.tally
    strategy = config.strategy
    cost = _kept_cost(pool, ranked, cuts)
    return {
        "strategy": config.identity["strategy"],
        "pool": dict(tally.pool),
        "kept": dict(kept.size),
        "share": {unit: kept.size[unit] / max(tally.pool[unit], 1) for unit in tally.pool},
        "budget": None
        if config.budget is None
        else {
            "unit": config.unit,
            "wanted": int(cuts.budget.sum()) + tally.included[config.unit],
            "kept": cost,
        },
        "thresholds": _thresholds(strategy, ranked.groups, cuts)
        if isinstance(strategy, Ranking)
        else [],
        "weights": tally.weights.summary() if isinstance(strategy, Weighted) else None,
        "overlap_with_random": {
            "unit": config.unit,
            "share": kept.shared / max(cost, 1),
            "by_chance": cost / max(tally.pool[config.unit], 1),
        },
        "domains": []
        if kept.domains is None
        else diagnostics.domain_table(pool.domains, kept.domains),
    }


def _thresholds(strategy: Ranking, groups: Sequence[str], cuts: _Cuts) -> list[dict[str, Any]]:
    """Per group where the ranking was cut: at a rank key and, where it has one, at a score.

    `from` is null where the stretch starts at the first document, `to` where it reaches the last.
    """

    def at(where: cut.Cut | None, group: int) -> dict[str, float | None] | None:
        if where is None or where.value[group] == cut.EXCLUDED:
            return None
        key = float(cut.unordered(where.value[group]))
        return {"key": key, "score": strategy.score_at(key)}

    largest = np.argsort(-cuts.budget, kind="stable")[:_GROUPS_SHOWN]
    return [
        {
            "group": groups[group],
            "budget": int(cuts.budget[group]),
            "kept": int(cuts.cost[group]),
            "from": at(cuts.start, group),
            "to": at(cuts.stop, group),
        }
        for group in largest
        if cuts.budget[group]
    ]
