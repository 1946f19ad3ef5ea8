"""Stages that run a model or read its answers, over the small corpus of pipeline.py.

Programs are compiled once and kept in a directory beside the artifacts.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import jax
import numpy as np
from pipeline import Stage

from evaluation import perplexity
from models import checkpoints, runtime, weights
from models.config import T5Config
from models.model import Model
from models.weights import winnow
from pruning.scores.distilled import ngram_student
from pruning.scores.model import engine
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.space import density, kmeans, semdedup, whiten
from pruning.scores.space.race import Race
from pruning.store.artifact import load_artifact

_MODEL = T5Config(
    vocab_size=256,
    d_model=16,
    d_kv=8,
    d_ff=24,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
)
_LIKELIHOOD = Likelihood("causal", window=64, overlap=16)


def _cache(root: Path) -> str:
    return f"{root.parent}/compiled"


def _weights(root: Path) -> None:
    model = Model(_MODEL)
    winnow.save(f"{root}/weights", model, jax.jit(model.init)(jax.random.key(3)))


def _scores(root: Path, name: str, scorer: object) -> None:
    config = engine.ScoreConfig(
        corpus=f"{root}/corpus",
        output=f"{root}/{name}",
        scorer=scorer,  # type: ignore[arg-type]
        model=f"{root}/weights",
        tokenizer="corpus",
        row_length=128,
        batch_rows=8,
        dtype="float32",
        compilation_cache=_cache(root),
    )
    engine.run(config)


def _likelihood(root: Path) -> None:
    _scores(root, "likelihood", _LIKELIHOOD)


def _embeddings(root: Path) -> None:
    _scores(root, "embeddings", Embedding(max_tokens=64))


def _space(root: Path, name: str) -> dict[str, str]:
    runtime.cache_compilations(_cache(root))
    return {
        "corpus": f"{root}/corpus",
        "embeddings": f"{root}/embeddings",
        "output": f"{root}/{name}",
    }


def _clusters(root: Path) -> None:
    given = _space(root, "clusters")
    kmeans.run(kmeans.KMeansConfig(**given, clusters=4, iterations=3, points_per_cluster=0))


def _semdedup(root: Path) -> None:
    given = _space(root, "semdedup")
    semdedup.run(semdedup.SemDeDupConfig(**given, clusters=f"{root}/clusters"))


def _density(root: Path) -> None:
    race = Race(rows=8, buckets=64, bandwidth=0.5)
    density.run(density.DensityConfig(**_space(root, "density"), race=race))


def _whitened(root: Path) -> None:
    whiten.run(whiten.WhitenConfig(**_space(root, "whitened"), components=4, documents=0))


def _student(root: Path) -> None:
    ngram_student.run(
        ngram_student.DistillConfig(
            f"{root}/corpus",
            f"{root}/likelihood",
            f"{root}/student",
            score="column:nll",
            buckets=1 << 17,
            l2=(0.1,),
            folds=2,
            workers=1,
        )
    )


def _applied(root: Path) -> None:
    config = ngram_student.DistillConfig(
        f"{root}/corpus", output=f"{root}/applied", model=f"{root}/student", workers=1
    )
    ngram_student.run(config)


def _loaded(root: Path) -> str:
    _, params = weights.load(f"{root}/weights", dtype="float32")
    return str(checkpoints.fingerprints({"params": params}))


def _perplexity(root: Path) -> str:
    output = root / "judged"
    shutil.rmtree(output, ignore_errors=True)
    config = perplexity.PerplexityConfig(
        model=f"{root}/weights",
        output=str(output),
        corpora={"all": f"{root}/corpus"},
        likelihood=_LIKELIHOOD,
        tokenizer="corpus",
        row_length=128,
        batch_rows=8,
        compilation_cache=_cache(root),
    )
    perplexity.run(config)
    losses = perplexity.read(
        load_artifact(output / "all"), load_artifact(root / "corpus", "corpus")
    )
    return hashlib.sha256(np.asarray(losses.nats).tobytes()).hexdigest()


STAGES = {
    stage.name: stage
    for stage in (
        Stage("weights", (), _weights),
        Stage("likelihood", ("corpus", "weights"), _likelihood),
        Stage("embeddings", ("corpus", "weights"), _embeddings),
        Stage("clusters", ("corpus", "embeddings"), _clusters),
        Stage("semdedup", ("corpus", "embeddings", "clusters"), _semdedup),
        Stage("density", ("corpus", "embeddings"), _density),
        Stage("whitened", ("corpus", "embeddings"), _whitened),
        Stage("student", ("corpus", "likelihood"), _student),
        Stage("applied", ("corpus", "student"), _applied),
        Stage("loading weights", ("weights",), _loaded, makes=False),
        Stage("perplexity", ("corpus", "weights"), _perplexity, makes=False),
    )
}
