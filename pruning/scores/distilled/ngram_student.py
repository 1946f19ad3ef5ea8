"""A distilled scorer: an expensive score, learned from a sample by a linear model of n-grams.

    python -m pruning distill --gin_file=configs/score/distill.gin --gin.CORPUS=...

The teacher has scored a part of the corpus (a selection with Split or Random, given to `score` as
`within`), or its scores are in the source ("corpus:score"). The student is fitted to them by
regression on n-grams of the corpus's tokens, and scores everything.

Choices
- The target is any score of a score set, as `select` names it. For Ask-LLM it is the log-odds of
  yes against no, which is unbounded, while the probability is crowded at both ends.
- The student reads as much of a document as the teacher read, according to the teacher's score set.
- No document is scored by a model that was fitted to it or to a copy of the part that is read
  (folds.py). Agreement with the teacher is measured on these scores: Spearman's correlation, and
  the share of the teacher's best tenth in the student's own, beside those of length and a random
  score.
- The penalty, and whether places in the text are features, is chosen once, on a held-out tenth of
  the contents (on more tenths, in turn, where these are small), and not for each fold, because
  every choice costs several fits. This makes the reported agreement slightly optimistic.
- The student is stored with its scores, and applied to another corpus of the same vocabulary by
  `Distill.model`.
- The time per document of both is in measured.json of their score sets.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from pruning.corpus.reader import Corpus
from pruning.scores import score_set
from pruning.scores.content import content_hashes
from pruning.scores.distilled.lessons import Lessons, agreement, beside
from pruning.scores.fitted import fit_once
from pruning.scores.score_set import Column
from pruning.scores.terms import CORPUS, Term
from pruning.scores.text import linear, passes, pieces
from pruning.scores.text.folds import FoldedLinear, Folds
from pruning.scores.text.linear import Bags, Linear
from pruning.scores.text.pieces import Pieces
from pruning.scores.text.texts import Texts
from pruning.store import late, progress, randomness
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.manifest import ArtifactError
from pruning.store.parallel import require_processes
from pruning.store.randomness import Stream

NAME = "Distill"
MODEL = "student.npz"

_ASKED = 1000  # held-out documents that choose the features and the penalty

COLUMNS = {"student": Column(pa.float32(), "the teacher's score, as predicted by the student")}


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Settings of `distill`.

    Attributes:
      corpus: the corpus to score.
      teacher: a score set of the corpus, whose scored documents are the examples. None if `score`
        is a column of the corpus, or if a model is applied.
      output: directory of the score set.
      score: the value to learn, named as for `select`.
      model: a score set of an earlier `distill`, whose student is applied instead of training.
      within: a selection of the corpus to score; other documents get the status "not_selected".
      n: number of tokens of the longest n-gram.
      buckets: number of buckets that n-grams are hashed into.
      tokens: number of tokens that are read of a document; None for as many as the teacher read.
      examples: largest number of the teacher's documents to train on.
      l2: weights of the penalty to choose from, in documents.
      places: number of parts of what the teacher reads in which tokens may be counted apart; 0 not
        to try it, as where the teacher reads whole documents.
      folds: number of models, each fitted without one part of the examples.
      seed: seed of the examples and the folds.
      workers: number of local processes; 0 for one per CPU.
    """

    corpus: str
    teacher: str | None = None
    output: str = ""
    score: str = "ask_llm_ratio"
    model: str | None = None
    within: str | None = None
    n: int = 2
    buckets: int = 1 << 20
    tokens: int | None = None
    examples: int = 200_000
    l2: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    places: int = 8
    folds: int = 5
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        require_processes(self.workers)
        if not self.output:
            raise ValueError("output is the directory of the score set: set it.")
        if self.examples < 20 or not self.l2 or min(self.l2) <= 0 or self.folds < 2:
            raise ValueError("examples is at least 20, folds 2, and l2 holds positive numbers.")
        Pieces(self.n, self.buckets, self.tokens)  # raises an error for what it cannot be
        if self.places and self.places < 2:
            raise ValueError(f"places is at least 2, or 0 for none, not {self.places}.")
        own = Term(self.score).source == CORPUS
        if (self.teacher is None) == (self.model is None and not own):
            raise ValueError(
                "learn from a teacher or from a column of the corpus (score=corpus:NAME), or "
                "apply a model: set one of the three."
            )


CONFIGURABLES: dict[str, type] = {NAME: DistillConfig}


@late.stage
def run(config: DistillConfig) -> Artifact:
    """Make the score set, or resume an interrupted run.

    Raises:
      ArtifactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output holds work of other settings.
      LinearError: the teacher's scores are all the same.
    """
    texts = Texts.open(config.corpus, config.within)
    if config.model is not None:
        return _apply(config, texts, load_artifact(config.model, score_set.KIND))
    inputs = texts.inputs("corpus")
    teacher = None
    if config.teacher is not None:
        teacher = load_artifact(config.teacher, score_set.KIND)
        require_input(teacher, "corpus", texts.corpus.artifact)
        inputs |= {"teacher": teacher}
    names = ("score", "n", "buckets", "tokens", "examples", "l2", "places", "folds", "seed")
    build = score_set.begin(
        config.output,
        {"scheme": pieces.SCHEME} | {name: getattr(config, name) for name in names},
        inputs,
        texts.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    content, summary = fit_once(build, lambda: learn(config, texts.corpus, teacher))
    build.write_file(MODEL, content)
    passes.score(build, texts, NGramStudent.from_bytes(content), COLUMNS, config.workers)
    summary |= {"teacher": config.score, "vocabulary": texts.corpus.vocabulary.digest}
    scores = score_set.finish(build, "distilled", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def _apply(config: DistillConfig, texts: Texts, fitted: Artifact) -> Artifact:
    """Score a corpus with the student of another score set."""
    if MODEL not in fitted.manifest.files:
        raise ArtifactError(f"{fitted.path} holds no {MODEL}: it is no student's score set.")
    known = fitted.manifest.summary.get("vocabulary")
    if known != texts.corpus.vocabulary.digest:
        raise ArtifactError(
            f"the student in {fitted.path} reads tokens of another vocabulary than that of "
            f"{texts.corpus.artifact.path}: ingest the texts with the vocabulary that it knows."
        )
    inputs = texts.inputs("corpus") | {"model": fitted}
    identity = {"scheme": pieces.SCHEME}
    build = score_set.begin(config.output, identity, inputs, texts.corpus, COLUMNS)
    if done := passes.finished(build):
        return done
    content = fitted.file(MODEL)
    build.write_file(MODEL, content)
    passes.score(build, texts, NGramStudent.from_bytes(content), COLUMNS, config.workers)
    summary = {"fitted_by": fitted.digest, "vocabulary": known}
    scores = score_set.finish(build, "distilled", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def learn(
    config: DistillConfig, corpus: Corpus, teacher: Artifact | None
) -> tuple[NGramStudent, dict]:
    """Return the student, and its agreement with the teacher out of fold."""
    lessons = Lessons.of(corpus, teacher, config.score, config.examples, config.seed)
    reads = features(config, config.tokens or lessons.tokens)
    bags, hashes = [], []
    with progress.track("examples", len(lessons.targets), "documents") as task:
        for shard, rows in enumerate(lessons.rows):
            for batch in Texts(corpus).read(shard, rows, reads):
                bags.append(reads.bags(reads.ngrams(batch)))
                hashes.append(content_hashes(batch, reads.first))
                task.advance(len(batch))
    examples, targets, contents = Bags.join(bags), lessons.targets, np.concatenate(hashes)
    folded, l2 = cross_fitted(config, reads, examples, targets, contents)
    student = NGramStudent(folded)
    lengths = [corpus.lengths_of(shard, rows) for shard, rows in enumerate(lessons.rows)]
    summary = {
        "examples": len(targets),
        "tokens": reads.first,
        "l2": l2,
        "places": student.features.places,
        "spearman_beside": beside(
            np.concatenate(lengths), lessons.ids, targets, Stream.STUDENT_BESIDE, config.seed
        ),
    }
    found = folded(examples.below(student.features.size), folded.folds.of(contents))
    return student, {**summary, **agreement(found, targets)}


def features(config: DistillConfig, tokens: int | None) -> Pieces:
    """Return all features that may be chosen, of a teacher that reads so many tokens."""
    places = min(config.places, tokens or 0)
    return Pieces(config.n, config.buckets, tokens, places if places > 1 else 0)


def cross_fitted(
    config: DistillConfig, reads: Pieces, bags: Bags, targets: np.ndarray, contents: np.ndarray
) -> tuple[FoldedLinear, float]:
    """Return a model for each fold, with the features and the penalty of the smallest error.

    Args:
      reads, bags: all features, and the examples' values of them.
      targets: float64 [documents].
      contents: int64 [documents], hashes; copies are in the same fold.
    """
    folds = Folds(Stream.STUDENT_FOLD, config.seed, config.folds)
    fold = folds.of(contents)
    chosen, l2 = _chosen(config, reads, bags, targets, contents)
    bags = bags.below(chosen.size)
    models = []
    with progress.track("fit", folds.count, "folds") as task:
        for k in range(folds.count):
            known = np.flatnonzero(fold != k)
            models.append(fitted(chosen, bags.take(known), targets[known], l2))
            task.advance()
    return FoldedLinear(folds, tuple(models)), l2


def _chosen(
    config: DistillConfig, reads: Pieces, bags: Bags, targets: np.ndarray, contents: np.ndarray
) -> tuple[Pieces, float]:
    """Return the features and penalty with the smallest error on held-out tenths."""
    options = [dataclasses.replace(reads, places=0)] + [reads] * bool(reads.places)
    if len(config.l2) == len(options) == 1:
        return reads, config.l2[0]
    draws = randomness.uniform(Stream.STUDENT_PENALTY, config.seed, contents)
    tenth = np.searchsorted(np.quantile(draws, np.arange(1, 10) / 10, method="lower"), draws)
    tenths = range(min(math.ceil(10 * _ASKED / len(targets)), 10))

    def best(option: Pieces) -> tuple[float, float]:
        few = bags.below(option.size)
        parts = [(few.take(tenth != k), few.take(tenth == k)) for k in tenths]

        def error(l2: float) -> float:
            total = 0.0
            for k, (known, asked) in zip(tenths, parts, strict=True):
                found = fitted(option, known, targets[tenth != k], l2)(asked)
                total += float(np.square(found - targets[tenth == k]).sum())
            return total

        return smallest(error, sorted(config.l2))

    errors = [best(option) for option in options]
    found = min(range(len(options)), key=lambda i: errors[i][0])
    return options[found], errors[found][1]


def smallest(error: Callable[[float], float], values: Sequence[float]) -> tuple[float, float]:
    """Return the smallest error and its value, walking downhill from the middle of `values`.

    An error of a penalty has one minimum, so this takes about half the fits of trying all.
    """
    known = functools.cache(error)
    at = len(values) // 2
    while True:
        near = values[max(at - 1, 0) : at + 2]
        best = values.index(min(near, key=known))
        if best == at:
            return known(values[at]), values[at]
        at = best


def fitted(reads: Pieces, bags: Bags, targets: np.ndarray, l2: float) -> Linear:
    """Return a model in the teacher's units; raise LinearError when all targets are equal."""
    mean, spread = float(targets.mean()), float(targets.std()) or 1.0
    found = linear.fit(bags, (targets - mean) / spread, reads, "squared", l2)
    return Linear(reads, found.weights * np.float32(spread), found.bias * spread + mean)


@dataclasses.dataclass(frozen=True)
class NGramStudent:
    """Linear models of the teacher's score over n-grams of tokens, one for each fold."""

    model: FoldedLinear

    column = "tokens"

    @property
    def features(self) -> Pieces:
        features = self.model.features
        assert isinstance(features, Pieces)
        return features

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        return self.features.batches(column)

    def __call__(self, documents: pa.Array) -> dict[str, np.ndarray]:
        grams = self.features.ngrams(documents)
        fold = self.model.folds.of(content_hashes(documents, self.features.first))
        values = self.model(self.features.bags(grams), fold)
        return {"student": np.where(grams.lengths > 0, values, np.nan)}

    def to_bytes(self) -> bytes:
        return self.model.to_bytes(calibration=np.zeros(0))

    @classmethod
    def from_bytes(cls, content: bytes) -> NGramStudent:
        """Read a model; raise LinearError when it was fitted to other features."""
        model, _ = FoldedLinear.from_bytes(content, Stream.STUDENT_FOLD)
        return cls(model)
