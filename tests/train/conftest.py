"""A small T5 and data for it, for tests that train in their own process."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from collections.abc import Callable

import jax
import numpy as np
import pytest

import train
from models import partitioning
from models.config import T5Config
from models.optimizers import AdamW, Constant

VOCAB = 64


@dataclasses.dataclass(frozen=True)
class Reversals:
    """Targets are the first inputs in reverse order. Ids from 32 on stand for 3 bytes of text.

    The process gets SIGUSR1 when batch `signals_at` is made. `ids` is what the data say of their
    vocabulary.
    """

    seed: int = 0
    rows: int = 16
    num_batches: int | None = None
    signals_at: int | None = None
    ids: int = VOCAB

    @property
    def token_bytes(self) -> np.ndarray:
        return np.where(np.arange(self.ids) < 32, 0, 3)

    def open(self, process_index: int = 0, process_count: int = 1) -> Reversals:
        assert (process_index, process_count) == (0, 1)
        return self

    def batch(self, step: int) -> dict[str, np.ndarray]:
        if step == self.signals_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        rng = np.random.default_rng([self.seed, step])
        inputs = rng.integers(2, VOCAB, (self.rows, 12)).astype(np.int32)
        targets = inputs[:, 5::-1].copy()
        targets[np.arange(6) >= rng.integers(2, 7, (self.rows, 1))] = 0
        return {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": (targets != 0).astype(np.float32),
        }


TINY = T5Config(
    vocab_size=VOCAB,
    d_model=32,
    d_ff=64,
    d_kv=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
)


@pytest.fixture
def on_one_device(monkeypatch) -> None:
    """The tests' processes have eight devices; these tests are quicker on one."""
    on_one = functools.partial(partitioning.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(partitioning, "make_mesh", on_one)


@pytest.fixture(scope="session")
def reversals() -> type[Reversals]:
    return Reversals


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Callable[..., train.TrainConfig]:
    """`tiny_run(output, **changes)`: a run of six steps. All such runs share compiled programs."""
    cache = str(tmp_path_factory.mktemp("compiled"))

    def make(output, **changes) -> train.TrainConfig:
        base = train.TrainConfig(
            output=str(output),
            model=TINY,
            data=Reversals(),
            steps=6,
            log_every=1,
            optimizer=AdamW(Constant(1e-2)),
            compilation_cache=cache,
        )
        return dataclasses.replace(base, **changes)

    return make
