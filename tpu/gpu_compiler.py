"""XLA's GPU compiler on a machine without a GPU: its environment, devices, and kernels' registers.

Requires the extra `gpu_compile` (`pip install -e '.[gpu_compile]'`): the CUDA plugin of jaxlib's
version and the compiler components of CUDA. No driver is needed.

- Nothing is autotuned, because that takes a GPU: products have default configurations.
- Registers and spills of this project's kernels are those that NVIDIA's assembler reports
  (`ptxas -v`) for the PTX that XLA writes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpu.gpu_hlo import GATED, KERNELS
from tpu.gpus import Machine

PACKAGES = ("jax", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


class GpuCompilerError(RuntimeError):
    """Error for a missing component of the compiler."""


def toolkit() -> Path:
    """Return the directory of CUDA's compiler.

    Raises:
      GpuCompilerError: CUDA's compiler is not installed.
    """
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "cu13" / "bin" / "ptxas").exists():
            return Path(place) / "cu13"
    raise GpuCompilerError(
        "CUDA's compiler is not installed: pip install 'winnow-lm[gpu_compile]' (no GPU is needed)"
    )


def prepare_environment(dump: Path | None) -> None:
    """Set environment variables for compilation; must be called before jax is imported.

    Args:
      dump: directory for the PTX that the compiler writes; None writes none.
    """
    where = toolkit()
    os.environ["JAX_PLATFORMS"] = "cpu"  # JAX itself runs on the CPU
    flags = [
        os.environ.get("XLA_FLAGS", ""),
        f"--xla_gpu_cuda_data_dir={where}",
        "--xla_gpu_autotune_level=0",
    ]
    if dump is not None:
        flags.append(f"--xla_dump_to={dump}")
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()
    os.environ["PATH"] = f"{where / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"


def devices(machine: Machine) -> Sequence[Any]:
    """Return the devices of a machine, for a mesh."""
    from jax._src import xla_bridge
    from jax.experimental import topologies

    known = xla_bridge.canonicalize_platform

    def canonicalize_platform(platform: str) -> str:
        # NOTE: without a GPU JAX knows no platform "gpu" (jax issue 23971).
        try:
            return known(platform)
        except RuntimeError:
            if platform in ("gpu", "cuda"):
                return "cuda"
            raise

    if known.__module__ != __name__:
        xla_bridge.canonicalize_platform = canonicalize_platform
    described = topologies.get_topology_desc(
        machine.kind,
        platform="cuda",
        target_config=machine.chip.target_config(),
        topology=f"1x1x{machine.chips}",
    )
    return described.devices


def registers(dump: Path) -> dict[str, dict[str, int]]:
    """Return registers per thread and spilled bytes of this project's kernels, maxima by name.

    Raises:
      GpuCompilerError: the assembler rejects the PTX.
    """
    found: dict[str, dict[str, int]] = {}
    for file in sorted(dump.glob("*.ptx")):
        text = file.read_text(errors="replace")
        entries = re.findall(r"\.entry ([\w$]+)\(", text)
        names = {entry: kernel for entry in entries if (kernel := _kernel(entry)) is not None}
        if not names:
            continue
        target = re.search(r"^\.target (\w+)", text, re.MULTILINE)
        told = subprocess.run(
            [str(toolkit() / "bin" / "ptxas"), "-v", "-arch", target[1] if target else "sm_90",
             str(file), "-o", os.devnull],
            capture_output=True, text=True,
        )  # fmt: skip
        if told.returncode:
            raise GpuCompilerError(f"ptxas: {told.stderr.strip().splitlines()[-1:]}")
        pieces = re.split(r"Compiling entry function '([\w$]+)'", told.stderr)
        for entry, report in zip(pieces[1::2], pieces[2::2], strict=True):
            if entry in names:
                most = found.setdefault(names[entry], {"registers": 0, "spilled": 0})
                for key, pattern in (
                    ("registers", r"Used (\d+) registers"),
                    ("spilled", r"(\d+) bytes spill stores"),
                ):
                    match = re.search(pattern, report)
                    most[key] = max(most[key], int(match[1]) if match else 0)
    return found


def _kernel(entry: str) -> str | None:
    """Return the project's kernel with an entry's name, to which XLA may append a number."""
    name = re.sub(r"_\d+$", "", entry)
    return name if name in KERNELS or name == GATED else None
