"""What a selection is asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from pruning import artefact
from pruning.selection import strategies
from pruning.selection.scores import Term
from pruning.selection.strategies import Filter, Ranking

# Settings that say where and how, not what.
_NOT_IDENTITY = ("corpus", "output", "scores", "within", "in_memory", "threads")


class SelectError(ValueError):
    """A selection cannot be made as it is configured."""


@dataclasses.dataclass(frozen=True)
class Quotas:
    """Divides the budget among the values of a metadata column.

    A value that has less than its share keeps all it has; what is missing goes to nobody, and shows
    in the summary.

    Attributes:
      column: of the corpus.
      shares: value -> share of the budget; what they leave of 1 goes to all other values together.
        Without shares every value keeps the same rate of its own.
    """

    column: str = "domain"
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(share < 0 for share in self.shares.values()) or sum(self.shares.values()) > 1 + 1e-9:
            raise SelectError(f"quotas are positive and sum to 1 at most: {dict(self.shares)}.")


@dataclasses.dataclass(frozen=True)
class SelectConfig:
    """Settings of `select`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the selection.
      strategy: @Top(), @Random(), ...: one of `strategies.CONFIGURABLES`.
      scores: directory of a score set, or of several by name; for strategies that rank by a score.
      score: a named value of scores.py ("nll_mean"), or terms to be summed.
      keep_tokens: the budget: up to 1 a share of the pool's tokens, above 1 a number of tokens.
      keep_documents: the same in documents. A strategy with a budget needs one of the two.
      within: directory of a selection; only its documents are considered.
      quotas: how the budget is divided.
      keep_unscored: keep what has no score, at the expense of the rest of the budget.
      seed: of all draws.
      domain_column: the column by which the summary counts; left out where the corpus has none.
      in_memory: hold the ranking, 12 bytes a document (16 with quotas), instead of making it again
        for each of the passes that find the cut.
      threads: that read and rank shards; 0 for one per CPU.
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

    @property
    def terms(self) -> tuple[Term, ...]:
        """The summands of the score."""
        return (Term(self.score),) if isinstance(self.score, str) else tuple(self.score or ())

    @property
    def score_sets(self) -> Mapping[str, str]:
        """Their directories by name; one alone is called "scores"."""
        return {"scores": self.scores} if isinstance(self.scores, str) else dict(self.scores or {})

    @property
    def budget(self) -> float | None:
        return self.keep_tokens if self.keep_documents is None else self.keep_documents

    @property
    def unit(self) -> str:
        """Of the budget: "tokens" or "documents"."""
        return "tokens" if self.keep_documents is None else "documents"

    @property
    def workers(self) -> int:
        return self.threads or os.cpu_count() or 1

    @property
    def identity(self) -> dict[str, Any]:
        """What the selection depends on besides its inputs, as JSON values."""
        value = artefact.config_of(self)
        for name in _NOT_IDENTITY:
            del value[name]
        value["strategy"].pop("selections", None)
        return value


def validate(config: SelectConfig) -> None:
    """Raises SelectError or ScoreError where settings contradict each other."""
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
        if budgets[0] <= 0:
            raise SelectError(f"a budget is positive, not {budgets[0]}.")
    elif budgets:
        raise SelectError(f"{name} takes no budget: remove keep_tokens and keep_documents.")
    if config.quotas and not (ranking and ranking.takes_quotas):
        raise SelectError(f"{name} has no budget that quotas could divide: remove them.")
    if ranking and ranking.needs_score:
        if not (config.terms and config.score_sets):
            raise SelectError(f"{name} ranks by a score: set both scores and score.")
    elif config.terms or config.score_sets:
        raise SelectError(f"{name} looks at no score: remove scores and score.")
    for term in config.terms:
        if term.definition and term.scores not in config.score_sets:
            raise SelectError(
                f"{term} is of the score set {term.scores!r}; those given are: "
                f"{', '.join(config.score_sets)}."
            )
    for unread in sorted(set(config.score_sets) - {term.scores for term in config.terms}):
        raise SelectError(f"no term of the score reads the score set {unread!r}: remove it.")
