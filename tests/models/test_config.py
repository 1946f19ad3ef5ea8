"""Configurations are data: they survive JSON, refuse what they do not know, and have the published
sizes."""

import json

import jax
import numpy as np
import pytest

from models.config import DecoderConfig, RopeScaling, T5Config, T5GemmaConfig, from_dict
from models.model import Model, stack_layers, unstack_layers
from models.published import NAMED

TINY = T5Config(
    vocab_size=50,
    d_model=16,
    d_ff=24,
    d_kv=8,
    num_heads=2,
    num_encoder_layers=3,
    num_decoder_layers=2,
)

# Millions of parameters, as the model cards and papers give them.
PUBLISHED_MILLIONS = {
    "t5_small": 60.5,
    "t5_base": 222.9,
    "t5_large": 737.7,
    "t5_3b": 2851.6,
    "t5_11b": 11307,
    "flan_t5_small": 77.0,
    "flan_t5_base": 247.6,
    "flan_t5_large": 783.2,
    "flan_t5_xl": 2849.8,
    "flan_t5_xxl": 11135,
    "mt5_small": 300.2,
    "mt5_base": 582.4,
    "byt5_small": 299.6,
    "byt5_base": 581.7,
    "gpt2": 124.4,
    "gpt2_xl": 1557.6,
}


@pytest.mark.parametrize(
    "other", [{"positions": "learned"}, {"parallel_residual": True}, {"residual_scale": 0.5}]
)
def test_layers_that_a_t5gemma_does_not_compute_are_refused(other):
    shape = {"vocab_size": 8, "d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
    shape |= {"num_kv_heads": 1, "head_dim": 8}
    T5GemmaConfig(**shape, encoder=DecoderConfig(**shape))
    with pytest.raises(ValueError, match="a T5Gemma has rotary positions"):
        T5GemmaConfig(**shape, **other, encoder=DecoderConfig(**shape))


@pytest.mark.parametrize("name", NAMED)
def test_configuration_survives_json(name):
    config = NAMED[name]
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_nested_configuration_survives_json():
    config = DecoderConfig(
        vocab_size=9,
        d_model=8,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0),
    )
    restored = from_dict(json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert hash(restored) == hash(config)


def test_unknown_fields_and_values_are_refused():
    with pytest.raises(ValueError, match="n_heads"):
        from_dict(TINY.to_dict() | {"n_heads": 3})
    with pytest.raises(ValueError, match="family"):
        from_dict({"vocab_size": 3})
    with pytest.raises(ValueError, match="remat='some'"):
        from_dict(TINY.to_dict() | {"remat": "some"})
    with pytest.raises(ValueError, match="residual_dtype"):
        from_dict(TINY.to_dict() | {"residual_dtype": "bfloat16"})


@pytest.mark.parametrize("name", PUBLISHED_MILLIONS)
def test_sizes_are_the_published_ones(name):
    millions = Model(NAMED[name]).parameter_count() / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLIONS[name], rel=1e-3)


def test_tree_has_the_names_of_t5x():
    unrolled = Model(T5Config(**{**_fields(TINY), "scan_layers": False})).shapes()
    names = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(unrolled)[0]
    }
    assert names["token_embedder/embedding"] == (50, 16)
    assert names["encoder/relpos_bias/rel_embedding"] == (2, 32)
    assert names["encoder/layers_2/attention/query/kernel"] == (16, 16)
    assert names["encoder/layers_2/pre_attention_layer_norm/scale"] == (16,)
    assert names["encoder/layers_2/mlp/wi_0/kernel"] == (16, 24)
    assert names["encoder/encoder_norm/scale"] == (16,)
    assert names["decoder/layers_1/encoder_decoder_attention/out/kernel"] == (16, 16)
    assert names["decoder/layers_1/pre_cross_attention_layer_norm/scale"] == (16,)
    assert names["decoder/logits_dense/kernel"] == (16, 50)
    assert len(names) == 3 * 9 + 2 * 14 + 6


def test_stacked_and_unrolled_models_start_alike():
    key = jax.random.key(7)
    stacked = jax.jit(Model(TINY).init)(key)
    unrolled = jax.jit(Model(T5Config(**{**_fields(TINY), "scan_layers": False})).init)(key)
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(unrolled))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), unrolled)


def test_initialisation_has_the_deviations_of_t5():
    config = T5Config(
        vocab_size=1000,
        d_model=128,
        d_ff=512,
        d_kv=32,
        num_heads=8,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    params = jax.jit(Model(config).init)(jax.random.key(0))
    layers = params["encoder"]["layers"]
    expected = [
        (params["token_embedder"]["embedding"], 1.0),
        (layers["attention"]["query"]["kernel"], (128 * 32) ** -0.5),
        (layers["attention"]["key"]["kernel"], 128**-0.5),
        (layers["attention"]["value"]["kernel"], 128**-0.5),
        (layers["attention"]["out"]["kernel"], 256**-0.5),
        (layers["mlp"]["wi_0"]["kernel"], 128**-0.5),
        (layers["mlp"]["wo"]["kernel"], 512**-0.5),
        (params["decoder"]["logits_dense"]["kernel"], 128**-0.5),
        (params["encoder"]["relpos_bias"]["rel_embedding"], (2 / (8 + 32)) ** 0.5),
    ]
    for array, deviation in expected:
        sampling_error = 4 / (2 * array.size) ** 0.5
        assert float(array.std()) == pytest.approx(deviation, rel=max(sampling_error, 0.01))
        assert abs(float(array.mean())) < 5 * deviation / array.size**0.5
    assert (layers["pre_mlp_layer_norm"]["scale"] == 1).all()
    assert (
        layers["attention"]["key"]["kernel"][0] != layers["attention"]["key"]["kernel"][1]
    ).any()


def test_parameters_of_another_model_are_refused():
    params = Model(TINY).init(jax.random.key(0))
    del params["encoder"]["encoder_norm"]
    params["decoder"]["extra"] = {"kernel": 0.0}
    with pytest.raises(ValueError, match=r"encoder/encoder_norm/scale.*decoder/extra/kernel"):
        Model(TINY).bind(params)


def test_every_parameter_has_a_logical_axis_per_dimension():
    for config in (TINY, NAMED["umt5_small"], NAMED["sentence_t5_base"], NAMED["gpt2"]):
        model = Model(config)
        jax.tree.map(
            lambda shape, axes: _assert_fits(shape.shape, axes),
            model.shapes(),
            model.logical_axes(),
        )


def _assert_fits(shape, axes):
    assert len(shape) == len(axes)
    assert all(isinstance(axis, str) for axis in axes)


def _fields(config):
    fields = config.to_dict()
    del fields["family"]
    return fields
