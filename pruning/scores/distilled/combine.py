"""Weights of several scores, learned from a label by logistic regression.

    python -m pruning combine --gin_file=configs/score/combine.gin --gin.CORPUS=...

Some documents have labels (by people, by a judge, by a score in the source). This stage learns the
weights of a sum of terms that best separate good documents from others, and writes the weighted sum
as a score set of every document.

Choices
- Terms are standardized over the labeled documents after their own scales, so that weights can be
  compared with each other. Both classes have the same total weight.
- Cross-validated: folds by a hash of the content (folds.py). Every document is scored by the
  weights of its fold, which were learned without it and its copies. The area under the ROC curve in
  the summary is of these scores.
- The summary has the weights of every fold, and the area of each term alone. Where a single term is
  as good, the sum is not worth its cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import optimize, special

from pruning.corpus.layout import doc_ids
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.scores import score_set
from pruning.scores.intervals import auc_interval
from pruning.scores.score_set import Column
from pruning.scores.terms import CORPUS, SCORED, Combination, Term, read_scores, read_terms
from pruning.scores.text.folds import Folds
from pruning.scores.text.linear import class_weights
from pruning.store import late, progress
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.manifest import ArtifactError, config_of
from pruning.store.randomness import Stream

NAME = "Combine"

COLUMNS = {
    "combined": Column(
        pa.float32(), "log-odds that the document is a good one, at even odds, out of fold"
    )
}


@dataclasses.dataclass(frozen=True)
class CombineConfig:
    """Settings of `combine`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the score set.
      terms: @Term(), as of a selection; their weights are learned and left at 1. Scales "none" and
        "log".
      label: label of some documents: "corpus:NAME", or a value of the score set "label".
      label_from: least value of the label of a good document.
      scores: score sets by name.
      within: a selection; other documents get the status "not_selected" and are not trained on.
      folds: number of folds.
      l2: weight of the penalty, in documents.
      seed: seed of the folds.
    """

    corpus: str
    output: str
    terms: tuple[Term, ...]
    label: str
    label_from: float
    scores: Mapping[str, str] = dataclasses.field(default_factory=dict)
    within: str | None = None
    folds: int = 5
    l2: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.terms or self.folds < 2 or self.l2 < 0:
            raise ValueError("terms are one or more, folds 2 or more, and l2 is not negative.")
        if any(term.weight != 1 or term.scale not in ("none", "log") for term in self.terms):
            raise ValueError('terms have the weight 1 and the scale "none" or "log".')
        used = {term.source for term in (*self.terms, self.label_term)} - {CORPUS}
        if used != set(self.scores):
            raise ValueError(
                f"terms and label read the score sets {', '.join(sorted(used)) or 'none'}; those "
                f"given are: {', '.join(sorted(self.scores)) or 'none'}."
            )

    @property
    def label_term(self) -> Term:
        return Term(self.label, scores="label")


CONFIGURABLES: dict[str, type] = {NAME: CombineConfig, "Term": Term}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of one fold: value = bias + sum of weight * (term - mean) / spread."""

    bias: float
    weight: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return log-odds. values: float64 [n, terms]."""
        return self.bias + ((values - self.mean) / self.spread) @ self.weight


def fit(values: np.ndarray, good: np.ndarray, l2: float) -> Weights:
    """Return the weights that best separate the good documents from the others.

    Args:
      values: float64 [documents, terms], finite.
      good: bool [documents], with both values.
      l2: weight of the penalty, l2 / (2 documents) * |weights|^2.
    """
    mean, spread = values.mean(axis=0), values.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    x = (values - mean) / spread
    importance = class_weights(good.astype(np.float64))
    count = len(good)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = parameters[:-1], parameters[-1]
        odds = x @ weight + bias
        loss = importance * (np.logaddexp(0.0, odds) - good * odds)
        slope = importance * (special.expit(odds) - good) / count
        total = loss.mean() + 0.5 * l2 / count * (weight @ weight)
        return float(total), np.append(x.T @ slope + l2 / count * weight, slope.sum())

    start = np.zeros(values.shape[1] + 1)
    found = optimize.minimize(objective, start, jac=True, method="BFGS").x
    return Weights(float(found[-1]), found[:-1], mean, spread)


@late.stage
def run(config: CombineConfig) -> Artifact:
    """Learn the weights and make the score set, or resume an interrupted run.

    Raises:
      ArtifactError: inputs do not belong together, or too few documents of a class are labeled.
      ConfigurationChanged: the output holds work of other settings.
    """
    corpus = load_corpus(config.corpus)
    sets = {name: load_artifact(path, score_set.KIND) for name, path in config.scores.items()}
    for one in sets.values():
        require_input(one, "corpus", corpus.artifact)
    within = None if config.within is None else load_selection(config.within, corpus.artifact)
    names = ("label", "label_from", "folds", "l2", "seed")
    identity = {"terms": config_of(config)["terms"]}
    identity |= {name: getattr(config, name) for name in names}
    inputs = {f"scores_{name}": one for name, one in sets.items()}
    if within is not None:
        inputs["corpus_within"] = within.artifact
    build = score_set.begin(config.output, identity, inputs, corpus, COLUMNS)
    if build.finished:
        return load_artifact(build.path, score_set.KIND)
    shards = _Shards(config, corpus, sets, within)
    models, summary = learn(config, shards)
    with progress.track("score", corpus.num_shards, "shards") as task:
        for shard in build.pending():
            values, status, fold = shards.read(shard)
            combined = np.zeros(len(fold))
            for k, model in enumerate(models):
                combined[fold == k] = model(values[fold == k])
            score_set.write(build, shard, corpus, COLUMNS, status, {"combined": combined})
            task.advance()
    scores = score_set.finish(build, "combined", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def learn(config: CombineConfig, shards: _Shards) -> tuple[list[Weights], dict[str, Any]]:
    """Return the weights of every fold, and their evaluation out of fold."""
    parts = [shards.labelled(shard) for shard in range(shards.corpus.num_shards)]
    values, good, fold = (np.concatenate(column) for column in zip(*parts, strict=True))
    models = []
    for k in range(config.folds):
        known = good[fold != k]
        if min(known.sum(), (~known).sum()) < 2:
            raise ArtifactError(
                f"{int(good.sum())} good and {int((~good).sum())} other documents have a label and "
                f"all scores, {len(known)} of them outside of fold {k}: that is too few. Look at "
                "Combine.label and label_from."
            )
        models.append(fit(values[fold != k], known, config.l2))
    scored = np.zeros(len(good))
    for k, model in enumerate(models):
        scored[fold == k] = model(values[fold == k])

    def area(column: np.ndarray) -> dict[str, float] | None:
        found = auc_interval(column[good], column[~good])
        return None if found is None else found._asdict()

    weights = np.stack([model.weight for model in models])
    terms = [
        {
            "term": term.value,
            "scores": None if term.source == CORPUS else term.scores,
            "weight": float(weights[:, i].mean()),
            "weights_of_folds": weights[:, i].tolist(),
            "auc_alone": area(values[:, i]),
        }
        for i, term in enumerate(config.terms)
    ]
    return models, {
        "labelled": {"good": int(good.sum()), "others": int((~good).sum())},
        "auc_out_of_fold": area(scored),
        "terms": terms,
    }


@dataclasses.dataclass(frozen=True)
class _Shards:
    """Terms and labels of the documents, shard by shard."""

    config: CombineConfig
    corpus: Corpus
    sets: Mapping[str, Artifact]
    within: Selection | None

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return terms float64 [n, terms], statuses int8 [n], and folds int64 [n]."""
        hashes = self.corpus.columns(shard, ["text_hash"])["text_hash"].to_numpy()
        ids = doc_ids(shard, np.arange(len(hashes)))
        read = {term.source for term in self.config.terms}
        sets = {name: one for name, one in self.sets.items() if name in read}
        found = read_terms(self.config.terms, self.corpus.artifact, sets, shard, ids)
        scaled = [
            Combination((term,)).of((value,))
            for term, value in zip(self.config.terms, found.values, strict=True)
        ]
        values = np.stack(scaled, axis=1)
        status = score_set.status_within(self.corpus, shard, self.within)
        ok = score_set.ok(status)
        codes = [_status(name) for name in found.reasons]
        status = np.where(ok, np.asarray(codes, np.int8)[found.reason], status)
        finite = np.isfinite(values).all(axis=1)
        status[score_set.ok(status) & ~finite] = _status(score_set.NO_VALUE)
        folds = Folds(Stream.COMBINE_HELD_OUT, self.config.seed, self.config.folds)
        return values, status.astype(np.int8), folds.of(hashes.view(np.int64))

    def labelled(self, shard: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return terms, goodness bool [n] and folds of the documents with a label and terms."""
        values, status, fold = self.read(shard)
        term = self.config.label_term
        sets = {name: one for name, one in self.sets.items() if name == term.source}
        ids = doc_ids(shard, np.arange(len(fold)))
        label = read_scores(Combination((term,)), self.corpus.artifact, sets, shard, ids)
        known = score_set.ok(status) & (label.reason == SCORED)
        return values[known], label.score[known] >= self.config.label_from, fold[known]


def _status(name: str) -> int:
    known: Sequence[str] = score_set.ALL_STATUSES
    return known.index(name if name in known else score_set.NO_VALUE)
