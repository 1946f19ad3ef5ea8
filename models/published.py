"""Shapes of published models by name: for dry runs, compilation, and training from scratch.

Sources
- T5 v1.0, v1.1, mT5, umT5, ByT5: the gin files of T5X; Sentence-T5: its paper (arXiv 2108.08877).
- GPT-2: the config.json of each size on the Hugging Face hub (openai-community/gpt2, ...).
- Decoder-only families: likewise, as of November 2026, from Qwen/Qwen3-*, meta-llama/Llama-3.2-1B
  and -3B, -3.1-8B, and Meta-Llama-3-8B, google/gemma-3-*-pt (the text model), allenai/OLMo-2-*,
  HuggingFaceTB/SmolLM3-3B-Base and EleutherAI/pythia-*. A test compares their numbers of parameters
  with those that the hub states.
"""

import dataclasses
from typing import Any

from models.config import DecoderConfig, Experts, ModelConfig, RopeScaling, T5Config


def _t5(
    d_model: int,
    d_ff: int,
    layers: int | tuple[int, int],
    heads: int,
    vocab_size: int = 32_128,
    **fields: Any,
) -> T5Config:
    encoder_layers, decoder_layers = layers if isinstance(layers, tuple) else (layers, layers)
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_ff=d_ff,
        num_encoder_layers=encoder_layers,
        num_decoder_layers=decoder_layers,
        num_heads=heads,
        **fields,
    )


_V1_0: dict[str, Any] = {
    "activation": "relu",
    "gated": False,
    "tie_embeddings": True,
    "dropout_rate": 0.1,
}
_V1_0_SIZES = {  # d_model, d_ff, layers, heads, d_kv
    "small": (512, 2048, 6, 8, 64),
    "base": (768, 3072, 12, 12, 64),
    "large": (1024, 4096, 24, 16, 64),
    "3b": (1024, 16_384, 24, 32, 128),
    "11b": (1024, 65_536, 24, 128, 128),
}
_V1_1_SIZES = {  # d_model, d_ff, layers, heads; d_kv is 64
    "small": (512, 1024, 8, 6),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 24, 16),
    "xl": (2048, 5120, 24, 32),
    "xxl": (4096, 10_240, 24, 64),
}
_BYT5_SIZES: dict[
    str, tuple[int, int, tuple[int, int], int]
] = {  # the encoder is three times as deep as the decoder
    "small": (1472, 3584, (12, 4), 6),
    "base": (1536, 3968, (18, 6), 12),
    "large": (1536, 3840, (36, 12), 16),
    "xl": (2560, 6720, (36, 12), 32),
    "xxl": (4672, 12_352, (36, 12), 64),
}
_SENTENCE_T5_SIZES = {"base": "base", "large": "large", "xl": "3b", "xxl": "11b"}


def _gpt2(d_model: int, layers: int, heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=50_257,
        d_model=d_model,
        d_ff=4 * d_model,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=64,
        max_length=1024,
        positions="learned",
        norm="layer",
        norm_epsilon=1e-5,
        activation="gelu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        bos_id=50_256,
        eos_id=50_256,
    )


def _rotary(
    d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int, **fields: Any
) -> DecoderConfig:
    return DecoderConfig(
        d_model=d_model,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        **{"head_dim": d_model // heads, **fields},
    )


def _qwen3() -> dict[str, DecoderConfig]:
    common: dict[str, Any] = {
        "vocab_size": 151_936,
        "head_dim": 128,
        "max_length": 40_960,
        "rope_theta": 1e6,
        "qk_norm": True,
        "bos_id": 151_643,
        "eos_id": 151_645,
        "pad_id": 151_645,
    }
    sizes = {  # d_model, d_ff, layers, heads, kv_heads
        "0_6b": (1024, 3072, 28, 16, 8),
        "1_7b": (2048, 6144, 28, 16, 8),
        "4b": (2560, 9728, 36, 32, 8),
        "8b": (4096, 12_288, 36, 32, 8),
        "14b": (5120, 17_408, 40, 40, 8),
    }
    named = {
        f"qwen3_{size}": _rotary(*shape, tie_embeddings=size not in ("8b", "14b"), **common)
        for size, shape in sizes.items()
    }
    experts = Experts(count=128, chosen=8, d_ff=768)
    named["qwen3_30b_a3b"] = _rotary(2048, 6144, 48, 32, 4, experts=experts, **common)
    return named


def _llama3() -> dict[str, DecoderConfig]:
    common: dict[str, Any] = {
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "norm_epsilon": 1e-5,
        "bos_id": 128_000,
        "eos_id": 128_001,
        "pad_id": 128_001,
    }

    def longer(factor: float) -> dict[str, Any]:
        return {"max_length": 131_072, "rope_scaling": RopeScaling(kind="llama3", factor=factor)}

    first = {**common, "max_length": 8192}
    large = {**common, **longer(8.0)}
    small = {**common, **longer(32.0), "tie_embeddings": True}
    return {
        "llama3_8b": _rotary(4096, 14_336, 32, 32, 8, **first),
        "llama3_1_8b": _rotary(4096, 14_336, 32, 32, 8, **large),
        "llama3_2_1b": _rotary(2048, 8192, 16, 32, 8, **small),
        "llama3_2_3b": _rotary(3072, 8192, 28, 24, 8, **small),
    }


def _gemma3() -> dict[str, DecoderConfig]:
    sizes = {  # d_model, d_ff, layers, heads, kv_heads; window, vocabulary, factor of positions
        "1b": ((1152, 6912, 26, 4, 1), 512, 262_144, None),
        "4b": ((2560, 10_240, 34, 8, 4), 1024, 262_208, 8.0),
        "12b": ((3840, 15_360, 48, 16, 8), 1024, 262_208, 8.0),
    }
    return {
        f"gemma3_{size}": _rotary(
            *shape,
            vocab_size=vocab_size,
            head_dim=256,
            max_length=32_768 if factor is None else 131_072,
            rope_theta=1e6,
            rope_scaling=None if factor is None else RopeScaling(kind="linear", factor=factor),
            window=window,
            global_every=6,
            local_rope_theta=10_000.0,
            norm_offset=1.0,
            post_norms=True,
            activation="gelu",
            qk_norm=True,
            attention_scale=256**-0.5,
            embedding_scale=shape[0] ** 0.5,
            tie_embeddings=True,
            bos_id=2,
            eos_id=1,
        )
        for size, (shape, window, vocab_size, factor) in sizes.items()
    }


def _olmo2() -> dict[str, DecoderConfig]:
    sizes = {"1b": (2048, 8192, 16, 16, 16), "7b": (4096, 11_008, 32, 32, 32)}
    return {
        f"olmo2_{size}": _rotary(
            *shape,
            vocab_size=100_352,
            max_length=4096,
            rope_theta=500_000.0,
            pre_norms=False,
            post_norms=True,
            qk_norm=True,
            qk_norm_joint=True,
            eos_id=100_257,
            pad_id=100_277,
        )
        for size, shape in sizes.items()
    }


def _smollm3() -> dict[str, DecoderConfig]:
    shape = _rotary(
        2048, 11_008, 36, 16, 4,
        vocab_size=128_256, max_length=65_536, rope_theta=5e6, unrotated_every=4,
        tie_embeddings=True, bos_id=None, eos_id=128_001, pad_id=128_004,
    )  # fmt: skip
    return {"smollm3_3b": shape}


def _pythia() -> dict[str, DecoderConfig]:
    sizes = {  # d_model, layers, heads
        "160m": (768, 12, 12),
        "410m": (1024, 24, 16),
        "1b": (2048, 16, 8),
        "1_4b": (2048, 24, 16),
        "2_8b": (2560, 32, 32),
    }
    return {
        f"pythia_{size}": _rotary(
            *(d_model, 4 * d_model, layers, heads, heads),
            vocab_size=50_304,
            max_length=2048,
            rotary_fraction=0.25,
            norm="layer",
            norm_epsilon=1e-5,
            activation="gelu_exact",
            gated=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            parallel_residual=True,
            bos_id=0,
            eos_id=0,
            pad_id=0,
        )
        for size, (d_model, layers, heads) in sizes.items()
    }


def _named() -> dict[str, ModelConfig]:
    v1_0 = {
        size: _t5(d_model, d_ff, layers, heads, d_kv=d_kv, **_V1_0)
        for size, (d_model, d_ff, layers, heads, d_kv) in _V1_0_SIZES.items()
    }
    named: dict[str, ModelConfig] = {f"t5_{size}": config for size, config in v1_0.items()}
    for size, base in _SENTENCE_T5_SIZES.items():
        named[f"sentence_t5_{size}"] = dataclasses.replace(
            v1_0[base], num_decoder_layers=0, sentence_head=768
        )
    for size, shape in _V1_1_SIZES.items():
        named[f"t5_v1_1_{size}"] = _t5(*shape)
        named[f"flan_t5_{size}"] = _t5(*shape)
        named[f"mt5_{size}"] = _t5(*shape, vocab_size=250_112)
        named[f"umt5_{size}"] = _t5(*shape, vocab_size=256_384, relpos_per_layer=True)
    for size, (d_model, d_ff, layers, heads) in _BYT5_SIZES.items():
        named[f"byt5_{size}"] = _t5(d_model, d_ff, layers, heads, vocab_size=384)
    named["gpt2"] = _gpt2(768, 12, 12)
    named["gpt2_medium"] = _gpt2(1024, 24, 16)
    named["gpt2_large"] = _gpt2(1280, 36, 20)
    named["gpt2_xl"] = _gpt2(1600, 48, 25)
    for make in (_qwen3, _llama3, _gemma3, _olmo2, _smollm3, _pythia):
        named |= make()
    return named


NAMED: dict[str, ModelConfig] = _named()
