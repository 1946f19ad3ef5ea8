"""Ahead-of-time compilation of the training and scoring programs for TPUs and NVIDIA GPUs, with
cost estimates.

    python -m tpu.compile --topology v5e:16x16 --model t5_v1_1_xl --program train --batch 2048 \\
        --fsdp 16
    python -m tpu.compile --topology v5e:2x4 --model flan_t5_xl --program ask_llm --batch 1024
    python -m tpu.compile --topology v5e:16x16 --model t5_v1_1_large --program train --batch 2048 \\
        --fsdp 1,4,16,64 --remat projections,full --scan_layers True,False --search
    python -m tpu.compile --topology h100:8,a100:8 --model flan_t5_xl --program ask_llm --batch 128

Requires the extra `tpu` (`pip install -e '.[tpu]'`), for GPUs `gpu_compile`, and a CPU, but neither
a TPU nor a GPU. Memory, collectives and
FLOPs are those of the compiled program. Times and shares of peak are estimates: the compiler's
estimated cycles of every operation times the trip counts of the loops around it. Stalls on
collectives and on the host are not included; expect 10 to 20% less on hardware.

Choices
- For GPUs the time is a roofline of every operation, over its own bytes and FLOPs (tpu/gpu_hlo.py),
  at shares of bandwidth and peak that are assumed (tpu/gpus.py).
- Several values, separated by commas, are compiled in all combinations, each in a process of its
  own, because the compiler may abort its process. `--search` ranks those that fit.
- A result is a small JSON file, named after the program, the compiler version and a digest of
  Winnow's code. An interrupted run continues where it stopped; after a change of the code, or with
  `--anew`, everything is compiled again.
- Shares of peak are given twice (models/flops.py): by the FLOPs of the plain model, so that two
  programs of one model compare as their times do, and by the FLOPs that the program executes, which
  leave out what a program avoids (absorbed cross-attention) and include what it computes again
  (rematerialization). The second cannot exceed what the hardware reaches on a large product.
- Cycles of Pallas kernels are counted in the compiler's final schedule (tpu/bundles.py) and are an
  upper bound. The loops of a decoder-only model's attention, whose bounds depend on the data, are
  those of rows of one document each. For other such loops, give `--kernel NAME=CYCLES`.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models.config import REMAT
from models.terminal import say
from tpu import bundles, gpu_compiler, targets
from tpu.chips import GIB, Topology, TopologyError
from tpu.gpu_compiler import GpuCompilerError
from tpu.gpus import Machine
from tpu.programs import PROGRAMS, ProgramError, Variant

RESULTS = "runs/tpu"
_PACKAGES = ("jax", "libtpu")
_ATTENTION = ("relative_attention", "relative_attention_backward")  # with loops over blocks
_SOURCES = ("models", "pruning", "tpu")  # and train.py: code that a result depends on
ENVIRONMENT = {
    # JAX itself runs on the CPU, several processes may load the compiler, and it does not query
    # the metadata server of a TPU VM.
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class CompileError(RuntimeError):
    """A missing requirement of compilation."""


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of compiling a variant; figures are per chip and step unless stated otherwise.

    Attributes:
      variant: the compiled variant.
      versions: versions of jax and libtpu, and a digest of Winnow's code.
      error: reason why there is no program; the attributes below are then empty.
      fits: True if the program fits into memory.
      memory: bytes by use: "arguments" (parameters, state, batch), "results", "temporary", "code",
        and "total".
      flops: FLOPs of the plain model on all chips.
      executed_flops: FLOPs of the program on all chips.
      cycles: estimated cycles, including Pallas kernels.
      kernels: {"count", "cycles"} by name; cycles are of one execution. On GPUs {"count",
        "registers", "spilled"}: registers of a thread, and bytes that it spills.
      bytes: estimated HBM traffic.
      traffic: on GPUs, `bytes` by kind of operation (tpu/gpu_hlo.py).
      roofline: on GPUs, seconds by kind of operation.
      collectives: bytes by kind and by "synchronous" or "asynchronous".
      compile_seconds: time of tracing and compiling.
      operations: the most expensive operations: [cycles, executions, name, source]; on GPUs
        nanoseconds instead of cycles.
    """

    variant: Variant
    versions: dict[str, str]
    error: str | None = None
    fits: bool = False
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    executed_flops: float = 0.0
    cycles: int = 0
    kernels: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    traffic: dict[str, int] = dataclasses.field(default_factory=dict)
    roofline: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    operations: list[list[Any]] = dataclasses.field(default_factory=list)

    @property
    def topology(self) -> Topology | Machine:
        return targets.parse(self.variant.topology)

    @property
    def seconds(self) -> float:
        """Estimated time of a step."""
        target = self.topology
        if isinstance(target, Machine):
            return sum(self.roofline.values())
        return self.cycles / target.chip.clock

    @property
    def share_of_peak(self) -> float:
        """Share of the bf16 peak by the FLOPs of the plain model."""
        return self._share(self.flops)

    @property
    def executed_share_of_peak(self) -> float:
        """Share of the bf16 peak by executed FLOPs."""
        return self._share(self.executed_flops)

    def _share(self, flops: float) -> float:
        target = self.topology
        if isinstance(target, Machine):
            available = self.seconds * target.chip.peak * target.chips
        else:
            available = self.cycles * target.chip.flops_per_cycle * target.chips
        return flops / available if available else 0.0

    def synchronous(self) -> int:
        """Return the bytes of all synchronous collectives."""
        return sum(kind["synchronous"] for kind in self.collectives.values())

    def to_json(self) -> str:
        value = dataclasses.asdict(self)
        if self.seconds:
            value["estimate"] = {
                "step_seconds": self.seconds,
                "share_of_peak": round(self.share_of_peak, 4),
                "executed_share_of_peak": round(self.executed_share_of_peak, 4),
                "rows_per_second_per_chip": self.variant.batch / self.seconds / self.topology.chips,
            }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        value = json.loads(text)
        value.pop("estimate", None)
        value["variant"] = variant_of(value["variant"])
        return cls(**value)

    def __str__(self) -> str:
        variant, chip = self.variant, self.topology.chip
        axes = " x ".join(f"{axis} {size}" for axis, size in variant.mesh_axes.items() if size > 1)
        changed = dict(variant.settings) | dict(variant.train) | dict(variant.options)
        head = (
            f"{variant.model} {variant.program} on {variant.topology} ({axes or 'one chip'}), "
            f"batch {variant.batch} of {' + '.join(map(str, variant.lengths))}"
            + "".join(f", {name}={value}" for name, value in changed.items())
        )
        if self.error:
            return f"{head}\n  {self.error}"
        total = self.memory["total"]
        lines = [
            head,
            f"  memory        {total / GIB:.2f} of {chip.hbm / GIB:.2f} GiB a chip: "
            + ", ".join(
                f"{name} {size / GIB:.2f}" for name, size in self.memory.items() if name != "total"
            ),
            f"  FLOPs         {self.flops:.3g} a step by the plain model, "
            f"{self.executed_flops:.3g} executed; all chips",
            f"  HBM traffic   {self.bytes / 1e9:.1f} GB a chip and step (estimate)",
        ]
        for kind, ways in sorted(self.collectives.items()):
            parts = [f"{size / 1e9:.3g} GB {way}" for way, size in ways.items() if size]
            lines.append(f"  {kind:<13} {', '.join(parts) or 'nothing'} a chip and step")
        for name, kernel in self.kernels.items():
            each = ", ".join(f"{value:,} {key}" for key, value in kernel.items() if key != "count")
            lines.append(f"  kernel        {name}: {kernel['count']} x {each}")
        rows = variant.batch / self.seconds / self.topology.chips
        method = "without stalls on collectives"
        if self.roofline:
            method = "a roofline: " + ", ".join(
                f"{kind} {seconds * 1e3:.1f}"
                + (f" ({self.traffic[kind] / 1e9:.1f} GB)" if kind in self.traffic else "")
                for kind, seconds in self.roofline.items()
            )
        lines += [
            f"  compiled in   {self.compile_seconds:.0f} s",
            f"  ESTIMATE      {self.seconds * 1e3:.1f} ms a step, {rows:.4g} rows/s a chip, "
            f"{method}",
            f"  of peak       {self.share_of_peak:.1%} by the plain model, "
            f"{self.executed_share_of_peak:.1%} executed (a large product: "
            f"{chip.best_product:.1%})",
        ]
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# One variant


def variant_of(value: dict[str, Any]) -> Variant:
    """Return the variant of a JSON value."""
    pairs = {
        name: tuple((key, _frozen(setting)) for key, setting in value[name])
        for name in ("settings", "train", "options", "kernels")
    }
    return Variant(**{**value, **pairs})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@functools.cache
def versions(*, gpu: bool = False) -> dict[str, str]:
    """Return the versions of the compiler and a digest of Winnow's code.

    Raises:
      CompileError: the compiler is not installed.
    """
    import importlib.metadata

    packages, extra = (gpu_compiler.PACKAGES, "gpu_compile") if gpu else (_PACKAGES, "tpu")
    try:
        compilers = {name: importlib.metadata.version(name) for name in packages}
    except importlib.metadata.PackageNotFoundError as error:
        raise CompileError(
            f"{error.name} is not installed: pip install 'winnow-lm[{extra}]' "
            f"(no {'GPU' if gpu else 'TPU'} is needed)"
        ) from error
    root = Path(__file__).parent.parent
    sources = [root / "train.py", *(f for name in _SOURCES for f in (root / name).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources)))
    return compilers | {"winnow": digest.hexdigest()[:10]}


def prepare_environment(target: Topology | Machine, dump: Path | None = None) -> None:
    """Set environment variables for compilation; must be called before jax is imported.

    Args:
      dump: directory for the schedules or PTX that the compiler writes; None writes none.
    """
    if isinstance(target, Machine):
        gpu_compiler.prepare_environment(dump)
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if dump is not None:
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        flags = bundles.FLAGS.format(directory=dump)
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {flags}".strip()


def topology_devices(topology: Topology | Machine) -> Sequence[Any]:
    """Return the devices of a topology, for a mesh.

    NOTE: devices of two calls are incompatible: call once per process and topology.
    """
    if isinstance(topology, Machine):
        return gpu_compiler.devices(topology)
    from jax.experimental import topologies

    return topologies.get_topology_desc(str(topology), "tpu").devices


def compile_variant(
    variant: Variant, devices: Sequence[Any] | None = None, dump: Path | None = None
) -> tuple[Result, str]:
    """Compile a variant; return the result and the HLO text ("" if the program does not fit).

    Args:
      devices: devices of the variant's topology; None creates them.
      dump: the directory given to `prepare_environment`.

    Raises:
      ProgramError: there is no program for the variant.
      CompileError: the cycles of a kernel are unknown.
      HloError, BundleError: the cost of the compiled program cannot be computed.
    """
    import jax

    from models import flops, partitioning
    from models.compiler_options import Option, compiler_options, scoring_options
    from tpu import programs

    target = targets.parse(variant.topology)
    found = Result(variant, _versions(variant))
    if devices is None:
        devices = topology_devices(found.topology)
    mesh = partitioning.make_mesh(variant.mesh_axes, devices)
    started = time.perf_counter()
    traced = programs.trace(variant, mesh)
    try:
        given: dict[str, Option] = dict(variant.options)
        if variant.program == "train":
            options = compiler_options(mesh, given)
        else:
            options = scoring_options(mesh, programs.model_of(variant).config, given)
        compiled = traced.lower().compile(options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        why = next((line for line in str(error).splitlines() if " of " in line), str(error)[:300])
        return dataclasses.replace(found, error=f"does not fit: {why.strip()[:200]}"), ""
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values())
    text = compiled.as_text()
    result = dataclasses.replace(
        found,
        fits=memory["total"] <= target.chip.hbm,
        memory=memory,
        flops=programs.model_flops(variant),
        executed_flops=flops.traced_flops(traced.jaxpr),
        compile_seconds=round(seconds, 1),
    )
    costs = _gpu_costs if isinstance(target, Machine) else _tpu_costs
    return dataclasses.replace(result, **costs(variant, text, dump)), text


def _versions(variant: Variant) -> dict[str, str]:
    return versions(gpu=isinstance(targets.parse(variant.topology), Machine))


def _tpu_costs(variant: Variant, text: str, dump: Path | None) -> dict[str, Any]:
    """Return the attributes of a result that are read from a TPU's program."""
    from tpu import hlo, programs

    cost = hlo.cost(text)
    kernels = {}
    for kernel in cost.kernels:
        each = dict(variant.kernels).get(kernel.name)
        if each is None and dump is None:
            raise CompileError(f"unknown cycles of kernel {kernel.name}: no schedules were dumped")
        if each is None and dump is not None:
            rows = variant.batch * variant.tensor // targets.parse(variant.topology).chips
            trips = programs.attention_trips(variant) if kernel.name in _ATTENTION else None
            each = bundles.of_kernel(dump, kernel.instructions, rows, trips)
        kernels[f"{kernel.name} ({kernel.instructions[0]})"] = {
            "count": kernel.count,
            "cycles": int(each or 0),
        }
    return {
        "cycles": cost.cycles + sum(k["count"] * k["cycles"] for k in kernels.values()),
        "kernels": kernels,
        "bytes": cost.bytes,
        "collectives": hlo.totals(cost.collectives),
        "operations": [list(operation) for operation in cost.operations],
    }


def _gpu_costs(variant: Variant, text: str, dump: Path | None) -> dict[str, Any]:
    """Return the attributes of a result that are read from a GPU's program."""
    from tpu import gpu_hlo

    found = gpu_hlo.operations(text, Machine.parse(variant.topology).chip)
    kernels = gpu_compiler.registers(dump) if dump is not None else {}
    counts: collections.Counter[str] = collections.Counter()
    for each in found:
        if (kernel := each.source.removesuffix("/pallas_call").rpartition("/")[2]) in kernels:
            counts[kernel] += each.count
    costly = sorted(found, key=lambda each: each.seconds * each.count, reverse=True)[:20]
    traffic = gpu_hlo.traffic(found)
    return {
        "kernels": {name: {"count": counts[name], **kernel} for name, kernel in kernels.items()},
        "bytes": sum(traffic.values()),
        "traffic": traffic,
        "roofline": gpu_hlo.roofline(found),
        "collectives": gpu_hlo.collectives(found),
        "operations": [
            [round(each.seconds * each.count * 1e9), each.count, each.name, each.source]
            for each in costly
        ],
    }


# --------------------------------------------------------------------------------------------------
# Many variants


def key_of(variant: Variant) -> str:
    """Return the name of a variant's result file, without suffix."""
    described = json.dumps([dataclasses.asdict(variant), _versions(variant)], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:10]
    return f"{variant.topology.replace(':', '-')}_{variant.model}_{variant.program}_{digest}"


def state_bytes(variant: Variant) -> int:
    """Return the bytes of parameters, and in training of gradients, that a chip holds at least."""
    from tpu import programs

    model = programs.model_of(variant)
    each = 8 if variant.program == "train" else {"bfloat16": 2}.get(model.config.dtype, 4)
    return model.parameter_count() * each // (variant.fsdp * variant.tensor)


def run_variant(
    variant: Variant, directory: Path, anew: bool = False, verbose: bool = True
) -> Result:
    """Return the result of a variant: read from its file, or compiled in a new process."""
    file = directory / f"{key_of(variant)}.json"
    if file.exists() and not anew:
        return Result.from_json(file.read_text())
    topology = targets.parse(variant.topology)
    if state_bytes(variant) > topology.chip.hbm:
        needed = state_bytes(variant) / GIB
        result = Result(
            variant, _versions(variant), error=f"does not fit: {needed:.1f} GiB of state a chip"
        )
    else:
        if verbose:
            say(f"compiling {file.stem} ...", error=True)
        child = subprocess.run(
            [
                sys.executable,
                "-m",
                "tpu.compile",
                "--variant",
                json.dumps(dataclasses.asdict(variant)),
            ],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        if child.returncode == 0:
            result = Result.from_json(child.stdout)
        else:
            said = [line for line in child.stderr.splitlines() if line.startswith("error: ")]
            if said:
                raise ProgramError(said[-1].removeprefix("error: "))
            last = child.stderr.strip().splitlines()[-1:] or [""]
            result = Result(
                variant,
                _versions(variant),
                error=f"the compiler exited with status {child.returncode}: {last[0][:200]}",
            )
    _keep(result, directory)
    return result


def _keep(result: Result, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{key_of(result.variant)}.json"
    partial = file.with_suffix(f".{os.getpid()}.part")
    partial.write_text(result.to_json())
    partial.replace(file)


def ranked(results: Iterable[Result]) -> list[Result]:
    """Return the results that fit, by descending rows per second, then those that do not fit."""

    def order(result: Result) -> tuple[bool, float]:
        usable = result.fits and not result.error
        return not usable, -result.variant.batch / result.seconds if usable else 0.0

    return sorted(results, key=order)


def table(results: Iterable[Result]) -> str:
    """Return a Markdown table."""
    rows = [
        "| model | program | topology | mesh | batch | settings | GiB a chip | sync GB | step ms | "
        "share of peak, plain | executed | rows/s a chip | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        variant = result.variant
        mesh = " ".join(f"{axis}={size}" for axis, size in variant.mesh_axes.items() if size > 1)
        changed = dict(variant.settings) | dict(variant.train) | dict(variant.options)
        head = [
            variant.model,
            variant.program,
            variant.topology,
            mesh,
            str(variant.batch),
            ", ".join(f"{name}={value}" for name, value in changed.items()),
        ]
        if result.error:
            values = [result.error, "", "", "", "", "", ""]
        else:
            total = f"{result.memory['total'] / GIB:.1f}" + ("" if result.fits else " (too much)")
            values = [
                total,
                f"{result.synchronous() / 1e9:.2g}",
                f"{result.seconds * 1e3:.1f}",
                f"{result.share_of_peak:.1%}",
                f"{result.executed_share_of_peak:.1%}",
                f"{variant.batch / result.seconds / result.topology.chips:.4g}",
                f"{result.compile_seconds:.0f}",
            ]
        rows.append("| " + " | ".join(head + values) + " |")
    return "\n".join(rows)


# --------------------------------------------------------------------------------------------------
# Command line


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    made = argparse.ArgumentParser(
        prog="python -m tpu.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    many = "; several, separated by commas"
    made.add_argument(
        "--topology", help=f"topology, such as v5e:16x16, v5p:4x4x4, v6e:2x4 or h100:8{many}"
    )
    made.add_argument("--model", help=f"a published size, such as t5_v1_1_xl or flan_t5_xl{many}")
    made.add_argument("--program", choices=PROGRAMS)
    made.add_argument("--batch", help=f"rows of the global batch{many}")
    made.add_argument("--input_length", type=int, default=0, help="positions of an encoder row")
    made.add_argument("--target_length", type=int, default=0, help="positions of a decoder row")
    made.add_argument("--fsdp", default=None, help=f"size of the mesh axis fsdp [1]{many}")
    made.add_argument("--tensor", default="1", help=f"size of the mesh axis tensor [1]{many}")
    made.add_argument("--remat", help=f"{', '.join(REMAT[:-1])} or {REMAT[-1]}{many}")
    made.add_argument(
        "--scan_layers", help=f"True: one compiled layer in a loop; False: unrolled{many}"
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of the model's configuration",
    )
    made.add_argument(
        "--train",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="setting of TrainConfig, such as optimizer=AdamW",
    )
    made.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="compiler option"
    )
    made.add_argument(
        "--kernel",
        action="append",
        default=[],
        metavar="NAME=CYCLES",
        help="cycles of a Pallas kernel",
    )
    made.add_argument(
        "--search",
        action="store_true",
        help="rank by estimated rows per second; without --fsdp, try all powers of two up to 64",
    )
    made.add_argument("--results", default=RESULTS, help=f"directory of results [{RESULTS}]")
    made.add_argument("--anew", action="store_true", help="compile again what has a result")
    made.add_argument("--jobs", type=int, default=1, help="parallel compilations [1]")
    made.add_argument("--json", action="store_true", help="print results as JSON lines")
    made.add_argument("--markdown", action="store_true", help="print results as a table")
    made.add_argument(
        "--operations", action="store_true", help="also print the most expensive operations"
    )
    made.add_argument(
        "--variant", help=argparse.SUPPRESS
    )  # JSON: compile it here, print the result
    made.add_argument("--hlo", help="write the optimized HLO text to this file")
    return made


def variants_of(given: argparse.Namespace) -> list[Variant]:
    """Return the variants of all combinations of the flags, without those that have no program."""
    for name in ("topology", "model", "program", "batch"):
        if getattr(given, name) is None:
            raise ProgramError(f"--{name} is missing; see --help")
    fsdp = given.fsdp or ("1,2,4,8,16,32,64" if given.search else "1")
    axes = {
        "topology": given.topology.split(","),
        "model": given.model.split(","),
        "batch": _integers(given.batch, "batch"),
        "fsdp": _integers(fsdp, "fsdp"),
        "tensor": _integers(given.tensor, "tensor"),
        "remat": given.remat.split(",") if given.remat else [None],
        "scan_layers": _values(given.scan_layers) if given.scan_layers else [None],
    }
    variants: list[Variant] = []
    refused = None
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        settings = [
            (name, value)
            for name in ("remat", "scan_layers")
            if (value := chosen.pop(name)) is not None
        ]
        try:
            variant = Variant(
                program=given.program,
                input_length=given.input_length,
                target_length=given.target_length,
                settings=tuple(settings) + _pairs(given.set),
                train=_pairs(given.train),
                options=tuple((name, str(value)) for name, value in _pairs(given.option)),
                kernels=_pairs(given.kernel),
                **chosen,
            )
            variants.append(variant)
        except ProgramError as error:
            refused = error
    if not variants and refused is not None:
        raise refused
    return variants


def _integers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ProgramError(f"--{name} {text}: give whole numbers, separated by commas") from error


def _values(text: str) -> list[Any]:
    return [_value(part) for part in text.split(",")]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _pairs(settings: Sequence[str]) -> tuple[tuple[str, Any], ...]:
    for setting in settings:
        if "=" not in setting:
            raise ProgramError(f"{setting!r}: write NAME=VALUE")
    return tuple((n, _value(v)) for n, _, v in (s.partition("=") for s in settings))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 if at least one variant fits."""
    given = parser().parse_args(arguments)
    try:
        if given.variant is not None:
            say(_compiled_here(variant_of(json.loads(given.variant)), given.hlo).to_json().rstrip())
            return 0
        return _run(given)
    except (ProgramError, TopologyError, CompileError, GpuCompilerError, ValueError) as error:
        say(f"error: {error}", error=True)
        return 2


def _compiled_here(variant: Variant, hlo: str | None) -> Result:
    with tempfile.TemporaryDirectory(prefix="winnow_schedules_") as directory:
        prepare_environment(targets.parse(variant.topology), Path(directory))
        result, text = compile_variant(variant, dump=Path(directory))
    if hlo:
        Path(hlo).write_text(text)
    return result


def _run(given: argparse.Namespace) -> int:
    variants = variants_of(given)
    if given.hlo:
        if len(variants) != 1:
            raise ProgramError(f"--hlo requires a single variant; these flags give {len(variants)}")
        results = [_compiled_here(variants[0], given.hlo)]
        _keep(results[0], Path(given.results))
    else:
        directory = Path(given.results)
        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            results = list(
                pool.map(lambda variant: run_variant(variant, directory, given.anew), variants)
            )
    if given.search:
        results = ranked(results)
    if given.markdown:
        say(table(results))
    for result in results:
        if given.json:
            say(json.dumps(json.loads(result.to_json())))
        elif not given.markdown:
            say(result)
        if given.operations:
            for cycles, times, name, source in result.operations:
                share = cycles / (result.cycles or result.seconds * 1e9)
                say(f"    {share:6.1%}  {times} x {name}  {source}")
    return 0 if any(result.fits for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
