"""Entropy: the mean surprisal of a document's words under the corpus's own frequencies.

    python -m pruning entropy --gin_file=configs/score/entropy.gin --gin.CORPUS=...

Kim and Baek (arXiv 2406.14124) rank documents by H_q + H_f: the mean surprisal under a small
language model, which is a likelihood score set (`nll_mean`), and the mean surprisal under the
corpus's own word frequencies, which this stage computes. The sum is two terms of a selection
(configs/select/entropy.gin).

Choices
- With unit="token" a word is a token of the corpus's vocabulary: H_f is then in nats per token, as
  H_q is, and their sum has one unit. With unit="word" it is a lower-cased word, hashed into 2**22
  buckets. The paper does not say which.
- Frequencies are those of the corpus, or of the selection that is scored. They are counted in a
  first pass and summed over shards, so no word of a scored document has frequency 0.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pyarrow as pa

from pruning.scores import score_set
from pruning.scores.score_set import Column
from pruning.scores.text import passes
from pruning.scores.text.hashing import SCHEME, Features, NGrams, OfNGrams
from pruning.scores.text.pieces import Tokens
from pruning.scores.text.texts import Texts
from pruning.store import late
from pruning.store.artifact import Artifact
from pruning.store.parallel import require_processes

NAME = "Entropy"

COLUMNS = {
    "h_f": Column(
        pa.float32(), "mean of -log f(word) over the document, f the corpus's frequency, in nats"
    )
}

_WORDS = Features(n=1, buckets=1 << 22)


@dataclasses.dataclass(frozen=True)
class EntropyConfig:
    """Settings of `entropy`.

    Attributes:
      corpus: the corpus to score.
      output: the score set's directory.
      within: a selection of the corpus; other documents get the status "not_selected" and are not
        counted.
      unit: of the frequencies, "token" or "word".
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    within: str | None = None
    unit: Literal["token", "word"] = "token"
    workers: int = 0

    def __post_init__(self) -> None:
        require_processes(self.workers)


CONFIGURABLES: dict[str, type] = {NAME: EntropyConfig}


@late.stage
def run(config: EntropyConfig) -> Artifact:
    """Make the score set, or resume it.

    Raises:
      ArtifactError: an input is missing, or inputs do not belong together.
      ConfigurationChanged: the output was begun with other settings.
    """
    texts = Texts.open(config.corpus, config.within)
    hashes = SCHEME if config.unit == "word" else None
    build = score_set.begin(
        config.output,
        {"unit": config.unit, "hashes": hashes},
        texts.inputs("corpus"),
        texts.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    words: Features | Tokens = _WORDS
    if config.unit == "token":
        words = Tokens(texts.corpus.vocabulary.size)
    counts = passes.count(build, f"{config.unit}s", texts, words, config.workers)
    function = Surprisals(words, surprisal(counts))
    passes.score(build, texts, function, COLUMNS, config.workers)
    summary = {
        "unit": config.unit,
        "words": int(counts.sum()),
        "kinds": int(np.count_nonzero(counts)),
        "corpus_entropy": entropy(counts),
    }
    scores = score_set.finish(build, "entropy", COLUMNS, summary)
    assert scores is not None  # this process had every shard
    return scores


def surprisal(counts: np.ndarray) -> np.ndarray:
    """Return -log frequency in nats, float64 [words]; infinite where the count is 0."""
    with np.errstate(divide="ignore"):
        return np.log(counts.sum()) - np.log(counts)


def entropy(counts: np.ndarray) -> float:
    """Return the entropy of the frequencies in nats, the mean of H_f over all words."""
    some = counts[counts > 0]
    return float((some / some.sum()) @ surprisal(some)) if len(some) else 0.0


@dataclasses.dataclass(frozen=True)
class Surprisals(OfNGrams):
    """Mean surprisal of words. `table`: float64 [buckets]."""

    table: np.ndarray

    def values(self, grams: NGrams) -> dict[str, np.ndarray]:
        return {"h_f": grams.sums(self.table) / np.maximum(grams.lengths, 1)}
