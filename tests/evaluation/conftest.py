"""A small corpus and a small model, made by the stages themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEXTS = [
    "The harvest begins when the grain is dry.",
    "Chaff is lighter than grain, and the wind takes it.",
    "<script>alert('hostile')</script> <img src=x onerror=alert(1)> & more",
    "Winnow the wheat; keep what falls.",
    "A",
    "Rye, barley and oats are sown in spring or in autumn, as the weather will have it.",
]


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 documents of bytes in two shards, with metadata."""
    from pruning.corpus import ingest
    from pruning.corpus.sources import JsonlSource

    root = tmp_path_factory.mktemp("evaluation")
    for part in range(2):
        lines = [
            json.dumps(
                {
                    "text": f"{TEXTS[i % len(TEXTS)]} {'So it is. ' * (i % 5)}".strip(),
                    "url": f"https://{'grain' if i % 3 else 'chaff'}.example/{part}/{i}",
                }
            )
            for i in range(24)
        ]
        (root / f"part-{part}.jsonl").write_text("\n".join(lines))
    source = JsonlSource(paths=(str(root / "part-*.jsonl"),))
    config = ingest.IngestConfig(
        source=source, vocabulary="bytes", output=str(root / "corpus"), workers=1
    )
    ingest.run(config)
    return root / "corpus"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers, with random parameters."""
    import jax

    from models import weights
    from models.config import T5Config
    from models.model import Model

    config = T5Config(
        vocab_size=384,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    model = Model(config)
    path = tmp_path_factory.mktemp("model") / "t5"
    weights.save(path, model, jax.jit(model.init)(jax.random.key(0)))
    return path
