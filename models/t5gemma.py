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

from models.attention import AttentionPlan, KeyValues, masked_plan, plan_attention
from models.config import DecoderConfig, T5GemmaConfig
from models.decoder import (
    DecoderLayer,
    attention_of,
    choose,
    main_layers,
    norm_of,
    plans_of,
    rotations_of,
)
from models.errors import ModelError
from models.kernels.segments import Branches
from models.language_model import Batch, Decoding, LanguageModel
from models.layers import Embedding, Linear, Stack, add, dropout, split_key
from models.logits import OutputHead
from models.partitioning import constrain
from models.positions import Rotation, segment_positions

_RESIDUAL = ("batch", "length", "embed")

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
        encoded: jax.Array,
        plan: AttentionPlan,
        cross: AttentionPlan,
        rotation: Rotation | None,
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


class Encoder(Stack):
    """The encoder's embeddings, layers and last norm."""

    def __init__(self, config: DecoderConfig):
        init = jax.nn.initializers.normal(config.initializer_range)
        self.token_embedder = Embedding(config.vocab_size, config.d_model, axis="vocab", init=init)
        self.add_layers(
            lambda: DecoderLayer(config),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.encoder_norm = norm_of(config)


class Decoder(Stack):
    """The decoder's layers, its last norm and, when untied, its logits."""

    def __init__(self, config: T5GemmaConfig):
        self.add_layers(
            lambda: CrossLayer(config),
            config.num_layers,
            scan=config.scan_layers,
            remat=config.remat,
        )
        self.decoder_norm = norm_of(config)
        if not config.tie_embeddings:
            init = jax.nn.initializers.normal(config.initializer_range)
            self.logits_dense = Linear(
                config.d_model, config.vocab_size, ("embed", "vocab"), init=init
            )


class T5Gemma(LanguageModel):
    """The whole model."""

    config: T5GemmaConfig

    def __init__(self, config: T5GemmaConfig):
        assert config.encoder is not None  # checked by the configuration
        self.config = config
        self.encoder_config = config.encoder
        init = jax.nn.initializers.normal(config.initializer_range)
        self.token_embedder = Embedding(config.vocab_size, config.d_model, axis="vocab", init=init)
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config)

    def encode(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, dropout_key: Key = None
    ) -> jax.Array:
        """Encode int32 [batch, length] -> [batch, length, the encoder's d_model].

        `segment_ids` [batch, length]; None: a row is one segment, and the pad id padding.
        """
        config = self.encoder_config
        segment_ids = self._segments(tokens, segment_ids)
        plans = plans_of(
            config, segment_ids, None, training=dropout_key is not None, bidirectional=True
        )
        rotations = rotations_of(config, segment_positions(segment_ids))
        keys = split_key(dropout_key, config.num_layers + 1)
        x = _embed(self.encoder.token_embedder, tokens, config)
        x = constrain(dropout(x, config.dropout_rate, keys[0]), _RESIDUAL)

        def through(layer: DecoderLayer, x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            is_main, key = given
            plan, rotation = choose(is_main, plans), choose(is_main, rotations)
            return layer(x, plan, rotation, dropout_key=key), None

        layer_keys = None if dropout_key is None else keys[1:]
        x, _ = self.encoder.over_layers(through, x, (main_layers(config), layer_keys))
        return self.encoder.encoder_norm(x)

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
        """Return the decoder's states under teacher forcing; see `models.t5.T5.decode`."""
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
        keys = split_key(dropout_key, config.num_layers + 1)
        x = _embed(self.token_embedder, tokens, config)
        x = constrain(dropout(x, config.dropout_rate, keys[0]), _RESIDUAL)

        def through(layer: CrossLayer, x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            is_main, key = given
            plan, rotation = choose(is_main, plans), choose(is_main, rotations)
            return layer(x, encoded, plan, cross, rotation, dropout_key=key), None

        layer_keys = None if dropout_key is None else keys[1:]
        x, _ = self.decoder.over_layers(through, x, (main_layers(config), layer_keys))
        return self.decoder.decoder_norm(x)

    def forward(self, batch: Batch, *, dropout_key: Key = None) -> jax.Array:
        """Return states of a batch, see `LanguageModel.forward`."""
        tokens = batch["encoder_input_tokens"]
        segment_ids = self._segments(tokens, batch.get("encoder_segment_ids"))
        first, second = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        return self.decode(
            self.encode(tokens, segment_ids, dropout_key=first),
            segment_ids,
            batch["decoder_input_tokens"],
            batch.get("decoder_segment_ids"),
            dropout_key=second,
        )

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
        if self.config.tie_embeddings:
            kernel = self.token_embedder.embedding[...].T
        else:
            kernel = self.decoder.logits_dense.kernel[...]
        return OutputHead(kernel, self.config.logit_scale, self.config.logit_softcap)

    def text_states(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the encoder's states."""
        return self.encode(tokens, segment_ids)

    def start_decoding(
        self, tokens: jax.Array, lengths: jax.Array | None, *, beams: int, steps: int
    ) -> Decoding:
        """Encode, and project keys and values of the encoder's states once."""
        config, decoder = self.config, self.decoder
        batch, length = tokens.shape
        if lengths is None:
            segment_ids = self._segments(tokens, None)
        else:
            segment_ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
        encoded = self.encode(tokens, segment_ids)
        cross = masked_plan(segment_ids[:, None, None, :] > 0)  # [batch, 1, 1, length]

        def project(layer: CrossLayer, _: None, __: None) -> tuple[None, KeyValues]:
            return None, layer.encoder_decoder_attention.keys_values(encoded)

        _, projected = decoder.over_layers(project, None)
        shape = (config.num_layers, batch * beams, steps, config.num_kv_heads, config.head_dim)
        cache = KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        if config.start_id is None:
            raise ModelError("the configuration has no bos_token_id to start decoding with")
        start = jnp.full(batch * beams, config.start_id, jnp.int32)

        def step(
            token: jax.Array, index: jax.Array, cache: KeyValues
        ) -> tuple[jax.Array, KeyValues]:
            distance = index - jnp.arange(steps)
            visible = (distance >= 0)[None, None, None]
            everything = masked_plan(visible)
            plans = everything, everything
            if config.window is not None:
                plans = everything, masked_plan(visible & (distance < config.window))
            rotations = rotations_of(config, jnp.full((batch * beams, 1), index))

            def through(layer: CrossLayer, x: jax.Array, given: Any) -> Any:
                old, pairs, is_main = given
                plan, rotation = choose(is_main, plans), choose(is_main, rotations)
                return layer.step(x, plan, old, index, rotation, cross, pairs)

            x = _embed(self.token_embedder, token[:, None], config)
            given = cache, projected, main_layers(config)
            x, new = decoder.over_layers(through, x, given)
            logits = self.logits(decoder.decoder_norm(x))[:, 0]
            return logits, cache.written_everywhere(new, index)

        return Decoding(start, cache, step)

    def _segments(self, tokens: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        if segment_ids is None:
            return (tokens != self.config.pad_id).astype(jnp.int32)
        return segment_ids


def _embed(table: Embedding, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    x = table(tokens, config.residual_dtype)
    return x * jnp.asarray(config.embedding_scale, x.dtype)
