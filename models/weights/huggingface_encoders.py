"""Encoder-only models of Hugging Face: config.json in and out, and tensors' names.

BERT, RoBERTa, XLM-R, CamemBERT, ModernBERT, and DeBERTa v2 and v3 (of one model type).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import Disentangled, EncoderConfig
from models.errors import ModelError
from models.weights.transfer import Part, Source

_FIELDS = {  # ours: theirs
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "initializer_range": "initializer_range",
    "pad_id": "pad_token_id",
}
_BERT = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
_ROBERTA = {**_BERT, "pad_token_id": 1, "eos_token_id": 2, "vocab_size": 50_265}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": {**_ROBERTA, "vocab_size": 30_522},
    "camembert": {**_ROBERTA, "vocab_size": 30_522},
    "modernbert": {
        "vocab_size": 50_368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "hidden_activation": "gelu",
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "norm_eps": 1e-5,
        "norm_bias": False,
        "pad_token_id": 50_283,
        "eos_token_id": 50_282,
        "attention_bias": False,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0,
    },
    "deberta-v2": {
        **_BERT,
        "vocab_size": 128_100,
        "hidden_size": 1536,
        "num_hidden_layers": 24,
        "num_attention_heads": 24,
        "intermediate_size": 6144,
        "type_vocab_size": 0,
        "layer_norm_eps": 1e-7,
        "relative_attention": False,
        "max_relative_positions": -1,
        "position_buckets": -1,
        "position_biased_input": True,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "conv_kernel_size": 0,
    },
}
_ROBERTAS = ("roberta", "xlm-roberta", "camembert")
_CLASSES = {
    "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
    "modernbert": "ModernBert", "deberta-v2": "DebertaV2",
}  # fmt: skip
_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu_exact", "gelu_new": "gelu",
                "gelu_pytorch_tanh": "gelu"}  # fmt: skip
_THEIR_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_exact": "gelu",
                      "gelu": "gelu_pytorch_tanh"}  # fmt: skip
_PREFIXES = {"modernbert": "model.", "deberta-v2": "deberta.", "bert": "bert."}

# Tensors that published files hold and no parameter needs, as regular expressions.
REDUNDANT = (
    r".*\.position_ids",  # 0, 1, 2, ...
    r"(cls|lm_head|lm_predictions|mask_predictions|decoder)\..*",  # heads of pretraining
    r"generator_.*|discriminator_.*",
)
# Redundant without a classifier that reads them.
REDUNDANT_POOLERS = (r"(bert|roberta|deberta)\.pooler\..*", r"pooler\..*", r"head\..*")


# --------------------------------------------------------------------------------------------------
# In


def from_json(kind: str, values: Mapping[str, Any]) -> EncoderConfig:
    """Return the configuration that a config.json describes, without a head."""
    settings = {**DEFAULTS[kind], **values}
    for name, only in {
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
        "conv_kernel_size": 0,
    }.items():
        if settings.get(name, only) not in (only, None):
            raise ModelError(f"{name}={settings[name]!r} is not supported")
    activation = settings["hidden_activation" if kind == "modernbert" else "hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    fields = {ours: settings[theirs] for ours, theirs in _FIELDS.items()}
    fields["activation"] = _ACTIVATIONS[activation]
    if isinstance(settings.get("eos_token_id"), int):
        fields["eos_id"] = settings["eos_token_id"]
    if kind == "modernbert":
        return EncoderConfig(**fields, **_modernbert(settings))
    fields |= {
        "dropout_rate": settings["hidden_dropout_prob"],
        "norm_epsilon": settings["layer_norm_eps"],
        "token_types": settings["type_vocab_size"],
        "max_length": settings["max_position_embeddings"],
    }
    if kind in _ROBERTAS:
        offset = settings["pad_token_id"] + 1
        fields |= {"position_offset": offset, "max_length": fields["max_length"] - offset}
    if kind == "deberta-v2":
        fields |= _deberta(settings)
    return EncoderConfig(**fields)


def _modernbert(settings: Mapping[str, Any]) -> dict[str, Any]:
    layers = settings["num_hidden_layers"]
    every = settings["global_attn_every_n_layers"]
    if (types := settings.get("layer_types")) is not None:
        sees_all = [kind == "full_attention" for kind in types]
        every = sees_all.index(True, 1) if True in sees_all[1:] else max(layers, 1)
        if len(types) != layers or sees_all != [i % every == 0 for i in range(layers)]:
            raise ModelError("layer_types other than every n-th from the first are not supported")
    bases = {
        "full_attention": settings["global_rope_theta"],
        "sliding_attention": settings["local_rope_theta"] or settings["global_rope_theta"],
    }
    for name, rope in (settings.get("rope_parameters") or {}).items():
        if name not in bases or (rope or {}).get("rope_type", "default") != "default":
            raise ModelError("rope_parameters other than default ones by layer type")
        bases[name] = (rope or {}).get("rope_theta", bases[name])
    if settings.get("rope_scaling"):
        raise ModelError("rope_scaling is not supported for 'modernbert'")
    return {
        "max_length": settings["max_position_embeddings"],
        "positions": "rotary",
        "token_types": 0,
        "rope_theta": bases["full_attention"],
        "local_rope_theta": bases["sliding_attention"],
        "window": settings["local_attention"] // 2,
        "global_every": every,
        "post_norms": False,
        "norm_epsilon": settings["norm_eps"],
        "norm_bias": settings["norm_bias"],
        "attention_bias": settings["attention_bias"],
        "mlp_bias": settings["mlp_bias"],
        "gated": True,
        "dropout_rate": settings["mlp_dropout"],
    }


def _deberta(settings: Mapping[str, Any]) -> dict[str, Any]:
    if not settings["relative_attention"]:
        raise ModelError("relative_attention=False is not supported")
    terms = settings.get("pos_att_type") or []
    terms = [x.strip() for x in terms.lower().split("|")] if isinstance(terms, str) else terms
    if unknown := sorted(set(terms) - {"c2p", "p2c"}):
        raise ModelError(f"pos_att_type {unknown[0]!r} is not supported")
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    if settings.get("attention_head_size", width // heads) != width // heads:
        raise ModelError("attention_head_size other than hidden_size / num_attention_heads")
    norms = [x.strip() for x in settings["norm_rel_ebd"].lower().split("|")]
    if unknown := sorted(set(norms) - {"none", "layer_norm"}):
        raise ModelError(f"norm_rel_ebd={unknown[0]!r} is not supported")
    distance = settings["max_relative_positions"]
    distance = settings["max_position_embeddings"] if distance < 1 else distance
    buckets = settings["position_buckets"]
    embedding = settings.get("embedding_size", width)
    return {
        "positions": "learned" if settings["position_biased_input"] else "none",
        "embedding_size": None if embedding == width else embedding,
        "disentangled": Disentangled(
            rows=2 * (buckets if buckets > 0 else distance),
            max_distance=distance,
            logarithmic=buckets > 0,
            to_position="c2p" in terms,
            from_position="p2c" in terms,
            shared=settings["share_att_key"],
            norm="layer_norm" in norms,
        ),
    }


# --------------------------------------------------------------------------------------------------
# Out


def to_json(config: EncoderConfig) -> dict[str, Any]:
    """Return the config.json of the model type whose settings can express it, if any can.

    The head is not in it.
    """
    kind = (
        "modernbert"
        if config.positions == "rotary"
        else "deberta-v2"
        if config.disentangled
        else "roberta"
        if config.position_offset
        else "bert"
    )
    act = "hidden_activation" if kind == "modernbert" else "hidden_act"
    values = {
        "architectures": [f"{_CLASSES[kind]}Model"],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()},
        "max_position_embeddings": config.max_length + config.position_offset,
        act: _THEIR_ACTIVATIONS[config.activation],
    }
    if config.eos_id != DEFAULTS[kind].get("eos_token_id", 1):
        values["eos_token_id"] = config.eos_id
    if kind == "modernbert":
        every = [i % config.global_every == 0 for i in range(config.num_layers)]
        local = config.local_rope_theta or config.rope_theta
        return values | {
            "norm_eps": config.norm_epsilon,
            "norm_bias": config.norm_bias,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "mlp_dropout": config.dropout_rate,
            "embedding_dropout": config.dropout_rate,
            "attention_dropout": config.dropout_rate,
            "local_attention": 2 * (config.window or 0),
            "layer_types": ["full_attention" if a else "sliding_attention" for a in every],
            "global_attn_every_n_layers": config.global_every,  # older releases; newer: the types
            "global_rope_theta": config.rope_theta,
            "local_rope_theta": local,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": config.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }
    values |= {
        "layer_norm_eps": config.norm_epsilon,
        "type_vocab_size": config.token_types,
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.dropout_rate,
    }
    if (relative := config.disentangled) is not None:
        terms = {"c2p": relative.to_position, "p2c": relative.from_position}
        values |= {
            "relative_attention": True,
            "max_relative_positions": relative.max_distance,
            "position_buckets": relative.rows // 2 if relative.logarithmic else -1,
            "position_biased_input": config.positions == "learned",
            "pos_att_type": [name for name, there in terms.items() if there],
            "share_att_key": relative.shared,
            "norm_rel_ebd": "layer_norm" if relative.norm else "none",
        }
        if config.embedding_size:
            values["embedding_size"] = config.embedding_size
    return values


# --------------------------------------------------------------------------------------------------
# Names


def prefix(kind: str) -> str:
    """Return the prefix that names lack where a base model was saved without a head."""
    return _PREFIXES.get(kind, "roberta.")


def sources(config: EncoderConfig, kind: str) -> dict[str, Source]:
    """Return the tensor that holds each parameter of the unrolled model, without its head."""
    names = _Names(config)
    base = prefix(kind)
    if kind == "modernbert":
        _modernbert_names(names, base)
        return names.found
    embeddings = f"{base}embeddings"
    names.found["token_embedder/embedding"] = Source(f"{embeddings}.word_embeddings.weight")
    tables = {
        "position_embedder": ("position_embeddings", config.positions == "learned"),
        "type_embedder": ("token_type_embeddings", config.token_types > 0),
    }
    for ours, (theirs, there) in tables.items():
        if there:
            names.found[f"{ours}/embedding"] = Source(f"{embeddings}.{theirs}.weight")
    if config.embedding_size:
        names.linear("embedding_projection", f"{embeddings}.embed_proj", bias=False)
    names.norm("embedding_norm", f"{embeddings}.LayerNorm")
    joint = {"query": "query", "key": "key", "value": "value"}
    if (relative := config.disentangled) is not None:
        joint = {name: f"{name}_proj" for name in joint}
        if not relative.shared and relative.to_position:
            joint["position_key"] = "pos_key_proj"
        if not relative.shared and relative.from_position:
            joint["position_query"] = "pos_query_proj"
        table = Source(f"{base}encoder.rel_embeddings.weight")
        names.found["encoder/relative_positions/table/embedding"] = table
        if relative.norm:
            names.norm("encoder/relative_positions/norm", f"{base}encoder.LayerNorm")
    for i in range(config.num_layers):
        ours, theirs = f"encoder/layers_{i}", f"{base}encoder.layer.{i}"
        for name, their_name in joint.items():
            names.linear(f"{ours}/attention/{name}", f"{theirs}.attention.self.{their_name}")
        names.linear(f"{ours}/attention/out", f"{theirs}.attention.output.dense")
        names.norm(f"{ours}/post_attention_layer_norm", f"{theirs}.attention.output.LayerNorm")
        names.linear(f"{ours}/mlp/wi", f"{theirs}.intermediate.dense")
        names.linear(f"{ours}/mlp/wo", f"{theirs}.output.dense")
        names.norm(f"{ours}/post_mlp_layer_norm", f"{theirs}.output.LayerNorm")
    return names.found


def _modernbert_names(names: _Names, base: str) -> None:
    config = names.config
    names.found["token_embedder/embedding"] = Source(f"{base}embeddings.tok_embeddings.weight")
    names.norm("embedding_norm", f"{base}embeddings.norm")
    for i in range(config.num_layers):
        ours, theirs = f"encoder/layers_{i}", f"{base}layers.{i}"
        for k, name in enumerate(("query", "key", "value")):
            part, bias = Part(k * config.d_model, 3 * config.d_model), config.attention_bias
            names.linear(f"{ours}/attention/{name}", f"{theirs}.attn.Wqkv", bias, part)
        names.linear(f"{ours}/attention/out", f"{theirs}.attn.Wo", config.attention_bias)
        names.norm(f"{ours}/post_attention_layer_norm", f"{theirs}.mlp_norm")
        for k, name in enumerate(("wi_0", "wi_1")):
            part = Part(k * config.d_ff, 2 * config.d_ff)
            names.linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.Wi", config.mlp_bias, part)
        names.linear(f"{ours}/mlp/wo", f"{theirs}.mlp.Wo", config.mlp_bias)
        last = i == config.num_layers - 1
        after = "final_norm" if last else f"layers.{i + 1}.attn_norm"  # see models/encoder.py
        names.norm(f"{ours}/post_mlp_layer_norm", f"{base}{after}")


class _Names:
    """Names that are gathered."""

    def __init__(self, config: EncoderConfig):
        self.config = config
        self.found: dict[str, Source] = {}

    def linear(self, ours: str, theirs: str, bias: bool = True, part: Part | None = None) -> None:
        self.found[f"{ours}/kernel"] = Source(f"{theirs}.weight", transposed=True, part=part)
        if bias:
            self.found[f"{ours}/bias"] = Source(f"{theirs}.bias", part=part)

    def norm(self, ours: str, theirs: str) -> None:
        self.found[f"{ours}/scale"] = Source(f"{theirs}.weight")
        if self.config.norm_bias:
            self.found[f"{ours}/bias"] = Source(f"{theirs}.bias")
