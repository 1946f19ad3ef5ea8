"""A small pipeline whose artifacts are broken: stages, what they read, and the bytes they make."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruning.corpus import ingest, token_set, vocabulary_training
from pruning.corpus.sources import JsonlSource
from pruning.data import export
from pruning.data.objectives import CausalLM
from pruning.data.stream import StreamConfig
from pruning.scores.imported import join
from pruning.scores.text import entropy
from pruning.scores.text.dedup import stage as dedup
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Top
from pruning.store.artifact import load_artifact
from pruning.store.manifest import MEASURED

SHARDS = 3
_DOCUMENTS = 60  # of a shard


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command.

    Attributes:
      reads: artifacts by name.
      run: does the work below a directory; a reader returns what it has read, as a digest.
      makes: whether it makes the artifact of its name.
    """

    name: str
    reads: tuple[str, ...]
    run: Callable[[Path], str | None]
    makes: bool = True


def write_inputs(root: Path) -> None:
    """Write documents, scores of them, and a second vocabulary."""
    rng = random.Random(0)
    words = [f"{a}{b}" for a in "bcdfglmnprst" for b in ("a", "ent", "ing", "o", "urs", "ill")]
    (root / "documents").mkdir(parents=True)
    texts = []
    for shard in range(SHARDS):
        lines = []
        for number in range(_DOCUMENTS):
            text = " ".join(rng.choices(words, k=rng.randint(5, 60)))
            if number % 7 == 3:
                text = texts[-1]  # a copy
            if number % 7 == 5:
                text = texts[-1] + " and more"  # nearly one
            texts.append(text)
            lines.append(json.dumps({"text": text, "url": f"https://example.org/{len(texts)}"}))
        (root / "documents" / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "other.model").write_bytes(vocabulary_training.train(texts, 90))
    urls = [f"https://example.org/{k + 1}" for k in range(len(texts))]
    for part in range(2):
        rows = slice(part, None, 2)
        values = np.random.default_rng(part).normal(size=len(urls[rows]))
        table = pa.table({"url": urls[rows], "likes": values})
        pq.write_table(table, root / f"likes-{part}.parquet")


def _vocabulary(root: Path) -> None:
    source = JsonlSource((f"{root}/documents",))
    vocabulary_training.run(
        vocabulary_training.TrainVocabularyConfig(source, f"{root}/vocabulary", size=100)
    )


def ingested(root: Path, **settings: object) -> ingest.IngestConfig:
    defaults = {
        "source": JsonlSource((f"{root}/documents",)),
        "vocabulary": f"{root}/vocabulary",
        "output": f"{root}/corpus",
        "metadata": ("url",),
        "workers": 1,
    }
    return ingest.IngestConfig(**defaults | settings)  # type: ignore[arg-type]


def _corpus(root: Path) -> None:
    ingest.run(ingested(root))


def _tokens(root: Path) -> None:
    token_set.run(
        token_set.TokenizeConfig(f"{root}/corpus", f"{root}/other.model", f"{root}/tokens", 1)
    )


def _entropy(root: Path) -> None:
    entropy.run(entropy.EntropyConfig(f"{root}/corpus", f"{root}/entropy", workers=1))


def _imported(root: Path) -> None:
    files = tuple(f"{root}/likes-{part}.parquet" for part in range(2))
    config = join.ImportConfig(
        f"{root}/corpus", f"{root}/imported", files=files, columns=("likes",), workers=1
    )
    join.run(config)


def _duplicates(root: Path) -> None:
    config = dedup.DedupConfig(
        f"{root}/corpus", f"{root}/duplicates", min_jaccard=0.5, workers=1, examples=20
    )
    dedup.run(config)


def selected(root: Path, **settings: object) -> SelectConfig:
    defaults = {
        "corpus": f"{root}/corpus",
        "scores": f"{root}/entropy",
        "score": "column:h_f",
        "strategy": Top(),
        "keep_documents": 0.5,
        "output": f"{root}/selection",
        "threads": 1,
    }
    return SelectConfig(**defaults | settings)  # type: ignore[arg-type]


def _selection(root: Path) -> None:
    select.run(selected(root))


def _dataset(root: Path) -> None:
    names = ("entropy", "imported", "duplicates")
    config = export.ExportConfig(
        f"{root}/corpus",
        f"{root}/dataset",
        selection=f"{root}/selection",
        scores={name: f"{root}/{name}" for name in names},
        workers=1,
    )
    export.run(config)


def _read(root: Path, tokens: str | None) -> str:
    config = StreamConfig(
        f"{root}/corpus",
        batch_size=8,
        selection=f"{root}/selection",
        objective=CausalLM(),
        target_length=128,
        tokens=tokens,
    )
    batches = config.open()
    digest = hashlib.sha256()
    for step in range(batches.num_batches):
        for name, values in sorted(batches.batch(step).items()):
            digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()


def _check(root: Path) -> None:
    load_artifact(root / "dataset").verify()


def _stream(root: Path) -> str:
    return _read(root, None)


def _stream_of_tokens(root: Path) -> str:
    return _read(root, f"{root}/tokens")


STAGES = {
    stage.name: stage
    for stage in (
        Stage("vocabulary", (), _vocabulary),
        Stage("corpus", ("vocabulary",), _corpus),
        Stage("tokens", ("corpus",), _tokens),
        Stage("entropy", ("corpus",), _entropy),
        Stage("imported", ("corpus",), _imported),
        Stage("duplicates", ("corpus",), _duplicates),
        Stage("selection", ("corpus", "entropy"), _selection),
        Stage("dataset", ("corpus", "selection", "entropy", "imported", "duplicates"), _dataset),
        Stage("inspect --verify", ("dataset",), _check, makes=False),
        Stage("stream", ("corpus", "selection"), _stream, makes=False),
        Stage(
            "stream of tokens",
            ("corpus", "tokens", "selection"),
            _stream_of_tokens,
            makes=False,
        ),
    )
}


def content(directory: Path) -> dict[str, bytes]:
    """Return all files of an artifact, what is left of unfinished work included.

    measured.json is left out: it holds times.
    """
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in sorted(directory.rglob("*"))
        if path.name != MEASURED
    }
