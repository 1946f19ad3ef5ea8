"""FLOPs in closed form against those of traced programs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models import flops
from models.config import DecoderConfig, T5Config
from models.model import Model

T5 = T5Config(
    vocab_size=96, d_model=32, d_kv=8, num_heads=3, d_ff=48, num_encoder_layers=2,
    num_decoder_layers=3, attention="xla",
)  # fmt: skip
DECODER = DecoderConfig(
    vocab_size=96, d_model=32, head_dim=8, num_heads=4, num_kv_heads=2, d_ff=48, num_layers=3,
    attention="xla",
)  # fmt: skip
SHAPES = {"encoder_input_tokens": (2, 20), "decoder_input_tokens": (2, 5)}


def traced(function, model, shapes):
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    return flops.traced_flops(jax.jit(function).trace(model.shapes(), batch).jaxpr)


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("config", [T5, DECODER], ids=["t5", "decoder"])
def test_a_forward_pass_executes_the_plain_models_flops(config, scan_layers):
    model = Model(dataclasses.replace(config, scan_layers=scan_layers))

    def logits(params, batch):
        module = model.bind(params)
        return module.logits(module.forward(batch))

    assert traced(logits, model, SHAPES) == flops.forward_flops(model.config, SHAPES)


def test_absorbed_cross_attention_executes_fewer():
    model = Model(T5)

    def logits(params, batch, absorb=True):
        module = model.bind(params)
        segments = jnp.ones_like(batch["encoder_input_tokens"])
        encoded = module.encode(batch["encoder_input_tokens"], segments)
        starts = batch["decoder_input_tokens"]
        return module.logits(module.decode(encoded, segments, starts, absorb=absorb))

    shapes = {"encoder_input_tokens": (2, 20), "decoder_input_tokens": (2, 1)}
    executed = flops.forward_flops(T5, shapes, absorb=True)
    assert traced(logits, model, shapes) == executed < flops.forward_flops(T5, shapes)


def test_logits_are_counted_where_they_are_computed():
    head = 2 * DECODER.d_model * DECODER.vocab_size
    shapes = {"decoder_input_tokens": (2, 20), "answer_segment_ids": (2, 3)}
    without = flops.forward_flops(DECODER, shapes | {"answer_segment_ids": (2, 0)})
    assert flops.forward_flops(DECODER, shapes) == without + 2 * 3 * head
    everywhere = {"decoder_input_tokens": (2, 20)}
    assert flops.forward_flops(DECODER, everywhere) == without + 2 * 20 * head


def test_rematerialization_executes_more():
    def loss(model):
        def mean(params, batch):
            module = model.bind(params)
            return jnp.mean(module.logits(module.forward(batch)))

        return traced(jax.grad(mean), model, SHAPES)

    plain = flops.training_flops(T5, SHAPES)
    saved = loss(Model(dataclasses.replace(T5, remat="projections")))
    full = loss(Model(dataclasses.replace(T5, remat="full")))
    assert loss(Model(T5)) == plain < saved < full
    # A full recomputation is at most one more forward pass.
    assert full <= plain + flops.forward_flops(T5, SHAPES)


def test_loops_without_a_known_trip_count_are_refused():
    def doubled(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y @ y, x)

    jaxpr = jax.jit(doubled).trace(jnp.ones((2, 2))).jaxpr
    with pytest.raises(ValueError, match="while loop"):
        flops.traced_flops(jaxpr)
