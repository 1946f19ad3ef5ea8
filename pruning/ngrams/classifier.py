"""A quality classifier: hashed n-grams of good documents against those of random ones.

    python -m pruning classifier --gin_file=configs/score/classifier.gin --gin.CORPUS=...

The cheap baseline that did better than Ask-LLM and perplexity in DataComp-LM (Li et al. 2024):
train on documents that somebody calls good against random ones, score everything, keep the top.

Choices
- Good documents are a corpus, or a selection of one: a set given by the user, or, by the user's
  choice, the documents of this corpus that Ask-LLM likes best.
- The others are drawn at random from the corpus, less what is good in it. Some of them are good as
  well, which shifts the score and hardly its order.
- `quality` is the log-odds, so that it can be added to other scores.
- A tenth of the examples is held out; how well these are told apart stands in the summary.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from pruning import derived, progress, randomness
from pruning.artefact import Artefact, ArtefactError, config_of
from pruning.corpus import doc_ids, rows_of, shards_of
from pruning.ngrams import linear, passes
from pruning.ngrams.hashing import SCHEME, Features, NGrams, hashed_ngrams
from pruning.ngrams.linear import Bags, Linear
from pruning.ngrams.passes import Texts
from pruning.scorers import Column

NAME = "Classifier"
MODEL = "classifier.npz"

COLUMNS = {"quality": Column(pa.float32(), "log-odds that the document is a good one")}

_HELD_OUT = 0.1
_SAMPLE, _SPLIT = 34, 35  # streams of draws


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Settings of `classifier`.

    Attributes:
      corpus: the corpus to score.
      good: a corpus of good documents; None for `corpus` itself, and then `good_within` says which.
      output: the score set's directory.
      good_within: a selection of `good`.
      within: a selection of the corpus; other documents get the status "not_selected" and are not
        drawn as examples.
      features: `@Features()`.
      examples: at most as many good documents, and as many others.
      l2: weight of the penalty, in documents.
      seed: of the examples.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    good: str | None = None
    good_within: str | None = None
    within: str | None = None
    features: Features = dataclasses.field(default_factory=lambda: Features(buckets=1 << 20))
    examples: int = 100_000
    l2: float = 0.1
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.good is None and self.good_within is None:
            raise ValueError("say what is good: set good, good_within, or both.")
        if self.examples < 2 or self.l2 <= 0:
            raise ValueError("examples is at least 2, and l2 positive.")


CONFIGURABLES: dict[str, type] = {NAME: ClassifierConfig, "Features": Features}


def run(config: ClassifierConfig) -> Artefact:
    """Makes the score set, or goes on with it.

    Raises:
      ArtefactError: an input is missing, inputs do not belong together, or nothing is good.
      ConfigurationChanged: the output was begun with other settings.
    """
    texts = Texts.open(config.corpus, config.within)
    good = Texts.open(config.good or config.corpus, config.good_within)
    names = ("examples", "l2", "seed")
    build = derived.begin(
        config.output,
        {
            "features": config_of(config.features),
            "hashes": SCHEME,
            **{name: getattr(config, name) for name in names},
        },
        texts.inputs("corpus") | good.inputs("good"),
        texts.corpus,
        COLUMNS,
    )
    if done := passes.finished(build):
        return done
    model, summary = train(config, texts, good)
    build.write_file(MODEL, model.to_bytes())
    passes.score(build, texts, config.features, Quality(model), COLUMNS, config.workers)
    scores = derived.finish(build, "classifier", COLUMNS, summary)
    assert scores is not None  # every shard was ours
    return scores


def train(config: ClassifierConfig, texts: Texts, good: Texts) -> tuple[Linear, dict]:
    """The model, and how well it does on examples that it has not seen."""
    in_corpus = good.corpus.artefact.digest == texts.corpus.artefact.digest

    def draws(ids: np.ndarray) -> np.ndarray:
        return randomness.uniform(config.seed, ids, _SAMPLE)

    def draws_of_others(ids: np.ndarray) -> np.ndarray:
        if not (in_corpus and len(ids)):
            return draws(ids)
        taken = np.isin(rows_of(ids), good.rows(int(shards_of(ids[0]))))
        return np.where(taken, np.inf, draws(ids))

    bags, labels, held_out = [], [], []
    with progress.track("examples", None, "documents") as task:
        for label, source, draw in ((True, good, draws), (False, texts, draws_of_others)):
            for shard, rows in enumerate(passes.sample(source, config.examples, draw)):
                for batch in source.read(shard, rows):
                    bags.append(Bags.of(hashed_ngrams(batch, config.features)))
                    task.advance(len(batch))
                ids = doc_ids(shard, rows)
                labels.append(np.full(len(rows), label))
                held_out.append(randomness.uniform(config.seed, ids, _SPLIT) < _HELD_OUT)
    examples, is_good = Bags.join(bags), np.concatenate(labels)
    held = np.concatenate(held_out)
    if is_good.all() or not is_good.any():
        raise ArtefactError(
            f"{int(is_good.sum())} of {len(is_good)} examples are good: there must be both kinds. "
            f"Look at {good.corpus.artefact.path} and {texts.corpus.artefact.path}."
        )
    model = linear.fit(examples.take(~held), is_good[~held], config.features, "logistic", config.l2)
    values = model(examples.take(held))
    return model, {
        "examples": {"good": int(is_good.sum()), "random": int((~is_good).sum())},
        "held_out": int(held.sum()),
        "held_out_auc": auc(values[is_good[held]], values[~is_good[held]]),
    }


def auc(good: np.ndarray, others: np.ndarray) -> float | None:
    """The probability that a good document scores higher than another one; None without both."""
    if not (len(good) and len(others)):
        return None
    ordered = np.sort(others)
    below = np.searchsorted(ordered, good, side="left")
    up_to = np.searchsorted(ordered, good, side="right")
    return float((below + up_to).sum() / (2 * len(good) * len(others)))


@dataclasses.dataclass(frozen=True)
class Quality:
    """N-grams -> the column."""

    model: Linear

    def __call__(self, grams: NGrams) -> dict[str, np.ndarray]:
        return {"quality": self.model(Bags.of(grams))}
