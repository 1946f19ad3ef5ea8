"""A training step beside transformers' on the same CPU: the same weights, batches and optimiser.

    python benchmarks/training_step.py --model=t5_small --steps=100

Both programs take the same steps in turn, so that whatever else the machine does falls on both
alike; times are medians without the first two steps (compilation). Since both start from the same
weights and see the same batches, their losses are compared at every step too: this is also how one
sees that the numerics of the whole recipe, optimiser included, are T5's. What it gave is in
docs/log.md.

Wants the "hf" extra and PyTorch.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import train
from models.config import ModelConfig
from models.flops import training_flops
from models.model import Model
from models.optimizers import Adafactor, AdamW, Constant
from models.published import NAMED
from models.weights import huggingface

Batch = dict[str, np.ndarray]


def batches(config: ModelConfig, rows: int, inputs: int, targets: int, seed: int = 0):
    """Endless batches of random tokens, a different number of them in each row."""
    rng = np.random.default_rng(seed)
    while True:

        def tokens(length: int) -> np.ndarray:
            # Half of the vocabulary's ids at most: some tokens come again, and can be learnt.
            ids = rng.zipf(1.3, (rows, length)) % (config.vocab_size - 2) + 2
            real = np.arange(length) < rng.integers(length // 2, length + 1, (rows, 1))
            return np.where(real, ids, 0).astype(np.int32)

        given, wanted = tokens(inputs), tokens(targets)
        yield {
            "encoder_input_tokens": given,
            "decoder_input_tokens": np.pad(wanted[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": wanted,
            "decoder_loss_weights": (wanted != 0).astype(np.float32),
        }


class Winnow:
    """train.py's step."""

    def __init__(self, model: Model, params: Any, config: train.TrainConfig):
        optimizer = train.make_optimizer(config, model)
        self._state = jax.jit(
            lambda params: train.State(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
            donate_argnums=0,
        )(params)
        self._step = jax.jit(train.make_train_step(config, model, optimizer), donate_argnums=0)

    def step(self, batch: Batch) -> float:
        self._state, metrics = self._step(self._state, batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(self._state)
        return loss


class Transformers:
    """T5ForConditionalGeneration with transformers' Adafactor or PyTorch's AdamW."""

    def __init__(self, directory: str, optimizer: Adafactor | AdamW, dtype: torch.dtype):
        self._model = transformers.T5ForConditionalGeneration.from_pretrained(directory).train()
        self._autocast = dtype != torch.float32
        rate = float(optimizer.schedule(0))
        if isinstance(optimizer, Adafactor):
            self._optimizer: Any = transformers.optimization.Adafactor(
                self._model.parameters(), lr=rate, relative_step=False, scale_parameter=True
            )
        else:
            decayed = [p for p in self._model.parameters() if p.ndim >= 2]
            whole = [p for p in self._model.parameters() if p.ndim < 2]
            self._optimizer = torch.optim.AdamW(
                [
                    {"params": decayed, "weight_decay": optimizer.weight_decay},
                    {"params": whole, "weight_decay": 0.0},
                ],
                lr=rate,
                betas=(optimizer.beta1, optimizer.beta2),
                eps=optimizer.epsilon,
            )

    def step(self, batch: Batch) -> float:
        given = torch.from_numpy(batch["encoder_input_tokens"]).long()
        wanted = torch.from_numpy(batch["decoder_target_tokens"]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self._model(
                input_ids=given,
                attention_mask=(given != 0).long(),
                decoder_input_ids=torch.from_numpy(batch["decoder_input_tokens"]).long(),
                labels=wanted.masked_fill(wanted == 0, -100),
            ).loss
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())


def compare(
    model_config: ModelConfig,
    optimizer: Adafactor | AdamW,
    *,
    steps: int,
    rows: int,
    inputs: int,
    targets: int,
    dtype: str = "float32",
) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> (loss of every step, seconds of every step)."""
    model = Model(dataclasses.replace(model_config, dtype=dtype, dropout_rate=0.0))
    params = jax.jit(model.init)(jax.random.key(0))
    config = train.TrainConfig(
        output="", data=None, steps=steps, model=model.config, optimizer=optimizer, z_loss=0.0
    )
    with tempfile.TemporaryDirectory() as directory:
        huggingface.save(directory, model, params)
        peer = Transformers(directory, optimizer, getattr(torch, dtype))
    programs = {"winnow": Winnow(model, params, config), "transformers": peer}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in programs}
    for _, batch in zip(range(steps), batches(model.config, rows, inputs, targets), strict=False):
        for name, program in programs.items():
            began = time.perf_counter()
            found[name][0].append(program.step(batch))
            found[name][1].append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="t5_small", choices=sorted(NAMED))
    parser.add_argument("--optimizer", default="adafactor", choices=("adafactor", "adamw"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=128)
    parser.add_argument("--targets", type=int, default=32)
    options = parser.parse_args()
    # transformers factors every matrix, T5 those with both dimensions of 128 and more.
    optimizer = {
        "adafactor": Adafactor(Constant(1e-2), min_dim_to_factor=1),
        "adamw": AdamW(Constant(1e-4), beta2=0.999, weight_decay=0.01),
    }[options.optimizer]
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    found = compare(
        NAMED[options.model],
        optimizer,
        steps=options.steps,
        rows=options.rows,
        inputs=options.inputs,
        targets=options.targets,
        dtype=options.dtype,
    )
    flops = training_flops(
        NAMED[options.model],
        {
            "encoder_input_tokens": (options.rows, options.inputs),
            "decoder_input_tokens": (options.rows, options.targets),
        },
    )
    print(
        f"{options.model}, {options.optimizer}, {options.dtype}, {options.rows} rows of "
        f"{options.inputs}/{options.targets}, {options.steps} steps, {cores} cores"
    )
    medians = {name: statistics.median(seconds[2:]) for name, (_, seconds) in found.items()}
    for name, (losses, _) in found.items():
        print(
            f"  {name:<14}{1000 * medians[name]:8.0f} ms/step  {flops / medians[name] / 1e9:6.0f} "
            f"GFLOP/s   loss {losses[0]:.6f} -> {losses[-1]:.6f}"
        )
    print(f"  winnow is {medians['transformers'] / medians['winnow']:.2f} times as fast")
    apart = np.abs(np.subtract(found["winnow"][0], found["transformers"][0]))
    relative = apart / np.abs(found["transformers"][0])
    print(
        f"  losses differ by at most {relative.max():.1e} (relative), at step {relative.argmax()}"
    )


if __name__ == "__main__":
    main()
