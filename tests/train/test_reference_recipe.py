"""The whole recipe beside transformers': the same weights, batches and optimiser, step by step.

The comparison is benchmarks/training_step.py's, which times both programs as well; at T5-small's
shape over 100 steps it is run by hand, and its figures stand in docs/log.md.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import train
from models.config import T5Config
from models.optimizers import Adafactor, AdamW, Constant

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="the hf extra is not installed")

# T5-small's shape, smaller: ReLU, tied and scaled logits.
MODEL = T5Config(
    vocab_size=256,
    d_model=64,
    d_ff=128,
    d_kv=16,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    activation="relu",
    gated=False,
    tie_embeddings=True,
)


@pytest.fixture(scope="module")
def benchmark():
    file = Path(train.__file__).parent / "benchmarks" / "training_step.py"
    specification = importlib.util.spec_from_file_location("training_step", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "optimizer",
    [
        AdamW(Constant(1e-3), beta2=0.999, weight_decay=0.01),
        Adafactor(Constant(1e-2), min_dim_to_factor=1),  # transformers factors every matrix
    ],
    ids=["adamw", "adafactor"],
)
def test_losses_follow_those_of_transformers(benchmark, optimizer):
    found = benchmark.compare(MODEL, optimizer, steps=20, rows=4, inputs=24, targets=12)
    ours, theirs = (np.asarray(found[name][0]) for name in ("winnow", "transformers"))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)  # the same initial weights
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert theirs[-1] < theirs[0] - 0.1  # both learnt something
