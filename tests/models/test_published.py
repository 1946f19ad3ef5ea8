"""Shapes of published models."""

from __future__ import annotations

import pytest

from models.model import Model
from models.published import NAMED
from models.weights.huggingface_config import from_json

# Parameters as the hub states them for each repository's safetensors; Pythia's without buffers.
PARAMETERS = {
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_30b_a3b": 30_532_122_624,
    "llama3_8b": 8_030_261_248,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "gemma3_1b": 999_885_952,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "smollm3_3b": 3_075_098_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "gpt2": 124_439_808,
    "gpt2_xl": 1_557_611_200,
}
_LLAMA = {
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500_000.0,
    "vocab_size": 128_256,
}
_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_QWEN = {
    "attention_bias": False,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151_936,
}
# Files of the hub, without fields that do not concern a model's shape.
FILES = {
    "llama3_1_8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rope_scaling": {"factor": 8.0, **_ROPE},
        "tie_word_embeddings": False,
    },
    "llama3_2_3b": _LLAMA
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": {"factor": 32.0, **_ROPE},
        "tie_word_embeddings": True,
    },
    "qwen3_4b": _QWEN
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3_30b_a3b": _QWEN
    | {
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "gemma3_1b": {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32_768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10_000,
        "rope_theta": 1_000_000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262_144,
    },
    "smollm3_3b": {
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 128_001,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "max_position_embeddings": 65_536,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128_004,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5_000_000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128_256,
    },
    "pythia_2_8b": {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rotary_emb_base": 10_000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50_304,
    },
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_shape_has_the_published_number_of_parameters(name):
    assert Model(NAMED[name]).parameter_count() == PARAMETERS[name]


@pytest.mark.parametrize("name", FILES)
def test_a_published_shape_is_that_of_the_published_file(name):
    assert NAMED[name] == from_json(FILES[name])
