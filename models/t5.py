"""T5: an encoder-decoder for v1.0, v1.1, Flan, LM-adapted, mT5, umT5, ByT5 and Sentence-T5.

- Parameters have T5X's names, so that published checkpoints map by name; stacked layers drop the
  number: `encoder/layers_0/...` becomes `encoder/layers/...` with a leading [layers] dimension.
- Rows are packed: `segment_ids` are 1, 2, ... per example in a row, 0 for padding. The bias depends
  on key - query alone and other segments are masked, so array indices serve as positions.
- Projections compute in `config.dtype`; norms, scores, softmax and logits in float32.
- Dropout is T5X's: one draw for all positions of a row (for all queries, in attention), except
  after the encoder's last norm, where every entry has its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Attention, AttentionPlan, KeyValues, masked_plan, plan_attention
from models.config import T5Config
from models.encoder_decoder import EncoderDecoder
from models.errors import ModelError
from models.flops import absorbs_cross_attention
from models.heads import SequenceHead
from models.kernels.segments import Branches, segment_mask
from models.language_model import Batch, Decoding
from models.layers import (
    KERNEL_INIT,
    Embedding,
    Linear,
    RMSNorm,
    Stack,
    add,
    dropout,
    split_key,
)
from models.logits import OutputHead
from models.mlp import MLP
from models.partitioning import constrain
from models.positions import segment_positions
from models.relative_bias import RelativePositionBias

_EMBEDDING_INIT = jax.nn.initializers.normal(1.0)
_RESIDUAL = ("batch", "length", "embed")
_LENGTH = (1,)  # of [batch, length, features]
_QUERIES = (2,)  # of [batch, heads, queries, keys]

Key = jax.Array | None  # of dropout


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, each with a norm before it and added to the residual stream."""

    def __init__(self, config: T5Config):
        self.pre_attention_layer_norm = _norm(config)
        self.attention = _attention(config)
        self.pre_mlp_layer_norm = _norm(config)
        self.mlp = _mlp(config)
        if config.relpos_per_layer:
            self.relpos_bias = _relative_bias(config, bidirectional=True)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x: jax.Array, plan: AttentionPlan, *, dropout_key: Key = None) -> jax.Array:
        """Map [batch, length, d_model] to the same shape."""
        keys = split_key(dropout_key, 4)
        drop = functools.partial(dropout, rate=self.dropout_rate, broadcast=_LENGTH)
        plan = plan.with_bias(getattr(self, "relpos_bias", None))
        y = self.attention(self.pre_attention_layer_norm(x), plan, dropout_key=keys[0])
        x = add(x, drop(y, key=keys[1]))
        y = self.mlp(self.pre_mlp_layer_norm(x), dropout_key=keys[2], broadcast=_LENGTH)
        return constrain(add(x, drop(y, key=keys[3])), _RESIDUAL)


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder, and MLP."""

    def __init__(self, config: T5Config):
        self.pre_self_attention_layer_norm = _norm(config)
        self.self_attention = _attention(config)
        self.pre_cross_attention_layer_norm = _norm(config)
        self.encoder_decoder_attention = _attention(config, cross=True)
        self.pre_mlp_layer_norm = _norm(config)
        self.mlp = _mlp(config)
        if config.relpos_per_layer:
            self.relpos_bias = _relative_bias(config, bidirectional=False)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        plan: AttentionPlan,
        cross: AttentionPlan | jax.Array,
        *,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Map [batch, target_length, d_model] to the same shape.

        `cross` is the plan of the attention to `encoded`, or the mask of absorbed attention.
        """
        keys = split_key(dropout_key, 6)
        drop = functools.partial(dropout, rate=self.dropout_rate, broadcast=_LENGTH)
        plan = plan.with_bias(getattr(self, "relpos_bias", None))
        y = self.self_attention(self.pre_self_attention_layer_norm(x), plan, dropout_key=keys[0])
        x = add(x, drop(y, key=keys[1]))
        y = self.pre_cross_attention_layer_norm(x)
        if isinstance(cross, AttentionPlan):
            y = self.encoder_decoder_attention(y, cross, source=encoded, dropout_key=keys[2])
        else:
            y = self.encoder_decoder_attention.absorbed(y, encoded, mask=cross)
        x = add(x, drop(y, key=keys[3]))
        y = self.mlp(self.pre_mlp_layer_norm(x), dropout_key=keys[4], broadcast=_LENGTH)
        return constrain(add(x, drop(y, key=keys[5])), _RESIDUAL)

    def step(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        cache: KeyValues,
        slot: jax.Array,
        cross: AttentionPlan,
        encoded: KeyValues,
    ) -> tuple[jax.Array, KeyValues]:
        """Map one new token of each row, [rows, 1, d_model], to the same shape.

        Args:
          plan: of self-attention; of umT5 without its bias, which is this layer's.
          cache, slot: see `Attention.step`.
          cross: plan of the attention to the encoder.
          encoded: keys and values of the encoder's states, of [batch] rows. The beams of a batch
            row are queries of one attention, so that they share them.

        Returns:
          The states, and the keys and values of the new tokens.
        """
        if hasattr(self, "relpos_bias"):
            plan = _with_step_bias(self.relpos_bias, plan, slot)
        attended, new = self.self_attention.step(
            self.pre_self_attention_layer_norm(x), plan, cache, slot
        )
        x = add(x, attended)
        attention = self.encoder_decoder_attention
        y = self.pre_cross_attention_layer_norm(x).reshape(encoded.key.shape[0], -1, x.shape[-1])
        y = attention.attend(attention.queries(y), encoded, cross)
        x = add(x, y.reshape(x.shape))
        return add(x, self.mlp(self.pre_mlp_layer_norm(x))), new


class Encoder(Stack):
    """The encoder's layers, its relative bias and its last norm."""

    def __init__(self, config: T5Config):
        self.add_layers(
            lambda: EncoderLayer(config),
            config.num_encoder_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        if not config.relpos_per_layer:
            self.relpos_bias = _relative_bias(config, bidirectional=True)
        self.encoder_norm = _norm(config)
        self.config = config
        self.dropout_rate = config.dropout_rate

    def __call__(
        self, x: jax.Array, segment_ids: jax.Array, *, dropout_key: Key = None
    ) -> jax.Array:
        """Encode embedded tokens [batch, length, d_model]; the shape stays."""
        first, last, layer_keys = _layer_keys(dropout_key, self.count)
        x = constrain(dropout(x, self.dropout_rate, first, broadcast=_LENGTH), _RESIDUAL)
        plan = _plan(self.config, segment_ids, segment_ids)
        plan = plan.with_bias(getattr(self, "relpos_bias", None))

        def through(layer: EncoderLayer, x: jax.Array, key: Key) -> tuple[jax.Array, None]:
            return layer(x, plan, dropout_key=key), None

        x, _ = self.over_layers(through, x, layer_keys)
        return dropout(self.encoder_norm(x), self.dropout_rate, last)


class Decoder(Stack):
    """The decoder's layers, its relative bias, its last norm and, when untied, its logits."""

    def __init__(self, config: T5Config):
        self.add_layers(
            lambda: DecoderLayer(config),
            config.num_decoder_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        if not config.relpos_per_layer:
            self.relpos_bias = _relative_bias(config, bidirectional=False)
        self.decoder_norm = _norm(config)
        self.config = config
        if not config.tie_embeddings and not config.head:
            self.logits_dense = Linear(config.d_model, config.vocab_size, ("embed", "vocab"))
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array,
        segment_ids: jax.Array,
        encoder_segment_ids: jax.Array,
        *,
        reach: jax.Array | None = None,
        absorb: bool = False,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Map embedded tokens [batch, target_length, d_model] to states of the same shape."""
        first, last, layer_keys = _layer_keys(dropout_key, self.count)
        x = constrain(dropout(x, self.dropout_rate, first, broadcast=_LENGTH), _RESIDUAL)
        branches = None if reach is None else Branches.of(reach, segment_positions(segment_ids))
        plan = _plan(self.config, segment_ids, segment_ids, causal=True, branches=branches)
        if absorb:
            cross: Any = segment_mask(segment_ids, encoder_segment_ids)
        else:
            cross = _plan(self.config, segment_ids, encoder_segment_ids)
        plan = plan.with_bias(getattr(self, "relpos_bias", None))

        def through(layer: DecoderLayer, x: jax.Array, key: Key) -> tuple[jax.Array, None]:
            return layer(x, encoded, plan, cross, dropout_key=key), None

        x, _ = self.over_layers(through, x, layer_keys)
        return dropout(self.decoder_norm(x), self.dropout_rate, last, broadcast=_LENGTH)


class T5(EncoderDecoder):
    """The whole model."""

    config: T5Config
    decoder: Decoder

    def __init__(self, config: T5Config):
        self.config = config
        self.token_embedder = Embedding(
            config.vocab_size, config.d_model, axis="vocab", init=_EMBEDDING_INIT
        )
        self.encoder = Encoder(config)
        if config.num_decoder_layers:
            self.decoder = Decoder(config)
        if config.sentence_head:
            self.projection_layer = Linear(
                config.d_model, config.sentence_head, ("embed", "sentence")
            )
        if config.head:
            self.head = SequenceHead(config.head, config.d_model, KERNEL_INIT)

    def encode(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, dropout_key: Key = None
    ) -> jax.Array:
        """Return the encoder's states, see `EncoderDecoder.encode`."""
        segment_ids = self.segments(tokens, segment_ids)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 0)
        embedded = self.token_embedder(tokens, self.config.residual_dtype)
        return self.encoder(embedded, segment_ids, dropout_key=key)

    def decode(
        self,
        encoded: jax.Array,
        encoder_segment_ids: jax.Array,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        reach: jax.Array | None = None,
        absorb: bool = False,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Return the decoder's states under teacher forcing, see `EncoderDecoder.decode`.

        Args:
          absorb: let the queries of cross-attention absorb its key and value projections, see
            `Attention.absorbed`: equal but for rounding, and cheaper while target_length is less
            than d_kv. Without dropout.
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if absorb and dropout_key is not None:
            raise ModelError("absorb=True has no dropout")
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        embedded = self.token_embedder(tokens, self.config.residual_dtype)
        return self.decoder(
            embedded,
            encoded,
            segment_ids,
            encoder_segment_ids,
            reach=reach,
            absorb=absorb,
            dropout_key=key,
        )

    def answer_states(self, batch: Batch) -> jax.Array:
        """Return the states after start tokens, see `LanguageModel.answer_states`."""
        segment_ids, starts = batch["encoder_segment_ids"], batch["decoder_input_tokens"]
        return self.decode(
            self.encode(batch["encoder_input_tokens"], segment_ids),
            segment_ids,
            starts,
            batch["decoder_segment_ids"],
            reach=batch.get("decoder_reach"),
            absorb=absorbs_cross_attention(self.config, starts.shape[1]),
        )

    def output_head(self) -> OutputHead:
        """Return the map from states to logits."""
        if not self.config.has_decoder or self.config.head:
            raise ModelError("the model has an encoder only, or a head: it has no logits of tokens")
        if not self.config.tie_embeddings:
            return OutputHead(self.decoder.logits_dense.kernel[...])
        scale = self.config.d_model**-0.5 if self.config.scale_tied_logits else 1.0
        return OutputHead(self.token_embedder.embedding[...].T, scale)

    def pool(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, max_segments: int = 1
    ) -> jax.Array:
        """Return vectors of segments, see `LanguageModel.pool`."""
        vectors = super().pool(tokens, segment_ids, max_segments=max_segments)
        return self.projection_layer(vectors) if self.config.sentence_head else vectors

    def text_states(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the encoder's states; with a head on a decoder, the decoder's.

        That decoder reads the same tokens as the encoder, each segment's shifted by one, as in
        transformers.
        """
        encoded = self.encode(tokens, segment_ids)
        if not (self.config.head and self.config.has_decoder):
            return encoded
        before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
        starts = segment_positions(segment_ids) == 0
        shifted = jnp.where(starts, self.config.decoder_start_id, before)
        return self.decode(encoded, segment_ids, shifted, segment_ids)

    def start_decoding(
        self, tokens: jax.Array, lengths: jax.Array | None, *, beams: int, steps: int
    ) -> Decoding:
        """Encode, and project keys and values of the encoder's states once."""
        config, decoder = self.config, self.decoder
        rows = len(tokens) * beams
        projected, cross = self.encoded_once(tokens, lengths)
        shape = (config.num_decoder_layers, rows, steps, config.num_heads, config.d_kv)
        cache = KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

        def step(
            token: jax.Array, index: jax.Array, cache: KeyValues
        ) -> tuple[jax.Array, KeyValues]:
            x = self.token_embedder(token[:, None], config.residual_dtype)  # [rows, 1, d_model]
            plan = masked_plan((jnp.arange(steps) <= index)[None, None, None])
            if not config.relpos_per_layer:
                plan = _with_step_bias(decoder.relpos_bias, plan, index)

            def through(layer: DecoderLayer, x: jax.Array, given: Any) -> Any:
                old, pairs = given
                return layer.step(x, plan, old, index, cross, pairs)

            x, new = decoder.over_layers(through, x, (cache, projected))
            logits = self.logits(decoder.decoder_norm(x))[:, 0]
            return logits, cache.written_everywhere(new, index)

        start = jnp.full(rows, config.decoder_start_id, jnp.int32)
        return Decoding(start, cache, step)


def _with_step_bias(
    relative: RelativePositionBias, plan: AttentionPlan, index: jax.Array
) -> AttentionPlan:
    """Return the plan with the bias of one query at `index` on all slots of the cache."""
    return dataclasses.replace(plan, bias=relative(1, plan.lengths[1], index))


def _norm(config: T5Config) -> RMSNorm:
    return RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=config.dtype)


def _attention(config: T5Config, *, cross: bool = False) -> Attention:
    return Attention(
        config.d_model,
        config.num_heads,
        config.d_kv,
        dropout_rate=config.dropout_rate,
        dropout_broadcast=_QUERIES,
        cross=cross,
    )


def _plan(
    config: T5Config,
    queries: jax.Array,
    keys: jax.Array,
    *,
    causal: bool = False,
    branches: Branches | None = None,
) -> AttentionPlan:
    return plan_attention(
        config.attention,
        queries,
        keys,
        causal=causal,
        head_dim=config.d_kv,
        dtype=config.dtype,
        branches=branches,
    )


def _mlp(config: T5Config) -> MLP:
    return MLP(
        config.d_model,
        config.d_ff,
        activation=config.activation,
        gated=config.gated,
        dropout_rate=config.dropout_rate,
        kernel=config.mlp_kernel,
    )


def _relative_bias(config: T5Config, *, bidirectional: bool) -> RelativePositionBias:
    return RelativePositionBias(
        config.num_heads,
        config.relpos_buckets,
        config.relpos_max_distance,
        bidirectional=bidirectional,
    )


def _layer_keys(key: Key, count: int) -> tuple[Key, Key, Key]:
    """Return keys for a stack's first dropout, its last, and [layers] for those between."""
    if key is None:
        return None, None, None
    keys = jax.random.split(key, count + 2)
    return keys[0], keys[1], keys[2:]
