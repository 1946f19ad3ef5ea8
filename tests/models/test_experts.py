"""Mixtures of experts: against a sum over all experts in float64; sharded; their FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import flops, partitioning
from models.config import DecoderConfig, Experts
from models.experts import _mixture, grouped
from models.model import Model

CONFIG = DecoderConfig(
    vocab_size=96, d_model=32, d_ff=64, num_layers=1, num_heads=8, num_kv_heads=8, head_dim=8,
    experts=Experts(count=6, chosen=2, d_ff=24, shared_d_ff=16), attention="xla",
)  # fmt: skip
MESHES = [{"data": 1, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 4}]  # 4 divides the width only


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_grouped_products_and_gradients_are_those_of_each_group():
    sizes = np.array([3, 0, 5, 1])
    x, kernels, weight = drawn(9, 6), drawn(4, 6, 7), drawn(9, 7)
    starts = np.cumsum(sizes) - sizes
    groups = [slice(a, a + n) for a, n in zip(starts, sizes, strict=True)]
    found = grouped(x, kernels, sizes)
    products = [x[g].astype(float) @ k for g, k in zip(groups, kernels, strict=True)]
    expected = np.concatenate(products)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    dx, dk = jax.grad(lambda x, k: jnp.sum(grouped(x, k, sizes) * weight), (0, 1))(x, kernels)
    for g, k, gradient in zip(groups, kernels, dk, strict=True):
        np.testing.assert_allclose(dx[g], weight[g].astype(float) @ k.T, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient, x[g].T.astype(float) @ weight[g], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "all of one expert"])
def test_every_token_is_read_by_each_expert_that_it_chose(crowded):
    """Also where all tokens choose the same: nothing is dropped."""
    random = np.random.default_rng(0)
    indices = np.argsort(random.random((2, 9, 4)), axis=-1)[..., :2]
    if crowded:
        indices = np.broadcast_to([3, 0], indices.shape)
    x, weights = drawn(2, 9, 6, seed=1), random.random((2, 9, 2)).astype(np.float32)
    wi_0, wi_1, wo = drawn(4, 6, 5, seed=2), drawn(4, 6, 5, seed=3), drawn(4, 5, 6, seed=4)
    numbers = np.arange(4)
    found = _mixture(x, weights, indices, numbers, wi_0, wi_1, wo, activation="relu")
    wide = x.astype(float)
    each = zip(wi_0, wi_1, wo, strict=True)
    outputs = [(np.maximum(wide @ a, 0) * (wide @ b)) @ c for a, b, c in each]
    by_expert = np.stack(outputs, axis=-2)  # [2, 9, experts, 6]
    picked = np.take_along_axis(by_expert, indices[..., None], axis=-2)
    np.testing.assert_allclose(found, (picked * weights[..., None]).sum(-2), rtol=1e-5, atol=1e-5)
    # Two devices with two experts each compute the parts of the sum.
    halves = [
        _mixture(x, weights, indices, numbers[h], wi_0[h], wi_1[h], wo[h], activation="relu")
        for h in (slice(0, 2), slice(2, 4))
    ]
    np.testing.assert_allclose(halves[0] + halves[1], found, rtol=1e-5, atol=1e-5)


def loss(model: Model):
    def of(params, tokens):
        logits = model.bind(params)({"decoder_input_tokens": tokens[:, :-1]})
        rows = jax.nn.log_softmax(logits)
        return -jnp.mean(jnp.take_along_axis(rows, tokens[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(of))


@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: str(axes)[1:-1])
def test_sharded_equals_unsharded(axes, eight_devices):
    model = Model(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(2, 96, (4, 13)).astype(np.int32)
    expected = loss(model)(params, tokens)
    mesh = partitioning.make_mesh(axes, eight_devices[:4])
    shardings = partitioning.param_shardings(model, mesh)
    spread = jax.device_put(params, shardings)
    with partitioning.use(mesh):
        rows = jax.device_put(tokens, partitioning.batch_sharding(mesh))
        found = loss(model)(spread, rows)
    kernel = spread["decoder"]["layers"]["mlp"]["experts"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
        found,
        expected,
    )


def test_flops_are_those_of_chosen_experts():
    model, shapes = Model(CONFIG), {"decoder_input_tokens": (2, 8)}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    program = jax.jit(lambda p, b: model.bind(p)(b)).trace(model.shapes(), batch).jaxpr
    assert flops.traced_flops(program) == flops.forward_flops(CONFIG, shapes)
    one_more = CONFIG.experts.chosen + 1
    more = flops.forward_flops(
        DecoderConfig(**{**vars(CONFIG), "experts": Experts(
            count=6, chosen=one_more, d_ff=24, shared_d_ff=16)}), shapes
    )  # fmt: skip
    tokens = 2 * 8
    assert more - flops.forward_flops(CONFIG, shapes) == tokens * 2 * 3 * 32 * 24
