"""A distilled scorer: what a costly scorer thinks, learned by a cheap one from a sample.

    python -m pruning distill --gin_file=configs/score/distill.gin --gin.CORPUS=...

The teacher has scored a part of the corpus (a selection with Split or Random, given to `score` as
`within`); the student learns its score by regression on hashed n-grams, and scores everything. The
authors of Ask-LLM call this a good idea that they have not explored; readers of the paper asked for
it.

Choices
- The target is any score of a score set, as `select` names it; for Ask-LLM the log-odds of yes
  against no, which is a number without bounds where the probability is crowded at both ends.
- A tenth of the teacher's documents is held out. How well the student ranks them stands in the
  summary: Spearman's correlation, and how many of the teacher's best tenth are its own.
- What both took per document stands in measured.json of both score sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from scipy import stats

from pruning import artefact, derived, progress, randomness
from pruning.artefact import Artefact, ArtefactError, config_of
from pruning.corpus import Corpus
from pruning.ngrams import linear, passes
from pruning.ngrams.hashing import SCHEME, Features, NGrams, hashed_ngrams
from pruning.ngrams.linear import Bags, Linear
from pruning.ngrams.passes import Texts
from pruning.scorers import Column
from pruning.selection import scores as selection_scores
from pruning.selection.scores import Term

NAME = "Distill"
MODEL = "student.npz"

COLUMNS = {"student": Column(pa.float32(), "the teacher's score, as the student predicts it")}

HELD_OUT = 0.1
_BEST = 0.1
_SPLIT, _SAMPLE = 36, 37  # streams of draws


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of `distill`.

    Attributes:
      corpus: the corpus to score.
      teacher: a score set of it; the documents that have a score there are learned from.
      output: the score set's directory.
      score: what is learned, named as for `select`.
      within: a selection of the corpus to score; other documents get the status "not_selected".
      features: `@Features()`.
      examples: at most as many of the teacher's documents.
      l2: weight of the penalty, in documents.
      seed: of the examples and of what is held out.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    teacher: str
    output: str
    score: str = "ask_llm_ratio"
    within: str | None = None
    features: Features = dataclasses.field(default_factory=lambda: Features(buckets=1 << 20))
    examples: int = 200_000
    l2: float = 1.0
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.examples < 20 or self.l2 <= 0:
            raise ValueError("examples is at least 20, and l2 positive.")


CONFIGURABLES: dict[str, type] = {NAME: DistillConfig, "Features": Features}


def run(config: DistillConfig) -> Artefact:
    """Makes the score set, or goes on with it.

    Raises:
      ArtefactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output was begun with other settings.
      LinearError: the teacher's scores are all the same.
    """
    texts = Texts.open(config.corpus, config.within)
    teacher = artefact.load(config.teacher, "scores")
    artefact.require_input(teacher, "corpus", texts.corpus.artefact)
    names = ("score", "examples", "l2", "seed")
    build = derived.begin(
        config.output,
        {
            "features": config_of(config.features),
            "hashes": SCHEME,
            **{name: getattr(config, name) for name in names},
        },
        texts.inputs("corpus") | {"teacher": teacher},
        texts.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    model, summary = learn(config, texts.corpus, teacher)
    build.write_file(MODEL, model.to_bytes())
    passes.score(build, texts, config.features, Student(model), COLUMNS, config.workers)
    scores = derived.finish(build, "distilled", COLUMNS, {"teacher": config.score} | summary)
    assert scores is not None  # every shard was ours
    return scores


def learn(config: DistillConfig, corpus: Corpus, teacher: Artefact) -> tuple[Linear, dict]:
    """The student, and how it agrees with its teacher on documents that it has not seen."""
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    bags = []
    with progress.track("examples", len(lessons.targets), "documents") as task:
        for shard, rows in enumerate(lessons.rows):
            for batch in Texts(corpus).read(shard, rows):
                bags.append(Bags.of(hashed_ngrams(batch, config.features)))
                task.advance(len(batch))
    examples, held = Bags.join(bags), lessons.held_out
    targets = lessons.targets[~held]
    mean, spread = float(targets.mean()), float(targets.std()) or 1.0
    fitted = linear.fit(
        examples.take(~held), (targets - mean) / spread, config.features, "squared", config.l2
    )
    model = Linear(
        config.features, fitted.weights * np.float32(spread), fitted.bias * spread + mean
    )
    found = model(examples.take(held))
    return model, {"examples": len(targets)} | agreement(found, lessons.targets[held])


@dataclasses.dataclass(frozen=True)
class Student:
    """N-grams -> the column."""

    model: Linear

    def __call__(self, grams: NGrams) -> dict[str, np.ndarray]:
        return {"student": self.model(Bags.of(grams))}


# --------------------------------------------------------------------------------------------------
# What any student learns from, and is judged by


@dataclasses.dataclass(frozen=True)
class Lessons:
    """The teacher's documents and scores, in corpus order.

    Attributes:
      rows: per shard, int64 ascending.
      targets: float64 [documents].
      held_out: bool [documents], not to be learned from.
    """

    rows: list[np.ndarray]
    targets: np.ndarray
    held_out: np.ndarray

    @classmethod
    def of(cls, corpus: Corpus, teacher: Artefact, score: str, most: int, seed: int) -> Lessons:
        """A sample of at most `most` documents.

        Raises:
          ArtefactError: the teacher has scored fewer than 20 documents.
        """
        values: dict[int, np.ndarray] = {}

        def of_shard(shard: int) -> np.ndarray:
            if shard not in values:
                doc_ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
                found = selection_scores.read((Term(score),), {"scores": teacher}, shard, doc_ids)
                values[shard] = np.where(found.reason == selection_scores.OK, found.score, np.nan)
            return values[shard]

        def draws(ids: np.ndarray) -> np.ndarray:
            if not len(ids):
                return np.zeros(0)
            known = np.isfinite(of_shard(int(ids[0]) >> 32)[ids & 0xFFFF_FFFF])
            return np.where(known, randomness.uniform(seed, ids, _SAMPLE), np.inf)

        rows = passes.sample(Texts(corpus), most, draws)
        if sum(map(len, rows)) < 20:
            raise ArtefactError(
                f"{teacher.path} has {sum(map(len, rows))} scores to learn from: let the teacher "
                "score more documents."
            )
        ids = np.concatenate([(np.int64(shard) << 32) + r for shard, r in enumerate(rows)])
        targets = np.concatenate([of_shard(shard)[r] for shard, r in enumerate(rows) if len(r)])
        return cls(rows, targets, randomness.uniform(seed, ids, _SPLIT) < HELD_OUT)


def agreement(student: np.ndarray, teacher: np.ndarray) -> Mapping[str, float | int]:
    """How two scores of the same documents [n] agree on their order."""
    best = max(round(_BEST * len(teacher)), 1)
    shared = np.intersect1d(np.argsort(-student)[:best], np.argsort(-teacher)[:best])
    return {
        "held_out": len(teacher),
        "spearman": float(stats.spearmanr(student, teacher).statistic),
        "best_tenth_overlap": len(shared) / best,
    }
