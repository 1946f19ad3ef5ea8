"""A quality classifier: hashed n-grams of good documents against bad or random ones.

    python -m pruning classifier --gin_file=configs/score/classifier.gin --gin.CORPUS=...

This inexpensive baseline outperformed Ask-LLM and perplexity in DataComp-LM (Li et al. 2024): train
on documents labeled as good against others, score everything, keep the top.

Choices
- Good documents are a corpus, or a selection of one: a set given by the user, or the documents of
  this corpus with the highest values of another score.
- The other class is given as `bad`, or drawn at random from the corpus without its good documents.
  Some random documents are good as well, which shifts the score but hardly changes its order.
- No document is scored by a model that was fitted to it or to a copy of it (folds.py), so that
  examples have no advantage in a ranking of the corpus.
- Both classes have the same total weight. `quality` is the log-odds at even prior odds, a term that
  can be added to others; `quality_probability` is calibrated on out-of-fold values (Platt 1999).
- A fitted model can be applied to another corpus: `Classifier.model` names its score set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from scipy import optimize, special

from pruning.corpus.layout import rows_of, shards_of
from pruning.scores import score_set
from pruning.scores.content import content_hashes
from pruning.scores.fitted import fit_once
from pruning.scores.intervals import auc
from pruning.scores.score_set import Column
from pruning.scores.text import linear, passes
from pruning.scores.text.folds import FoldedLinear, Folds
from pruning.scores.text.hashing import SCHEME, Features, hashed_ngrams
from pruning.scores.text.linear import Bags
from pruning.scores.text.texts import Texts, sample
from pruning.store import late, progress, randomness
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.manifest import ArtifactError, config_of
from pruning.store.parallel import require_processes
from pruning.store.randomness import Stream

NAME = "Classifier"
MODEL = "classifier.npz"

COLUMNS = {
    "quality": Column(pa.float32(), "log-odds that the document is a good one, at even odds"),
    "quality_probability": Column(
        pa.float32(),
        "probability that it is a good one among as many good as other documents, calibrated out "
        "of fold",
    ),
}


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Settings of `classifier`.

    Attributes:
      corpus: the corpus to score.
      output: directory of the score set.
      good: a corpus of good documents; None for `corpus` itself, of which good_within is good.
      good_within: a selection of `good`.
      bad: a corpus of bad documents; None for `corpus` itself, of which bad_within is bad. With
        neither, random documents of the corpus are the other class.
      bad_within: a selection of `bad`.
      model: a score set of an earlier `classifier`, whose model is applied instead of training.
      within: a selection of the corpus; other documents get the status "not_selected" and are not
        drawn as examples.
      features: `@Features()`.
      examples: largest number of examples of each class.
      folds: number of models, each fitted without one part of the examples.
      l2: weight of the penalty, in documents.
      seed: seed of the examples and the folds.
      workers: number of local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    good: str | None = None
    good_within: str | None = None
    bad: str | None = None
    bad_within: str | None = None
    model: str | None = None
    within: str | None = None
    features: Features = dataclasses.field(default_factory=lambda: Features(buckets=1 << 20))
    examples: int = 100_000
    folds: int = 5
    l2: float = 0.1
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        require_processes(self.workers)
        examples = (self.good, self.good_within, self.bad, self.bad_within)
        if self.model is not None and any(path is not None for path in examples):
            raise ValueError("model applies a fitted classifier: remove good and bad.")
        if self.model is None and self.good is None and self.good_within is None:
            raise ValueError("say what is good: set good, good_within, or both; or set model.")
        if self.examples < 2 or self.l2 <= 0 or self.folds < 2:
            raise ValueError("examples and folds are at least 2, and l2 is positive.")


CONFIGURABLES: dict[str, type] = {NAME: ClassifierConfig, "Features": Features}


@late.stage
def run(config: ClassifierConfig) -> Artifact:
    """Make the score set, or resume an interrupted run.

    Raises:
      ArtifactError: an input is missing, inputs do not belong together, or one class is empty.
      ConfigurationChanged: the output holds work of other settings.
    """
    texts = Texts.open(config.corpus, config.within)
    if config.model is not None:
        return _apply(config, texts, load_artifact(config.model, score_set.KIND))
    good = Texts.open(config.good or config.corpus, config.good_within)
    inputs = texts.inputs("corpus") | good.inputs("good")
    bad = None
    if config.bad is not None or config.bad_within is not None:
        bad = Texts.open(config.bad or config.corpus, config.bad_within)
        inputs |= bad.inputs("bad")
    names = ("examples", "folds", "l2", "seed")
    build = score_set.begin(
        config.output,
        {
            "features": config_of(config.features),
            "hashes": SCHEME,
            **{name: getattr(config, name) for name in names},
        },
        inputs,
        texts.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    content, summary = fit_once(build, lambda: train(config, texts, good, bad))
    build.write_file(MODEL, content)
    passes.score(build, texts, Quality.from_bytes(content), COLUMNS, config.workers)
    scores = score_set.finish(build, "classifier", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def _apply(config: ClassifierConfig, texts: Texts, scores: Artifact) -> Artifact:
    """Score a corpus with the model of another score set."""
    quality = fitted_model(scores)
    inputs = texts.inputs("corpus") | {"model": scores}
    build = score_set.begin(config.output, {"hashes": SCHEME}, inputs, texts.corpus, COLUMNS)
    if done := passes.finished(build):
        return done
    build.write_file(MODEL, scores.file(MODEL))
    passes.score(build, texts, quality, COLUMNS, config.workers)
    summary = {"fitted_by": scores.digest}
    applied = score_set.finish(build, "classifier", COLUMNS, summary)
    assert applied is not None  # this process had every shard
    return applied


def fitted_model(scores: Artifact) -> Quality:
    """Return the classifier of a score set.

    Raises:
      ArtifactError: it has none.
    """
    if MODEL not in scores.manifest.files:
        raise ArtifactError(f"{scores.path} holds no {MODEL}: it is not a classifier's score set.")
    return Quality.from_bytes(scores.file(MODEL))


def train(
    config: ClassifierConfig, texts: Texts, good: Texts, bad: Texts | None = None
) -> tuple[Quality, dict]:
    """Fit a model for each fold, and evaluate it on the examples outside its training set."""
    parts = [Examples.draw(config, good, draws_of(config.seed))]
    taken = good if good.corpus.artifact.digest == texts.corpus.artifact.digest else None
    others = bad or texts
    parts.append(
        Examples.draw(config, others, draws_of(config.seed, None if bad else taken)).without(
            parts[0].hashes
        )
    )
    bags = Bags.join([part.bags for part in parts])
    hashes = np.concatenate([part.hashes for part in parts])
    is_good = np.repeat([True, False], [len(part.hashes) for part in parts])
    if is_good.all() or not is_good.any():
        raise ArtifactError(
            f"{int(is_good.sum())} of {len(is_good)} examples are good: there must be both kinds. "
            f"Look at {good.corpus.artifact.path} and {others.corpus.artifact.path}."
        )
    folds = Folds(Stream.CLASSIFIER_HELD_OUT, config.seed, config.folds)
    fold = folds.of(hashes)
    models = []
    with progress.track("fit", folds.count, "folds") as task:
        for k in range(folds.count):
            rows = np.flatnonzero(fold != k)
            if is_good[rows].all() or not is_good[rows].any():
                raise ArtifactError(
                    f"all of the {len(rows)} examples outside of fold {k} are of one kind: give "
                    "more examples."
                )
            models.append(
                linear.fit(
                    bags.take(rows), is_good[rows], config.features, "logistic", config.l2, True
                )
            )
            task.advance()
    folded = FoldedLinear(folds, tuple(models))
    values = folded(bags, fold)
    found = auc(values[is_good], values[~is_good])
    other_name = "random" if bad is None else "bad"
    return Quality(folded, *calibrated(values, is_good)), {
        "examples": {"good": int(is_good.sum()), other_name: int((~is_good).sum())},
        "held_out": len(values),
        "held_out_auc": found,
        "held_out_auc_tells": (
            f"how well good examples are told from {other_name} documents by models that have seen "
            "neither; not how good a document is"
        ),
    }


def draws_of(seed: int, taken: Texts | None = None):
    """Return a function from document ids to draws; documents in `taken` are never drawn."""

    def draws(ids: np.ndarray) -> np.ndarray:
        found = randomness.uniform(Stream.CLASSIFIER_SAMPLE, seed, ids)
        if taken is None or not len(ids):
            return found
        return np.where(np.isin(rows_of(ids), taken.rows(int(shards_of(ids[0])))), np.inf, found)

    return draws


@dataclasses.dataclass(frozen=True)
class Examples:
    """Documents of one class: their vectors, and hashes of their content int64 [documents]."""

    bags: Bags
    hashes: np.ndarray

    @classmethod
    def draw(cls, config: ClassifierConfig, source: Texts, draws) -> Examples:
        """Read the examples with the lowest draws."""
        bags, hashes = [], [np.zeros(0, np.int64)]
        with progress.track("examples", None, "documents") as task:
            for shard, rows in enumerate(sample(source, config.examples, draws)):
                for batch in source.read(shard, rows, config.features):
                    bags.append(Bags.of(hashed_ngrams(batch, config.features)))
                    hashes.append(content_hashes(batch))
                    task.advance(len(batch))
        empty = Bags(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(1, np.int64))
        return cls(Bags.join([empty, *bags]), np.concatenate(hashes))

    def without(self, hashes: np.ndarray) -> Examples:
        """Return the examples whose content hash is not among those given."""
        rows = np.flatnonzero(~np.isin(self.hashes, hashes))
        return Examples(self.bags.take(rows), self.hashes[rows])


def calibrated(values: np.ndarray, is_good: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept of the log-odds as a function of out-of-fold values.

    Classes have equal weight. Targets are Platt's (1999): moved away from 0 and 1 by the rule of
    succession, so that separable examples do not give an infinite slope.
    """
    weight = linear.class_weights(is_good)
    good, others = int(is_good.sum()), int((~is_good).sum())
    target = np.where(is_good, (good + 1) / (good + 2), 1 / (others + 2))

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        odds = parameters[0] * values + parameters[1]
        loss = weight * (np.logaddexp(0.0, odds) - target * odds)
        slope = weight * (special.expit(odds) - target) / len(values)
        return float(loss.mean()), np.array([slope @ values, slope.sum()])

    found = optimize.minimize(objective, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    return float(found[0]), float(found[1])


@dataclasses.dataclass(frozen=True)
class Quality:
    """A fitted classifier, callable on texts.

    Attributes:
      model: a linear model for each fold.
      slope, intercept: calibrated log-odds as a linear function of the model's value.
    """

    model: FoldedLinear
    slope: float
    intercept: float

    column = "text"

    def batches(self, column: pa.Array) -> Iterator[pa.Array]:
        return Features().batches(column)

    def __call__(self, documents: pa.Array) -> dict[str, np.ndarray]:
        features = self.model.features
        assert isinstance(features, Features)
        grams = hashed_ngrams(documents, features)
        values = self.model(Bags.of(grams), self.model.folds.of(content_hashes(documents)))
        values[grams.lengths == 0] = np.nan
        odds = self.slope * values + self.intercept
        return {"quality": values, "quality_probability": special.expit(odds)}

    def to_bytes(self) -> bytes:
        return self.model.to_bytes(calibration=np.array([self.slope, self.intercept]))

    @classmethod
    def from_bytes(cls, content: bytes) -> Quality:
        """Read a model; raise LinearError when it was fitted to other hashes."""
        model, calibration = FoldedLinear.from_bytes(content, Stream.CLASSIFIER_HELD_OUT)
        slope, intercept = calibration.tolist()
        return cls(model, slope, intercept)
