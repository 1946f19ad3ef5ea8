"""A cascade: a cheap score of everything, a costly judge of what is in doubt, and a promise.

    python -m pruning cascade --gin_file=configs/select/cascade.gin --gin.CORPUS=...

    teach     the judge answers a share of the documents; a student learns from them
    levels    cheaper judges answer the documents in doubt, which puts these into a new order
    plan      what to ask about is planned by the answers so far; a dry run ends here
    certify   the judge answers a sample drawn after all that, more densely where doubt is larger
    doubt     the judge answers everything between two edges, which the sample allows (bound.py)

The selection is what the judge, asked about everything, would keep, up to the share that was
promised. docs/cascade.md describes the method and its proof.

Choices
- Whatever is learned is learned before the certifying sample is drawn, from documents that are not
  part of it: a student may be taught as often as wanted, by any rule.
- Draws are hashes of (seed, document), so that a restart asks the same questions, and finds the
  answers. The certifying draw has a seed of its own for every cheap score and pool, because these
  may have been learned from an earlier cascade's answers.
- Where the plan leaves hardly anything unasked, the judge is asked about everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.terminal import say
from pruning.corpus.reader import load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.scores import score_set
from pruning.scores.distilled import ngram_student
from pruning.scores.distilled.ngram_student import DistillConfig
from pruning.scores.model import engine
from pruning.scores.terms import CORPUS, Term
from pruning.scores.workers import require_worker
from pruning.selection.cascade import labels, report
from pruning.selection.cascade.config import CascadeConfig, Level
from pruning.selection.cascade.decide import Cascade, Population, Promise
from pruning.selection.cascade.documents import ENCODING, Documents
from pruning.selection.cascade.rounds import Rounds
from pruning.selection.config import SelectError, unit_note
from pruning.selection.select import SCHEMA
from pruning.store import late, randomness
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError, digest_of
from pruning.store.randomness import Stream

NAME = "Cascade"
CONFIGURABLES: dict[str, type] = {
    NAME: CascadeConfig,
    "Level": Level,
    "Distill": DistillConfig,
    **engine.CONFIGURABLES,
}

_LEAST_TAUGHT = 50  # documents


@late.stage
def run(config: CascadeConfig) -> Artifact | None:
    """Make the selection, or resume an interrupted run.

    Returns:
      The selection; None after a dry run, and in processes other than the first.

    Raises:
      ArtifactError: inputs are missing, or do not belong together.
      ConfigurationChanged: the output holds work of other settings.
    """
    require_worker(config.worker, config.workers)
    if note := unit_note("Cascade", config.unit, config.budget):
        say(f"cascade: {note}", error=True)
    corpus = load_corpus(config.corpus)
    inputs = {"corpus": corpus.artifact}
    within = None
    if config.within is not None:
        within = load_selection(config.within, corpus.artifact)
        inputs["within"] = within.artifact
    for name in ("judged", "cheap"):
        if (path := getattr(config, name)) is not None:
            inputs[name] = load_artifact(path, score_set.KIND)
            require_input(inputs[name], "corpus", corpus.artifact)
    build = Build(
        config.output, "selection", config.identity, inputs, corpus.num_shards, SCHEMA, ENCODING
    )
    if build.finished:
        return load_artifact(build.path, "selection")
    documents = Documents.of(corpus, within, inputs.get("judged"))
    rounds = Rounds(config, documents, inputs.get("judged"))
    work = _Work(config, documents, rounds, inputs)
    work.teach()
    work.refine()
    predicted = work.predict()
    for line in report.prediction(predicted):
        say(line)
    if config.dry_run:
        return None
    outcome = work.cascade.settle()
    if not rounds.first:
        return None
    actual = None
    if config.judge is None:
        actual = work.cascade.share_of(outcome.kept, rounds.known)
    summary = report.summary(work.cascade, outcome, documents, predicted, config, actual)
    costs = report.costs(rounds.spent, rounds.everything(), work.students, documents)
    selection = documents.write(build, outcome.kept, summary, costs)
    for line in report.lines(selection.manifest.summary["cascade"], costs):
        say(line)
    return selection


def sample_seed(config: CascadeConfig, inputs: Mapping[str, Artifact]) -> int:
    """Return the seed of the certifying draw, another one for every cheap score and pool.

    A cheap score or a pool that an earlier cascade's answers made depends on its certifying sample,
    which must not be drawn again.
    """
    names = {"cheap", "within"}
    if config.cheap is None and config.student is None:
        names.add("corpus")  # has the cheap score
    given = {name: found.digest for name, found in inputs.items() if name in names}
    if not given:
        return config.seed
    return int(digest_of({"seed": config.seed, **given})[:15], 16)


class _Work:
    """A running cascade.

    Attributes:
      cascade: its answers and decisions.
      students: descriptions of the students, in the order in which they were taught.
    """

    def __init__(
        self,
        config: CascadeConfig,
        documents: Documents,
        rounds: Rounds,
        inputs: Mapping[str, Artifact],
    ):
        self.config = config
        self.documents = documents
        self.rounds = rounds
        self.students: list[dict[str, Any]] = []
        self._cheap = inputs.get("cheap")
        unit, budget = config.unit, config.budget
        weights = documents.n_tokens if unit == "tokens" else np.ones_like(documents.n_tokens)
        amount = round(budget * documents.pool[unit] if budget <= 1 else budget)
        if amount < 1:
            raise SelectError(
                f"Cascade keeps nothing of {len(documents):,} documents: raise the budget."
            )
        ids = documents.ids
        population = Population(
            ids,
            np.arange(len(ids)),
            weights.astype(np.int64),
            randomness.hashed(Stream.SELECTION_TIE, config.seed, ids),
        )
        promise = Promise(amount, config.share, config.confidence)
        self.cascade = Cascade(population, promise, rounds.ask, sample_seed(config, inputs))

    # ---- teaching --------------------------------------------------------------------------------

    def teach(self) -> None:
        """Ask about the documents that teach, and order all documents by a cheap score."""
        ids, config = self.documents.ids, self.config
        draws = randomness.uniform(Stream.CASCADE_TEACH, config.seed, ids)
        for number, share in enumerate(config.teach, 1):
            rates = self._rates(share)
            # What is left of a draw that was not below its rate is uniform again.
            drawn = draws < rates
            draws = np.where(drawn, np.inf, (draws - rates) / (1 - rates))
            self.cascade.learned(f"teach-{number}", drawn, rates)
            if np.isfinite(self.cascade.scores).sum() < _LEAST_TAUGHT:
                raise ArtifactError(
                    f"{np.isfinite(self.cascade.scores).sum()} of {len(ids):,} documents have an "
                    "answer to learn from: ask about more of them (Cascade.teach), or score all."
                )
            if config.student is not None:
                self._order(number, self._taught(number, config.student))
            elif number == 1:
                term = Term(config.cheap_score)
                cheap = None if term.source == CORPUS else self._cheap
                self._order(number, self.documents.read(cheap, config.cheap_score))

    def _rates(self, share: float) -> np.ndarray:
        """Return rates of a round of teaching, float64 [n]: uniform, then by doubt."""
        if not self.cascade.answered.any():
            return np.full(len(self.documents), share)
        kept = self.cascade.make_plan().doubt(self.cascade.places)
        doubt = np.sqrt(kept * (1 - kept)) + 0.05
        return np.minimum(share * doubt / doubt.mean(), 0.5)

    def _taught(self, number: int, student: DistillConfig) -> np.ndarray:
        """Return the scores of a student taught on all answers so far, float64 [n]."""
        at = self.rounds.at(f"student-{number}")
        taught = self.rounds.at(f"labels-{number}")

        def make() -> None:
            labels.write(taught, self.rounds, self.cascade)
            ngram_student.run(
                dataclasses.replace(
                    student,
                    corpus=self.config.corpus,
                    within=self.config.within,
                    teacher=str(taught),
                    score=f"column:{labels.COLUMN}",
                    tokens=student.tokens or self.rounds.tokens_read(),
                    output=str(at),
                    seed=self.config.seed,
                )
            )

        self.rounds.made(at, make)
        scores = load_artifact(at, score_set.KIND)
        names = ("examples", "spearman", "spearman_interval", "best_tenth_overlap", "tokens")
        self.students.append({name: scores.manifest.summary.get(name) for name in names})
        return self.documents.read(scores, "column:student")

    def _order(self, number: int, scores: np.ndarray) -> None:
        """Put the documents into the order of a score, and ask about those without one."""
        ties = self.cascade.population.ties
        order = np.lexsort((ties, scores))  # NaN is last
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        self.cascade.reorder(f"unscored-{number}", places, np.isnan(scores))

    # ---- levels ----------------------------------------------------------------------------------

    def refine(self) -> None:
        """Ask the levels, each about the documents in doubt so far, and order these by it."""
        for number, level in enumerate(self.config.levels, 1):
            first, last = self.cascade.doubtful()
            places = self.cascade.population.places
            inside = (places >= first) & (places < last)
            rows = np.flatnonzero(inside & ~self.cascade.unranked)
            scores = self.rounds.score(f"level_{number}", rows, level.scorer, f"level_{number}")
            values = self.documents.read(scores, level.score)
            within = np.flatnonzero(inside)
            order = np.lexsort((places[within], values[within]))
            moved = places.copy()
            moved[within[order]] = np.sort(places[within])
            unscored = inside & np.isnan(values)
            self.cascade.reorder(f"unscored-level_{number}", moved, unscored)

    def predict(self) -> dict[str, Any]:
        """Return what the plan expects."""
        plan = self.cascade.make_plan()
        answered = int(self.cascade.answered.sum())
        everything = self.cascade.asks_everything
        asked = (
            len(self.documents) if everything else min(answered + plan.asked, len(self.documents))
        )
        return {
            "documents": len(self.documents),
            "asked_before": answered,
            "asked": round(asked),
            "share": asked / max(len(self.documents), 1),
            "everything": everything,
            "students": self.students,
        }
