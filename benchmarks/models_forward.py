"""Forward and loss-with-gradient time of T5 against transformers in PyTorch, on the same CPU.

python benchmarks/models_forward.py --sizes flan_t5_small flan_t5_base

Same shapes, same tokens, same number of threads, in one process; the two take turns, and each time
is the least of the repetitions, so that other work on the machine disturbs both alike. A ratio over
1 says how many times faster Winnow is. transformers runs its default attention, and in bfloat16
holds its parameters in bfloat16; Winnow's stay float32, and its softmax, norms and residual stream.
What it gave is in docs/log.md.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["flan_t5_small", "flan_t5_base"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--target_length", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--unrolled", action="store_true", help="unrolled layers instead of a scan")
    options = parser.parse_args()
    limit_threads(options.threads)

    shape = f"{options.rows} x {options.length}/{options.target_length} tokens"
    print(f"{shape}, {options.threads} threads; milliseconds, and transformers / winnow")
    print(f"{'size':16}{'dtype':10}{'what':16}{'transformers':>13}{'winnow':>9}{'ratio':>8}")
    for size in options.sizes:
        for dtype in options.dtypes:
            compare(size, dtype, options)


def limit_threads(threads: int) -> None:
    """Before JAX and PyTorch start: both take as many threads as this process has cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def compare(size: str, dtype: str, options) -> None:
    from models.published import NAMED

    config = dataclasses.replace(NAMED[size], dtype=dtype, scan_layers=not options.unrolled)
    batch = tokens(config.vocab_size, options)
    theirs = transformers_functions(config, batch, options.threads)
    ours = winnow_functions(config, batch)
    for what in ("forward", "loss + gradient"):
        times = alternate(theirs[what], ours[what], options.repetitions)
        milliseconds = [f"{1000 * t:.0f}" for t in times]
        print(
            f"{size:16}{dtype:10}{what:16}{milliseconds[0]:>13}{milliseconds[1]:>9}"
            f"{times[0] / times[1]:>8.2f}",
            flush=True,
        )


def alternate(first, second, repetitions: int) -> tuple[float, float]:
    """The least time of each, in seconds, after one call to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repetitions + 1):
        for function, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if round_:
                kept.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])


def tokens(vocab_size: int, options) -> dict:
    import numpy as np

    random = np.random.default_rng(0)
    tokens = random.integers(2, vocab_size, (options.rows, options.length)).astype(np.int32)
    targets = random.integers(2, vocab_size, (options.rows, options.target_length)).astype(np.int32)
    return {
        "encoder_input_tokens": tokens,
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }


def winnow_functions(config, batch) -> dict:
    import jax
    import jax.numpy as jnp

    from models.losses import cross_entropy
    from models.model import Model

    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))

    def loss(params, batch):
        targets = batch["decoder_target_tokens"]
        total, weight, _ = cross_entropy(
            model.bind(params)(batch), targets, jnp.ones(targets.shape)
        )
        return total / weight

    forward = jax.jit(lambda params, batch: model.bind(params)(batch))
    gradient = jax.jit(jax.value_and_grad(loss))
    return {
        "forward": lambda: jax.block_until_ready(forward(params, batch)),
        "loss + gradient": lambda: jax.block_until_ready(gradient(params, batch)),
    }


def transformers_functions(config, batch, threads: int) -> dict:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    settings = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_encoder_layers,
        num_decoder_layers=config.num_decoder_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        tie_word_embeddings=config.tie_embeddings,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(settings).eval()
    model.to(getattr(torch, config.dtype))
    given = {
        "input_ids": torch.tensor(batch["encoder_input_tokens"]).long(),
        "decoder_input_ids": torch.tensor(batch["decoder_input_tokens"]).long(),
    }
    labels = torch.tensor(batch["decoder_target_tokens"]).long()

    def forward():
        with torch.inference_mode():
            model(**given)

    def gradient():
        model.zero_grad()
        model(**given, labels=labels).loss.backward()

    return {"forward": forward, "loss + gradient": gradient}


if __name__ == "__main__":
    main()
