"""A short run of the fuzzer: fuzz.py runs a target for as long as one likes."""

from __future__ import annotations

import contextlib
import random
import resource
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import mutations
from targets import TARGETS

INPUTS = 250


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_read_or_refused(name):
    target = TARGETS[name]
    for seed in target.seeds:
        target.read(seed)
    stream = mutations(target.seeds, random.Random(name))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(INPUTS):
        content = next(stream)
        started = time.monotonic()
        with contextlib.suppress(*target.errors):
            target.read(content)
        assert time.monotonic() - started < 10, content[:200]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20, f"{grown >> 10} MiB more for files of at most {1 << 18} bytes"
