"""Tests of how shards are divided between processes; division does not start JAX."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from pruning.scores.workers import worker_of

ALONE = """
import jax
from pruning.scores.model import device
from pruning.scores.workers import worker_of
device.available_cpus = lambda: 3
print(*worker_of(None, None), *worker_of(None, 4))
device.use_cores(None)  # would have no effect once JAX has started
print(jax.local_device_count())
"""
JOINED = """
import sys
import jax
from pruning.scores.workers import worker_of
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
print(*worker_of(None, None), *worker_of(0, None))
"""


def _start(code: str, *arguments: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_process_alone_is_the_first_of_one_and_jax_is_not_started():
    out, error = _start(ALONE).communicate(timeout=120)
    assert out.split() == ["0", "1", "0", "4", "3"], error


def test_joined_processes_count_themselves():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    started = [_start(JOINED, address, str(index)) for index in range(2)]
    for index, process in enumerate(started):
        out, error = process.communicate(timeout=120)
        assert out.split() == [str(index), "2", "0", "2"], error


def test_an_index_beyond_the_number_is_refused():
    with pytest.raises(ValueError, match="counts from 0 to workers - 1 = 1"):
        worker_of(2, 2)
