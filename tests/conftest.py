"""Where the real data is, and what is skipped without it."""

from __future__ import annotations

import os
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

# Before anything imports jax: eight devices on one CPU, so that sharding can be tested.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()

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
