"""config.json, both ways: the Hugging Face fields of a model type, and our configurations.

- A field that the file leaves out has the default of its model type in transformers: published
  files leave many out.
- What would change a number and cannot be expressed here is an error that names the field. What
  only tunes training or caching is not looked at.
- Tying is settled by the tensors, not here alone: see `huggingface.load`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import DecoderConfig, ModelConfig, RopeScaling, RunConfig, T5Config

_ACTIVATIONS = {"relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu_exact",
                "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}  # fmt: skip
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
    "qwen2": {**_ROTARY_DEFAULTS, "max_window_layers": 28, "sliding_window": 4096},
    "qwen3": {**_ROTARY_DEFAULTS, "max_window_layers": 28, "sliding_window": 4096, "head_dim": 128},
    "gemma": _GEMMA_DEFAULTS,
    "gemma2": {
        **_GEMMA2_DEFAULTS,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        **_GEMMA2_DEFAULTS,
        "sliding_window_pattern": 6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "max_position_embeddings": 131_072,
    },
}  # fmt: skip
MODEL_TYPES = (*_T5_TYPES, *_DEFAULTS)


# --------------------------------------------------------------------------------------------------
# In


def from_json(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json describes.

    Raises:
        ValueError: a model type, or a setting of it, that is not supported; or a field is missing.
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not supported; known: {', '.join(MODEL_TYPES)}")
    if values.get("quantization_config"):
        raise ValueError("quantized weights (quantization_config) are not supported")
    try:
        if kind in _T5_TYPES:
            return _t5_from_json({**_T5_DEFAULTS, **values})
        settings = {**_DEFAULTS[kind], **values}
        return _gpt2_from_json(settings) if kind == "gpt2" else _rotary_from_json(kind, settings)
    except KeyError as error:
        raise ValueError(f"the field {error.args[0]!r} is missing") from error


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


def _rotary_from_json(kind: str, settings: dict[str, Any]) -> DecoderConfig:
    _only(settings, "use_bidirectional_attention", False)
    heads, gemma = settings["num_attention_heads"], kind.startswith("gemma")
    settings["num_key_value_heads"] = settings.get("num_key_value_heads") or heads
    settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // heads
    fields = _fields(_LLAMA_FIELDS, settings)
    activation = settings.get("hidden_activation") or settings["hidden_act"]
    if gemma and activation == "gelu":  # the first releases say so and mean the tanh approximation
        activation = "gelu_pytorch_tanh"
    if kind in ("gemma2", "gemma3_text"):
        fields |= {
            "post_norms": True,
            "attention_scale": settings["query_pre_attn_scalar"] ** -0.5,
            "attention_softcap": settings.get("attn_logit_softcapping"),
            "logit_softcap": settings.get("final_logit_softcapping"),
        }
    return DecoderConfig(
        **fields,
        **_special_ids(settings),
        **_rope(settings),
        **_window(kind, settings),
        activation=_activation(activation),
        qkv_bias=kind == "qwen2" or settings["attention_bias"],
        out_bias=settings["attention_bias"],
        mlp_bias=settings["mlp_bias"],
        qk_norm=kind in ("qwen3", "gemma3_text"),
        norm_offset=1.0 if gemma else 0.0,
        embedding_scale=settings["hidden_size"] ** 0.5 if gemma else 1.0,
    )


def _fields(table: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields by their names. Only the beginning of text may be missing, or None."""
    fields = {ours: settings.get(theirs) for ours, theirs in table.items()}
    for ours, theirs in table.items():
        if fields[ours] is None and ours != "bos_id":
            raise KeyError(theirs)
    return fields


def _special_ids(settings: Mapping[str, Any]) -> dict[str, int]:
    """Several ends of text: the first. No padding id: the end of text pads, as in transformers."""
    eos = settings.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) else eos
    if eos is None:
        raise KeyError("eos_token_id")
    pad = settings.get("pad_token_id")
    return {"eos_id": eos, "pad_id": eos if pad is None else pad}


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, from transformers 5's `rope_parameters` or the fields that came before."""
    rope = settings.get("rope_parameters") or {}
    local = settings.get("rope_local_base_freq")
    if "full_attention" in rope:
        rope, local = rope["full_attention"], rope["sliding_attention"]["rope_theta"]
    rope = {**(settings.get("rope_scaling") or {}), **rope}
    if settings.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor is not supported")
    fields = {
        "rope_theta": rope.get("rope_theta", settings["rope_theta"]),
        "local_rope_theta": local,
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        fields["rope_scaling"] = RopeScaling(kind=kind, factor=rope["factor"])
    elif kind == "llama3":
        fields["rope_scaling"] = RopeScaling(
            kind=kind,
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_length=rope["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise ValueError(
            f"rotary scaling {kind!r} is not supported; known: default, linear, llama3"
        )
    return fields


def _window(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers see a window only: the pattern must be regular, every n-th layer seeing all."""
    layers, window = settings["num_hidden_layers"], settings.get("sliding_window")
    if kind in ("llama", "gemma") or window is None:
        return {}
    if kind.startswith("qwen") and not settings.get("use_sliding_window"):
        return {}
    if settings.get("layer_types"):
        sees_all = [name == "full_attention" for name in settings["layer_types"]]
    elif kind.startswith("qwen"):
        sees_all = [i < settings["max_window_layers"] for i in range(layers)]
    else:
        every = settings.get("sliding_window_pattern", layers + 1)
        sees_all = [(i + 1) % every == 0 for i in range(layers)]
    if all(sees_all):
        return {}
    every = sees_all.index(True) + 1 if any(sees_all) else 0
    if sees_all != [bool(every) and (i + 1) % every == 0 for i in range(layers)]:
        raise ValueError("a pattern of windowed layers that is not every n-th is not supported")
    return {"window": window, "global_every": every}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _only(settings: Mapping[str, Any], name: str, value: Any) -> None:
    if settings.get(name, value) not in (value, None):
        raise ValueError(f"{name}={settings[name]!r} is not supported")


# --------------------------------------------------------------------------------------------------
# Out


def to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json that `from_json`, and transformers, read as this configuration.

    Raises:
        ValueError: no model type of transformers has these settings.
    """
    if isinstance(config, T5Config):
        values = _t5_to_json(config)
    elif config.positions == "learned":
        values = _gpt2_to_json(config)
    else:
        values = _rotary_to_json(config)
    read = dataclasses.replace(from_json(values), **_not_in_json(config))
    if read != config:
        wrong = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(read, field.name)
        }
        raise ValueError(f"no {values['model_type']!r} of transformers can have {wrong}")
    return values


def _not_in_json(config: ModelConfig) -> dict[str, Any]:
    """What says how to compute or train, or is kept elsewhere."""
    names = [field.name for field in dataclasses.fields(RunConfig)]
    if isinstance(config, T5Config):
        # An untied model's `scale_tied_logits` says nothing.
        names += (
            ["sentence_head"] if config.tie_embeddings else ["sentence_head", "scale_tied_logits"]
        )
    elif config.positions == "rotary":
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


def _rotary_to_json(config: DecoderConfig) -> dict[str, Any]:
    if config.norm_offset:
        kind = "gemma3_text" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
    elif config.qk_norm:
        kind = "qwen3"
    elif config.qkv_bias and not config.out_bias:
        kind = "qwen2"
    else:
        kind = "mistral" if config.window else "llama"
    classes = {
        "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3",
        "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3",
    }  # fmt: skip
    sees_all = [
        config.window is None or (bool(config.global_every) and (i + 1) % config.global_every == 0)
        for i in range(config.num_layers)
    ]
    activation = "hidden_activation" if kind in ("gemma2", "gemma3_text") else "hidden_act"
    values = {
        "architectures": [f"{classes[kind]}ForCausalLM"],
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
    if kind not in ("llama", "mistral", "gemma"):
        values["layer_types"] = ["full_attention" if a else "sliding_attention" for a in sees_all]
    return values


def _rope_to_json(config: DecoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    if config.local_rope_theta is None:
        return rope
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return {"full_attention": rope, "sliding_attention": local}
