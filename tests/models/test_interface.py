"""Every family answers the calls of `LanguageModel`; kernels and families need no other edit."""

import ast
import dataclasses
import functools
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.attention import plan_attention
from models.config import FAMILIES, DecoderConfig, T5Config
from models.kernels.plain import Plain
from models.model import Model

SHAPE = {"vocab_size": 60, "d_model": 16, "d_ff": 24, "num_heads": 4}
T5 = T5Config(**SHAPE, d_kv=4, num_encoder_layers=1, num_decoder_layers=2)
DECODER = DecoderConfig(**SHAPE, num_layers=2, num_kv_heads=2, head_dim=4, logit_softcap=3.0)
OLMO2 = dataclasses.replace(
    DECODER, pre_norms=False, post_norms=True, qk_norm=True, qk_norm_joint=True
)
CONFIGS = {"t5": T5, "decoder": DECODER, "olmo2": OLMO2}


@functools.cache
def initial(config):
    return jax.jit(Model(config).init)(jax.random.key(0))


def batch_of(config, documents):
    """Documents of one row, packed, and one answer for each."""
    tokens = np.concatenate(documents)[None].astype(np.int32)
    segments = np.repeat(np.arange(1, len(documents) + 1), [len(d) for d in documents])[None]
    asked = np.arange(1, len(documents) + 1, dtype=np.int32)[None]
    if config.has_encoder:
        return {
            "encoder_input_tokens": tokens,
            "encoder_segment_ids": segments,
            "decoder_input_tokens": np.full_like(asked, config.start_id),
            "decoder_segment_ids": asked,
        }
    return {
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": segments,
        "answer_segment_ids": asked,
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_decoding_step_predicts_what_the_answer_states_do(name):
    config = CONFIGS[name]
    model = Model(config)
    params = initial(config)
    random = np.random.default_rng(0)
    documents = [random.integers(2, 60, length) for length in (7, 3, 5)]
    batch = batch_of(config, documents)
    lengths = np.array([len(document) for document in documents])
    rows = np.zeros((3, 7), np.int32)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = document

    @jax.jit
    def run(params):
        module = model.bind(params)
        answers = module.logits(module.answer_states(batch))[0]
        given = None if config.has_encoder else jnp.asarray(lengths)
        decoding = module.start_decoding(jnp.asarray(rows), given, beams=1, steps=2)
        return answers, decoding.step(decoding.start, jnp.int32(0), decoding.cache)[0]

    answers, logits = run(params)
    np.testing.assert_allclose(logits, answers, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_head_gives_the_logits(name):
    config = CONFIGS[name]
    model = Model(config)
    module = model.bind(initial(config))
    states = jax.random.normal(jax.random.key(1), (1, 3, config.d_model))
    kernel, scale, softcap = module.output_head()
    expected = jnp.dot(states, kernel, precision="highest") * scale
    if softcap is not None:
        expected = softcap * jnp.tanh(expected / softcap)
    np.testing.assert_allclose(module.logits(states), expected, rtol=1e-5, atol=1e-5)


def test_an_encoder_alone_has_states_and_no_head():
    model = Model(dataclasses.replace(T5, num_decoder_layers=0))
    params, batch = initial(model.config), {"encoder_input_tokens": jnp.arange(1, 9)[None]}
    forward = jax.jit(lambda params: model.bind(params).forward(batch))
    assert forward(params).shape == (1, 8, T5.d_model)
    module = model.bind(params)
    assert not model.config.has_decoder
    with pytest.raises(ValueError, match="no logits"):
        module.output_head()
    decoder = Model(DECODER)
    with pytest.raises(ValueError, match="no encoder"):
        decoder.bind(initial(DECODER)).pool(jnp.ones((1, 4), jnp.int32))


def test_a_kernel_of_the_users_is_named_by_its_import_path(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Doubled(Plain):
        def attend(self, operands):
            return 2 * super().attend(operands)

    module = types.ModuleType("kernel_of_a_user")
    module.KERNEL = Doubled()
    monkeypatch.setitem(sys.modules, "kernel_of_a_user", module)
    ids = jnp.ones((1, 6), jnp.int32)
    plan = plan_attention("kernel_of_a_user:KERNEL", ids, ids, head_dim=4, dtype="float32")
    assert plan.kernel == Doubled()
    config = dataclasses.replace(DECODER, attention="kernel_of_a_user:KERNEL")
    params, tokens = initial(DECODER), {"decoder_input_tokens": ids}
    theirs, ours = (
        jax.jit(lambda params, c=c: Model(c).bind(params).forward(tokens))(params)
        for c in (config, DECODER)
    )
    assert not np.allclose(theirs, ours, atol=1e-3)


def test_no_module_outside_the_families_asks_for_a_family():
    """Classes of families are named where they are defined, built and mapped to files only."""
    root = pathlib.Path(models.__file__).parent.parent
    own = {"config.py", "t5.py", "decoder.py", "model.py"}
    names = {config.__name__ for config in FAMILIES.values()}
    for path in [*root.glob("models/*.py"), *root.glob("pruning/**/*.py"), *root.glob("tpu/*.py"),
                 *root.glob("evaluation/**/*.py")]:  # fmt: skip
        if path.parent.name == "models" and path.name in own:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                tested = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not tested & names, f"{path}:{node.lineno}"
