"""lm-evaluation-harness on one model, through Winnow's adapter and through its own "hf" model.

    python benchmarks/harness_huggingface.py --data eval --vocabulary t5-base.spiece.model

A Llama-shaped model with random parameters, written as Winnow's weights and as a Hugging Face
directory; the same documents of real tasks, in one process and on the same threads. For every task:
the largest difference of a log-likelihood relative to its size, whether all metrics agree, and CPU
seconds of both. Ours are given with compilation, and again without. A ratio over 1 says how many
times faster Winnow is.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="directory of the evaluation sets")
    parser.add_argument("--vocabulary", required=True, help="T5's SentencePiece model")
    parser.add_argument("--documents", type=int, default=40, help="of each task")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["arc_easy", "arc_challenge", "piqa", "boolq", "lambada", "mmlu::anatomy"],
    )
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(arguments.threads)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from evaluation import harness, inference
    from evaluation.harness import HarnessConfig
    from evaluation.harness_model import WinnowLM

    root = Path(tempfile.mkdtemp())
    write_twins(root, arguments)
    tasks = [f"winnow_{name}" for name in arguments.tasks]
    config = HarnessConfig(
        inference.InferenceConfig(
            str(root / "ours"), None, 1024, arguments.batch, compilation_cache=None
        ),
        str(root / "out"),
        tuple({name.partition("::")[0] for name in tasks}),
        arguments.data,
    )
    manager = harness.task_manager(config)
    loaded = manager.load(config.names())["tasks"]
    ours = WinnowLM(inference.load(config.inference))
    theirs = HFLM(
        pretrained=str(root / "theirs"),
        add_bos_token=False,
        device="cpu",
        dtype="float32",
        batch_size=arguments.batch,
    )

    def evaluated(lm, task):
        started = time.process_time()
        found = simple_evaluate(
            model=lm,
            tasks=[task],
            limit=arguments.documents,
            task_manager=manager,
            bootstrap_iters=0,
        )
        return found, time.process_time() - started

    totals = [0.0, 0.0, 0.0]
    for name in tasks:
        task = loaded[name]
        first, compiled = evaluated(ours, task)
        _, warm = evaluated(ours, task)
        other, seconds = evaluated(theirs, task)
        totals = [a + b for a, b in zip(totals, (compiled, warm, seconds), strict=True)]
        worst = max(
            abs(a / b - 1.0)
            for one, two in zip(first["samples"][name], other["samples"][name], strict=True)
            for a, b in zip(numbers(one), numbers(two), strict=True)
        )
        metrics = [
            (first["results"][name][key], value)
            for key, value in other["results"][name].items()
            if isinstance(value, float) and "stderr" not in key
        ]
        same = all(abs(a - b) <= 1e-5 * abs(b) for a, b in metrics)
        shown = ", ".join(f"{b:.4g}" for _, b in metrics)
        print(
            f"{name}: metrics {shown} {'agree' if same else 'DIFFER'}, largest difference "
            f"{worst:.1e}; CPU s: ours {compiled:.1f} with compilation, {warm:.1f} without, hf "
            f"{seconds:.1f}: {seconds / warm:.2f}",
            flush=True,
        )
    print(f"all: {totals[2] / totals[1]:.2f}; with compilation {totals[2] / totals[0]:.2f}")


def numbers(sample):
    """The log-likelihoods of a document's requests."""
    return [float(response[0][0]) for response in sample["resps"]]


def write_twins(root, arguments):
    import jax

    from models import weights
    from models.config import DecoderConfig
    from models.model import Model
    from models.weights import huggingface

    model = Model(
        DecoderConfig(
            vocab_size=32_128,
            d_model=arguments.width,
            d_ff=4 * arguments.width,
            num_layers=arguments.layers,
            num_heads=arguments.width // 32,
            num_kv_heads=arguments.width // 32,
            head_dim=32,
            initializer_range=0.2,
        )
    )
    params = jax.jit(model.init)(jax.random.key(0))
    weights.save(root / "ours", model, params, arguments.vocabulary)
    huggingface.save(root / "theirs", model, params)
    (root / "theirs" / "spiece.model").write_bytes(Path(arguments.vocabulary).read_bytes())
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (root / "theirs" / "tokenizer_config.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    main()
