"""MaxText's training step beside Winnow's, compiled for a TPU slice and counted by one method.

    python3.12 -m venv peer
    peer/bin/pip install 'maxtext[tpu]==0.2.5' jax==0.12.0.1 'libtpu==0.0.50.*' gin-config
    python benchmarks/training_maxtext.py --python peer/bin/python --shape llama3_2_1b --rows 8 \\
        -- --fsdp 16 --remat no_hidden

Needs no TPU. Both programs are compiled by the same compiler, that of the peer's environment, for
the same shape, rows, length, AdamW in float32 and clipping of gradients. What follows `--` are
options of `tpu.compile`.

- MaxText's program is what its `train_compile` compiles: attention by its splash kernel, mesh and
  remat policy by `--maxtext`, compiler flags by `--flags`. The defaults are those of its script for
  Llama 2 7B on v5e (configs/tpu/v5e/llama2_7b.sh).
- Cycles, collectives and memory are counted by tpu/hlo.py and tpu/bundles.py for both.
- MaxText's attention skips the blocks above the diagonal. Its schedule does not say how often, so
  its time is given as a range: those blocks at no cost, and all blocks in full. Winnow's loops over
  blocks are counted for rows of one document each. Ratios are to MaxText's shorter time.
- Shares of peak are by the FLOPs of the plain model for both, attention in full.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.config import DecoderConfig
from tpu import bundles, hlo
from tpu.chips import GIB, Topology
from tpu.compile import ENVIRONMENT, parser, variants_of
from tpu.programs import Variant, model_flops, model_of

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true "
    "--xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_enable_async_collective_fusion=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true "
    "--xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
_REMAT = "save_qkv_proj"
_BLOCK = 512  # of splash attention, MaxText's default in both directions


@dataclasses.dataclass(frozen=True)
class Row:
    """Costs of one program, per chip and step; cycles from the least to the most."""

    name: str
    settings: str
    memory: int
    cycles: tuple[int, int]
    collectives: dict[str, dict[str, int]]
    compile_seconds: float


def maxtext_arguments(config: DecoderConfig, given: argparse.Namespace) -> list[str]:
    """Return the arguments of MaxText's command for a shape of Llama's family."""
    topology = Topology.parse(given.topology)
    settings: dict[str, Any] = {
        "run_name": "benchmark",
        "base_output_directory": "unused",
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "use_iota_embed": True,
        "compile_topology": f"{topology.kind}-{topology.chips * topology.chip.cores_in_name}",
        "compile_topology_num_slices": 1,
        "per_device_batch_size": given.rows,
        "max_target_length": given.length,
        "remat_policy": _REMAT,
        "base_emb_dim": config.d_model,
        "base_mlp_dim": config.d_ff,
        "base_num_decoder_layers": config.num_layers,
        "base_num_query_heads": config.num_heads,
        "base_num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rope_max_timescale": int(config.rope_theta),
        "normalization_layer_epsilon": config.norm_epsilon,
        "logits_via_embedding": config.tie_embeddings,
    }
    settings |= dict(pair.split("=", 1) for pair in given.maxtext)
    return [f"{name}={value}" for name, value in settings.items()]


def compile_maxtext(arguments: Sequence[str], directory: Path) -> None:
    """Run MaxText's `train_compile` and keep its program: step.txt and step.json."""
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    compile_step = train_compile.jit_and_compile

    def kept(*given: Any, **named: Any) -> Any:
        started = time.perf_counter()
        compiled = compile_step(*given, **named)
        stats = compiled.memory_analysis()
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        memory = stats.argument_size_in_bytes + stats.temp_size_in_bytes + results
        found = {
            "memory": memory + stats.generated_code_size_in_bytes,
            "compile_seconds": time.perf_counter() - started,
        }
        (directory / "step.txt").write_text(compiled.as_text())
        (directory / "step.json").write_text(json.dumps(found))
        return compiled

    train_compile.jit_and_compile = kept
    configuration = Path(maxtext.__file__).parent / "configs" / "base.yml"
    train_compile.main(["train_compile", str(configuration), *arguments])


def maxtext_row(config: DecoderConfig, given: argparse.Namespace) -> Row:
    """Compile MaxText's step in its environment and count it."""
    arguments = maxtext_arguments(config, given)
    digest = hashlib.sha256(json.dumps([arguments, given.flags]).encode()).hexdigest()[:10]
    directory = given.directory.absolute() / digest
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "step.json").exists():
        flags = f"{given.flags} {bundles.FLAGS.format(directory=directory)}"
        environment = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
        _run([given.python, __file__, "--inside", str(directory), *arguments], environment)
    found = json.loads((directory / "step.json").read_text())
    cost = hlo.cost((directory / "step.txt").read_text())
    least = most = cost.cycles
    blocks = -(-given.length // _BLOCK)
    for kernel in cost.kernels:
        cycles = kernel.count * bundles.of_kernel(directory, kernel.instructions)
        most += cycles
        least += round(cycles * (blocks + 1) / (2 * blocks))
    collectives = hlo.totals(cost.collectives)
    settings = ", ".join(given.maxtext) or f"remat_policy={_REMAT}"
    return Row(
        "MaxText", settings, found["memory"], (least, most), collectives, found["compile_seconds"]
    )


def winnow_row(variant: Variant, given: argparse.Namespace, options: Sequence[str]) -> Row:
    """Compile Winnow's step in the peer's environment and count it."""
    result = json.loads(_run([given.python, "-m", "tpu.compile", "--json", *options], os.environ))
    if result["error"]:
        raise SystemExit(f"Winnow: {result['error']}")
    changed = " ".join(f"{name}={value}" for name, value in result["variant"]["settings"])
    return Row(
        "Winnow",
        f"fsdp={variant.fsdp} {changed}",
        result["memory"]["total"],
        (result["cycles"], result["cycles"]),
        result["collectives"],
        result["compile_seconds"],
    )


def _run(command: Sequence[str], environment: Any) -> str:
    """Run a command with this repository's modules and return its output."""
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    # NOTE: importing jax sets it, here to the compiler of this interpreter's environment.
    environment.pop("TPU_LIBRARY_PATH", None)
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} exited with status {done.returncode}")
    return done.stdout


def say(row: Row, topology: Topology, flops: float) -> None:
    """Print a line of a Markdown table."""
    sent = [
        sum(kind[way] for kind in row.collectives.values()) / 1e9
        for way in ("synchronous", "asynchronous")
    ]
    cycles = sorted(set(row.cycles))
    step = " to ".join(f"{each / topology.chip.clock * 1e3:.1f}" for each in cycles)
    peak = topology.chip.flops_per_cycle * topology.chips
    share = " to ".join(f"{flops / (each * peak):.1%}" for each in reversed(cycles))
    print(
        f"| {row.name} | {row.settings} | {row.memory / GIB:.1f} | {sent[0]:.1f} | {sent[1]:.1f} | "
        f"{step} | {share} | {row.compile_seconds:.0f} |",
        flush=True,
    )


def main() -> None:
    """Run the command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--python", required=True, help="interpreter of the peer's environment")
    made.add_argument("--topology", default="v5e:16x16")
    made.add_argument("--shape", default="llama3_2_1b", help="name in models/published.py")
    made.add_argument("--change", action="append", default=[], help="NAME=VALUE of the shape")
    made.add_argument("--rows", type=int, default=8, help="rows of a chip")
    made.add_argument("--length", type=int, default=2048, help="tokens of a row")
    made.add_argument("--maxtext", action="append", default=[], help="NAME=VALUE of MaxText")
    made.add_argument("--flags", default=FLAGS, help="MaxText's flags of the compiler")
    made.add_argument(
        "--directory",
        type=Path,
        default=Path("runs/maxtext"),
        help="where MaxText's programs and schedules are kept; none is compiled twice",
    )
    made.add_argument("options", nargs="*", help="further options of tpu.compile, after --")
    given = made.parse_args()
    topology = Topology.parse(given.topology)
    options = [
        *("--topology", given.topology, "--model", given.shape, "--program", "train"),
        *("--batch", str(given.rows * topology.chips), "--target_length", str(given.length)),
        *("--set", "attention=pallas"),
        *("--train", "optimizer=AdamW", "--train", "clip_norm=1.0"),
        *(part for change in given.change for part in ("--set", change)),
        *given.options,
    ]
    (variant,) = variants_of(parser().parse_args(options))
    config = model_of(variant).config
    flops = model_flops(variant)
    print("| program | settings | GiB a chip | sync GB | async GB | step ms | share | compile s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    peer = maxtext_row(config, given)
    say(peer, topology, flops)
    own = winnow_row(variant, given, options)
    say(own, topology, flops)
    print(f"Winnow is {peer.cycles[0] / own.cycles[0]:.2f} times as fast")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        compile_maxtext(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
