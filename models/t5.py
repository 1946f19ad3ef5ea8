"""T5: one encoder-decoder for v1.0, v1.1, Flan, LM-adapted, mT5, umT5, ByT5 and Sentence-T5.

- Parameters carry T5X's names, so that published checkpoints map by name; stacked layers drop the
  number: `encoder/layers_0/...` becomes `encoder/layers/...` with a leading [layers] dimension.
- Everything is packed: `segment_ids` are 1, 2, ... per example in a row, 0 for padding. The bias
  depends on key - query alone and other segments are masked, so array indices serve as positions.
- Projections compute in `config.dtype`; norms, scores, softmax and logits in float32.
- Dropout where T5X has it: one draw for all positions of a row (for all queries, in attention),
  except after the encoder's last norm, where every entry has its own.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Attention, RelativePositionBias, attention_mask, segment_mask
from models.config import T5Config
from models.layers import (
    MLP,
    Embedding,
    Linear,
    RMSNorm,
    Stack,
    add,
    dropout,
    einsum,
    split_key,
)
from models.logits import vocabulary_logits
from models.partitioning import constrain

_EMBEDDING_INIT = jax.nn.initializers.normal(1.0)
_RESIDUAL = ("batch", "length", "embed")
_LENGTH = (1,)  # of [batch, length, features]
_QUERIES = (2,)  # of [batch, heads, queries, keys]


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, each normed before and added to the residual stream."""

    def __init__(self, config: T5Config):
        self.pre_attention_layer_norm = _norm(config)
        self.attention = _attention(config)
        self.pre_mlp_layer_norm = _norm(config)
        self.mlp = _mlp(config)
        if config.relpos_per_layer:
            self.relpos_bias = _relative_bias(config, bidirectional=True)
        self.dropout_rate = config.dropout_rate

    def __call__(self, x, *, bias, mask, dropout_key=None):
        """[batch, length, d_model] -> the same; `bias` None: this layer's own."""
        keys = split_key(dropout_key, 4)
        drop = functools.partial(dropout, rate=self.dropout_rate, broadcast=_LENGTH)
        if bias is None:
            bias = self.relpos_bias.beside(mask, x.shape[1])
        y = self.attention(
            self.pre_attention_layer_norm(x), bias=bias, mask=mask, dropout_key=keys[0]
        )
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

    def __call__(self, x, encoded, *, bias, mask, cross_mask, absorb=False, dropout_key=None):
        """[batch, target_length, d_model] -> the same; `bias` None: this layer's own."""
        keys = split_key(dropout_key, 6)
        drop = functools.partial(dropout, rate=self.dropout_rate, broadcast=_LENGTH)
        if bias is None:
            bias = self.relpos_bias.beside(mask, x.shape[1])
        y = self.self_attention(
            self.pre_self_attention_layer_norm(x), bias=bias, mask=mask, dropout_key=keys[0]
        )
        x = add(x, drop(y, key=keys[1]))
        cross, y = self.encoder_decoder_attention, self.pre_cross_attention_layer_norm(x)
        if absorb:
            y = cross.absorbed(y, encoded, mask=cross_mask)
        else:
            y = cross(y, encoded, mask=cross_mask, dropout_key=keys[2])
        x = add(x, drop(y, key=keys[3]))
        y = self.mlp(self.pre_mlp_layer_norm(x), dropout_key=keys[4], broadcast=_LENGTH)
        return constrain(add(x, drop(y, key=keys[5])), _RESIDUAL)


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

    def __call__(self, x, segment_ids, *, dropout_key=None):
        """Embedded tokens [batch, length, d_model] -> their encodings, the same shape."""
        first, last, layer_keys = _layer_keys(dropout_key, self.count)
        x = constrain(dropout(x, self.dropout_rate, first, broadcast=_LENGTH), _RESIDUAL)
        mask = _mask(self.config, segment_ids, segment_ids)
        shared = hasattr(self, "relpos_bias")
        bias = self.relpos_bias.beside(mask, x.shape[1]) if shared else None

        def step(layer, x, key):
            return layer(x, bias=bias, mask=mask, dropout_key=key), None

        x, _ = self.over_layers(step, x, layer_keys)
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
        if not config.tie_embeddings:
            self.logits_dense = Linear(config.d_model, config.vocab_size, ("embed", "vocab"))
        self.dropout_rate = config.dropout_rate

    def __call__(
        self, x, encoded, segment_ids, encoder_segment_ids, *, absorb=False, dropout_key=None
    ):
        """Embedded tokens [batch, target_length, d_model] -> hidden states, the same shape."""
        first, last, layer_keys = _layer_keys(dropout_key, self.count)
        x = constrain(dropout(x, self.dropout_rate, first, broadcast=_LENGTH), _RESIDUAL)
        mask = _mask(self.config, segment_ids, segment_ids, causal=True)
        if absorb:
            cross_mask = segment_mask(segment_ids, encoder_segment_ids)
        else:
            cross_mask = _mask(self.config, segment_ids, encoder_segment_ids)
        shared = hasattr(self, "relpos_bias")
        bias = self.relpos_bias.beside(mask, x.shape[1]) if shared else None

        def step(layer, x, key):
            x = layer(
                x,
                encoded,
                bias=bias,
                mask=mask,
                cross_mask=cross_mask,
                absorb=absorb,
                dropout_key=key,
            )
            return x, None

        x, _ = self.over_layers(step, x, layer_keys)
        return dropout(self.decoder_norm(x), self.dropout_rate, last, broadcast=_LENGTH)


class T5(nnx.Module):
    """The whole model. Built and filled by `models.model.Model`."""

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

    def encode(self, tokens, segment_ids=None, *, dropout_key=None) -> jax.Array:
        """Encodes int32 [batch, length] -> [batch, length, d_model] in the compute dtype.

        `segment_ids` [batch, length]; without them a row is one segment, and the pad id padding.
        """
        if segment_ids is None:
            segment_ids = (tokens != self.config.pad_id).astype(jnp.int32)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 0)
        embedded = self.token_embedder(tokens, self.config.residual_dtype)
        return self.encoder(embedded, segment_ids, dropout_key=key)

    def decode(
        self,
        encoded,
        encoder_segment_ids,
        tokens,
        segment_ids=None,
        *,
        absorb: bool = False,
        dropout_key=None,
    ) -> jax.Array:
        """Teacher forcing: hidden states [batch, target_length, d_model] for `logits`.

        Args:
          encoded: [batch, length, d_model], from `encode`.
          encoder_segment_ids: [batch, length]; 0 hides an encoder position.
          tokens: decoder inputs, int32 [batch, target_length]: targets shifted right, each segment
            beginning with `decoder_start_id`.
          segment_ids: [batch, target_length]; a token sees its own segment, in the decoder and in
            the encoder. None: all is segment 1. NOTE: padding is not inferred from the tokens here,
            because T5 starts to decode with the pad id; trailing padding is in nobody's past.
          absorb: let the queries of cross-attention absorb its key and value projections, see
            `Attention.absorbed`: the same but for rounding, and cheaper while target_length is less
            than d_kv. Without dropout.
          dropout_key: the key given to `encode` may be given again.

        To ask one question of every document of a packed row, give one start token per document
        and segment_ids 1, 2, 3, ...: [rows, documents].
        """
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if absorb and dropout_key is not None:
            raise ValueError("absorb=True has no dropout")
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        embedded = self.token_embedder(tokens, self.config.residual_dtype)
        return self.decoder(
            embedded, encoded, segment_ids, encoder_segment_ids, absorb=absorb, dropout_key=key
        )

    def logits(self, hidden) -> jax.Array:
        """Hidden states [batch, length, d_model] -> float32 [batch, length, vocab]."""
        return vocabulary_logits(hidden, *self.output_embedding())

    def output_embedding(self) -> tuple[jax.Array, float]:
        """The kernel [d_model, vocab] and the scale of `logits`, for losses that work in chunks."""
        if not self.config.tie_embeddings:
            return self.decoder.logits_dense.kernel[...], 1.0
        scale = self.config.d_model**-0.5 if self.config.scale_tied_logits else 1.0
        return self.token_embedder.embedding[...].T, scale

    def __call__(self, batch: dict[str, jax.Array], *, dropout_key=None) -> jax.Array:
        """Logits of a seqio-style batch, packed or not: float32 [batch, target_length, vocab]."""
        return self.logits(self.forward(batch, dropout_key=dropout_key))

    def forward(self, batch: dict[str, jax.Array], *, dropout_key=None) -> jax.Array:
        """Decoder states of a seqio-style batch: [batch, target_length, d_model]."""
        tokens = batch["encoder_input_tokens"]
        segment_ids = batch.get("encoder_segment_ids")
        if segment_ids is None:
            segment_ids = (tokens != self.config.pad_id).astype(jnp.int32)
        encoded = self.encode(tokens, segment_ids, dropout_key=dropout_key)
        return self.decode(
            encoded,
            segment_ids,
            batch["decoder_input_tokens"],
            batch.get("decoder_segment_ids"),
            dropout_key=dropout_key,
        )

    def embed(self, tokens, segment_ids=None, *, max_segments: int | None = None) -> jax.Array:
        """Sentence-T5: mean over a text's tokens, projection, unit length; float32.

        Unpacked (`max_segments` None): one text per row, [batch, sentence_head]. Packed:
        [batch, max_segments, sentence_head], segment s at s - 1; a segment that is not there gives
        zeros. A model without a sentence head gives the mean itself, [..., d_model].
        """
        pooled = self.pool(tokens, segment_ids, max_segments=max_segments or 1)
        norm = jnp.sqrt(jnp.sum(jnp.square(pooled), axis=-1, keepdims=True))
        pooled = pooled / jnp.maximum(norm, 1e-12)
        return pooled if max_segments else pooled[:, 0]

    def pool(self, tokens, segment_ids=None, *, max_segments: int = 1) -> jax.Array:
        """Mean over a text's tokens, and the projection where there is one: `embed` before scaling.

        float32 [batch, max_segments, sentence_head or d_model].
        """
        if segment_ids is None:
            segment_ids = (tokens != self.config.pad_id).astype(jnp.int32)
        encoded = self.encode(tokens, segment_ids).astype(jnp.float32)
        wanted = jnp.arange(1, max_segments + 1)
        belongs = segment_ids[:, None, :] == wanted[None, :, None]  # [batch, segments, length]
        count = jnp.sum(belongs, axis=-1, keepdims=True)
        total = einsum("bsl,bld->bsd", belongs.astype(jnp.float32), encoded)
        mean = total / jnp.maximum(count, 1)
        return self.projection_layer(mean) if self.config.sentence_head else mean


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


def _mask(config: T5Config, queries, keys, *, causal=False):
    return attention_mask(
        config.attention,
        queries,
        keys,
        causal=causal,
        head_dim=config.d_kv,
        dtype=config.dtype,
    )


def _mlp(config: T5Config) -> MLP:
    return MLP(
        config.d_model,
        config.d_ff,
        activation=config.activation,
        gated=config.gated,
        dropout_rate=config.dropout_rate,
    )


def _relative_bias(config: T5Config, *, bidirectional: bool) -> RelativePositionBias:
    return RelativePositionBias(
        config.num_heads,
        config.relpos_buckets,
        config.relpos_max_distance,
        bidirectional=bidirectional,
    )


def _layer_keys(key, count):
    """Keys for a stack's first dropout, its last, and [layers] for those between; or Nones."""
    if key is None:
        return None, None, None
    keys = jax.random.split(key, count + 2)
    return keys[0], keys[1], keys[2:]
