"""Memory that XLA frees on CPUs is used again, in a process of its own."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

_PROGRAM = """
import resource
from models import host_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * (64 << 20)  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

returned = faults()
host_memory.keep_freed()
faults()
print(returned, faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True
    )
    returned, kept = map(int, done.stdout.split())
    assert returned > 20 * 10_000 > 2_000 > kept  # 16,384 pages each
