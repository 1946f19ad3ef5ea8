"""The GPU kernel of gated MLPs against the plain form, its steps run in XLA."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import T5Config
from models.kernels import gated
from models.kernels.gated import Blocks, gated_products
from models.layers import ACTIVATIONS
from models.model import Model

SMALL = Blocks(rows=16, columns=32, depth=16, warps=4, stages=2, group=4)
TINY = T5Config(
    vocab_size=64,
    d_model=32,
    d_ff=64,
    num_encoder_layers=2,
    num_decoder_layers=1,
    num_heads=2,
    d_kv=16,
    remat="projections",
)
BATCH = {
    "encoder_input_tokens": np.arange(64, dtype=np.int32).reshape(2, 32) % 60 + 2,
    "decoder_input_tokens": np.arange(14, dtype=np.int32).reshape(2, 7) % 60 + 2,
}


@pytest.mark.parametrize("rows", [(16,), (5, 32)])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype, bound", [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_the_kernel_equals_two_products(rows, activation, dtype, bound):
    random = np.random.default_rng(0)
    shapes = ((*rows, 48), (48, 96), (48, 96))
    x, first, second = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    act = ACTIVATIONS[activation]
    found = gated_products(x, first, second, activation=act, blocks=SMALL, interpret=True)
    exact = [np.asarray(each, np.float64) for each in (x, first, second)]
    gate = np.asarray(act(jnp.asarray(exact[0] @ exact[1], jnp.float32)), np.float64)
    expected = gate * (exact[0] @ exact[2])
    assert found.dtype == x.dtype
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found, np.float64) - expected).max()
    assert error <= bound * np.abs(expected).max()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(gated, "BLOCKS", dict.fromkeys(gated.BLOCKS, SMALL))


def test_a_model_has_the_same_states_and_trains_with_the_plain_form(small_blocks):
    """The decoder's 14 rows are not whole blocks: there the plain form computes."""
    fused = Model(dataclasses.replace(TINY, mlp_kernel="triton_interpret"))
    plain = Model(TINY)
    params = jax.jit(plain.init)(jax.random.key(0))

    def states(model):
        return jax.jit(lambda params: model.bind(params).forward(BATCH))

    def gradient(model):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(states(model)(params)))))

    np.testing.assert_allclose(states(fused)(params), states(plain)(params), rtol=1e-5, atol=1e-5)
    assert gated.NAME in str(states(fused).trace(params).jaxpr)
    assert gated.NAME not in str(states(plain).trace(params).jaxpr)
    assert gated.NAME not in str(gradient(fused).trace(params).jaxpr)
    trees = [jax.tree.leaves(gradient(model)(params)) for model in (fused, plain)]
    for a, b in zip(*trees, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_published_shapes_are_whole_blocks():
    for blocks in gated.BLOCKS.values():
        for depth, columns in ((1024, 2816), (2048, 5120), (4096, 10_240), (4096, 14_336)):
            assert gated.unsupported((16, 1024, depth), columns, blocks) is None
        assert gated.unsupported((16, 12, 2048), 5120, blocks) is not None
        assert gated.unsupported((16, 1024, 2048), 5000, blocks) is not None
