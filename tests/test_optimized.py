"""Numbers of programs that are compiled as users compile them, with all optimizations.

The compiler of the other tests is in a hurry: see conftest.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
# T5, a decoder and the losses.
TESTS = [
    "tests/models/test_t5_parity.py::test_variant_equals_transformers[v1_1]",
    "tests/models/test_decoder_parity.py::test_variant_equals_transformers[qwen3-True]",
    "tests/models/test_losses.py::test_chunked_equals_plain_at_real_vocabularies[32128]",
]


@pytest.mark.slow
def test_numbers_hold_with_all_optimizations():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["WINNOW_OPTIMIZED"] = "1"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout.splitlines()[-1]
