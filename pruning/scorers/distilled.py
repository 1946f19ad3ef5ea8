"""A distilled scorer: what a costly scorer thinks, learned by a cheap one from a sample.

    python -m pruning distill --gin_file=configs/score/distill.gin --gin.CORPUS=...

The teacher has scored a part of the corpus (a selection with Split or Random, given to `score` as
`within`); the student learns its score by regression on n-grams of the corpus's tokens, and scores
everything. The authors of Ask-LLM call this a good idea that they have not explored; readers of the
paper asked for it.

Choices
- The target is any score of a score set, as `select` names it; for Ask-LLM the log-odds of yes
  against no, which is a number without bounds where the probability is crowded at both ends.
- The student reads as much of a document as the teacher read, which the teacher's score set says.
- The penalty is the one that does best on a tenth of what is learned from.
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
from pruning.artefact import Artefact, ArtefactError
from pruning.corpus import Corpus, doc_ids, rows_of, shards_of
from pruning.ngrams import linear, passes
from pruning.ngrams.hashing import NGrams
from pruning.ngrams.linear import Bags, Linear
from pruning.ngrams.passes import Texts
from pruning.ngrams.pieces import Pieces
from pruning.scorers import Column
from pruning.selection import scores as selection_scores
from pruning.selection.scores import Term

NAME = "Distill"
MODEL = "student.npz"

COLUMNS = {"student": Column(pa.float32(), "the teacher's score, as the student predicts it")}

HELD_OUT = 0.1
_BEST = 0.1
_SPLIT, _SAMPLE, _PENALTY = 36, 37, 38  # streams of draws


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of `distill`.

    Attributes:
      corpus: the corpus to score.
      teacher: a score set of it; the documents that have a score there are learned from.
      output: the score set's directory.
      score: what is learned, named as for `select`.
      within: a selection of the corpus to score; other documents get the status "not_selected".
      n: longest n-gram of tokens.
      buckets: that n-grams are hashed into.
      tokens: how many of a document are read; None for as many as the teacher read.
      examples: at most as many of the teacher's documents.
      l2: weights of the penalty to choose from, in documents.
      seed: of the examples and of what is held out.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    teacher: str
    output: str
    score: str = "ask_llm_ratio"
    within: str | None = None
    n: int = 2
    buckets: int = 1 << 20
    tokens: int | None = None
    examples: int = 200_000
    l2: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.examples < 20 or not self.l2 or min(self.l2) <= 0:
            raise ValueError("examples is at least 20, and l2 holds positive numbers.")


CONFIGURABLES: dict[str, type] = {NAME: DistillConfig}


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
    names = ("score", "n", "buckets", "tokens", "examples", "l2", "seed")
    build = derived.begin(
        config.output,
        {"scheme": Pieces.scheme} | {name: getattr(config, name) for name in names},
        texts.inputs("corpus") | {"teacher": teacher},
        texts.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    student, summary = learn(config, texts.corpus, teacher)
    build.write_file(MODEL, student.model.to_bytes())
    passes.score(build, texts, student.pieces, student, COLUMNS, config.workers)
    scores = derived.finish(build, "distilled", COLUMNS, {"teacher": config.score} | summary)
    assert scores is not None  # every shard was ours
    return scores


def learn(config: DistillConfig, corpus: Corpus, teacher: Artefact) -> tuple[Student, dict]:
    """The student, and how it agrees with its teacher on documents that it has not seen."""
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    pieces = Pieces(config.n, config.buckets, config.tokens or lessons.tokens)
    bags = []
    with progress.track("examples", len(lessons.targets), "documents") as task:
        for shard, rows in enumerate(lessons.rows):
            for batch in Texts(corpus).read(shard, rows, pieces):
                bags.append(pieces.bags(pieces.ngrams(batch)))
                task.advance(len(batch))
    examples, held = Bags.join(bags), lessons.held_out
    learned, targets = examples.take(~held), lessons.targets[~held]
    l2 = _penalty(config, pieces, learned, targets) if len(config.l2) > 1 else config.l2[0]
    student = Student.fit(pieces, learned, targets, l2)
    found = student.model(examples.take(held))
    summary = {"examples": len(targets), "tokens": pieces.first, "l2": l2}
    return student, summary | agreement(found, lessons.targets[held])


def _penalty(config: DistillConfig, pieces: Pieces, bags: Bags, targets: np.ndarray) -> float:
    """The one with the smallest error on a tenth of the documents, learned from the others."""
    order = np.argsort(randomness.hashed(config.seed, np.arange(len(targets)), _PENALTY))
    tried = order < max(round(HELD_OUT * len(targets)), 1)
    known, asked, truth = bags.take(~tried), bags.take(tried), targets[tried]
    students = {l2: Student.fit(pieces, known, targets[~tried], l2) for l2 in config.l2}
    return min(students, key=lambda l2: float(np.square(students[l2].model(asked) - truth).mean()))


@dataclasses.dataclass(frozen=True)
class Student:
    """N-grams -> the column."""

    pieces: Pieces
    model: Linear

    @classmethod
    def fit(cls, pieces: Pieces, bags: Bags, targets: np.ndarray, l2: float) -> Student:
        """Raises LinearError when the targets are all the same."""
        mean, spread = float(targets.mean()), float(targets.std()) or 1.0
        fitted = linear.fit(bags, (targets - mean) / spread, pieces, "squared", l2)
        weights, bias = fitted.weights * np.float32(spread), fitted.bias * spread + mean
        return cls(pieces, Linear(pieces, weights, bias))

    def __call__(self, grams: NGrams) -> dict[str, np.ndarray]:
        return {"student": self.model(self.pieces.bags(grams))}


# --------------------------------------------------------------------------------------------------
# What any student learns from, and is judged by


@dataclasses.dataclass(frozen=True)
class Lessons:
    """The teacher's documents and scores, in corpus order.

    Attributes:
      rows: per shard, int64 ascending.
      targets: float64 [documents].
      held_out: bool [documents], not to be learned from.
      ids: int64 [documents].
      tokens: of a document, how many the teacher read at most; None where it read all.
    """

    rows: list[np.ndarray]
    targets: np.ndarray
    held_out: np.ndarray
    ids: np.ndarray
    tokens: int | None

    @classmethod
    def of(cls, corpus: Corpus, teacher: Artefact, score: str, most: int, seed: int) -> Lessons:
        """A sample of at most `most` documents.

        Raises:
          ArtefactError: the teacher has scored fewer than 20 documents.
        """
        values: dict[int, np.ndarray] = {}

        def of_shard(shard: int) -> np.ndarray:
            if shard not in values:
                ids = corpus.columns(shard, ["doc_id"])["doc_id"].to_numpy()
                found = selection_scores.read((Term(score),), {"scores": teacher}, shard, ids)
                values[shard] = np.where(found.reason == selection_scores.OK, found.score, np.nan)
            return values[shard]

        def draws(ids: np.ndarray) -> np.ndarray:
            if not len(ids):
                return np.zeros(0)
            known = np.isfinite(of_shard(int(shards_of(ids[0])))[rows_of(ids)])
            return np.where(known, randomness.uniform(seed, ids, _SAMPLE), np.inf)

        rows = passes.sample(Texts(corpus), most, draws)
        if sum(map(len, rows)) < 20:
            raise ArtefactError(
                f"{teacher.path} has {sum(map(len, rows))} scores to learn from: let the teacher "
                "score more documents."
            )
        ids = np.concatenate([doc_ids(shard, r) for shard, r in enumerate(rows)])
        targets = np.concatenate([of_shard(shard)[r] for shard, r in enumerate(rows) if len(r)])
        held_out = randomness.uniform(seed, ids, _SPLIT) < HELD_OUT
        return cls(rows, targets, held_out, ids, _tokens_read(corpus, teacher))


def _tokens_read(corpus: Corpus, teacher: Artefact) -> int | None:
    """The most tokens that the teacher read of a document that it cut."""
    most = 0
    for shard in range(corpus.num_shards):
        with teacher.parquet(shard) as file:
            if "truncated_tokens" not in file.schema_arrow.names:
                return None
        cut = teacher.read(shard, ["truncated_tokens"])["truncated_tokens"]
        lengths = corpus.columns(shard, ["n_tokens"])["n_tokens"].to_numpy()
        missing = cut.fill_null(0).to_numpy()
        most = max(most, int(np.where(missing > 0, lengths - missing, 0).max(initial=0)))
    return most or None


def agreement(student: np.ndarray, teacher: np.ndarray) -> Mapping[str, float | int]:
    """How two scores of the same documents [n] agree on their order."""
    best = max(round(_BEST * len(teacher)), 1)
    shared = np.intersect1d(np.argsort(-student)[:best], np.argsort(-teacher)[:best])
    return {
        "held_out": len(teacher),
        "spearman": float(stats.spearmanr(student, teacher).statistic),
        "best_tenth_overlap": len(shared) / best,
    }
