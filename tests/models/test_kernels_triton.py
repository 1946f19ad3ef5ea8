"""The GPU attention kernel against the plain form: outputs and gradients, its steps run in XLA.

`python benchmarks/gpu_parity.py` compares them over all lengths, head sizes and dtypes.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from models.kernels import triton
from models.kernels.segments import block_spans, segment_mask
from models.kernels.triton import TUNING, Blocks, Tuning, generation

SMALL = Tuning(*itertools.repeat(Blocks(16, 16, 4, 2), 4))  # many blocks in short rows


def _load_cases():
    file = Path(triton.__file__).parents[2] / "benchmarks" / "gpu_parity.py"
    specification = importlib.util.spec_from_file_location("gpu_parity", file)
    module = importlib.util.module_from_spec(specification)
    sys.modules["gpu_parity"] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module.Case


Case = _load_cases()
CASES = [
    Case(128, packed=False),
    Case(200),  # a part of a block at the end
    Case(128, head_dim=128, causal=True, scale=0.7, reach=128, tuning=TUNING["ampere"][128]),
    Case(90, head_dim=16, tuning=SMALL),
    Case(48, keys=90, head_dim=16, biased=False, heads=4, group=2, tuning=SMALL),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.length}x{case.head_dim}")
def test_kernel_equals_plain_attention_and_its_gradients(case):
    out, *gradients = case.differences()
    assert out <= 2e-6
    assert max(gradients) <= 1e-5


def test_bfloat16_is_as_near_as_its_rounding():
    assert max(Case(128, dtype="bfloat16").differences()) <= 1e-2


def test_segments_in_any_order_are_computed():
    class Shuffled(Case):
        def segments(self):
            return [np.random.default_rng(0).permuted(ids, axis=1) for ids in super().segments()]

    out, *gradients = Shuffled(90, head_dim=16, tuning=SMALL).differences()
    assert out <= 2e-6
    assert max(gradients) <= 1e-5


def test_spans_of_unequal_blocks_hold_every_visible_pair():
    ids = np.array([[1] * 100 + [2] * 156 + [3] * 128 + [0] * 128], np.int32)
    for causal in (False, True):
        (first, end), (key_first, key_end) = block_spans(ids, ids, 128, 64, causal=causal)
        mask = np.asarray(segment_mask(ids, ids, causal=causal))[0, 0]
        some = mask.reshape(4, 128, 8, 64).any((1, 3))  # [query blocks, key blocks]
        index, key_index = np.arange(8), np.arange(4)
        met = (first[:, None] <= index) & (index < end[:, None])
        key_met = (key_first[:, None] <= key_index) & (key_index < key_end[:, None])
        assert not (some & ~met).any() and not (some & ~key_met.T).any()
        assert met.sum() <= 12 and key_met.sum() <= 12  # of 32


def test_what_the_kernel_lacks_is_refused():
    with pytest.raises(ValueError, match="heads of 16, 32, 64 or 128, not 80"):
        Case(64, head_dim=80).differences()
    with pytest.raises(ValueError, match="48 queries and 90 keys"):
        Case(48, keys=90).differences()


def test_every_generation_has_blocks_for_every_head_size():
    assert generation("NVIDIA H100 80GB HBM3") == generation("NVIDIA H200") == "hopper"
    assert generation("NVIDIA A100-SXM4-80GB") == generation("NVIDIA L4") == "ampere"
    for sizes in TUNING.values():
        for head_dim in (16, 32, 64, 128):
            assert triton.unsupported(head_dim) is None
            tuning = sizes[64 if head_dim <= 64 else 128]
            assert tuning.of_bias.queries == tuning.of_bias.keys
