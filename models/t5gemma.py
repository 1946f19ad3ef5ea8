"""T5Gemma: an encoder-decoder of Gemma 2's layers (Zhang et al., arXiv 2504.06225).

- Encoder and decoder may differ in width and depth, and have embeddings of their own. Parameters
  are named as in models/decoder.py; `encoder` holds `token_embedder`, `layers` and `encoder_norm`,
  and a layer of the decoder also `encoder_decoder_attention` with a norm before and after it.
- A windowed layer of the encoder sees `window` tokens on either side; attention to the encoder has
  neither window nor rotary positions.
- Rows are packed as in models/t5.py: an answer is read after its start token, in its segment.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import AttentionPlan, KeyValues, plan_attention
from models.config import DecoderConfig, T5GemmaConfig
from models.decoder import (
    Decoder,
    DecoderLayer,
    Layers,
    attention_of,
    norm_of,
    plans_of,
    rotations_of,
    scaled_embeddings,
)
from models.encoder_decoder import EncoderDecoder
from models.errors import ModelError
from models.kernels.segments import Branches
from models.language_model import Batch, Decoding
from models.layers import Embedding, add, dropout, split_key
from models.logits import OutputHead
from models.positions import Rotation, segment_positions

Key = jax.Array | None  # of dropout


class CrossLayer(nnx.Module):
    """A layer of Gemma's decoder with attention to the encoder between its two blocks."""

    def __init__(self, config: T5GemmaConfig):
        init = jax.nn.initializers.normal(config.initializer_range)
        assert config.encoder is not None  # checked by the configuration
        self.layer = DecoderLayer(config)
        self.pre_cross_attention_layer_norm = norm_of(config)
        self.encoder_decoder_attention = attention_of(
            config, init, source_size=config.encoder.d_model
        )
        self.post_cross_attention_layer_norm = norm_of(config)
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        rotation: Rotation | None,
        encoded: jax.Array,
        cross: AttentionPlan,
        *,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Map [batch, length, d_model] to the same shape."""
        keys = split_key(dropout_key, 5)
        x = self.layer.attended(x, plan, rotation, keys[0], keys[1])
        pairs = self.encoder_decoder_attention.keys_values(encoded)
        return self._rest(x, pairs, cross, keys[2:])

    def step(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        cache: KeyValues,
        slot: jax.Array,
        rotation: Rotation | None,
        cross: AttentionPlan,
        encoded: KeyValues,
    ) -> tuple[jax.Array, KeyValues]:
        """Map one new token of each row; see `models.t5.DecoderLayer.step`."""
        x, new = self.layer.attended_step(x, plan, cache, slot, rotation)
        return self._rest(x, encoded, cross, (None, None, None)), new

    def _rest(self, x: jax.Array, pairs: KeyValues, cross: AttentionPlan, keys: Any) -> jax.Array:
        """Attend to the encoder, whose batch row may serve several rows of x; then the MLP."""
        attention = self.encoder_decoder_attention
        y = self.pre_cross_attention_layer_norm(x).reshape(pairs.key.shape[0], -1, x.shape[-1])
        y = attention.attend(attention.queries(y), pairs, cross, dropout_key=keys[0])
        y = self.post_cross_attention_layer_norm(y.reshape(x.shape))
        x = add(x, dropout(y, self.dropout_rate, keys[1]))
        return self.layer.after_attention(x, x, keys[2])


class Encoder(Layers):
    """The encoder's embeddings, layers and last norm."""

    def __init__(self, config: DecoderConfig):
        init = jax.nn.initializers.normal(config.initializer_range)
        self.token_embedder = Embedding(config.vocab_size, config.d_model, axis="vocab", init=init)
        super().__init__(config)
        self.encoder_norm = norm_of(config)


class T5Gemma(EncoderDecoder):
    """The whole model."""

    config: T5GemmaConfig
    decoder: Decoder

    def __init__(self, config: T5GemmaConfig):
        assert config.encoder is not None  # checked by the configuration
        self.config = config
        init = jax.nn.initializers.normal(config.initializer_range)
        self.token_embedder = Embedding(config.vocab_size, config.d_model, axis="vocab", init=init)
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config, CrossLayer)

    def encode(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, dropout_key: Key = None
    ) -> jax.Array:
        """Return the encoder's states, of its own width; see `EncoderDecoder.encode`."""
        config = self.encoder.config
        segment_ids = self.segments(tokens, segment_ids)
        training = dropout_key is not None
        plans = plans_of(config, segment_ids, None, training=training, bidirectional=True)
        rotations = rotations_of(config, segment_positions(segment_ids))
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 0)
        x = scaled_embeddings(self.encoder.token_embedder, tokens, config)
        return self.encoder.encoder_norm(self.encoder(x, plans, rotations, dropout_key=key))

    def decode(
        self,
        encoded: jax.Array,
        encoder_segment_ids: jax.Array,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        reach: jax.Array | None = None,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Return the decoder's states under teacher forcing; see `EncoderDecoder.decode`."""
        config = self.config
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        positions = segment_positions(segment_ids)
        branches = None if reach is None else Branches.of(reach, positions)
        plans = plans_of(config, segment_ids, branches, training=dropout_key is not None)
        cross = plan_attention(
            config.attention,
            segment_ids,
            encoder_segment_ids,
            head_dim=config.head_dim,
            dtype=config.dtype,
            softcap=config.attention_softcap is not None,
            dropout_per_query=dropout_key is not None and config.dropout_rate > 0,
        )
        rotations = rotations_of(config, positions)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
        x = scaled_embeddings(self.token_embedder, tokens, config)
        x = self.decoder(x, plans, rotations, encoded, cross, dropout_key=key)
        return self.decoder.decoder_norm(x)

    def answer_states(self, batch: Batch) -> jax.Array:
        """Return the states after start tokens, see `LanguageModel.answer_states`."""
        segment_ids = batch["encoder_segment_ids"]
        return self.decode(
            self.encode(batch["encoder_input_tokens"], segment_ids),
            segment_ids,
            batch["decoder_input_tokens"],
            batch["decoder_segment_ids"],
            reach=batch.get("decoder_reach"),
        )

    def output_head(self) -> OutputHead:
        """Return the map from states to logits."""
        return self.decoder.output_head(self.token_embedder)

    def start_decoding(
        self, tokens: jax.Array, lengths: jax.Array | None, *, beams: int, steps: int
    ) -> Decoding:
        """Encode, and project keys and values of the encoder's states once."""
        if self.config.start_id is None:
            raise ModelError("the configuration has no bos_token_id to start decoding with")
        rows = len(tokens) * beams
        projected, cross = self.encoded_once(tokens, lengths)

        def step(
            token: jax.Array, index: jax.Array, cache: KeyValues
        ) -> tuple[jax.Array, KeyValues]:
            distance = (index - jnp.arange(steps))[None, None, None]
            x, cache = self.decoder.step(
                scaled_embeddings(self.token_embedder, token[:, None], self.config),
                jnp.full((rows, 1), index),
                distance >= 0,
                distance,
                cache,
                index,
                cross,
                of_layers=(projected,),
            )
            return self.logits(self.decoder.decoder_norm(x))[:, 0], cache

        start = jnp.full(rows, self.config.start_id, jnp.int32)
        return Decoding(start, self.decoder.empty_cache(rows, steps), step)
