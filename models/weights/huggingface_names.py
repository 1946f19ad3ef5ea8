"""The Hugging Face name of every parameter, for unrolled layers: data, written out by loops.

Kernels there are [out, in], except GPT-2's, which are [in, out] with query, key and value in one.
"""

from models.config import DecoderConfig, ModelConfig, T5Config
from models.weights.transfer import Source

DENSE = "2_Dense/"  # prefix, here, of the tensors of a sentence-transformers Dense module

# Tensors that published files hold and no parameter needs, as regular expressions.
REDUNDANT = {
    "t5": (
        r"(encoder|decoder)\.embed_tokens\.weight",  # copies of shared.weight
        # A table that early exports wrote and no model ever used.
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
    "decoder": (
        r"transformer\.h\.\d+\.attn\.(masked_)?bias",  # GPT-2's causal mask, kept as a buffer
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    ),
}


def sources(config: ModelConfig) -> dict[str, Source]:
    """For each parameter of the unrolled model, the tensor that holds it."""
    if isinstance(config, T5Config):
        return _t5(config)
    return _gpt2(config) if config.positions == "learned" else _llama(config)


def prefix(config: ModelConfig) -> str:
    """What a base model's names lack, where it was saved without its head."""
    if isinstance(config, T5Config):
        return ""
    return "transformer." if config.positions == "learned" else "model."


def _t5(config: T5Config) -> dict[str, Source]:
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
    if config.num_decoder_layers and not config.tie_embeddings:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)
    if config.sentence_head:
        names["projection_layer/kernel"] = Source(f"{DENSE}linear.weight", transposed=True)
    return names


def _llama(config: DecoderConfig) -> dict[str, Source]:
    """Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3: the same names, some of them not everywhere."""
    names = {
        "token_embedder/embedding": Source("model.embed_tokens.weight"),
        "decoder/decoder_norm/scale": Source("model.norm.weight"),
    }
    if not config.tie_embeddings:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)

    def linear(ours: str, theirs: str, bias: bool) -> None:
        names[f"{ours}/kernel"] = Source(f"{theirs}.weight", transposed=True)
        if bias:
            names[f"{ours}/bias"] = Source(f"{theirs}.bias")

    norms = {
        "pre_self_attention_layer_norm": "input_layernorm",
        "pre_mlp_layer_norm": "post_attention_layernorm",
    }
    if config.post_norms:  # NOTE: here Llama's name for the second norm names another one
        norms = {
            "pre_self_attention_layer_norm": "input_layernorm",
            "post_self_attention_layer_norm": "post_attention_layernorm",
            "pre_mlp_layer_norm": "pre_feedforward_layernorm",
            "post_mlp_layer_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        norms["self_attention/query_norm"] = "self_attn.q_norm"
        norms["self_attention/key_norm"] = "self_attn.k_norm"
    for i in range(config.num_layers):
        ours, theirs = f"decoder/layers_{i}", f"model.layers.{i}"
        for name, their_name in norms.items():
            names[f"{ours}/{name}/scale"] = Source(f"{theirs}.{their_name}.weight")
        for name in ("query", "key", "value"):
            their_name = f"{theirs}.self_attn.{name[0]}_proj"
            linear(f"{ours}/self_attention/{name}", their_name, config.qkv_bias)
        linear(f"{ours}/self_attention/out", f"{theirs}.self_attn.o_proj", config.out_bias)
        for name, their_name in {"wi_0": "gate", "wi_1": "up", "wo": "down"}.items():
            linear(f"{ours}/mlp/{name}", f"{theirs}.mlp.{their_name}_proj", config.mlp_bias)
    return names


def _gpt2(config: DecoderConfig) -> dict[str, Source]:
    names = {
        "token_embedder/embedding": Source("transformer.wte.weight"),
        "position_embedder/embedding": Source("transformer.wpe.weight"),
    }
    if not config.tie_embeddings:
        names["decoder/logits_dense/kernel"] = Source("lm_head.weight", transposed=True)

    def both(
        ours: str, theirs: str, weight: str = "kernel", part: tuple[int, int] = (0, 1)
    ) -> None:
        names[f"{ours}/{weight}"] = Source(f"{theirs}.weight", part=part)
        names[f"{ours}/bias"] = Source(f"{theirs}.bias", part=part)

    for i in range(config.num_layers):
        ours, theirs = f"decoder/layers_{i}", f"transformer.h.{i}"
        both(f"{ours}/pre_self_attention_layer_norm", f"{theirs}.ln_1", "scale")
        for k, name in enumerate(("query", "key", "value")):
            both(f"{ours}/self_attention/{name}", f"{theirs}.attn.c_attn", part=(k, 3))
        both(f"{ours}/self_attention/out", f"{theirs}.attn.c_proj")
        both(f"{ours}/pre_mlp_layer_norm", f"{theirs}.ln_2", "scale")
        both(f"{ours}/mlp/wi", f"{theirs}.mlp.c_fc")
        both(f"{ours}/mlp/wo", f"{theirs}.mlp.c_proj")
    both("decoder/decoder_norm", "transformer.ln_f", "scale")
    return names
