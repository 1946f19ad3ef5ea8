"""config.json, in and out: the fields of each Hugging Face model type, and `ModelConfig`s.

- A field that the file omits has the default of its model type in transformers: published files
  omit many.
- A setting that changes numbers and cannot be expressed here is an error that names the field.
  Settings that only affect training or caching are ignored.
- Tying also depends on the tensors: see `huggingface.read`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.config import (
    DecoderConfig,
    EncoderConfig,
    Experts,
    ModelConfig,
    RopeScaling,
    RunConfig,
    T5Config,
    T5GemmaConfig,
)
from models.errors import ModelError
from models.weights import huggingface_encoders, huggingface_heads, limits

_ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu_exact",
                "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu"}  # fmt: skip
_THEIR_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_exact": "gelu",
                      "gelu": "gelu_pytorch_tanh"}  # fmt: skip
_T5_TYPES = ("t5", "mt5", "umt5")

# Ours: theirs, where one is the other.
_T5_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "d_model",
    "d_kv": "d_kv",
    "d_ff": "d_ff",
    "num_heads": "num_heads",
    "num_encoder_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "relpos_buckets": "relative_attention_num_buckets",
    "relpos_max_distance": "relative_attention_max_distance",
    "dropout_rate": "dropout_rate",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
    "decoder_start_id": "decoder_start_token_id",
}
_LLAMA_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "bos_id": "bos_token_id",
}
_GPT2_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_length": "n_positions",
    "norm_epsilon": "layer_norm_epsilon",
    "dropout_rate": "resid_pdrop",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "bos_id": "bos_token_id",
}

_NEOX_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "norm_epsilon": "layer_norm_eps",
    "initializer_range": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
    "bos_id": "bos_token_id",
}
_GRANITE_FIELDS = {
    "embedding_scale": "embedding_multiplier",
    "attention_scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
}

_T5_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_ROTARY_DEFAULTS = {
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "rope_theta": 10_000.0,
}
_LLAMA_DEFAULTS = {**_ROTARY_DEFAULTS, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA_DEFAULTS = {
    **_ROTARY_DEFAULTS,
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "max_position_embeddings": 8192,
}
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
}
_OLMO_DEFAULTS = {
    **_ROTARY_DEFAULTS,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
    "eos_token_id": 50_279,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 50_256,
        "eos_token_id": 50_256,
    },
    "llama": {**_LLAMA_DEFAULTS, "max_position_embeddings": 2048},
    "mistral": {**_LLAMA_DEFAULTS, "sliding_window": 4096},
    "mixtral": {
        **_LLAMA_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2": {**_ROTARY_DEFAULTS, "max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {**_ROTARY_DEFAULTS, "max_window_layers": 28, "sliding_window": 4096, "head_dim": 128},
    "qwen2_moe": {
        **_ROTARY_DEFAULTS,
        "max_window_layers": 28,
        "sliding_window": 4096,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        **_ROTARY_DEFAULTS,
        "sliding_window": 4096,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
    },
    "olmoe": {
        **_OLMO_DEFAULTS,
        "max_position_embeddings": 4096,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "olmo2": _OLMO_DEFAULTS,
    "olmo3": {
        **_OLMO_DEFAULTS,
        "rope_theta": 500_000.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
    },
    "smollm3": {
        **_ROTARY_DEFAULTS,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        "max_position_embeddings": 32_768,
        "no_rope_layer_interval": 4,
        "pad_token_id": 128_004,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    },
    "phi3": {
        **_ROTARY_DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "pad_token_id": 32_000,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
    },
    "granite": {
        **_LLAMA_DEFAULTS,
        "max_position_embeddings": 2048,
        **dict.fromkeys((*_GRANITE_FIELDS.values(), "logits_scaling"), 1.0),
    },
    "gpt_neox": {
        "attention_bias": True,
        "hidden_act": "gelu",
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    "gemma": _GEMMA_DEFAULTS,
    "gemma2": {
        **_GEMMA2_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA2_DEFAULTS,
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
    },
}  # fmt: skip
# Models of text and images, of which the language model is read: theirs, and the text's type.
TEXT_PARTS = {"gemma3": "gemma3_text"}
_T5GEMMA = "t5gemma"
_T5GEMMA_DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MODEL_TYPES = (*_T5_TYPES, _T5GEMMA, *huggingface_encoders.DEFAULTS, *_DEFAULTS, *TEXT_PARTS)


# --------------------------------------------------------------------------------------------------
# In


def from_json(values: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that a config.json describes.

    Raises:
        ModelError: a model type, or a setting of it, that is not supported; a field that is
            missing, of the wrong type, or out of bounds.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ModelError(
            f"model_type {kind!r} is not supported; supported are {', '.join(MODEL_TYPES)}"
        )
    if values.get("quantization_config"):
        raise ModelError(
            "quantized weights (quantization_config) are not supported: take the repository of the "
            "weights before quantization"
        )
    try:
        if kind in TEXT_PARTS:
            kind, values = TEXT_PARTS[kind], values["text_config"]
        config = _from_json(kind, values)
        return limits.checked(huggingface_heads.with_classifier(config, values))
    except KeyError as error:
        raise ModelError(f"the field {error.args[0]!r} is missing") from error
    except ModelError:
        raise
    except (ValueError, ArithmeticError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"a field has a value that is not supported ({error})") from error


def _from_json(kind: str, values: Mapping[str, Any]) -> ModelConfig:
    if kind in _T5_TYPES:
        return _t5_from_json({**_T5_DEFAULTS, **values})
    if kind in huggingface_encoders.DEFAULTS:
        return huggingface_encoders.from_json(kind, values)
    if kind == _T5GEMMA:
        return _t5gemma_from_json(values)
    settings = {**_DEFAULTS[kind], **values}
    if kind == "gpt2":
        return _gpt2_from_json(settings)
    return (
        _gpt_neox_from_json(settings) if kind == "gpt_neox" else _rotary_from_json(kind, settings)
    )


def _t5_from_json(settings: dict[str, Any]) -> T5Config:
    gate, _, activation = settings.get("feed_forward_proj", "relu").rpartition("-")
    if gate and activation == "gelu":  # T5 v1.1 means the tanh approximation by this name
        activation = "gelu_new"
    tied = settings.get("tie_word_embeddings") is not False
    if settings.get("num_decoder_layers") is None:
        settings["num_decoder_layers"] = settings["num_layers"]
    fields = _fields(_T5_FIELDS, settings)
    if any(name.endswith("EncoderModel") for name in settings.get("architectures") or ()):
        fields["num_decoder_layers"] = 0
    return T5Config(
        **fields,
        activation=_activation(activation),
        gated=gate == "gated",
        tie_embeddings=tied,
        # NOTE: transformers 5 always ties, and keeps in `scale_decoder_outputs` what tying once
        # meant besides: whether the logits are scaled. Its mT5 never scales.
        scale_tied_logits=not tied
        or settings.get("scale_decoder_outputs", settings["model_type"] != "mt5"),
        relpos_per_layer=settings["model_type"] == "umt5",
    )


def _t5gemma_from_json(values: Mapping[str, Any]) -> T5GemmaConfig:
    if not values.get("is_encoder_decoder", True):
        raise ModelError("is_encoder_decoder=False: an encoder of T5Gemma alone is not supported")
    defaults = {**_DEFAULTS["gemma2"], **_T5GEMMA_DEFAULTS}
    encoder, decoder = (
        _rotary_from_json("gemma2", {**defaults, **(values.get(name) or {})})
        for name in ("encoder", "decoder")
    )
    fields = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)}
    fields |= {
        "tie_embeddings": values.get("tie_word_embeddings") is not False,
        "dropout_rate": values.get("dropout_rate", 0.0),
    }
    return T5GemmaConfig(**fields, encoder=encoder)


def _gpt2_from_json(settings: Mapping[str, Any]) -> DecoderConfig:
    for name, only in {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }.items():
        _only(settings, name, only)
    fields = _fields(_GPT2_FIELDS, settings)
    return DecoderConfig(
        **fields,
        **_special_ids(settings),
        d_ff=settings.get("n_inner") or 4 * settings["n_embd"],
        num_kv_heads=settings["n_head"],
        head_dim=settings["n_embd"] // settings["n_head"],
        positions="learned",
        norm="layer",
        activation=_activation(settings["activation_function"]),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _gpt_neox_from_json(settings: dict[str, Any]) -> DecoderConfig:
    # Names of its own for the rotary base and the share of dimensions that are rotated.
    for theirs, common in {
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
    }.items():
        if theirs in settings:
            settings[common] = settings[theirs]
    settings.setdefault("partial_rotary_factor", 0.25)
    heads = settings["num_attention_heads"]
    return DecoderConfig(
        **_fields(_NEOX_FIELDS, settings),
        **_special_ids(settings),
        **_rope("gpt_neox", settings),
        num_kv_heads=heads,
        head_dim=settings["hidden_size"] // heads,
        norm="layer",
        activation=_activation(settings["hidden_act"]),
        gated=False,
        qkv_bias=settings["attention_bias"],
        out_bias=settings["attention_bias"],
        mlp_bias=True,
        parallel_residual=settings["use_parallel_residual"],
    )


def _rotary_from_json(kind: str, settings: dict[str, Any]) -> DecoderConfig:
    _only(settings, "use_bidirectional_attention", False)
    heads, gemma = settings["num_attention_heads"], kind.startswith("gemma")
    settings["num_key_value_heads"] = settings.get("num_key_value_heads") or heads
    settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // heads
    fields = _fields(_LLAMA_FIELDS, settings)
    activation = settings.get("hidden_activation") or settings["hidden_act"]
    if gemma and activation == "gelu":  # the first releases say so and mean the tanh approximation
        activation = "gelu_pytorch_tanh"
    return DecoderConfig(
        **fields,
        **_special_ids(settings),
        **_of_kind(kind, settings),
        **_rope(kind, settings),
        **_window(kind, settings),
        activation=_activation(activation),
        qkv_bias=_qkv_bias(kind, settings),
        out_bias=settings["attention_bias"],
        mlp_bias=settings["mlp_bias"],
        qk_norm=kind in _QK_NORMS,
    )


_QK_NORMS = ("qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe")
_MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def _qkv_bias(kind: str, settings: Mapping[str, Any]) -> bool:
    if kind == "qwen2_moe":
        return settings.get("qkv_bias", True)
    return kind == "qwen2" or settings["attention_bias"]


def _experts(kind: str, settings: Mapping[str, Any]) -> Experts:
    """Return the experts of a layer.

    Raises:
        ModelError: some layers have an MLP instead.
    """
    _only(settings, "decoder_sparse_step", 1)
    _only(settings, "mlp_only_layers", [])
    _only(settings, "clip_qkv", None)
    # NOTE: transformers 5 writes `num_local_experts` for every kind, and reads both.
    counts = [name for name in ("num_local_experts", "num_experts") if name in settings]
    return Experts(
        count=settings[counts[0]],
        chosen=settings["num_experts_per_tok"],
        d_ff=settings.get("moe_intermediate_size") or settings["intermediate_size"],
        normalized=kind == "mixtral" or settings["norm_topk_prob"],
        shared_d_ff=settings.get("shared_expert_intermediate_size") or 0,
    )


def _of_kind(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that only models of one kind have."""
    fields: dict[str, Any] = {}
    if kind.startswith("gemma"):
        fields |= {"norm_offset": 1.0, "embedding_scale": settings["hidden_size"] ** 0.5}
    if kind in ("gemma2", "gemma3_text"):
        fields |= {
            "post_norms": True,
            "attention_scale": settings["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": settings.get("attn_logit_softcapping"),
            "logit_softcap": settings.get("final_logit_softcapping"),
        }
    if kind in ("olmo2", "olmo3"):
        fields |= {"pre_norms": False, "post_norms": True, "qk_norm_joint": True}
    if kind == "olmoe":
        fields["qk_norm_joint"] = True
    if kind in _MIXTURES:
        fields["experts"] = _experts(kind, settings)
    if kind == "granite":
        fields |= _fields(_GRANITE_FIELDS, settings)
        fields["logit_scale"] = 1 / settings["logits_scaling"]
    if kind == "smollm3":
        layers, interval = settings["num_hidden_layers"], settings["no_rope_layer_interval"]
        rotated = settings.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
        fields["unrotated_every"] = _every([not flag for flag in rotated], layers, "NoPE")
    return fields


def _fields(table: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a configuration. Only the beginning of text may be missing, or None."""
    fields = {ours: settings.get(theirs) for ours, theirs in table.items()}
    for ours, theirs in table.items():
        if fields[ours] is None and ours != "bos_id":
            raise KeyError(theirs)
    return fields


def _special_ids(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of end and padding.

    Of several ends of text the first is taken. Without a padding id the end of text pads, as in
    transformers.
    """
    eos = settings.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise KeyError("eos_token_id")
    pad = settings.get("pad_token_id")
    return {"eos_id": eos, "pad_id": eos if pad is None else pad}


def _rope(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings, from `rope_parameters` of transformers 5 or from earlier fields."""
    rope = settings.get("rope_parameters") or {}
    local = settings.get("rope_local_base_freq")
    if "full_attention" in rope:
        rope, windowed = rope["full_attention"], rope["sliding_attention"]
        local = windowed.get("rope_theta", settings["rope_theta"])
        if windowed.get("rope_type", "default") != "default":
            raise ModelError("scaled rotary positions of windowed layers are not supported")
    rope = {**(settings.get("rope_scaling") or {}), **rope}
    fraction = settings.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
    if fraction != 1.0 and kind not in ("gpt_neox", "phi3"):
        raise ModelError(f"partial_rotary_factor is not supported for {kind!r}")
    theta = rope.get("rope_theta", settings["rope_theta"])
    scaling = _rope_scaling(rope, settings)
    if kind == "olmo3" and scaling is not None and local is None:
        local = theta  # in olmo3, layers without a window alone are scaled
    if kind == "olmo3" and scaling is None and local == theta:
        local = None
    fields = {"rope_theta": theta, "local_rope_theta": local, "rope_scaling": scaling}
    return fields | {"rotary_fraction": fraction}


def _rope_scaling(rope: Mapping[str, Any], settings: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind=kind, factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_length=rope["original_max_position_embeddings"],
        )
    if kind == "yarn":
        return _yarn(rope, settings["max_position_embeddings"])
    raise ModelError(
        f"rotary scaling {kind!r} is not supported; supported are default, linear, llama3, yarn"
    )


def _yarn(rope: Mapping[str, Any], max_length: int) -> RopeScaling:
    """Return YaRN's settings, with the defaults of transformers."""
    original = rope.get("original_max_position_embeddings") or max_length
    factor = rope.get("factor") or max_length / original

    def magnitude(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = rope.get("attention_factor")
    if attention is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return RopeScaling(
        kind="yarn",
        factor=factor,
        low_frequency_factor=rope.get("beta_slow") or 1.0,
        high_frequency_factor=rope.get("beta_fast") or 32.0,
        original_length=original,
        magnitude=magnitude() if attention is None else attention,
        whole_dimensions=rope.get("truncate", True),
    )


def _window(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of windowed layers.

    Raises:
        ModelError: the layers without a window are not every n-th.
    """
    layers, window = settings["num_hidden_layers"], settings.get("sliding_window")
    if layers > limits.MAX_LAYERS:
        raise ModelError(f"num_hidden_layers={layers} is over the limit of {limits.MAX_LAYERS}")
    if kind in ("llama", "gemma", "granite", "olmo2", "olmoe") or window is None:
        return {}
    if kind.startswith(("qwen", "smollm")) and not settings.get("use_sliding_window"):
        return {}
    if settings.get("layer_types"):
        sees_all = [name == "full_attention" for name in settings["layer_types"]]
    elif kind == "smollm3":
        raise ModelError("use_sliding_window is not supported for 'smollm3'")
    elif kind in ("qwen2", "qwen2_moe", "qwen3"):
        sees_all = [i < settings["max_window_layers"] for i in range(layers)]
    else:
        every = settings.get("sliding_window_pattern", layers + 1)
        sees_all = [(i + 1) % every == 0 for i in range(layers)]
    if all(sees_all):
        return {}
    return {"window": window, "global_every": _every(sees_all, layers, "windowed")}


def _every(flags: Sequence[bool], layers: int, what: str) -> int:
    """Return n where every n-th layer has the flag, 0 where none has.

    Raises:
        ModelError: any other pattern.
    """
    every = list(flags).index(True) + 1 if any(flags) else 0
    if list(flags) != [bool(every) and (i + 1) % every == 0 for i in range(layers)]:
        raise ModelError(f"a pattern of {what} layers that is not every n-th is not supported")
    return every


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ModelError(
            f"activation {name!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _only(settings: Mapping[str, Any], name: str, value: Any) -> None:
    if settings.get(name, value) not in (value, None):
        raise ModelError(f"{name}={settings[name]!r} is not supported")


# --------------------------------------------------------------------------------------------------
# Out


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json that `from_json`, and transformers, read as this configuration.

    Raises:
        ModelError: no model type of transformers has these settings.
    """
    if isinstance(config, T5Config):
        values = _t5_to_json(config)
    elif isinstance(config, EncoderConfig):
        values = huggingface_encoders.to_json(config)
    elif isinstance(config, T5GemmaConfig):
        values = _t5gemma_to_json(config)
    else:
        assert isinstance(config, DecoderConfig)
        if config.positions == "learned":
            values = _gpt2_to_json(config)
        elif config.norm == "layer":
            values = _gpt_neox_to_json(config)
        else:
            values = _rotary_to_json(config)
    if config.head and config.head.kind != "embedding":
        values = _with_classifier(config, values)
    read = dataclasses.replace(from_json(values), **_not_in_json(config))
    if read != config:
        wrong = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(read, field.name)
        }
        raise ModelError(f"no {values['model_type']!r} of transformers can have {wrong}")
    return values


def _with_classifier(config: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with the fields and the class of a model with a classifier."""
    kind = values["model_type"]
    if not huggingface_heads.is_standard(config, kind):
        raise ModelError(f"no {kind!r} of transformers can have the head {config.head}")
    name = values["architectures"][0]
    for end in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "EncoderModel", "Model"):
        name = name.removesuffix(end)
    name = "Gemma3Text" if name == "Gemma3" else name
    fields = huggingface_heads.to_json(config, kind)
    return {**values, **fields, "architectures": [f"{name}{huggingface_heads.CLASSIFIER}"]}


def _not_in_json(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that concern computing or training only, or are stored elsewhere."""
    names = [field.name for field in dataclasses.fields(RunConfig)]
    if config.head and config.head.kind == "embedding":
        names += ["head", "tie_embeddings"]  # nothing is tied where there are no logits
    if isinstance(config, T5Config):
        # `scale_tied_logits` of an untied model has no meaning.
        names += (
            ["sentence_head"] if config.tie_embeddings else ["sentence_head", "scale_tied_logits"]
        )
    elif isinstance(config, EncoderConfig):
        names += ["tie_embeddings"]  # there are no logits
    elif config.max_positions is None:
        names += ["dropout_rate"]
    return {name: getattr(config, name) for name in names}


def _t5_to_json(config: T5Config) -> dict[str, Any]:
    kind = "umt5" if config.relpos_per_layer else "t5"
    encoder_only = not config.num_decoder_layers
    activation = {"gelu": "gelu" if config.gated else "gelu_new", "gelu_exact": "gelu"}.get(
        config.activation, config.activation
    )
    fields = {theirs: getattr(config, ours) for ours, theirs in _T5_FIELDS.items()}
    if encoder_only:
        fields["num_decoder_layers"] = config.num_encoder_layers
    return {
        "architectures": [
            f"{kind.upper()}{'EncoderModel' if encoder_only else 'ForConditionalGeneration'}"
        ],
        "model_type": kind,
        "is_encoder_decoder": not encoder_only,
        **fields,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.tie_embeddings and config.scale_tied_logits,
    }


def _t5gemma_to_json(config: T5GemmaConfig) -> dict[str, Any]:
    def part(shape: DecoderConfig, is_decoder: bool) -> dict[str, Any]:
        values = _rotary_to_json(shape)
        for name in ("architectures", "mlp_bias", "rope_theta"):
            del values[name]
        return {**values, "model_type": "t5_gemma_module", "is_decoder": is_decoder}

    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": _T5GEMMA,
        "is_encoder_decoder": True,
        "encoder": part(config.encoder_shape, False),
        "decoder": part(config, True),
        "vocab_size": config.vocab_size,
        "dropout_rate": config.dropout_rate,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


def _gpt2_to_json(config: DecoderConfig) -> dict[str, Any]:
    dropout = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _GPT2_FIELDS.items()},
        **dict.fromkeys(dropout, config.dropout_rate),
        "n_inner": config.d_ff,
        "activation_function": _THEIR_ACTIVATIONS[config.activation],
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


def _gpt_neox_to_json(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        **{theirs: getattr(config, ours) for ours, theirs in _NEOX_FIELDS.items()},
        "hidden_act": _THEIR_ACTIVATIONS[config.activation],
        "attention_bias": config.out_bias,
        "use_parallel_residual": config.parallel_residual,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "rotary_emb_base": config.rope_theta,  # both for older releases of transformers
        "rotary_pct": config.rotary_fraction,
        "rope_parameters": _rope_to_json(config),
    }


_CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma": "Gemma",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3", "olmo2": "Olmo2", "olmo3": "Olmo3",
    "smollm3": "SmolLM3", "phi3": "Phi3", "granite": "Granite", "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "olmoe": "Olmoe",
}  # fmt: skip


def _rotary_kind(config: DecoderConfig) -> str:
    """Return the model type whose settings can express the configuration, if any can."""
    if (experts := config.experts) is not None:
        if config.qk_norm:
            return "olmoe" if config.qk_norm_joint else "qwen3_moe"
        return "mixtral" if experts.normalized and not experts.shared_d_ff else "qwen2_moe"
    if config.norm_offset:
        return "gemma3_text" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
    if not config.pre_norms:
        return "olmo3" if config.window else "olmo2"
    if config.unrotated_every:
        return "smollm3"
    if config.residual_scale != 1 or config.logit_scale != 1 or config.attention_scale is not None:
        return "granite"
    if config.qk_norm:
        return "qwen3"
    if config.rotary_fraction != 1:
        return "phi3"
    if config.qkv_bias and not config.out_bias:
        return "qwen2"
    return "mistral" if config.window else "llama"


def _rotary_to_json(config: DecoderConfig) -> dict[str, Any]:
    kind = _rotary_kind(config)
    sees_all = [
        config.window is None or (bool(config.global_every) and (i + 1) % config.global_every == 0)
        for i in range(config.num_layers)
    ]
    activation = "hidden_activation" if kind in ("gemma2", "gemma3_text") else "hidden_act"
    values = {
        "architectures": [f"{_CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _LLAMA_FIELDS.items()},
        activation: _THEIR_ACTIVATIONS[config.activation],
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "attention_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,  # older releases of transformers; newer: rope_parameters
        "rope_parameters": _rope_to_json(config),
        "sliding_window": config.window,
    }
    if kind in ("gemma2", "gemma3_text"):
        scale = config.attention_scale or config.head_dim**-0.5
        values |= {
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    if kind.startswith("qwen"):
        values |= {"use_sliding_window": config.window is not None}
    if kind == "granite":
        values |= {theirs: getattr(config, ours) for ours, theirs in _GRANITE_FIELDS.items()}
        values["logits_scaling"] = 1 / config.logit_scale
    if config.experts is not None:
        values |= _experts_to_json(kind, config.experts)
    if kind == "qwen2_moe":
        values["qkv_bias"] = config.qkv_bias
    if kind == "smollm3":
        every = config.unrotated_every
        values["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(config.num_layers)]
        values["no_rope_layer_interval"] = every
    if kind in ("qwen2", "qwen2_moe", "qwen3", "gemma2", "gemma3_text", "olmo3"):
        values["layer_types"] = ["full_attention" if a else "sliding_attention" for a in sees_all]
    return values


def _experts_to_json(kind: str, experts: Experts) -> dict[str, Any]:
    values = {"num_experts_per_tok": experts.chosen}
    if kind in ("mixtral", "olmoe"):
        values["intermediate_size"] = experts.d_ff
    else:
        values["moe_intermediate_size"] = experts.d_ff
    if kind == "mixtral":
        return values | {"num_local_experts": experts.count}
    values |= {"num_experts": experts.count, "norm_topk_prob": experts.normalized}
    if kind == "qwen2_moe":
        values["shared_expert_intermediate_size"] = experts.shared_d_ff
    return values


def _rope_to_json(config: DecoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rotary_fraction != 1:
        rope["partial_rotary_factor"] = config.rotary_fraction
    if (scaling := config.rope_scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "yarn":
            rope |= {
                "beta_slow": scaling.low_frequency_factor,
                "beta_fast": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
                "attention_factor": scaling.magnitude,
                "truncate": scaling.whole_dimensions,
            }
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    if config.local_rope_theta is None:
        if config.pre_norms or not config.window:
            return rope
        local = rope  # olmo3 wants both
    else:
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return {"full_attention": rope, "sliding_attention": local}
