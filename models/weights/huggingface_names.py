"""The Hugging Face name of every parameter, for unrolled layers.

Their kernels are [out, in], except GPT-2's, which are [in, out] with query, key and value in one.
"""

import dataclasses
from collections.abc import Mapping

from models.config import (
    DecoderConfig,
    EncoderConfig,
    Experts,
    ModelConfig,
    T5Config,
    T5GemmaConfig,
)
from models.weights import huggingface_encoders, huggingface_heads
from models.weights.stored import StoredTensor
from models.weights.transfer import Part, Source

# Model type -> tensor of the output head, where it is not lm_head.weight.
OUTPUT_HEADS = {"t5gemma": "lm_head.out_proj.weight"}
# Tensors that published files hold and no parameter needs, as regular expressions.
_REDUNDANT: dict[str, tuple[str, ...]] = {
    "t5": (
        r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight",  # copies of shared.weight
        # A table that early exports wrote and no model ever used.
        r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    "decoder": (
        r"transformer\.h\.\d+\.attn\.(masked_)?bias",  # GPT-2's causal mask, kept as a buffer
        r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
}


def sources(config: ModelConfig, kind: str) -> dict[str, Source]:
    """Return the tensor that holds each parameter of the unrolled model; `kind`: its model_type."""
    head = huggingface_heads.sources(config, kind)
    if isinstance(config, EncoderConfig):
        return huggingface_encoders.sources(config, kind) | head
    if isinstance(config, T5Config):
        inside = "transformer." if config.head and config.has_decoder else ""
        return _t5(config, inside) | head
    if isinstance(config, T5GemmaConfig):
        return _t5gemma(config)
    assert isinstance(config, DecoderConfig)
    if kind in _BY_KIND:
        return _BY_KIND[kind](config) | head
    return _llama(config, joint=kind == "phi3", mixtral=kind == "mixtral") | head


def redundant(config: ModelConfig, kind: str) -> tuple[str, ...]:
    """Return regular expressions of tensors that a file may hold and no parameter needs."""
    if isinstance(config, EncoderConfig):
        used = huggingface_heads.is_standard(config, kind)
        poolers = () if used else huggingface_encoders.REDUNDANT_POOLERS
        return (*huggingface_encoders.REDUNDANT, *poolers)
    patterns = _REDUNDANT.get(config.family, ())
    if config.head:
        patterns = (*patterns, r"lm_head\.weight")
    if isinstance(config, T5Config) and not config.num_decoder_layers:
        return (
            *patterns,
            r"decoder\..*",
            r"lm_head\.weight",
        )  # a whole model, saved for its encoder
    return patterns


def prefix(config: ModelConfig, kind: str) -> str:
    """Return the prefix that names lack where a base model was saved without its head."""
    if isinstance(config, EncoderConfig):
        return huggingface_encoders.prefix(kind)
    if isinstance(config, T5Config):
        return ""
    return {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(kind, "model.")


def of_text(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the language model in a model of text and images, under its own names.

    The language model is `language_model` in files, and `model.language_model` in those of
    transformers 4.52 and later; its head is outside in the latter.
    """
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            found[name.removeprefix("language_model.")] = tensor
        elif name.startswith("model.language_model."):
            found[f"model.{name.removeprefix('model.language_model.')}"] = tensor
        elif name == "lm_head.weight":
            found[name] = tensor
    return found


def _t5(config: T5Config, inside: str) -> dict[str, Source]:
    """Return the names of T5's tensors; `inside` precedes those of the model beside a head."""
    names = {"token_embedder/embedding": Source("shared.weight")}

    def attention(ours: str, theirs: str) -> None:
        for name in ("query", "key", "value", "out"):
            names[f"{ours}/{name}/kernel"] = Source(f"{theirs}.{name[0]}.weight", transposed=True)

    def mlp(ours: str, theirs: str) -> None:
        for name in ("wi_0", "wi_1", "wo") if config.gated else ("wi", "wo"):
            names[f"{ours}/{name}/kernel"] = Source(f"{theirs}.{name}.weight", transposed=True)

    def bias(ours: str, theirs: str) -> None:
        table = Source(f"{theirs}.relative_attention_bias.weight", transposed=True)
        names[f"{ours}/relpos_bias/rel_embedding"] = table

    stacks = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    for stack, layers in stacks.items():
        blocks = {  # ours, theirs in the order of a layer's blocks
            "encoder": [("", "attention", "SelfAttention")],
            "decoder": [
                ("self_", "self_attention", "SelfAttention"),
                ("cross_", "encoder_decoder_attention", "EncDecAttention"),
            ],
        }[stack]
        for i in range(layers):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}.layer"
            for j, (kind, block, their_block) in enumerate(blocks):
                norm = Source(f"{theirs}.{j}.layer_norm.weight")
                names[f"{ours}/pre_{kind}attention_layer_norm/scale"] = norm
                attention(f"{ours}/{block}", f"{theirs}.{j}.{their_block}")
            j = len(blocks)
            names[f"{ours}/pre_mlp_layer_norm/scale"] = Source(f"{theirs}.{j}.layer_norm.weight")
            mlp(f"{ours}/mlp", f"{theirs}.{j}.DenseReluDense")
            if config.relpos_per_layer:
                bias(ours, f"{theirs}.0.SelfAttention")
        if layers:
            if not config.relpos_per_layer:
                bias(stack, f"{stack}.block.0.layer.0.SelfAttention")
            names[f"{stack}/{stack}_norm/scale"] = Source(f"{stack}.final_layer_norm.weight")
    if config.num_decoder_layers and not config.tie_embeddings and not config.head:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)
    if inside:
        names = {
            ours: dataclasses.replace(source, tensor=inside + source.tensor)
            for ours, source in names.items()
        }
    if config.sentence_head:
        names["projection_layer/kernel"] = Source("2_Dense/linear.weight", transposed=True)
    return names


def _llama(config: DecoderConfig, joint: bool, mixtral: bool) -> dict[str, Source]:
    """Return the names of Llama and the models that adopted them; some occur in a few only.

    `joint`: query, key and value are in one tensor, and so are the two inputs of the MLP (Phi-3).
    `mixtral`: experts have names of their own.
    """
    names = {
        "token_embedder/embedding": Source("model.embed_tokens.weight"),
        "decoder/decoder_norm/scale": Source("model.norm.weight"),
    }
    if not config.tie_embeddings and not config.head:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)

    def linear(ours: str, theirs: str, bias: bool, part: Part | None = None) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", transposed=True, part=part)
        if bias:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias", part=part)

    norms = {
        "pre_self_attention_layer_norm": "input_layernorm",
        "pre_mlp_layer_norm": "post_attention_layernorm",
    }
    if not config.pre_norms:
        norms = {
            "post_self_attention_layer_norm": "post_attention_layernorm",
            "post_mlp_layer_norm": "post_feedforward_layernorm",
        }
    elif config.post_norms:  # NOTE: here Llama's name for the second norm names another one
        norms = {
            "pre_self_attention_layer_norm": "input_layernorm",
            "post_self_attention_layer_norm": "post_attention_layernorm",
            "pre_mlp_layer_norm": "pre_feedforward_layernorm",
            "post_mlp_layer_norm": "post_feedforward_layernorm",
        }
    if not config.pre_norms:
        norms = {ours: theirs for ours, theirs in norms.items() if ours.startswith("post_")}
    if config.qk_norm:
        norms["self_attention/query_norm"] = "self_attn.q_norm"
        norms["self_attention/key_norm"] = "self_attn.k_norm"
    for i in range(config.num_layers):
        ours, theirs = f"decoder/layers_{i}", f"model.layers.{i}"
        for name, their_name in norms.items():
            names[f"{ours}/{name}/scale"] = Source(f"{theirs}.{their_name}.weight")
        if config.experts is not None:
            names |= _experts(f"{ours}/mlp", theirs, config.experts, mixtral)
        for name, (their_name, part) in _projections(config, joint).items():
            if config.experts is not None and name.startswith("mlp/"):
                continue
            bias = config.mlp_bias if name.startswith("mlp/") else config.qkv_bias
            linear(f"{ours}/{name}", f"{theirs}.{their_name}_proj", bias, part)
        linear(f"{ours}/self_attention/out", f"{theirs}.self_attn.o_proj", config.out_bias)
        if config.experts is None:
            linear(f"{ours}/mlp/wo", f"{theirs}.mlp.down_proj", config.mlp_bias)
    return names


_T5GEMMA_NORMS = {
    "pre_self_attention_layer_norm": "pre_self_attn_layernorm",
    "post_self_attention_layer_norm": "post_self_attn_layernorm",
    "pre_mlp_layer_norm": "pre_feedforward_layernorm",
    "post_mlp_layer_norm": "post_feedforward_layernorm",
}


def _t5gemma(config: T5GemmaConfig) -> dict[str, Source]:
    names = {
        "token_embedder/embedding": Source("model.decoder.embed_tokens.weight"),
        "encoder/token_embedder/embedding": Source("model.encoder.embed_tokens.weight"),
    }
    if not config.tie_embeddings:
        names["decoder/logits_dense/kernel"] = Source(OUTPUT_HEADS["t5gemma"], transposed=True)

    def linear(ours: str, theirs: str, bias: bool) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", transposed=True)
        if bias:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    def attention(ours: str, theirs: str, shape: DecoderConfig) -> None:
        for name in ("query", "key", "value"):
            linear(f"{ours}/{name}", f"{theirs}.{name[0]}_proj", shape.qkv_bias)
        linear(f"{ours}/out", f"{theirs}.o_proj", shape.out_bias)

    for stack, shape in (("encoder", config.encoder_shape), ("decoder", config)):
        names[f"{stack}/{stack}_norm/scale"] = Source(f"model.{stack}.norm.weight")
        for i in range(shape.num_layers):
            ours, theirs = f"{stack}/layers_{i}", f"model.{stack}.layers.{i}"
            if stack == "decoder":
                attention(f"{ours}/encoder_decoder_attention", f"{theirs}.cross_attn", shape)
                for when in ("pre", "post"):
                    norm = Source(f"{theirs}.{when}_cross_attn_layernorm.weight")
                    names[f"{ours}/{when}_cross_attention_layer_norm/scale"] = norm
                ours = f"{ours}/layer"
            attention(f"{ours}/self_attention", f"{theirs}.self_attn", shape)
            for name, their_name in _T5GEMMA_NORMS.items():
                names[f"{ours}/{name}/scale"] = Source(f"{theirs}.{their_name}.weight")
            for name, part in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
                linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{part}_proj", False)
    return names


def _experts(ours: str, layer: str, experts: Experts, mixtral: bool) -> dict[str, Source]:
    """Return the names of a layer's experts, each of which is three tensors."""
    block = f"{layer}.{'block_sparse_moe' if mixtral else 'mlp'}"
    kernels = dict(zip(("wi_0", "wi_1", "wo"), ("gate_proj", "up_proj", "down_proj"), strict=True))
    theirs = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"} if mixtral else kernels
    found = {f"{ours}/router/kernel": f"{block}.gate"}
    for i in range(experts.count):
        for name, their_name in theirs.items():
            found[f"{ours}/experts_{i}/{name}/kernel"] = f"{block}.experts.{i}.{their_name}"
    if experts.shared_d_ff:
        found[f"{ours}/shared_gate/kernel"] = f"{block}.shared_expert_gate"
        for name, their_name in kernels.items():
            found[f"{ours}/shared/{name}/kernel"] = f"{block}.shared_expert.{their_name}"
    return {name: Source(f"{tensor}.weight", transposed=True) for name, tensor in found.items()}


def _projections(config: DecoderConfig, joint: bool) -> dict[str, tuple[str, Part | None]]:
    """Return the tensors, and parts of them, of the projections that a joint layout merges."""
    if not joint:
        return {
            "self_attention/query": ("self_attn.q", None),
            "self_attention/key": ("self_attn.k", None),
            "self_attention/value": ("self_attn.v", None),
            "mlp/wi_0": ("mlp.gate", None),
            "mlp/wi_1": ("mlp.up", None),
        }
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    total = queries + 2 * keys
    return {
        "self_attention/query": ("self_attn.qkv", Part(0, total)),
        "self_attention/key": ("self_attn.qkv", Part(queries, total)),
        "self_attention/value": ("self_attn.qkv", Part(queries + keys, total)),
        "mlp/wi_0": ("mlp.gate_up", Part(0, 2 * config.d_ff)),
        "mlp/wi_1": ("mlp.gate_up", Part(config.d_ff, 2 * config.d_ff)),
    }


def _gpt2(config: DecoderConfig) -> dict[str, Source]:
    names = {
        "token_embedder/embedding": Source("transformer.wte.weight"),
        "position_embedder/embedding": Source("transformer.wpe.weight"),
    }
    if not config.tie_embeddings and not config.head:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)

    def both(ours: str, theirs: str, weight: str = "kernel", part: Part | None = None) -> None:
        names[f"{ours}/{weight}"] = Source(f"{theirs}.weight", part=part)
        names[f"{ours}/bias"] = Source(f"{theirs}.bias", part=part)

    for i in range(config.num_layers):
        ours, theirs = f"decoder/layers_{i}", f"transformer.h.{i}"
        both(f"{ours}/pre_self_attention_layer_norm", f"{theirs}.ln_1", "scale")
        for k, name in enumerate(("query", "key", "value")):
            joint = Part(k * config.d_model, 3 * config.d_model)
            both(f"{ours}/self_attention/{name}", f"{theirs}.attn.c_attn", part=joint)
        both(f"{ours}/self_attention/out", f"{theirs}.attn.c_proj")
        both(f"{ours}/pre_mlp_layer_norm", f"{theirs}.ln_2", "scale")
        both(f"{ours}/mlp/wi", f"{theirs}.mlp.c_fc")
        both(f"{ours}/mlp/wo", f"{theirs}.mlp.c_proj")
    both("decoder/decoder_norm", "transformer.ln_f", "scale")
    return names


def _gpt_neox(config: DecoderConfig) -> dict[str, Source]:
    names = {"token_embedder/embedding": Source("gpt_neox.embed_in.weight")}
    if not config.tie_embeddings and not config.head:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)

    def norm(ours: str, theirs: str) -> None:
        names[f"{ours}/scale"] = Source(f"{theirs}.weight")
        names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    def linear(ours: str, theirs: str, bias: bool, part: Part | None = None) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", transposed=True, part=part)
        if bias:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias", part=part)

    for i in range(config.num_layers):
        ours, theirs = f"decoder/layers_{i}", f"gpt_neox.layers.{i}"
        norm(f"{ours}/pre_self_attention_layer_norm", f"{theirs}.input_layernorm")
        for k, name in enumerate(("query", "key", "value")):  # side by side within each head
            part = Part(k * config.head_dim, 3 * config.d_model, config.num_heads)
            joint = f"{theirs}.attention.query_key_value"
            linear(f"{ours}/self_attention/{name}", joint, config.qkv_bias, part)
        linear(f"{ours}/self_attention/out", f"{theirs}.attention.dense", config.out_bias)
        norm(f"{ours}/pre_mlp_layer_norm", f"{theirs}.post_attention_layernorm")
        linear(f"{ours}/mlp/wi", f"{theirs}.mlp.dense_h_to_4h", config.mlp_bias)
        linear(f"{ours}/mlp/wo", f"{theirs}.mlp.dense_4h_to_h", config.mlp_bias)
    norm("decoder/decoder_norm", "gpt_neox.final_layer_norm")
    return names


_BY_KIND = {"gpt2": _gpt2, "gpt_neox": _gpt_neox}
