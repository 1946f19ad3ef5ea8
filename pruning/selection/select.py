"""Selection from a corpus by a score, a strategy and a budget.

    python -m pruning select --gin_file=configs/select/top.gin --gin.CORPUS=... --gin.SCORES=...

There are two passes over the shards. The first ranks (`ranking.py`); the second writes the kept
documents and counts them by domain. Between them `cut.py` finds the exact thresholds.

Choices
- Every draw about a document is a hash of (seed, doc_id), and ties are broken by such a hash. The
  same documents are kept for any number of shards, threads or restarts.
- Budgets are primarily in tokens. Documents are taken in the order of their rank as long as they
  fit: a selection never exceeds its budget, and falls short of it by less than one document. With
  quotas this holds for the whole, and for every group to within one document.
- A share is of the *pool*: the documents of `within` (or of the corpus), except those that the
  score set was configured to leave out. Documents without a score belong to the pool. They are
  never kept, except with `keep_unscored`, and then before all others.
- A random selection uses the same draws as a weighted one of the same seed. Their overlap in the
  summary shows how far the weights move the sample; by chance it is the share kept.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from models.terminal import say
from pruning.corpus import blocks
from pruning.corpus.layout import doc_ids
from pruning.corpus.selection_reader import ROW_GROUP
from pruning.scores.terms import Term
from pruning.selection import cut, diagnostics, strategies
from pruning.selection.config import Quotas, SelectConfig, SelectError, validate
from pruning.selection.ranking import Pool, Ranked, RankedShard, rank
from pruning.selection.strategies import Ranking, Weighted
from pruning.store import late, progress, randomness
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build, encoding_of_numbers
from pruning.store.manifest import Counts
from pruning.store.randomness import Stream

NAME = "Select"
CONFIGURABLES: dict[str, type] = {
    NAME: SelectConfig,
    "Quotas": Quotas,
    "Term": Term,
    **strategies.CONFIGURABLES,
}

SCHEMA = pa.schema([("doc_id", pa.int64()), ("n_tokens", pa.int32())])

_GROUPS_SHOWN = 64


@late.stage
def run(config: SelectConfig) -> Artifact:
    """Make the selection, or resume an interrupted run.

    Raises:
      SelectError, StrategyError, ScoreError: the configuration is invalid, or keeps nothing.
      ArtifactError: an input is missing, damaged, or belongs to another corpus.
      ConfigurationChanged: the output holds another selection.
    """
    validate(config)
    pool = Pool.open(config)
    build = Build(
        config.output,
        "selection",
        config.identity,
        pool.inputs,
        len(pool.shards),
        SCHEMA,
        encoding_of_numbers(SCHEMA),
    )
    if build.finished:
        return load_artifact(build.path, "selection")
    pool = pool.fitted()
    with progress.track("rank", len(pool.shards), "shards") as task:
        ranked = rank(pool, task.advance)
    cuts = find_cuts(pool, ranked)
    kept = _write(pool, ranked, cuts, build)
    build.write_file(blocks.FILE, blocks.to_parquet(kept.blocks))
    selection = build.finish(_summary(pool, ranked, cuts, kept))
    assert selection is not None  # this process had every shard
    for line in shortfall(config, ranked, cuts):
        say(f"select: {line}", error=True)
    return selection


def shortfall(config: SelectConfig, ranked: Ranked, cuts: Cuts) -> Iterator[str]:
    """Yield a line if over 1% of the budget is unused, and one if the budget looks wrong."""
    if config.budget is None:
        return
    if note := config.unit_note:
        yield note
    included = ranked.tally.included[config.unit]
    wanted, kept = int(cuts.budget.sum()) + included, int(cuts.cost.sum()) + included
    if kept >= 0.99 * wanted:
        return
    short = cuts.cost < cuts.budget
    exhausted = short & (cuts.stop.next_cost == 0)
    reasons = []
    if groups := int(np.count_nonzero(exhausted)):
        which = "the pool holds" if len(short) == 1 else f"{groups:,} groups hold"
        reasons.append(f"{which} no further documents that this strategy keeps")
    if np.any(short & ~exhausted):
        largest = int(cuts.stop.next_cost[short].max())
        reasons.append(
            f"the next document in rank is too long for what is left (up to {largest:,} "
            f"{config.unit})"
        )
    yield (
        f"{kept:,} of {wanted:,} {config.unit} of the budget are used ({kept / wanted:.1%}): "
        f"{'; '.join(reasons)}"
    )


# --------------------------------------------------------------------------------------------------
# The cut


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The range of the ranking that is kept.

    Attributes:
      start: cut before the first kept document; None for the first document of the ranking.
      stop: cut before the first document left out.
      budget: int64 [groups], in tokens or documents.
    """

    start: cut.Cut | None
    stop: cut.Cut
    budget: np.ndarray

    def keeps(self, chunk: cut.RankedKeys) -> np.ndarray:
        return cut.between(chunk, self.start, self.stop)

    @property
    def cost(self) -> np.ndarray:
        """Cost of the kept ranked documents, int64 [groups]."""
        return self.stop.cost - (0 if self.start is None else self.start.cost)


def find_cuts(pool: Pool, ranked: Ranked) -> Cuts:
    """Cut the ranking at the budget.

    Raises:
      SelectError: nothing is kept.
    """
    config, total = pool.config, ranked.cost
    budget = _budget(config, ranked)
    start, stop = np.zeros_like(total), total
    if isinstance(config.strategy, Ranking):
        start, stop = config.strategy.interval(total, budget)

    def find(target: np.ndarray) -> cut.Cut:
        def each(work: Callable[[Iterable[cut.RankedKeys]], Any]) -> Iterable[Any]:
            return pool.map_runs(lambda run: work(ranked.shard(k).chunk(config) for k in run))

        return cut.find(each, target)

    start_cut = find(start) if start.any() else None
    if start_cut and config.strategy.takes_budget:
        stop = start_cut.cost + budget  # a late start must not lengthen the range
    stop_cut = find(stop)
    if config.quotas:
        stop_cut = _share_rest(config.seed, stop_cut, stop)
    cuts = Cuts(start_cut, stop_cut, budget)
    if not (cuts.cost.any() or ranked.tally.included["documents"]):
        size, note = ranked.tally.pool, config.unit_note
        raise SelectError(
            f"{type(config.strategy).__name__} keeps nothing of {size['documents']:,} documents "
            f"with {size['tokens']:,} tokens: look at the budget, at the statuses of the score "
            f"set, or at the selections that are joined.{f' {note}.' * bool(note)}"
        )
    return cuts


def _share_rest(seed: int, stop: cut.Cut, targets: np.ndarray) -> cut.Cut:
    """Give some groups one more document, from the remainders of all groups' budgets.

    Without this, a domain of one document would never keep it. The first document that does not fit
    is taken with a probability of about the share of it that would fit.
    """
    rest = np.where(stop.next_cost > 0, targets - stop.cost, 0)
    share = rest / np.maximum(stop.next_cost, 1)
    draws = randomness.uniform(Stream.SELECTION_REST, seed, stop.tie.view(np.int64))
    order = np.argsort(draws / np.maximum(share, 1e-12), kind="stable")
    order = order[share[order] > 0]
    taken = np.zeros(len(rest), bool)
    taken[order] = np.cumsum(stop.next_cost[order]) <= rest.sum()
    return stop.moved(taken)


def _budget(config: SelectConfig, ranked: Ranked) -> np.ndarray:
    """Return the budget of every group, int64 [groups]; the whole cost if there is none."""
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
    return np.diff(through, prepend=0)  # sums to the amount


# --------------------------------------------------------------------------------------------------
# Second pass: write


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Kept documents of one or several shards.

    Attributes:
      size: numbers of documents and tokens.
      shared: the part of it, in the unit of the budget, that a random selection of this size keeps.
      domains: see `diagnostics.domain_counts`.
      blocks: blocks of the stream.
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


def _write(pool: Pool, ranked: Ranked, cuts: Cuts, build: Build) -> _Kept:
    """Write the missing shards, and count the kept documents of all shards."""
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


def _write_shard(config: SelectConfig, shard: RankedShard, kept: np.ndarray, build: Build) -> None:
    rows = np.flatnonzero(kept)
    n_tokens = shard.n_tokens[rows]
    with build.shard(shard.shard) as writer:
        writer.write({"doc_id": doc_ids(shard.shard, rows), "n_tokens": n_tokens}, ROW_GROUP)
        writer.tokens = int(n_tokens.sum(dtype=np.int64))
        writer.counts = _counts(config, shard, len(rows))


def _count(pool: Pool, shard: RankedShard, kept: np.ndarray, random_bucket: int) -> _Kept:
    rows = np.flatnonzero(kept)
    n_tokens = shard.n_tokens[rows]
    draws = randomness.uniform(Stream.SELECTION_DRAW, pool.config.seed, doc_ids(shard.shard, rows))
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


def _counts(config: SelectConfig, shard: RankedShard, kept: int) -> Counts:
    """Return counts in which every document of the shard appears once."""
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


def _kept_cost(pool: Pool, ranked: Ranked, cuts: Cuts) -> int:
    """Return the cost of the kept documents, in the unit of the budget."""
    return int(cuts.cost.sum()) + ranked.tally.included[pool.config.unit]


def _summary(pool: Pool, ranked: Ranked, cuts: Cuts, kept: _Kept) -> dict[str, Any]:
    config, tally = pool.config, ranked.tally
    strategy = config.strategy
    cost = _kept_cost(pool, ranked, cuts)
    fitted = [
        {"term": term.value, "scale": term.scale} | scale.summary()
        for term, scale in zip(pool.score.terms, pool.score.scales, strict=False)
    ]
    return {
        "strategy": config.identity["strategy"],
        **({"scales": fitted} if fitted else {}),
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


def _thresholds(strategy: Ranking, groups: Sequence[str], cuts: Cuts) -> list[dict[str, Any]]:
    """Return, for every group, the rank key of the cut and its score, if it has one.

    `from` is null if the range starts at the first document, `to` if it ends at the last.
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
