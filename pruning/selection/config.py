"""Configuration of `select`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from pruning.scores.terms import CORPUS, Combination, Operation, Term
from pruning.selection import strategies
from pruning.selection.strategies import Filter, Ranking
from pruning.store.manifest import added_setting, config_of

# Settings of location and execution, which do not change the selection.
_NOT_IDENTITY = ("corpus", "output", "scores", "within", "in_memory", "threads")


class SelectError(ValueError):
    """Error for a selection that cannot be made with its settings."""


@dataclasses.dataclass(frozen=True)
class Quotas:
    """Division of the budget among the values of a metadata column.

    A value with less than its share keeps all it has. The rest of its share is not reassigned, and
    is reported in the summary.

    Attributes:
      column: name of the column of the corpus.
      shares: value -> share of the budget. The remainder to 1 goes to all other values together.
        Without shares, the same rate is kept of every value.
    """

    column: str = "domain"
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        fine = all(share >= 0 for share in self.shares.values())  # False for NaN
        if not fine or sum(self.shares.values()) > 1 + 1e-9:
            raise SelectError(f"quotas are positive and sum to 1 at most: {dict(self.shares)}.")


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Settings of `select`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the selection.
      strategy: @Top(), @Random(), ...: one of `strategies.CONFIGURABLES`, or a user-defined
        subclass of `Ranking` or `Filter` (docs/examples/nearest.py).
      scores: directory of a score set, or of several by name; for strategies that rank by a score.
      score: a named value of terms.py ("nll_mean"), "corpus:NAME" for a metadata column of the
        corpus, which needs no score set, or terms.
      combine: operation on the scaled terms: "sum", "mean", "maximum", "minimum" or "product".
      keep_tokens: the budget: up to 1 a share of the pool's tokens, above 1 a number of tokens.
      keep_documents: the budget in documents, likewise. A strategy with a budget needs one of the
        two.
      within: directory of a selection; only its documents are considered.
      quotas: division of the budget among values of a column.
      keep_unscored: keep documents without a score, at the expense of the rest of the budget.
      seed: seed of all draws.
      domain_column: the column by which the summary counts; ignored if the corpus lacks it.
      in_memory: hold the ranking in memory, 12 bytes a document (16 with quotas), instead of
        recomputing it for each of the passes that find the cut.
      threads: number of threads that read and rank shards; 0 for one per CPU.
    """

    corpus: str
    output: str
    strategy: Any
    scores: str | Mapping[str, str] | None = None
    score: str | tuple[Term, ...] | None = None
    keep_tokens: float | None = None
    keep_documents: float | None = None
    within: str | None = None
    quotas: Quotas | None = None
    keep_unscored: bool = False
    seed: int = 0
    domain_column: str = "domain"
    in_memory: bool = True
    threads: int = 0
    combine: Operation = added_setting("sum")  # noqa: RUF009

    @property
    def combined(self) -> Combination:
        """The score before its scales are fitted."""
        return Combination(self.terms, self.combine)

    @property
    def terms(self) -> tuple[Term, ...]:
        """Terms of the score."""
        return (Term(self.score),) if isinstance(self.score, str) else tuple(self.score or ())

    @property
    def score_sets(self) -> Mapping[str, str]:
        """Directories of the score sets by name; a single one is called "scores"."""
        return {"scores": self.scores} if isinstance(self.scores, str) else dict(self.scores or {})

    @property
    def budget(self) -> float | None:
        return self.keep_tokens if self.keep_documents is None else self.keep_documents

    @property
    def unit(self) -> str:
        """Unit of the budget: "tokens" or "documents"."""
        return "tokens" if self.keep_documents is None else "documents"

    @property
    def unit_note(self) -> str:
        """Remark of `unit_note` on the budget."""
        return unit_note("Select", self.unit, self.budget)

    @property
    def workers(self) -> int:
        return self.threads or os.cpu_count() or 1

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that the selection depends on, as JSON values."""
        value = config_of(self)
        for name in _NOT_IDENTITY:
            del value[name]
        value["strategy"].pop("selections", None)
        return value


def unit_note(stage: str, unit: str, budget: float | None) -> str:
    """Return a remark if a budget that is a number may have been meant as a percentage."""
    if budget is None or not 1 < budget <= 100:
        return ""
    return (
        f"{stage}.keep_{unit}={budget:g} is a number of {unit}: for {budget:g}% of them write "
        f"{budget / 100:g} or {budget:g}%"
    )


def validate(config: SelectConfig) -> None:
    """Raise SelectError or ScoreError if settings contradict each other."""
    if config.threads < 0:
        raise SelectError(f"threads is 0, for one per CPU, or positive: not {config.threads}.")
    strategy = config.strategy
    if not isinstance(strategy, Ranking | Filter):
        raise SelectError(
            f"Select.strategy is {strategy!r}: give one of "
            f"{', '.join('@' + name + '()' for name in strategies.CONFIGURABLES)}."
        )
    name = type(strategy).__name__
    ranking = strategy if isinstance(strategy, Ranking) else None
    budgets = [b for b in (config.keep_tokens, config.keep_documents) if b is not None]
    if ranking and ranking.takes_budget:
        if len(budgets) != 1:
            raise SelectError(f"{name} wants a budget: set one of keep_tokens and keep_documents.")
        if not 0 < budgets[0] < float("inf"):
            raise SelectError(f"a budget is positive, not {budgets[0]}.")
    elif budgets:
        raise SelectError(f"{name} takes no budget: remove keep_tokens and keep_documents.")
    if config.quotas and not (ranking and ranking.takes_quotas):
        raise SelectError(f"{name} has no budget that quotas could divide: remove them.")
    if ranking and ranking.needs_score:
        inside = all(term.source == CORPUS for term in config.terms)
        if not config.terms or not (config.score_sets or inside):
            raise SelectError(f"{name} ranks by a score: set both scores and score.")
    elif config.terms or config.score_sets:
        raise SelectError(f"{name} looks at no score: remove scores and score.")
    for term in config.terms:
        if term.definition and term.source not in (*config.score_sets, CORPUS):
            raise SelectError(
                f"{term} is of the score set {term.source!r}; those given are: "
                f"{', '.join(config.score_sets)}."
            )
    for unread in sorted(set(config.score_sets) - {term.source for term in config.terms}):
        raise SelectError(f"no term of the score reads the score set {unread!r}: remove it.")
