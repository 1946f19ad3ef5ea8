"""What a report is made of: a study's results as plain arrays and records.

Nothing here reads (reading.py), decides (comparison.py) or draws (charts.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation.perplexity import Losses

RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation set: how it was chosen, and its size."""

    name: str
    title: str
    rule: str
    documents: int
    tokens: int
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss on an evaluation set during training: int64 [n] steps, float64 [n] nats per token."""

    step: np.ndarray
    loss: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """A model trained on a selection, and how it did.

    Attributes:
      share_kept: of the pool's tokens, realised.
      epochs: how often the selection was seen.
      seconds, flops: of its training.
      losses, curves: by evaluation set.
      tasks: set of tasks -> task -> score, 0 to 100.
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


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A way of selecting: its name in files, its title, and a sentence on its rule."""

    name: str
    title: str
    rule: str
    scorer: str | None


@dataclasses.dataclass(frozen=True)
class Pool:
    """The documents that selections were made from, in the order of `doc_id`."""

    doc_id: np.ndarray  # int64 [documents]
    n_tokens: np.ndarray  # int64 [documents]
    source: np.ndarray  # object [documents]: str or None
    domain: np.ndarray


@dataclasses.dataclass(frozen=True)
class Score:
    """A scorer's values over the pool.

    Attributes:
      values: float64 [documents], higher is what the scorer calls better; NaN where there is none.
      axis: what the values are, for the axis of a chart.
      statuses: how many documents have which status.
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
      cut: bool [documents], whether the text goes on.
      place: where each comes from: its address, or else its domain.
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
    """What a piece of work took, measured.

    Attributes:
      cpu_seconds: of all its processes, their start included; None where no note of it is left.
      flops: of the models, counted from their shapes; None for work without one.
      tokens: that a model has read.
    """

    title: str
    cpu_seconds: float | None
    flops: float | None
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a report is made of."""

    title: str
    description: str
    caveats: tuple[str, ...]
    evaluations: tuple[Evaluation, ...]  # the first is the one that the headline speaks of
    samplers: tuple[Sampler, ...]
    runs: tuple[Run, ...]
    pool: Pool
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
    provenance: tuple[Mapping[str, str], ...]  # name, kind, digest, path of every artefact
    commands: tuple[str, ...]
