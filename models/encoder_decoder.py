"""`EncoderDecoder`: what encoder-decoders have in common, whatever their layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.attention import AttentionPlan, KeyValues, masked_plan
from models.language_model import Batch, LanguageModel
from models.layers import Stack


class EncoderDecoder(LanguageModel):
    """An encoder, and a `decoder` whose layers have an `encoder_decoder_attention`."""

    decoder: Stack

    def encode(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Encode int32 [batch, length] -> [batch, length, d_model] in the compute dtype.

        `segment_ids` [batch, length]; None: a row is one segment, and the pad id padding.
        """
        raise NotImplementedError

    def decode(
        self,
        encoded: jax.Array,
        encoder_segment_ids: jax.Array,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        reach: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Return the decoder's states under teacher forcing, [batch, target_length, d_model].

        Args:
          encoded: [batch, length, d_model], from `encode`.
          encoder_segment_ids: [batch, length]; 0 hides an encoder position.
          tokens: decoder inputs, int32 [batch, target_length]: targets shifted right, each segment
            beginning with the start token.
          segment_ids: [batch, target_length]; a token sees its own segment, in the decoder and in
            the encoder. None: all are segment 1. NOTE: padding is not inferred from the tokens,
            because T5's start token is the pad id; padding trails, so the causal mask hides it.
          reach: [batch, target_length], how many next tokens see each token, where a segment holds
            several targets one after the other. None: all of the segment.
          dropout_key: may be the key given to `encode`.

        To ask one question of every document of a packed row, give one start token per document
        and segment_ids 1, 2, 3, ...: [rows, documents].
        """
        raise NotImplementedError

    def forward(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return states of a batch, see `LanguageModel.forward`."""
        tokens = batch["encoder_input_tokens"]
        segment_ids = self.segments(tokens, batch.get("encoder_segment_ids"))
        encoded = self.encode(tokens, segment_ids, dropout_key=dropout_key)
        if not self.config.has_decoder:
            return encoded
        return self.decode(
            encoded,
            segment_ids,
            batch["decoder_input_tokens"],
            batch.get("decoder_segment_ids"),
            dropout_key=dropout_key,
        )

    def text_states(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the encoder's states."""
        return self.encode(tokens, segment_ids)

    def encoded_once(
        self, tokens: jax.Array, lengths: jax.Array | None
    ) -> tuple[KeyValues, AttentionPlan]:
        """Encode inputs to decode from; arguments as in `LanguageModel.start_decoding`.

        Returns:
          Keys and values of the encoder's states for every layer of the decoder,
          [layers, batch, length, kv_heads, head_dim], and the plan of the attention to them.
        """
        if lengths is None:
            segment_ids = self.segments(tokens, None)
        else:
            segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
        encoded = self.encode(tokens, segment_ids)

        def project(layer, _: None, __: None) -> tuple[None, KeyValues]:
            return None, layer.encoder_decoder_attention.keys_values(encoded)

        _, projected = self.decoder.over_layers(project, None)
        return projected, masked_plan(segment_ids[:, None, None, :] > 0)  # [batch, 1, 1, length]

    def segments(self, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """Return the segment ids [batch, length], those of one segment before padding if None."""
        if segment_ids is None:
            return (tokens != self.config.pad_id).astype(jnp.int32)
        return segment_ids
