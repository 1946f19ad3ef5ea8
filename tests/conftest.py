"""Settings of every test: the compiler, the devices, and what is skipped without real data."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, without limits on time: slow machines are no faults.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fixed")

# Servers of tests listen on this machine: no proxy.
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = "localhost,127.0.0.1," + os.environ.get(_name, "")

# Before anything imports jax: eight devices on one CPU, so that sharding can be tested, and a
# compiler in a hurry. The tests compile some three thousand programs and run most of them once, on
# a few rows; without LLVM's optimizations and MLIR's fusions that takes a third of the time. With
# WINNOW_OPTIMIZED=1 they are compiled as users compile them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
_QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
_given = os.environ.get("XLA_FLAGS", "")
if os.environ.get("WINNOW_OPTIMIZED") != "1" and _QUICK not in _given:  # a worker inherits them
    os.environ["XLA_FLAGS"] = f"{_given} {_QUICK}".strip()

# Processes that tests start compile what others compiled before: they share the programs of this
# run. The process that starts the workers makes the directory and removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="winnow-compiled-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Background jobs of a script ignore it, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the further cases of sweeps unless they are asked for."""
    if os.environ.get("WINNOW_SWEEP") == "1":
        return
    for item in items:
        if item.get_closest_marker("sweep"):
            item.add_marker(pytest.mark.skip(reason="a sweep: set WINNOW_SWEEP=1 to run it"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The directory of real corpora and vocabularies; the tests that want it skip without it."""
    path = Path(os.environ.get("WINNOW_DATA", REPOSITORY.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set WINNOW_DATA to its directory")
    return path


@pytest.fixture(scope="session")
def t5_vocabulary_file(real_data: Path) -> Path:
    return real_data / "tokenizer" / "t5-base.spiece.model"


@pytest.fixture(scope="session")
def eight_devices() -> list:
    """The eight CPU devices that sharding tests lay their meshes over."""
    import jax

    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("jax was started with fewer than eight devices")
    return devices[:8]
