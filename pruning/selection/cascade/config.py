"""Configuration of `cascade`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pruning.scores.distilled.ngram_student import DistillConfig
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.terms import CORPUS, Term
from pruning.store.manifest import config_of

_PLACES = ("corpus", "output", "within", "judged", "cheap", "dry_run")
# Settings of `Score` that do not change its scores.
_NOT_SCORES = (
    *("corpus", "output", "within", "tokens", "batch_rows", "fsdp", "tensor", "attention"),
    *("scan_layers", "worker", "workers", "compilation_cache", "compiler_options"),
    *("dry_run", "efficiency", "residual_dtype", "mlp_kernel"),
)


@dataclasses.dataclass(frozen=True)
class Level:
    """A scorer between the cheap score and the judge, such as a small judge.

    Attributes:
      scorer: @Score(), as for `score`; it is asked about the documents in doubt so far.
      score: the named value to rank by.
    """

    scorer: ScoreConfig
    score: str = "ask_llm"


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """Settings of `cascade`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the selection.
      judge: @Score(), the costly judge as for `score`; its corpus, output, within and dry_run are
        set by the cascade. None to look its answers up in `judged`.
      judged: a score set of the corpus in the judge's place; None as well if `score` is a column of
        the corpus.
      score: the value of the judge to rank by, named as for `select`.
      keep_documents, keep_tokens: the budget, as for `select`; one of the two.
      within: a selection of the corpus; only its documents are considered.
      share: share of the judge's own selection, in documents or tokens, that the cascade's is
        promised to hold.
      confidence: probability of that.
      teach: shares of the documents that the judge is asked about first, one for each time that the
        student is taught. The first is drawn uniformly, further ones where the student of the one
        before is in doubt.
      student: @Distill(), taught on these documents; its corpus, teacher, output, score, within and
        seed are set by the cascade.
      cheap: a score set of the corpus in the student's place.
      cheap_score: the value to rank by in `cheap`, or a column of the corpus ("corpus:n_tokens").
        It may have been learned from any answers of the judge: another score is certified by
        another sample.
      levels: @Level(), ..., from cheap to costly.
      worker, workers: as for `score`; the processes share the judge's work, the first does the
        rest.
      seed: seed of all draws, and of ties among the judge's scores. A level that learned from the
        answers of an earlier cascade needs another seed.
      dry_run: ask about the documents that teach, predict how many the judge will be asked about,
        and stop. The same command without it goes on from there.
    """

    corpus: str
    output: str
    judge: ScoreConfig | None = None
    judged: str | None = None
    score: str = "ask_llm"
    keep_documents: float | None = None
    keep_tokens: float | None = None
    within: str | None = None
    share: float = 0.95
    confidence: float = 0.95
    teach: tuple[float, ...] = (0.05,)
    student: DistillConfig | None = None
    cheap: str | None = None
    cheap_score: str = "column:student"
    levels: tuple[Level, ...] = ()
    worker: int | None = None
    workers: int | None = None
    seed: int = 0
    dry_run: bool = False

    def __post_init__(self) -> None:
        budgets = [b for b in (self.keep_documents, self.keep_tokens) if b is not None]
        if len(budgets) != 1 or not 0 < budgets[0] < math.inf:
            raise ValueError("set one of keep_documents and keep_tokens, a positive number.")
        if not (0 < self.share < 1 and 0 < self.confidence < 1):
            raise ValueError("share and confidence are between 0 and 1.")
        if not self.teach or not all(0 < share < 1 for share in self.teach):
            raise ValueError("teach holds one or several shares between 0 and 1.")
        own = Term(self.score).source == CORPUS
        if (self.judge is not None) + (self.judged is not None) + own != 1:
            raise ValueError(
                "give a judge, a score set in its place (judged), or a column of the corpus "
                "(score=corpus:NAME): one of the three."
            )
        cheap = self.cheap is not None or Term(self.cheap_score).source == CORPUS
        if (self.student is not None) == cheap:
            raise ValueError(
                "give a student to teach, or a cheap score of every document: one of the two."
            )
        if self.student is not None and self.student.model is not None:
            raise ValueError(
                "Distill.model applies an earlier student: give the score set of that student as "
                "Cascade.cheap, without Cascade.student."
            )
        if self.judge is None and not self.levels and (self.workers or 1) > 1:
            raise ValueError("workers divide the judge's work: scores that exist need just one.")

    @property
    def unit(self) -> str:
        """Unit of the budget: "tokens" or "documents"."""
        return "tokens" if self.keep_documents is None else "documents"

    @property
    def budget(self) -> float:
        budget = self.keep_tokens if self.keep_documents is None else self.keep_documents
        assert budget is not None
        return budget

    @property
    def identity(self) -> dict[str, Any]:
        """Settings that the selection depends on, as JSON values."""
        value = config_of(self)
        for name in (*_PLACES, "worker", "workers"):
            del value[name]
        judges = [value["judge"], *(level["scorer"] for level in value["levels"])]
        for judge in judges:
            for name in _NOT_SCORES:
                if judge is not None:
                    judge.pop(name, None)
            if judge is not None and judge.get("server"):  # its address may change on a restart
                judge["server"] = {"top": judge["server"]["top"]}
        for name in ("corpus", "teacher", "output", "score", "within", "seed", "workers", "model"):
            if value["student"] is not None:
                value["student"].pop(name, None)
        return value
