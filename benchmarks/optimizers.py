"""Optimisers against one another: the same small language model, batches and steps.

    python benchmarks/optimizers.py --text=../shared/data/corpus/c4/c4_real_merged.jsonl.gz \\
        --output=/tmp/optimizers

A decoder over bytes, so that a small model spends its time on layers and not on a vocabulary, and
so that the held-out loss is in bits per byte. Every optimiser is tried at several rates: a
comparison at one rate shows whose rate it was. All rates fall to a tenth along a cosine.

Each run is a training run like any other: interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import train
from models.config import DecoderConfig
from models.optimizers import Adafactor, AdamW, Muon, WarmupCosine
from pruning.corpus import ingest
from pruning.corpus.sources import JsonlSource
from pruning.data.objectives import CausalLM
from pruning.data.stream import StreamConfig
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Split

MODEL = DecoderConfig(
    vocab_size=384,
    d_model=128,
    d_ff=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
)
RATES: dict[str, tuple[type, tuple[float, ...]]] = {
    "adafactor": (Adafactor, (0.01, 0.03, 0.1)),
    "adamw": (AdamW, (0.001, 0.003, 0.01)),
    "muon": (Muon, (0.001, 0.003, 0.01, 0.03)),
}


def data(text: Path, output: Path) -> tuple[StreamConfig, StreamConfig]:
    """Streams of 95% of the documents, for training, and of the others."""
    where = str(output / "corpus")
    ingest.run(
        ingest.IngestConfig(
            source=JsonlSource((str(text),)), vocabulary="bytes", output=where, workers=1
        )
    )
    streams = []
    for name, share in (("train", (0.0, 0.95)), ("held_out", (0.95, 1.0))):
        kept = str(output / name)
        select.run(SelectConfig(where, kept, Split(*share)))
        streams.append(StreamConfig(where, 16, kept, CausalLM(), target_length=128))
    return streams[0], streams[1]


def run(output: Path, streams: Any, name: str, rate: float, steps: int, seed: int) -> dict:
    """Trains once; what the run's result says, and the seconds of a step."""
    kind, _ = RATES[name]
    schedule = WarmupCosine(peak=rate, final=rate / 10, warmup_steps=steps // 10, total_steps=steps)
    config = train.TrainConfig(
        output=str(output / f"{name}_{rate}_{seed}"),
        model=MODEL,
        data=streams[0],
        eval_data={"held out": streams[1]},
        steps=steps,
        eval_every=steps,
        eval_batches=64,
        checkpoint_every=max(steps // 4, 1),
        optimizer=kind(schedule),
        clip_norm=1.0,
        seed=seed,
        log_every=10,
        compilation_cache=str(output / "compiled"),
    )
    result = train.train(config)
    assert result is not None
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    steps_logged = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    first, last = steps_logged[1], steps_logged[-1]
    seconds = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    return {**result["eval"]["held out"], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a text field")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(RATES), help="one optimiser")
    parser.add_argument("--rate", type=float, help="one of its rates")
    given = parser.parse_args()
    if given.steps < 30:
        parser.error("--steps must be 30 at least: the first ones are not timed")
    streams = data(given.text, given.output)
    for name in [given.only] if given.only else RATES:
        found = {
            rate: run(given.output, streams, name, rate, given.steps, given.seed)
            for rate in ([given.rate] if given.rate else RATES[name][1])
        }
        for rate, result in found.items():
            print(
                f"{name:<10} {rate:<6} {result['bits_per_byte']:.4f} bits per byte, "
                f"{1000 * result['seconds']:.0f} ms a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
