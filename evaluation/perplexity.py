"""Perplexity and bits per byte of a model on held-out documents.

    python -m evaluation perplexity --gin_file=configs/evaluate/perplexity.gin \\
        --gin.MODEL=runs/t5/train --gin.CORPUS=runs/c4/corpus --gin.OUTPUT=runs/t5/perplexity

writes a score set for every evaluation set, with the loss of every document, and result.json with
the sums, which comes last.

Choices
- The scoring engine computes the losses: packed, sharded, resumable, every token counted once. The
  estimator defines the loss of a token (pruning/scores/model/likelihood.py).
- The result is a ratio of sums over documents: nats / tokens, nats / bytes. A mean of per-document
  perplexities would be dominated by short documents.
- If the first tokens of a document have no score (prefix), its bytes are counted in proportion to
  its scored tokens.
- Intervals are bootstrapped over documents (bootstrap.py). A difference between two models is
  computed from their score sets, in which documents can be paired.
- `batches` adds the loss of the training objective, exactly as train.py evaluates it, for
  comparison with loss curves and other T5 code bases. Every example of a seqio task's split is
  taken once, and its bytes are those of the targets' text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from evaluation.errors import EvaluationError
from evaluation.statistics import bootstrap
from pruning.data import seqio_data, stream
from pruning.data.examples import ExamplesConfig
from pruning.data.seqio_data import SeqioConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.score_set import OK
from pruning.store.artifact import Artifact, load_artifact, require_input, require_same_documents
from pruning.store.atomic import write_text
from pruning.store.manifest import added_setting

NAME = "Perplexity"
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Settings of `perplexity`.

    Attributes:
      model: anything that `models.weights.load` takes: a directory, a training run, a hub name.
      output: directory of the result.
      corpora: evaluation set -> corpus.
      within: evaluation set -> selection of that corpus; by default the whole corpus.
      likelihood: the estimator.
      batches: name -> data as in Train.eval_data, for the loss of the training objective:
        @Stream(), @Examples(), or @Seqio(), a registered task.
      batch_count: largest number of batches of each; None takes all batches of finite data.
      dtype: as in Score, but float32 on every platform, so that losses are comparable.
      tokenizer, row_length, batch_rows, attention, fsdp, tensor, compilation_cache: as in Score.
    """

    model: str
    output: str
    corpora: Mapping[str, str]
    within: Mapping[str, str] = dataclasses.field(default_factory=dict)
    likelihood: Likelihood = dataclasses.field(default_factory=lambda: Likelihood("span"))
    batches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_count: int | None = 16
    tokenizer: str | None = None
    row_length: int | None = None
    batch_rows: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    fsdp: int = 1
    tensor: int = 1
    compilation_cache: str | None = "~/.cache/winnow/compiled"
    attention: str = added_setting("auto")

    def __post_init__(self) -> None:
        for name, data in self.batches.items():
            ends = isinstance(data, SeqioConfig) or getattr(data, "repeat", True) is False
            if self.batch_count is None and not ends:
                raise EvaluationError(f"{name} never ends: set Perplexity.batch_count.")
        if unknown := sorted(set(self.within) - set(self.corpora)):
            raise EvaluationError(
                f"Perplexity.within names {unknown[0]!r}, Perplexity.corpora does not."
            )


CONFIGURABLES: dict[str, type] = {
    NAME: PerplexityConfig,
    "Likelihood": Likelihood,
    **stream.CONFIGURABLES,
    "Examples": ExamplesConfig,
    "Seqio": SeqioConfig,
}


@dataclasses.dataclass(frozen=True)
class Losses:
    """A model's losses on an evaluation set, for every document that has a score.

    Attributes:
      doc_id: int64 [documents].
      nats: float64 [documents], summed over the document's scored tokens.
      tokens: int64 [documents], how many tokens these are.
      n_bytes: float64 [documents], UTF-8 bytes that these tokens stand for.
      unscored: how many documents of the set have no score, by reason.
    """

    doc_id: np.ndarray
    nats: np.ndarray
    tokens: np.ndarray
    n_bytes: np.ndarray
    unscored: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def per_token(self) -> float:
        """Nats per token: the logarithm of the perplexity."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.n_bytes.sum())


def run(config: PerplexityConfig) -> list[str]:
    """Evaluate, or finish evaluating, and return a line for every evaluation set."""
    result = evaluate(config)
    lines = [
        f"{name}: {found['loss']:.4f} nats per token (95%: {found['loss_interval'][0]:.4f} to "
        f"{found['loss_interval'][1]:.4f}), perplexity {found['perplexity']:.3f}, "
        f"{found['bits_per_byte']:.4f} bits per byte, {found['documents']:,} documents"
        for name, found in result["sets"].items()
    ]
    for name, found in result["objective"].items():
        lines.append(f"{name}: {found['loss']:.4f} nats per target token of the objective")
    return lines


def evaluate(config: PerplexityConfig) -> dict[str, Any]:
    """Evaluate, or finish evaluating, and return the content of result.json."""
    from pruning.scores.model import engine

    sets: dict[str, dict[str, Any]] = {}
    for name, corpus in config.corpora.items():
        scores = engine.run(
            engine.ScoreConfig(
                corpus=corpus,
                output=f"{config.output}/{name}",
                scorer=config.likelihood,
                model=config.model,
                tokenizer=config.tokenizer,
                row_length=config.row_length,
                batch_rows=config.batch_rows,
                dtype=config.dtype,
                attention=config.attention,
                fsdp=config.fsdp,
                tensor=config.tensor,
                within=config.within.get(name),
                compilation_cache=config.compilation_cache,
            )
        )
        if scores is not None:  # else other processes are still scoring
            sets[name] = summary(read(scores, load_artifact(corpus, "corpus"))) | {
                "scores": scores.as_input(),
                "estimator": config.likelihood.estimator,
            }
    result = {"model": config.model, "sets": sets, "objective": objective(config)}
    if len(sets) == len(config.corpora):
        file = epath.Path(config.output) / RESULT
        write_text(file, json.dumps(result, indent=1, sort_keys=True) + "\n")
    return result


def read(scores: Artifact, corpus: Artifact) -> Losses:
    """Read the losses in a likelihood's score set.

    Raises:
      ArtifactError: the scores are not of this corpus, or of another scorer.
      ValueError: no document has a score.
    """
    require_input(scores, "corpus", corpus)
    parts = []
    unscored: Counter[str] = Counter()
    for shard in range(corpus.num_shards):
        names = ["doc_id", "status", "nll", "n_scored_tokens"]
        other = "n_tokens" in scores.manifest.summary["columns"]  # by another tokenizer
        found = scores.read(shard, [*names, "n_tokens"] if other else names)
        sizes = corpus.read(shard, ["doc_id", "n_tokens", "n_bytes"])
        doc_id = found["doc_id"].to_numpy()
        where = f"{scores.path}/{scores.manifest.shards[shard].file}"
        require_same_documents(sizes["doc_id"].to_numpy(), doc_id, where)
        status = np.asarray(found["status"].to_pylist(), dtype=object)
        unscored.update(status[status != OK].tolist())
        rows = np.flatnonzero(status == OK)
        tokens = found["n_scored_tokens"].to_numpy()[rows].astype(np.int64)
        lengths = (found if other else sizes)["n_tokens"].to_numpy()[rows]
        per_token = sizes["n_bytes"].to_numpy()[rows] / lengths
        nats = found["nll"].to_numpy()[rows].astype(np.float64)
        parts.append((doc_id[rows], nats, tokens, tokens * per_token))
    doc_id, nats, tokens, n_bytes = (np.concatenate(column) for column in zip(*parts, strict=True))
    unscored.pop("not_selected", None)  # not of this set
    if not len(doc_id):
        raise EvaluationError(f"no document of {scores.path} has a score: {dict(unscored)}.")
    return Losses(doc_id, nats, tokens, n_bytes, dict(unscored))


def summary(losses: Losses, resamples: int = bootstrap.RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Return summary statistics of a set's losses, with 95% intervals as [low, high]."""
    nats, bits = losses.nats[None], losses.nats[None] / math.log(2)
    loss = bootstrap.interval(bootstrap.ratios(nats, losses.tokens[None], resamples, seed)[0])
    rate = bootstrap.interval(bootstrap.ratios(bits, losses.n_bytes[None], resamples, seed)[0])
    return {
        "documents": len(losses.doc_id),
        "tokens": int(losses.tokens.sum()),
        "bytes": round(float(losses.n_bytes.sum())),
        "unscored": dict(losses.unscored),
        "nats": float(losses.nats.sum()),
        "loss": losses.per_token,
        "loss_interval": loss,
        "perplexity": math.exp(losses.per_token),
        "perplexity_interval": [math.exp(value) for value in loss],
        "bits_per_byte": losses.bits_per_byte,
        "bits_per_byte_interval": rate,
    }


def objective(config: PerplexityConfig) -> dict[str, dict[str, float]]:
    """Return the training objective's nats per target token on each of `config.batches`."""
    if not config.batches:
        return {}
    import jax

    from models import losses, weights
    from pruning.scores.model import loading

    model, params = weights.load(config.model)

    @jax.jit
    def sums(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        module = model.bind(params)
        logits = module.logits(module.forward(dict(batch)))
        weight = batch["decoder_loss_weights"]
        _, count, found = losses.cross_entropy(logits, batch["decoder_target_tokens"], weight)
        return found["nll"], count

    found = {}
    for name, data in config.batches.items():
        opened = data.open(0, 1)
        if (made_by := getattr(opened, "vocabulary", None)) is not None:
            loading.require_ids(config.model, made_by, name, config.tokenizer)
        nats = tokens = n_bytes = 0.0
        for batch in itertools.islice(_batches(data, opened), config.batch_count):
            some, count = jax.device_get(sums(params, batch))
            nats, tokens = nats + float(some), tokens + float(count)
            if isinstance(data, SeqioConfig):
                n_bytes += _target_bytes(data, batch)
        found[name] = {"loss": nats / tokens, "target_tokens": int(tokens)}
        if n_bytes:
            found[name] |= {"bits_per_byte": nats / math.log(2) / n_bytes, "bytes": n_bytes}
    return found


def _batches(data: Any, opened: Any) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches in order; of a seqio task every example once, unshuffled."""
    if not isinstance(data, SeqioConfig):
        number = getattr(opened, "num_batches", None)
        yield from map(opened.batch, itertools.count() if number is None else range(number))
        return
    dataset = seqio_data.examples(data, shuffle=False, num_epochs=1)
    for batch in dataset.batch(data.batch_size).as_numpy_iterator():
        rows = data.batch_size - len(batch["decoder_target_tokens"])  # the last may be short
        yield {name: np.pad(x, ((0, rows), (0, 0))) for name, x in batch.items()}


def _target_bytes(data: SeqioConfig, batch: Mapping[str, np.ndarray]) -> int:
    """Return the number of UTF-8 bytes of the targets' text, without EOS."""
    import seqio

    vocabulary = (
        seqio.get_mixture_or_task(data.mixture_or_task).output_features["targets"].vocabulary
    )
    weights, targets = batch["decoder_loss_weights"], batch["decoder_target_tokens"]
    segments = batch.get("decoder_segment_ids", np.ones_like(targets))
    found = 0
    for row, weight, segment in zip(targets, weights, segments, strict=True):
        for number in range(1, int(segment.max()) + 1):
            kept = row[(weight > 0) & (segment == number) & (row != vocabulary.eos_id)]
            found += len(vocabulary.decode(kept.tolist()).encode())
    return found
