"""DSIR: how much more likely a document is as text of a target than as text of the corpus.

    python -m pruning dsir --gin_file=configs/score/dsir.gin --gin.CORPUS=... --gin.TARGET=...

Two bags of hashed n-grams, one of the corpus and one of the target, give every bucket a log-ratio;
a document's importance weight is the sum over its n-grams of log p_target - log p_raw (Xie et al.
2023). Their sampler draws documents without replacement with probabilities proportional to the
weight: Softmax with temperature 1 over `dsir_sum`.

Choices
- `dsir_sum` is the paper's weight and grows with the length of the document; `dsir_mean`, per
  n-gram, does not. Top or Softmax over either is one configuration apart.
- The target is a corpus, or a selection of one, so that whatever can be ingested can be a target.
- Every bucket begins with `smoothing` counts, in both bags, so that what only one of them holds has
  a finite ratio.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from pruning import derived
from pruning.artefact import Artefact, config_of
from pruning.ngrams import passes
from pruning.ngrams.hashing import SCHEME, Features, NGrams
from pruning.ngrams.passes import Texts
from pruning.scorers import Column

NAME = "DSIR"

COLUMNS = {
    "dsir_sum": Column(pa.float32(), "sum over the n-grams of log p_target - log p_raw, in nats"),
    "dsir_mean": Column(pa.float32(), "the same per n-gram"),
    "n_ngrams": Column(pa.int32(), "how many n-grams the sum is over"),
}


@dataclasses.dataclass(frozen=True)
class DSIRConfig:
    """Settings of `dsir`.

    Attributes:
      corpus: the corpus to score.
      target: a corpus of what is wanted; the same one, with `target_within`, is fine.
      output: the score set's directory.
      target_within: a selection of the target.
      within: a selection of the corpus; other documents get the status "not_selected" and do not
        count as raw text.
      features: `@Features()`; unigrams and bigrams in 10,000 buckets by default, as in the paper.
      smoothing: counts that every bucket begins with.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    target: str
    output: str
    target_within: str | None = None
    within: str | None = None
    features: Features = dataclasses.field(default_factory=Features)
    smoothing: float = 1.0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.smoothing <= 0:
            raise ValueError(f"smoothing is positive, not {self.smoothing}.")


CONFIGURABLES: dict[str, type] = {NAME: DSIRConfig, "Features": Features}


def run(config: DSIRConfig) -> Artefact:
    """Makes the score set, or goes on with it.

    Raises:
      ArtefactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output was begun with other settings.
    """
    raw = Texts.open(config.corpus, config.within)
    target = Texts.open(config.target, config.target_within)
    build = derived.begin(
        config.output,
        {
            "features": config_of(config.features),
            "hashes": SCHEME,
            "smoothing": config.smoothing,
        },
        raw.inputs("corpus") | target.inputs("target"),
        raw.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    counts = {
        name: passes.count(build, name, texts, config.features, config.workers)
        for name, texts in (("raw", raw), ("target", target))
    }
    ratios = log_ratios(counts["target"], counts["raw"], config.smoothing)
    passes.score(build, raw, config.features, ImportanceWeights(ratios), COLUMNS, config.workers)
    scores = derived.finish(
        build,
        "dsir",
        COLUMNS,
        {
            "documents": {"raw": raw.documents, "target": target.documents},
            "ngrams": {name: int(values.sum()) for name, values in counts.items()},
            "divergence": divergence(ratios, counts["target"]),
        },
    )
    assert scores is not None  # every shard was ours
    return scores


def log_ratios(target: np.ndarray, raw: np.ndarray, smoothing: float) -> np.ndarray:
    """log p_target - log p_raw of every bucket.

    Args:
      target, raw: int64 [buckets], counts.
      smoothing: added to every count.

    Returns:
      float64 [buckets].
    """
    logs = [np.log(counts + smoothing) for counts in (target, raw)]
    totals = [np.log(counts.sum() + smoothing * len(counts)) for counts in (target, raw)]
    return (logs[0] - totals[0]) - (logs[1] - totals[1])


def divergence(ratios: np.ndarray, target: np.ndarray) -> float:
    """Nats per n-gram by which the target differs from the corpus (KL of the two bags)."""
    return float(ratios @ target / max(target.sum(), 1))


@dataclasses.dataclass(frozen=True)
class ImportanceWeights:
    """N-grams -> the columns. `ratios`: float64 [buckets]."""

    ratios: np.ndarray

    def __call__(self, grams: NGrams) -> dict[str, np.ndarray]:
        sums = grams.sums(self.ratios)
        lengths = grams.lengths
        return {
            "dsir_sum": sums,
            "dsir_mean": sums / np.maximum(lengths, 1),
            "n_ngrams": lengths,
        }
