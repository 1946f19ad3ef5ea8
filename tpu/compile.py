"""Compiles the real programs for TPUs that are not there, and says what they would cost.

    python -m tpu.compile --topology v5e:16x16 --model t5_v1_1_xl --program train --batch 2048 \\
        --fsdp 16
    python -m tpu.compile --topology v5e:2x4 --model flan_t5_xl --program ask_llm --batch 1024
    python -m tpu.compile --topology v5e:16x16 --model t5_v1_1_large --program train --batch 2048 \\
        --fsdp 1,4,16,64 --remat projections,full --scan_layers True,False --search

Wants `pip install 'winnow-lm[tpu]'` and a CPU; no TPU. Memory, collectives and FLOPs are the
compiled program's own. Times and shares of peak are estimates: the compiler's estimated cycles of
every operation times the trips of the loops around it. What is not in them: waiting for collectives
and for the host; expect 10 to 20% less on hardware.

Choices
- A comma gives several values: all their combinations are compiled, each in a process of its own,
  because this compiler can take its process with it. `--search` ranks those that fit.
- A result is one small JSON file, named by what was compiled, by the compiler and by a digest of
  Winnow's code. A run that was stopped goes on; after a change of the code, or with `--anew`, all
  is compiled again.
- The share of peak is model FLOPs over what the chips could do in the cycles. Model FLOPs are the
  plain model's (models/flops.py), so that two programs of one model compare by it as by their time.
- Cycles of Pallas kernels, which the compiler does not estimate, are counted in its final schedule
  (tpu/bundles.py): an upper bound. Where a loop of a kernel depends on data, `--kernel NAME=CYCLES`
  says what to reckon with.
"""

from __future__ import annotations

import argparse
import ast
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
from tpu import bundles
from tpu.chips import GIB, Topology, TopologyError
from tpu.programs import PROGRAMS, Cell, ProgramError

RESULTS = "runs/tpu"
_SOURCES = ("models", "pruning", "tpu")  # and train.py: what a program and its estimate come from
_ENVIRONMENT = {
    # No accelerator is looked for, several processes may compile at a time, and the compiler does
    # not ask the machine which TPU it has.
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class CompileError(RuntimeError):
    """Nothing can be compiled here; the message says what is missing."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of a compiled cell. Per chip and step where nothing else is said.

    Attributes:
      cell: what was compiled.
      versions: of jax and libtpu, and a digest of Winnow's code.
      error: why there is no program; all that follows is then empty.
      fits: whether the memory is there.
      memory: bytes, by use: "arguments" (parameters, state, batch), "temporary", "code", "total".
      flops: of the plain model, all chips together.
      cycles: estimated; of the compiler's operations and the kernels.
      kernels: name -> {"count", "cycles" of one}.
      bytes: to and from HBM, estimated.
      collectives: kind -> {"synchronous", "asynchronous"} bytes.
      compile_seconds: including the tracing.
      operations: the costliest, [cycles, executions, name, source].
    """

    cell: Cell
    versions: dict[str, str]
    error: str | None = None
    fits: bool = False
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    cycles: int = 0
    kernels: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    operations: list[list[Any]] = dataclasses.field(default_factory=list)

    @property
    def topology(self) -> Topology:
        return Topology.parse(self.cell.topology)

    @property
    def seconds(self) -> float:
        """Estimated time of a step."""
        return self.cycles / self.topology.chip.clock

    @property
    def share_of_peak(self) -> float:
        chip = self.topology.chip
        available = self.cycles * chip.flops_per_cycle * self.topology.chips
        return self.flops / available if available else 0.0

    def synchronous(self) -> int:
        return sum(kind["synchronous"] for kind in self.collectives.values())

    def to_json(self) -> str:
        value = dataclasses.asdict(self)
        if self.cycles:
            value["estimate"] = {
                "step_seconds": self.seconds,
                "share_of_peak": round(self.share_of_peak, 4),
                "rows_per_second_per_chip": self.cell.batch / self.seconds / self.topology.chips,
            }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        value = json.loads(text)
        value.pop("estimate", None)
        value["cell"] = cell_of(value["cell"])
        return cls(**value)

    def __str__(self) -> str:
        cell, chip = self.cell, self.topology.chip
        axes = " x ".join(f"{axis} {size}" for axis, size in cell.mesh_axes.items() if size > 1)
        changed = dict(cell.settings) | dict(cell.train) | dict(cell.options)
        head = (
            f"{cell.model} {cell.program} on {cell.topology} ({axes or 'one chip'}), batch "
            f"{cell.batch} of {' + '.join(map(str, cell.lengths))}"
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
            f"  model FLOPs   {self.flops:.3g} a step, all chips",
            f"  HBM traffic   {self.bytes / 1e9:.1f} GB a chip and step (estimate)",
        ]
        for kind, ways in sorted(self.collectives.items()):
            parts = [f"{size / 1e9:.3g} GB {way}" for way, size in ways.items() if size]
            lines.append(f"  {kind:<13} {', '.join(parts) or 'nothing'} a chip and step")
        for name, kernel in self.kernels.items():
            lines.append(f"  kernel        {name}: {kernel['count']} x {kernel['cycles']:,} cycles")
        rows = cell.batch / self.seconds / self.topology.chips
        lines += [
            f"  compiled in   {self.compile_seconds:.0f} s",
            f"  ESTIMATE      {self.seconds * 1e3:.1f} ms a step, {self.share_of_peak:.1%} of peak "
            f"(a large product: {chip.best_product:.0%}), {rows:.4g} rows/s a chip; without "
            "waiting for collectives",
        ]
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# One cell


def cell_of(value: dict[str, Any]) -> Cell:
    """A cell from its JSON."""
    pairs = {
        name: tuple((key, _frozen(setting)) for key, setting in value[name])
        for name in ("settings", "train", "options", "kernels")
    }
    return Cell(**{**value, **pairs})


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


@functools.cache
def versions() -> dict[str, str]:
    """Of what compiles and of what is compiled.

    Raises CompileError where there is no compiler for TPUs.
    """
    import importlib.metadata

    try:
        compilers = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    except importlib.metadata.PackageNotFoundError as error:
        raise CompileError(
            f"{error.name} is not installed: pip install 'winnow-lm[tpu]' (no TPU is needed)"
        ) from error
    root = Path(__file__).parent.parent
    sources = [root / "train.py", *(f for name in _SOURCES for f in (root / name).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(sources)))
    return compilers | {"winnow": digest.hexdigest()[:10]}


def prepare_environment(dump: Path | None = None) -> None:
    """Call it before anything imports jax. `dump`: where the compiler writes its schedules."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if dump is not None:
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        flags = bundles.FLAGS.format(directory=dump)
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {flags}".strip()


def topology_devices(topology: Topology) -> Sequence[Any]:
    """Devices to lay a mesh over.

    NOTE: those of two calls are incompatible: call once a process and topology.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc(str(topology), "tpu").devices


def compile_cell(
    cell: Cell, devices: Sequence[Any] | None = None, dump: Path | None = None
) -> tuple[Result, str]:
    """Compiles a cell. Returns the result and the program's text ("" where there is none).

    Args:
      devices: of its topology, where there are some already.
      dump: what `prepare_environment` was given.

    Raises:
      ProgramError: the cell makes no program.
      HloError, BundleError: what was compiled cannot be costed.
    """
    import jax

    from models import partitioning
    from tpu import hlo, programs

    found = Result(cell, versions())
    if devices is None:
        devices = topology_devices(found.topology)
    mesh = partitioning.make_mesh(cell.mesh_axes, devices)
    started = time.perf_counter()
    lowered = programs.lower(cell, mesh)
    try:
        compiled = lowered.compile(dict(cell.options) or None)
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
    cost = hlo.cost(text)
    kernels = {}
    for kernel in cost.kernels:
        each = dict(cell.kernels).get(kernel.name)
        if each is None and dump is None:
            raise CompileError(f"no cycles known of the kernel {kernel.name}")
        if each is None and dump is not None:
            rows = cell.batch * cell.tensor // found.topology.chips
            each = bundles.of_kernel(dump, kernel.instructions, rows)
        kernels[f"{kernel.name} ({kernel.instructions[0]})"] = {
            "count": kernel.count,
            "cycles": int(each or 0),
        }
    result = dataclasses.replace(
        found,
        fits=memory["total"] <= found.topology.chip.hbm,
        memory=memory,
        flops=programs.model_flops(cell),
        cycles=cost.cycles + sum(k["count"] * k["cycles"] for k in kernels.values()),
        kernels=kernels,
        bytes=cost.bytes,
        collectives=hlo.totals(cost.collectives),
        compile_seconds=round(seconds, 1),
        operations=[list(operation) for operation in cost.operations],
    )
    return result, text


# --------------------------------------------------------------------------------------------------
# Many cells


def key_of(cell: Cell) -> str:
    """The name of a cell's file."""
    described = json.dumps([dataclasses.asdict(cell), versions()], sort_keys=True)
    digest = hashlib.sha256(described.encode()).hexdigest()[:10]
    return f"{cell.topology.replace(':', '-')}_{cell.model}_{cell.program}_{digest}"


def state_bytes(cell: Cell) -> int:
    """Least memory a chip needs: its part of the parameters, and in training of their gradients."""
    from tpu import programs

    model = programs.model_of(cell)
    each = 8 if cell.program == "train" else {"bfloat16": 2}.get(model.config.dtype, 4)
    return model.parameter_count() * each // (cell.fsdp * cell.tensor)


def run_cell(cell: Cell, directory: Path, anew: bool = False, verbose: bool = True) -> Result:
    """The cell's result: read, or compiled in a process of its own and written."""
    file = directory / f"{key_of(cell)}.json"
    if file.exists() and not anew:
        return Result.from_json(file.read_text())
    topology = Topology.parse(cell.topology)
    if state_bytes(cell) > topology.chip.hbm:
        needed = state_bytes(cell) / GIB
        result = Result(cell, versions(), error=f"does not fit: {needed:.1f} GiB of state a chip")
    else:
        if verbose:
            print(f"compiling {file.stem} ...", file=sys.stderr, flush=True)
        child = subprocess.run(
            [sys.executable, "-m", "tpu.compile", "--cell", json.dumps(dataclasses.asdict(cell))],
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
                cell,
                versions(),
                error=f"the compiler ended with status {child.returncode}: {last[0][:200]}",
            )
    _keep(result, directory)
    return result


def _keep(result: Result, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"{key_of(result.cell)}.json"
    partial = file.with_suffix(f".{os.getpid()}.part")
    partial.write_text(result.to_json())
    partial.replace(file)


def ranked(results: Iterable[Result]) -> list[Result]:
    """Those that fit, the most rows per second first; then those that do not."""

    def order(result: Result) -> tuple[bool, float]:
        usable = result.fits and not result.error
        return not usable, -result.cell.batch / result.seconds if usable else 0.0

    return sorted(results, key=order)


def table(results: Iterable[Result]) -> str:
    """A Markdown table."""
    rows = [
        "| model | program | topology | mesh | batch | settings | GiB a chip | sync GB | step ms | "
        "share of peak | rows/s a chip | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cell = result.cell
        mesh = " ".join(f"{axis}={size}" for axis, size in cell.mesh_axes.items() if size > 1)
        changed = dict(cell.settings) | dict(cell.train) | dict(cell.options)
        head = [
            cell.model,
            cell.program,
            cell.topology,
            mesh,
            str(cell.batch),
            ", ".join(f"{name}={value}" for name, value in changed.items()),
        ]
        if result.error:
            values = [result.error, "", "", "", "", ""]
        else:
            total = f"{result.memory['total'] / GIB:.1f}" + ("" if result.fits else " (too much)")
            values = [
                total,
                f"{result.synchronous() / 1e9:.2g}",
                f"{result.seconds * 1e3:.1f}",
                f"{result.share_of_peak:.1%}",
                f"{cell.batch / result.seconds / result.topology.chips:.4g}",
                f"{result.compile_seconds:.0f}",
            ]
        rows.append("| " + " | ".join(head + values) + " |")
    return "\n".join(rows)


# --------------------------------------------------------------------------------------------------
# Command line


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tpu.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    many = "; several with commas"
    made.add_argument("--topology", help=f"such as v5e:16x16, v5p:4x4x4, v6e:2x4{many}")
    made.add_argument("--model", help=f"a published size, such as t5_v1_1_xl or flan_t5_xl{many}")
    made.add_argument("--program", choices=PROGRAMS)
    made.add_argument("--batch", help=f"rows of the global batch{many}")
    made.add_argument("--input_length", type=int, default=0, help="positions of an encoder row")
    made.add_argument("--target_length", type=int, default=0, help="positions of a decoder row")
    made.add_argument("--fsdp", default=None, help=f"slices of the parameters [1]{many}")
    made.add_argument("--tensor", default="1", help=f"parts of every layer [1]{many}")
    made.add_argument("--remat", help=f"{', '.join(REMAT[:-1])} or {REMAT[-1]}{many}")
    made.add_argument("--scan_layers", help=f"True: one compiled layer; False: unrolled{many}")
    made.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="of the model's settings"
    )
    made.add_argument(
        "--train", action="append", default=[], metavar="NAME=VALUE", help="of TrainConfig's"
    )
    made.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the compiler's"
    )
    made.add_argument(
        "--kernel", action="append", default=[], metavar="NAME=CYCLES", help="of a Pallas kernel"
    )
    made.add_argument(
        "--search",
        action="store_true",
        help="rank by estimated rows per second; without --fsdp tries every power of two to 64",
    )
    made.add_argument("--results", default=RESULTS, help=f"where results are kept [{RESULTS}]")
    made.add_argument("--anew", action="store_true", help="compile what is there already")
    made.add_argument("--jobs", type=int, default=1, help="compilations at a time [1]")
    made.add_argument("--json", action="store_true", help="print results as JSON lines")
    made.add_argument("--markdown", action="store_true", help="print them as a table")
    made.add_argument("--operations", action="store_true", help="also show the costliest ones")
    made.add_argument("--cell", help=argparse.SUPPRESS)  # JSON: compile it here, print the result
    made.add_argument("--hlo", help="also write the optimised program to this file")
    return made


def cells_of(given: argparse.Namespace) -> list[Cell]:
    """All combinations of what the flags say that make a program."""
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
    cells: list[Cell] = []
    refused = None
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        settings = [
            (name, value)
            for name in ("remat", "scan_layers")
            if (value := chosen.pop(name)) is not None
        ]
        try:
            cell = Cell(
                program=given.program,
                input_length=given.input_length,
                target_length=given.target_length,
                settings=tuple(settings) + _pairs(given.set),
                train=_pairs(given.train),
                options=tuple((name, str(value)) for name, value in _pairs(given.option)),
                kernels=_pairs(given.kernel),
                **chosen,
            )
            cells.append(cell)
        except ProgramError as error:
            refused = error
    if not cells and refused is not None:
        raise refused
    return cells


def _integers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ProgramError(f"--{name} {text}: whole numbers, with commas between") from error


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
    """Returns the exit status: 0 where at least one cell fits."""
    given = parser().parse_args(arguments)
    try:
        if given.cell is not None:
            print(_compiled_here(cell_of(json.loads(given.cell)), given.hlo).to_json(), end="")
            return 0
        return _run(given)
    except (ProgramError, TopologyError, CompileError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _compiled_here(cell: Cell, hlo: str | None) -> Result:
    with tempfile.TemporaryDirectory(prefix="winnow_schedules_") as directory:
        prepare_environment(Path(directory))
        result, text = compile_cell(cell, dump=Path(directory))
    if hlo:
        Path(hlo).write_text(text)
    return result


def _run(given: argparse.Namespace) -> int:
    cells = cells_of(given)
    if given.hlo:
        if len(cells) != 1:
            raise ProgramError(f"--hlo is for one cell; these flags make {len(cells)}")
        results = [_compiled_here(cells[0], given.hlo)]
        _keep(results[0], Path(given.results))
    else:
        directory = Path(given.results)
        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            results = list(pool.map(lambda cell: run_cell(cell, directory, given.anew), cells))
    if given.search:
        results = ranked(results)
    if given.markdown:
        print(table(results))
    for result in results:
        if given.json:
            print(json.dumps(json.loads(result.to_json())))
        elif not given.markdown:
            print(result)
        if given.operations:
            for cycles, times, name, source in result.operations:
                print(f"    {cycles / result.cycles:6.1%}  {times} x {name}  {source}")
    return 0 if any(result.fits for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
