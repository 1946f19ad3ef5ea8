"""A decoder-only language model: GPT-2, Llama, Qwen 2 and 3, Gemma 1 to 3, by configuration.

- Parameters are named as in models/t5.py: `token_embedder/embedding`, `position_embedder/embedding`
  (GPT-2), and under `decoder`: `layers/...`, `decoder_norm`, `logits_dense` (when untied). A layer
  has `pre_self_attention_layer_norm`, `self_attention/{query,key,value,out}` (with `query_norm`,
  `key_norm`), `pre_mlp_layer_norm`, `mlp/{wi_0,wi_1,wo}` or `mlp/{wi,wo}`, and in Gemma 2 and 3
  `post_self_attention_layer_norm` and `post_mlp_layer_norm`.
- Rows are packed: segment ids hide other documents, and positions start anew in every segment.
- Layers that see a window and layers that see everything have the same parameters, so that they
  stack; which is which is an input of the scan.
- Dropout, for GPT-2's sake, is plain: embeddings, attention weights, and both blocks' outputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import Attention, attention_mask, rotary, segment_mask, segment_positions
from models.config import DecoderConfig
from models.layers import (
    MLP,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    Stack,
    add,
    dropout,
    split_key,
)
from models.logits import vocabulary_logits
from models.partitioning import constrain

_RESIDUAL = ("batch", "length", "embed")


class DecoderLayer(nnx.Module):
    """Causal self-attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, config: DecoderConfig):
        init = jax.nn.initializers.normal(config.initializer_range)
        self.pre_self_attention_layer_norm = _norm(config)
        self.self_attention = Attention(
            config.d_model,
            config.num_heads,
            config.head_dim,
            num_kv_heads=config.num_kv_heads,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=functools.partial(_head_norm, config) if config.qk_norm else None,
            scale=config.head_dim**-0.5
            if config.attention_scale is None
            else config.attention_scale,
            softcap=config.attention_softcap,
            dropout_rate=config.dropout_rate,
            init=init,
        )
        self.pre_mlp_layer_norm = _norm(config)
        self.mlp = MLP(
            config.d_model,
            config.d_ff,
            activation=config.activation,
            gated=config.gated,
            bias=config.mlp_bias,
            init=init,
        )
        if config.post_norms:
            self.post_self_attention_layer_norm = _norm(config)
            self.post_mlp_layer_norm = _norm(config)
        self.post_norms = config.post_norms
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, *, mask, rotation=None, dropout_key=None):
        """[batch, length, d_model] -> the same."""
        keys = split_key(dropout_key, 3)
        y = self.self_attention(
            self.pre_self_attention_layer_norm(x),
            mask=mask,
            rotation=rotation,
            dropout_key=keys[0],
        )
        return self.finish(x, y, dropout_keys=keys[1:])

    def finish(self, x, attended, *, dropout_keys=(None, None)):
        """What follows the attention: `attended` is its output, x the residual stream before it."""
        if self.post_norms:
            attended = self.post_self_attention_layer_norm(attended)
        x = add(x, dropout(attended, self.dropout_rate, dropout_keys[0]))
        y = self.mlp(self.pre_mlp_layer_norm(x))
        if self.post_norms:
            y = self.post_mlp_layer_norm(y)
        return constrain(add(x, dropout(y, self.dropout_rate, dropout_keys[1])), _RESIDUAL)


class Decoder(Stack):
    """The layers, the last norm and, when untied, the logits."""

    def __init__(self, config: DecoderConfig):
        self.add_layers(
            lambda: DecoderLayer(config),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.decoder_norm = _norm(config)
        if not config.tie_embeddings:
            init = jax.nn.initializers.normal(config.initializer_range)
            self.logits_dense = Linear(
                config.d_model, config.vocab_size, ("embed", "vocab"), init=init
            )


class DecoderLM(nnx.Module):
    """The whole model. Built and filled by `models.model.Model`."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        init = jax.nn.initializers.normal(config.initializer_range)
        self.token_embedder = Embedding(config.vocab_size, config.d_model, axis="vocab", init=init)
        if config.positions == "learned":
            self.position_embedder = Embedding(
                config.max_length, config.d_model, axis="positions", init=init
            )
        self.decoder = Decoder(config)

    def embed(self, tokens, positions) -> jax.Array:
        """Token ids and positions [batch, length] -> [batch, length, d_model], scaled."""
        config = self.config
        x = self.token_embedder(tokens, config.residual_dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        if config.positions == "learned":
            x = x + self.position_embedder(positions, config.residual_dtype)
        return x

    def rotations(self, positions):
        """The rotations of global and of local layers; None where positions are learned."""
        config = self.config
        if config.positions == "learned":
            return None
        everywhere = rotary(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        if config.local_rope_theta is None:
            return everywhere, everywhere
        return everywhere, rotary(positions, config.head_dim, config.local_rope_theta)

    def hidden(self, tokens, segment_ids=None, positions=None, *, dropout_key=None) -> jax.Array:
        """Hidden states [batch, length, d_model] for `logits`, in the compute dtype.

        Args:
          tokens: int32 [batch, length].
          segment_ids: [batch, length], 0 where padding. None: each row is one segment throughout;
            trailing padding is in nobody's past.
          positions: [batch, length]. None: counted from each segment's first token.
        """
        config = self.config
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = segment_positions(segment_ids)
        mask = attention_mask(
            config.attention,
            segment_ids,
            segment_ids,
            causal=True,
            head_dim=config.head_dim,
            dtype=config.dtype,
            only_plain=_only_plain(config, training=dropout_key is not None),
        )
        if config.window is None:
            masks = mask, mask
        else:
            masks = mask, mask & segment_mask(segment_ids, segment_ids, window=config.window)
        rotations = self.rotations(positions)

        keys = split_key(dropout_key, config.num_layers + 1)
        x = dropout(self.embed(tokens, positions), config.dropout_rate, keys[0])
        x = constrain(x, _RESIDUAL)

        def step(layer, x, given):
            is_global, key = given
            x = layer(
                x,
                mask=choose(is_global, masks),
                rotation=choose(is_global, rotations),
                dropout_key=key,
            )
            return x, None

        layer_keys = None if dropout_key is None else keys[1:]
        x, _ = self.decoder.over_layers(step, x, (global_layers(config), layer_keys))
        return self.decoder.decoder_norm(x)

    def logits(self, hidden) -> jax.Array:
        """Hidden states [batch, length, d_model] -> float32 [batch, length, vocab]."""
        return vocabulary_logits(hidden, *self.output_embedding(), self.config.logit_softcap)

    def output_embedding(self) -> tuple[jax.Array, float]:
        """The kernel [d_model, vocab] and the scale of `logits`, for losses that work in chunks."""
        if self.config.tie_embeddings:
            return self.token_embedder.embedding[...].T, 1.0
        return self.decoder.logits_dense.kernel[...], 1.0

    def forward(self, batch: dict[str, jax.Array], *, dropout_key=None) -> jax.Array:
        """Hidden states of a seqio-style batch, packed or not: [batch, length, d_model]."""
        return self.hidden(
            batch["decoder_input_tokens"],
            batch.get("decoder_segment_ids"),
            batch.get("decoder_positions"),
            dropout_key=dropout_key,
        )

    def __call__(self, batch: dict[str, jax.Array], *, dropout_key=None) -> jax.Array:
        """Logits of a seqio-style batch: float32 [batch, length, vocab]."""
        return self.logits(self.forward(batch, dropout_key=dropout_key))


def global_layers(config: DecoderConfig) -> np.ndarray:
    """Which layers see everything, bool [layers]; the others see `config.window` tokens."""
    if config.window is None:
        return np.ones(config.num_layers, bool)
    if not config.global_every:
        return np.zeros(config.num_layers, bool)
    return np.arange(1, config.num_layers + 1) % config.global_every == 0


def choose(is_global, pair):
    """The first of a pair of trees where `is_global` (a traced bool), else the second."""
    if pair is None or pair[0] is pair[1]:
        return None if pair is None else pair[0]
    return jax.tree.map(lambda a, b: jnp.where(is_global, a, b), *pair)


def _only_plain(config: DecoderConfig, *, training: bool) -> str | None:
    """What of this model's attention only the plain form can do."""
    if config.window is not None:
        return "window"
    if config.attention_softcap is not None:
        return "softcap"
    return "dropout drawn for each query" if training and config.dropout_rate else None


def _norm(config: DecoderConfig) -> RMSNorm | LayerNorm:
    if config.norm == "layer":
        return LayerNorm(config.d_model, epsilon=config.norm_epsilon, dtype=config.dtype)
    return _rms_norm(config, config.d_model, "embed")


def _head_norm(config: DecoderConfig) -> RMSNorm:
    return _rms_norm(config, config.head_dim, "head_dim")


def _rms_norm(config: DecoderConfig, features: int, axis: str) -> RMSNorm:
    return RMSNorm(
        features,
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        offset=config.norm_offset,
        axis=axis,
    )
