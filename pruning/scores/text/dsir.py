"""DSIR: the importance weight of a document, its likelihood ratio between a target and the corpus.

    python -m pruning dsir --gin_file=configs/score/dsir.gin --gin.CORPUS=... --gin.TARGET=...

Two bags of hashed n-grams, one of the corpus and one of the target, give every bucket a log-ratio;
a document's importance weight is the sum over its n-grams of log p_target - log p_raw (Xie et al.
2023). Their sampler draws documents without replacement with probabilities proportional to the
weight: Softmax with temperature 1 over `dsir_sum`.

Choices
- `dsir_sum` is the paper's weight. A sum of mostly negative terms falls with the length of the
  document (correlation -0.75 on C4), so that the paper's sampler keeps short documents.
  `dsir_mean`, per n-gram, does not: configs/select/dsir.gin selects by it.
- The target is a corpus or a selection of one, so everything that can be ingested can be a target.
- Every bucket of both bags begins with `smoothing` counts, so that an n-gram of only one of them
  has a finite ratio.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.text import passes
from pruning.scores.text.hashing import SCHEME, Features, NGrams, OfNGrams
from pruning.scores.text.texts import Texts
from pruning.store import late
from pruning.store.artifact import Artifact
from pruning.store.manifest import config_of
from pruning.store.parallel import require_processes

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
      target: a corpus of wanted text; it may be the same one with `target_within`.
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
        require_processes(self.workers)
        if self.smoothing <= 0:
            raise ValueError(f"smoothing is positive, not {self.smoothing}.")


CONFIGURABLES: dict[str, type] = {NAME: DSIRConfig, "Features": Features}


@late.stage
def run(config: DSIRConfig) -> Artifact:
    """Make the score set, or resume it.

    Raises:
      ArtifactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output was begun with other settings.
    """
    raw = Texts.open(config.corpus, config.within)
    target = Texts.open(config.target, config.target_within)
    build = score_set.begin(
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
    weights = ImportanceWeights(config.features, ratios)
    passes.score(build, raw, weights, COLUMNS, config.workers)
    scores = score_set.finish(
        build,
        "dsir",
        COLUMNS,
        {
            "documents": {"raw": raw.documents, "target": target.documents},
            "ngrams": {name: int(values.sum()) for name, values in counts.items()},
            "divergence": divergence(ratios, counts["target"]),
        },
    )
    assert scores is not None  # this process had every shard
    return scores


def log_ratios(target: np.ndarray, raw: np.ndarray, smoothing: float) -> np.ndarray:
    """Return log p_target - log p_raw of every bucket.

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
    """Return KL(target || corpus) of the two bags, in nats per n-gram."""
    return float(ratios @ target / max(target.sum(), 1))


@dataclasses.dataclass(frozen=True)
class ImportanceWeights(OfNGrams):
    """Importance weights from n-grams. `ratios`: float64 [buckets]."""

    ratios: np.ndarray

    def values(self, grams: NGrams) -> dict[str, np.ndarray]:
        sums = grams.sums(self.ratios)
        lengths = grams.lengths
        return {
            "dsir_sum": sums,
            "dsir_mean": sums / np.maximum(lengths, 1),
            "n_ngrams": lengths,
        }
