"""Sharded equals unsharded on eight devices: data, FSDP, tensor and mixed meshes.

Loss, its gradients, and the log-likelihoods of scoring; and the parameters lie where the rules
say. A lost sharding gives right numbers, slowly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import partitioning
from models.config import DecoderConfig, T5Config, T5GemmaConfig
from models.losses import chunked_cross_entropy, token_log_likelihood
from models.model import Model

MESHES = [
    {"data": 8},
    {"fsdp": 8, "data": 1},
    {"tensor": 8, "data": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 4, "tensor": 2},
]
# Every model on a mixed mesh, and every mesh by at least one model; the rest is a sweep.
MIXED = MESHES[3]
BY_MODEL = {
    "t5": (MESHES[1], MESHES[2], MIXED),
    "decoder": (MESHES[0], MESHES[4]),
    "t5gemma": (MIXED,),
}
TINY = {"vocab_size": 96, "d_model": 32, "d_ff": 64}
T5 = T5Config(**TINY, d_kv=8, num_heads=8, num_encoder_layers=2, num_decoder_layers=2)
LLAMA = DecoderConfig(**TINY, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=8)
T5GEMMA = T5GemmaConfig(
    **TINY, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=8, window=5, post_norms=True,
    global_every=2, attention_softcap=9.0, tie_embeddings=True,
    encoder=DecoderConfig(**TINY, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=8, window=4),
)  # fmt: skip


def batch() -> dict:
    random = np.random.default_rng(0)
    tokens, inputs, targets = random.integers(2, 96, (3, 8, 24)).astype(np.int32)
    segment_ids = np.sort(random.integers(1, 4, (8, 24)), axis=1).astype(np.int32)
    segment_ids[:, -2:] = 0
    return {
        "encoder_input_tokens": tokens,
        "encoder_segment_ids": segment_ids,
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": targets,
        "decoder_segment_ids": segment_ids,
    }


def compute(model: Model):
    def loss(params, batch):
        module = model.bind(params)
        head = module.output_head()
        hidden = module.forward(batch, dropout_key=jax.random.key(1))
        weights = (batch["decoder_segment_ids"] > 0).astype(jnp.float32)
        targets = batch["decoder_target_tokens"]
        total, weight, _ = chunked_cross_entropy(
            hidden, head, targets, weights, z_loss=1e-4, chunk=64
        )
        return total / weight, token_log_likelihood(hidden, head, targets, chunk=64)

    return jax.value_and_grad(loss, has_aux=True)


MODELS = {"t5": T5, "decoder": LLAMA, "t5gemma": T5GEMMA}


@pytest.fixture(scope="module", params=MODELS)
def alone(request):
    """A model, its parameters, and what one device computes."""
    model = Model(MODELS[request.param])
    params = jax.jit(model.init)(jax.random.key(0))
    return model, params, jax.jit(compute(model))(params, batch())


@pytest.mark.parametrize(
    ("alone", "axes"),
    [
        pytest.param(
            name,
            axes,
            id=f"{name}-{str(axes)[1:-1]}",
            marks=[] if axes in BY_MODEL[name] else pytest.mark.sweep,
        )
        for name in MODELS
        for axes in MESHES
    ],
    indirect=["alone"],
)
def test_sharded_equals_unsharded(alone, axes, eight_devices):
    model, params, expected = alone
    mesh = partitioning.make_mesh(axes, eight_devices)
    shardings = partitioning.param_shardings(model, mesh)
    spread = jax.device_put(params, shardings)
    rows = jax.device_put(batch(), partitioning.batch_sharding(mesh))
    with partitioning.use(mesh):
        (loss, scores), gradients = jax.jit(compute(model))(spread, rows)

    (expected_loss, expected_scores), expected_gradients = expected
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-5 * 10)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max()),
        gradients,
        expected_gradients,
    )


def test_initialisation_does_not_depend_on_the_mesh(alone, eight_devices):
    model, params, _ = alone
    mesh = partitioning.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, eight_devices)
    shardings = partitioning.param_shardings(model, mesh)
    spread = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), spread, params)


def test_no_device_holds_a_whole_kernel(eight_devices):
    model = Model(T5)
    mesh = partitioning.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, eight_devices)
    shardings = partitioning.param_shardings(model, mesh)
    for path, shape in jax.tree_util.tree_flatten_with_path(model.shapes())[0]:
        name = jax.tree_util.keystr(path)
        node = shardings
        for key in path:
            node = node[key.key]
        held = np.prod(node.shard_shape(shape.shape)) / np.prod(shape.shape)
        if "kernel" in name or ("embedding']" in name and "rel_" not in name):
            assert held == 1 / 8, name
