"""An encoder-only model: BERT, RoBERTa, XLM-R, ModernBERT, and DeBERTa v2 and v3.

- Parameters: `token_embedder`, and, if configured, `position_embedder`, `type_embedder` and
  `embedding_projection`; `embedding_norm`; under `encoder`, `layers/...` and, in DeBERTa, the
  table of relative positions. A layer has `attention`, `mlp`, and the norms
  `post_attention_layer_norm` and `post_mlp_layer_norm`.
- Both norms of a layer normalize the residual stream after a block was added to it. In BERT the
  normalized stream is the residual of the next block. In ModernBERT it is the input of the next
  block only, and the last layer's second norm is the model's final norm. With this layout all
  layers have the same parameters and can be stacked, although ModernBERT's first layer has no norm
  before its attention.
- Rows are packed: segment ids hide other texts, and positions restart in every segment. RoBERTa's
  positions begin after the row of the pad id. Every token has type 0, because texts are single, not
  pairs.
- Layers with and without a window have the same parameters; the kind is an input of the scan.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import Attention, AttentionPlan, plan_attention
from models.config import EncoderConfig
from models.disentangled import DisentangledAttention, RelativePositions
from models.errors import ModelError
from models.heads import SequenceHead
from models.language_model import Batch, LanguageModel
from models.layers import Embedding, LayerNorm, Linear, Stack, add, dropout, split_key
from models.mlp import MLP
from models.partitioning import constrain
from models.positions import Rotation, rotary, segment_positions

_RESIDUAL = ("batch", "length", "embed")

Key = jax.Array | None  # random key of dropout
Streams = tuple[jax.Array, jax.Array]  # the residual stream, and the input of the next block


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, with a norm of the residual stream after each."""

    def __init__(self, config: EncoderConfig):
        init = jax.nn.initializers.normal(config.initializer_range)
        if config.disentangled is None:
            self.attention: Any = Attention(
                config.d_model,
                config.num_heads,
                config.head_size,
                qkv_bias=config.attention_bias,
                out_bias=config.attention_bias,
                scale=config.head_size**-0.5,
                dropout_rate=config.dropout_rate,
                init=init,
            )
        else:
            self.attention = DisentangledAttention(config, init)
        self.post_attention_layer_norm = _norm(config)
        self.mlp = MLP(
            config.d_model,
            config.d_ff,
            activation=config.activation,
            gated=config.gated,
            bias=config.mlp_bias,
            init=init,
            kernel=config.mlp_kernel,
        )
        self.post_mlp_layer_norm = _norm(config)
        self.post_norms = config.post_norms
        self.dropout_rate = config.dropout_rate
        self.dtype = config.dtype

    def __call__(
        self, streams: Streams, plan: AttentionPlan, positions: Any, *, dropout_key: Key = None
    ) -> Streams:
        """Map both streams, [batch, length, d_model], to the same shapes.

        `positions` are rotations, or projected relative positions; None if they are added to the
        embeddings.
        """
        keys = split_key(dropout_key, 3)
        x, source = streams
        y = self.attention(source, plan, rotation=positions, dropout_key=keys[0])
        x, source = self._join(x, y, self.post_attention_layer_norm, keys[1])
        return self._join(x, self.mlp(source), self.post_mlp_layer_norm, keys[2])

    def _join(self, x: jax.Array, y: jax.Array, norm: LayerNorm, key: Key) -> Streams:
        x = constrain(add(x, dropout(y, self.dropout_rate, key)), _RESIDUAL)
        normalized = norm(x)
        return normalized if self.post_norms else x, normalized.astype(self.dtype)


class Encoder(Stack):
    """Stack of layers, and DeBERTa's table of relative positions."""

    def __init__(self, config: EncoderConfig):
        self.add_layers(
            lambda: EncoderLayer(config),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        if config.disentangled is not None:
            self.relative_positions = RelativePositions(config)


class EncoderLM(LanguageModel):
    """Complete encoder-only model, without logits of tokens."""

    config: EncoderConfig

    def __init__(self, config: EncoderConfig):
        self.config = config
        init = jax.nn.initializers.normal(config.initializer_range)
        width = config.embedding_size or config.d_model
        self.token_embedder = Embedding(config.vocab_size, width, axis="vocab", init=init)
        if config.positions == "learned":
            rows = config.position_offset + config.max_length
            self.position_embedder = Embedding(rows, width, axis="positions", init=init)
        if config.token_types:
            self.type_embedder = Embedding(config.token_types, width, axis="positions", init=init)
        if config.embedding_size:
            self.embedding_projection = Linear(
                width, config.d_model, ("sentence", "embed"), init=init
            )
        self.embedding_norm = _norm(config)
        self.encoder = Encoder(config)
        if config.head:
            self.head = SequenceHead(config.head, config.d_model, init)

    def encode(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, dropout_key: Key = None
    ) -> jax.Array:
        """Encode int32 [batch, length] -> [batch, length, d_model] in the compute dtype.

        `segment_ids` is [batch, length]; None: each row is one segment, and the pad id is padding.
        """
        config = self.config
        if segment_ids is None:
            segment_ids = (tokens != config.pad_id).astype(jnp.int32)
        places = segment_positions(segment_ids)
        plans = self._plans(segment_ids, training=dropout_key is not None)
        positions = self._positions(places)
        keys = split_key(dropout_key, config.num_layers + 1)
        x = dropout(self._embed(tokens, places), config.dropout_rate, keys[0])
        x = constrain(x, _RESIDUAL)

        def through(layer: EncoderLayer, streams: Streams, given: Any) -> tuple[Streams, None]:
            is_global, key = given
            plan = _choose(is_global, plans)
            return layer(streams, plan, _choose(is_global, positions), dropout_key=key), None

        layer_keys = None if dropout_key is None else keys[1:]
        streams = x, x.astype(config.dtype)
        given = global_layers(config), layer_keys
        (_, last), _ = self.encoder.over_layers(through, streams, given)
        return last

    def forward(self, batch: Batch, *, dropout_key: Key = None) -> jax.Array:
        """Return states of a batch, see `LanguageModel.forward`."""
        return self.encode(
            batch["encoder_input_tokens"],
            batch.get("encoder_segment_ids"),
            dropout_key=dropout_key,
        )

    def text_states(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the last layer's states."""
        return self.encode(tokens, segment_ids)

    def output_head(self) -> Any:
        """Raise ModelError, because there are no logits of tokens."""
        raise ModelError("the model has an encoder only: it has no logits of tokens")

    def _embed(self, tokens: jax.Array, places: jax.Array) -> jax.Array:
        """Embed token ids with their positions, [batch, length] -> [batch, length, d_model]."""
        config = self.config
        x = self.token_embedder(tokens, jnp.float32)
        if config.token_types:
            x = x + self.type_embedder.embedding[0].astype(x.dtype)
        if config.positions == "learned":
            x = x + self.position_embedder(places + config.position_offset, x.dtype)
        if config.embedding_size:
            x = self.embedding_projection(x.astype(config.dtype))
        return self.embedding_norm(x)

    def _plans(
        self, segment_ids: jax.Array, *, training: bool
    ) -> tuple[AttentionPlan, AttentionPlan]:
        """Return the attention plans of global and of local layers."""
        config = self.config
        plan = plan_attention(
            "xla" if config.disentangled else config.attention,
            segment_ids,
            segment_ids,
            window=None if config.window is None else config.window + 1,
            head_dim=config.head_size,
            dtype=config.dtype,
            dropout_per_query=training and config.dropout_rate > 0,
        )
        if config.window is None:
            return plan, plan
        # NOTE: one compiled layer serves both kinds, so both use the kernel that windows need.
        visible = plan.kernel.visibility(segment_ids, segment_ids, causal=False, window=None)
        return dataclasses.replace(plan, visible=visible), plan

    def _positions(self, places: jax.Array) -> tuple[Any, Any] | None:
        """Return the position inputs of the attention of global and of local layers."""
        config = self.config
        if config.disentangled is not None:
            table = self.encoder.relative_positions(places.shape[1])
            return table, table
        if config.positions != "rotary":
            return None
        everywhere: Rotation = rotary(places, config.head_size, config.rope_theta)
        if config.local_rope_theta is None:
            return everywhere, everywhere
        return everywhere, rotary(places, config.head_size, config.local_rope_theta)


def global_layers(config: EncoderConfig) -> np.ndarray:
    """Return a mask of the layers with global attention, bool [layers]."""
    if config.window is None:
        return np.ones(config.num_layers, bool)
    return np.arange(config.num_layers) % config.global_every == 0


def _choose(is_global: jax.Array, pair: tuple[Any, Any] | None) -> Any:
    """Return the first of a pair of trees where `is_global` (a traced bool), else the second."""
    if pair is None or pair[0] is pair[1]:
        return None if pair is None else pair[0]
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(is_global, a, b), *pair)


def _norm(config: EncoderConfig) -> LayerNorm:
    return LayerNorm(
        config.d_model,
        epsilon=config.norm_epsilon,
        dtype=config.residual_dtype,
        bias=config.norm_bias,
    )
