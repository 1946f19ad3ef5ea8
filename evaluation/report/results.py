"""Results of a study as plain arrays and records.

They are read by reading.py, compared by comparison.py and drawn by charts.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.perplexity import Losses


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation set: its title, the rule of its choice, and its size."""

    name: str
    title: str
    rule: str
    documents: int
    tokens: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Floor:
    """An n-gram model of the pool's tokens on an evaluation set, document by document.

    Attributes:
      title: such as "Unigram".
      nats: float64 [documents], summed over the tokens that the models are evaluated on.
      tokens: int64 [documents], how many tokens these are.
      fitted_on: tokens of the pool that were counted.
    """

    title: str
    nats: np.ndarray
    tokens: np.ndarray
    fitted_on: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.per_token)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss on an evaluation set during training: int64 [n] steps, float64 [n] nats per token."""

    step: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """A model trained on a selection, and its results.

    Attributes:
      share_kept: of the pool's tokens, realised.
      epochs: number of passes over the selection.
      seconds, flops: of its training.
      losses, curves: by evaluation set.
      tasks: set of tasks -> task -> score, 0 to 100.
      answers: set of tasks -> task -> log-likelihood of the right answer, nats per character; tasks
        that were evaluated without it are missing.
    """

    sampler: str
    keep_rate: float
    seed: int
    size: str  # of the model; "" for the study's own
    documents: int
    tokens: int
    share_kept: float
    epochs: float
    steps: int
    parameters: int
    seconds: float
    flops: float
    losses: Mapping[str, Losses]
    curves: Mapping[str, Curve]
    tasks: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    answers: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A selection rule: its name in files, its title, and a sentence that describes it."""

    name: str
    title: str
    rule: str
    scorer: str | None


@dataclasses.dataclass(frozen=True)
class PoolDocuments:
    """The documents of the pool, in the order of `doc_id`."""

    doc_id: np.ndarray  # int64 [documents]
    n_tokens: np.ndarray  # int64 [documents]
    source: np.ndarray  # object [documents]: str or None
    domain: np.ndarray
    surprisal: np.ndarray  # float64 [documents]: unigram surprisal, nats per token


@dataclasses.dataclass(frozen=True)
class Score:
    """A scorer's values over the pool.

    Attributes:
      values: float64 [documents], higher is what the scorer calls better; NaN where there is none.
      axis: label of a chart's axis.
      statuses: status -> number of documents.
    """

    name: str
    title: str
    axis: str
    values: np.ndarray
    statuses: Mapping[str, int]
    digest: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """Documents of the pool to be browsed, drawn by their hashes.

    Attributes:
      rows: int64 [documents], of the pool.
      text: their beginnings.
      cut: bool [documents], whether the text is cut here.
      place: source of each: its address, or else its domain.
      tokens: index in the sample -> the tokens' texts, and their negative log-likelihoods in nats,
        float64, NaN where there is none.
    """

    rows: np.ndarray
    text: tuple[str, ...]
    cut: np.ndarray
    place: tuple[str, ...]
    tokens: Mapping[int, tuple[list[str], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Example:
    """A document to be shown."""

    decile: int
    score: float
    n_tokens: int
    source: str
    domain: str
    url: str
    text: str
    cut: bool  # the text goes on


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measured cost of a piece of work.

    Attributes:
      cpu_seconds: of all its processes, their start included; None if it was not recorded.
      flops: of the models, counted from their shapes; None for work without one.
      tokens: that a model has read.
    """

    title: str
    cpu_seconds: float | None
    flops: float | None
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Cascaded:
    """A cascade of the study: what it promised, found and spent, line by line."""

    name: str
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """Everything that the report of a study shows."""

    title: str
    description: str
    caveats: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]  # the headline is about the first
    samplers: tuple[Sampler, ...]
    runs: tuple[Run, ...]
    floors: Mapping[str, tuple[Floor, ...]]  # by evaluation set, the unigram model first
    pool: PoolDocuments
    pool_shards: tuple[int, int]  # shown, in all
    kept: Mapping[tuple[str, float, int], np.ndarray]  # run -> bool [documents of the pool]
    scores: tuple[Score, ...]
    examples: Mapping[str, tuple[Example, ...]]  # by scorer
    sample: Sample
    corpus: Mapping[str, Any]  # the manifest
    costs: tuple[Cost, ...]  # models and stages, each once
    sampler_costs: Mapping[str, Cost]  # all that had to be made for a sampler's selection
    training_cost: Cost  # of one run on the full data
    sizes: Mapping[str, str]  # of the model, besides the study's own: name -> title
    tasks: Mapping[str, str]  # sets of tasks: name -> title
    configuration: Mapping[str, Any]
    cascades: tuple[Cascaded, ...]
    provenance: tuple[Mapping[str, str], ...]  # name, kind, digest, path of every artifact
    commands: tuple[str, ...]
