"""A decoder-only language model, of all families that `DecoderConfig` covers.

- Parameters are named as in models/t5.py: `token_embedder/embedding`, `position_embedder/embedding`
  (GPT-2), and under `decoder`: `layers/...`, `decoder_norm`, `logits_dense` (when untied). A layer
  has `self_attention/{query,key,value,out}` (with `query_norm`, `key_norm`) and
  `mlp/{wi_0,wi_1,wo}` or `mlp/{wi,wo}`, or with experts `mlp/router` and
  `mlp/experts/{wi_0,wi_1,wo}`, stacked. As the configuration says, norms stand before both,
  `pre_self_attention_layer_norm` and `pre_mlp_layer_norm`, and after both,
  `post_self_attention_layer_norm` and `post_mlp_layer_norm`.
- Rows are packed: segment ids hide other documents, and positions restart in every segment.
- Layers of two kinds (with and without a window, or rotary positions) have the same parameters, so
  that they stack; the kind of a layer is an input of the scan.
- Dropout is GPT-2's: of embeddings, attention weights, and the outputs of both blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention import Attention, AttentionPlan, KeyValues, masked_plan, plan_attention
from models.config import DecoderConfig
from models.errors import ModelError
from models.experts import ExpertMLPs
from models.heads import SequenceHead
from models.kernels.segments import Branches
from models.language_model import Batch, Decoding, LanguageModel
from models.layers import (
    Embedding,
    Initializer,
    LayerNorm,
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
from models.pooling import last_of_segments
from models.positions import Rotation, rotary, segment_positions, unrotated

_RESIDUAL = ("batch", "length", "embed")

Key = jax.Array | None  # of dropout


class DecoderLayer(nnx.Module):
    """Self-attention and MLP, with norms before, after, or around each."""

    def __init__(self, config: DecoderConfig):
        init = jax.nn.initializers.normal(config.initializer_range)
        if config.pre_norms:
            self.pre_self_attention_layer_norm = norm_of(config)
        self.self_attention = attention_of(config, init)
        if config.pre_norms:
            self.pre_mlp_layer_norm = norm_of(config)
        self.mlp = _mlp(config, init)
        if config.post_norms:
            self.post_self_attention_layer_norm = norm_of(config)
            self.post_mlp_layer_norm = norm_of(config)
        self.pre_norms = config.pre_norms
        self.post_norms = config.post_norms
        self.parallel = config.parallel_residual
        self.residual_scale = config.residual_scale
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        rotation: Rotation | None = None,
        *,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Map [batch, length, d_model] to the same shape."""
        keys = split_key(dropout_key, 3)
        between = self.attended(x, plan, rotation, keys[0], keys[1])
        return self.after_attention(x, between, keys[2])

    def step(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        cache: KeyValues,
        slot: int | jax.Array,
        rotation: Rotation | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Map new tokens [rows, n, d_model] to the same shape; see `Attention.step`."""
        between, new = self.attended_step(x, plan, cache, slot, rotation)
        return self.after_attention(x, between), new

    def attended(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        rotation: Rotation | None,
        key: Key = None,
        output_key: Key = None,
    ) -> jax.Array:
        """Return the residual stream x with the attention's output added."""
        source = self._before_attention(x)
        y = self.self_attention(source, plan, rotation=rotation, dropout_key=key)
        return self._with_attention(x, y, output_key)

    def attended_step(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        cache: KeyValues,
        slot: int | jax.Array,
        rotation: Rotation | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Return `attended` for new tokens, and their keys and values."""
        y, new = self.self_attention.step(self._before_attention(x), plan, cache, slot, rotation)
        return self._with_attention(x, y), new

    def _before_attention(self, x: jax.Array) -> jax.Array:
        return self.pre_self_attention_layer_norm(x) if self.pre_norms else self._cast(x)

    def _with_attention(self, x: jax.Array, attended: jax.Array, key: Key = None) -> jax.Array:
        if self.post_norms:
            attended = self.post_self_attention_layer_norm(attended)
        return self._add(x, attended, key)

    def after_attention(self, x: jax.Array, between: jax.Array, key: Key = None) -> jax.Array:
        """Add the MLP's output to the residual stream.

        Args:
          x, between: before the attention, and after it.
        """
        source = x if self.parallel else between
        y = self.mlp(self.pre_mlp_layer_norm(source) if self.pre_norms else self._cast(source))
        if self.post_norms:
            y = self.post_mlp_layer_norm(y)
        return constrain(self._add(between, y, key), _RESIDUAL)

    def _add(self, x: jax.Array, y: jax.Array, key: Key) -> jax.Array:
        """Add a block's output to the residual stream x."""
        if self.residual_scale != 1.0:
            y = y * jnp.asarray(self.residual_scale, y.dtype)
        return add(x, dropout(y, self.dropout_rate, key))

    def _cast(self, x: jax.Array) -> jax.Array:
        """Return the residual stream in the compute dtype, which a norm would otherwise do."""
        return x.astype(self.post_mlp_layer_norm.dtype)


class Layers(Stack):
    """Layers of a `DecoderConfig`, each run with the plan and the rotation of its kind."""

    def __init__(self, config: DecoderConfig, layer: Callable[[Any], nnx.Module] = DecoderLayer):
        self.config = config
        self.add_layers(
            lambda: layer(config), config.num_layers, scan=config.scan_layers, remat=config.remat
        )

    def __call__(
        self, x: jax.Array, plans: Any, rotations: Any, *sources: Any, dropout_key: Key = None
    ) -> jax.Array:
        """Map embedded tokens [batch, length, d_model] to states of the same shape.

        Args:
          plans, rotations: see `plans_of` and `rotations_of`.
          sources: further arguments of every layer.
        """
        config = self.config
        keys = split_key(dropout_key, config.num_layers + 1)
        x = constrain(dropout(x, config.dropout_rate, keys[0]), _RESIDUAL)

        def through(layer: Any, x: jax.Array, given: Any) -> tuple[jax.Array, None]:
            is_main, key = given
            plan, rotation = choose(is_main, plans), choose(is_main, rotations)
            return layer(x, plan, rotation, *sources, dropout_key=key), None

        layer_keys = None if dropout_key is None else keys[1:]
        return self.over_layers(through, x, (main_layers(config), layer_keys))[0]

    def step(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        distance: jax.Array,
        cache: KeyValues,
        slot: int | jax.Array,
        *sources: Any,
        of_layers: Any = (),
    ) -> tuple[jax.Array, KeyValues]:
        """Run new tokens [rows, n, d_model] through the layers and write them to the cache.

        Args:
          positions: [rows, n], of the tokens in their texts.
          mask: bool, broadcastable to [rows, 1, n, slots]: which slots a token sees.
          distance: of the same shape: from a slot's token to the new token.
          cache, slot: see `Attention.step`; all layers' cache.
          sources: further arguments of every layer.
          of_layers: a tuple of further arguments with a leading [layers] dimension.
        """
        config = self.config
        everything = masked_plan(mask)
        plans = everything, everything
        if config.window is not None:
            plans = everything, masked_plan(mask & (distance < config.window))
        rotations = rotations_of(config, positions)

        def through(layer: Any, x: jax.Array, given: Any) -> tuple[jax.Array, KeyValues]:
            is_main, old, own = given
            plan, rotation = choose(is_main, plans), choose(is_main, rotations)
            return layer.step(x, plan, old, slot, rotation, *sources, *own)

        x, new = self.over_layers(through, x, (main_layers(config), cache, of_layers))
        return x, cache.written_everywhere(new, slot)


class Decoder(Layers):
    """The layers, the last norm and, when untied, the logits."""

    def __init__(self, config: DecoderConfig, layer: Callable[[Any], nnx.Module] = DecoderLayer):
        super().__init__(config, layer)
        self.decoder_norm = norm_of(config)
        if not config.tie_embeddings and not config.head:
            init = jax.nn.initializers.normal(config.initializer_range)
            self.logits_dense = Linear(
                config.d_model, config.vocab_size, ("embed", "vocab"), init=init
            )

    def output_head(self, table: Embedding) -> OutputHead:
        """Return the map from states to logits, given the embeddings that may be its kernel."""
        tied = self.config.tie_embeddings
        kernel = table.embedding[...].T if tied else self.logits_dense.kernel[...]
        return OutputHead(kernel, self.config.logit_scale, self.config.logit_softcap)

    def empty_cache(self, rows: int, slots: int) -> KeyValues:
        """Return a cache of all layers: [layers, rows, slots, kv_heads, head_dim] each."""
        config = self.config
        shape = (config.num_layers, rows, slots, config.num_kv_heads, config.head_dim)
        return KeyValues(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


class DecoderLM(LanguageModel):
    """The whole model."""

    config: DecoderConfig

    def __init__(self, config: DecoderConfig):
        self.config = config
        init = jax.nn.initializers.normal(config.initializer_range)
        self.token_embedder = Embedding(config.vocab_size, config.d_model, axis="vocab", init=init)
        if config.positions == "learned":
            self.position_embedder = Embedding(
                config.max_length, config.d_model, axis="positions", init=init
            )
        self.decoder = Decoder(config)
        if config.head:
            self.head = SequenceHead(config.head, config.d_model, init)

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        reach: jax.Array | None = None,
        dropout_key: Key = None,
    ) -> jax.Array:
        """Return states [batch, length, d_model] in the compute dtype.

        Args:
          tokens: int32 [batch, length].
          segment_ids: [batch, length], 0 for padding. None: each row is one segment; padding is
            trailing, so the causal mask hides it.
          positions: [batch, length]. None: counted from each segment's first token.
          reach: [batch, length], how many next tokens see each token, where several texts of a
            segment share a beginning (`Branches`). None: all of the segment.
        """
        config = self.config
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        if positions is None:
            positions = segment_positions(segment_ids)
        branches = None if reach is None else Branches.of(reach, positions)
        plans = plans_of(config, segment_ids, branches, training=dropout_key is not None)
        rotations = rotations_of(config, positions)
        x = self._embed(tokens, positions)
        x = self.decoder(x, plans, rotations, dropout_key=dropout_key)
        return self.decoder.decoder_norm(x)

    def forward(self, batch: Batch, *, dropout_key: Key = None) -> jax.Array:
        """Return states of a batch, see `LanguageModel.forward`."""
        return self.hidden(
            batch["decoder_input_tokens"],
            batch.get("decoder_segment_ids"),
            batch.get("decoder_positions"),
            dropout_key=dropout_key,
        )

    def answer_states(self, batch: Batch) -> jax.Array:
        """Return the states of last tokens, see `LanguageModel.answer_states`."""
        segment_ids = batch["decoder_segment_ids"]
        everywhere = self.hidden(
            batch["decoder_input_tokens"],
            segment_ids,
            batch.get("decoder_positions"),
            reach=batch.get("decoder_reach"),
        )
        last = last_of_segments(segment_ids, batch["answer_segment_ids"])
        if "answer_before_last" in batch:
            last = last - batch["answer_before_last"]
        return jnp.take_along_axis(everywhere, last[..., None], axis=1)

    def output_head(self) -> OutputHead:
        """Return the map from states to logits."""
        if self.config.head:
            raise ModelError("the model has a head for whole texts: it has no logits of tokens")
        return self.decoder.output_head(self.token_embedder)

    def text_states(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the last layer's states, for a head."""
        if not self.config.head:
            raise ModelError("the model has no encoder to pool the states of")
        return self.hidden(tokens, segment_ids)

    def start_decoding(
        self, tokens: jax.Array, lengths: jax.Array | None, *, beams: int, steps: int
    ) -> Decoding:
        """Read the prompts into the cache, without the last token of each.

        Generated tokens stand behind the longest prompt in the cache, at one slot for all rows.
        """
        batch, length = tokens.shape
        lengths = jnp.full(batch, length) if lengths is None else lengths
        before = lengths - 1  # [batch]: tokens that are in the cache when the first step begins
        slots = jnp.arange(length)
        cache = self.decoder.empty_cache(batch, length)
        positions = jnp.broadcast_to(slots, tokens.shape)
        _, cache = self._extend(tokens, positions, positions, slots < before[:, None], cache, 0)

        room = ((0, 0), (0, 0), (0, steps), (0, 0), (0, 0))
        cache = KeyValues(*(jnp.pad(jnp.repeat(x, beams, axis=1), room) for x in cache))
        before = jnp.repeat(before, beams)[:, None]  # [rows, 1]
        generated = before + jnp.arange(steps)
        key_positions = jnp.concatenate(
            [jnp.broadcast_to(slots, (batch * beams, length)), generated], 1
        )
        prompted = slots < before

        def step(
            token: jax.Array, index: jax.Array, cache: KeyValues
        ) -> tuple[jax.Array, KeyValues]:
            written = jnp.broadcast_to(jnp.arange(steps) <= index, generated.shape)
            filled = jnp.concatenate([prompted, written], axis=1)  # [rows, slots]
            x, cache = self._extend(
                token[:, None], before + index, key_positions, filled, cache, length + index
            )
            return self.logits(self.decoder.decoder_norm(x))[:, 0], cache

        start = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        return Decoding(jnp.repeat(start, beams), cache, step)

    def _extend(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        key_positions: jax.Array,
        filled: jax.Array,
        cache: KeyValues,
        slot: int | jax.Array,
    ) -> tuple[jax.Array, KeyValues]:
        """Run tokens [rows, n] at `positions` through the layers and write them to the cache.

        Args:
          key_positions, filled: [rows, slots], the position of each slot's token in its text, and
            whether the slot has one.
          slot: index in the cache of the first token.

        Returns:
          States [rows, n, d_model] before the last norm, and the cache.
        """
        distance = (positions[:, :, None] - key_positions[:, None, :])[:, None]
        mask = filled[:, None, None, :] & (distance >= 0)  # [rows, 1, n, slots]
        x = self._embed(tokens, positions)
        return self.decoder.step(x, positions, mask, distance, cache, slot)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Embed token ids and positions [batch, length] -> [batch, length, d_model], scaled."""
        config = self.config
        x = scaled_embeddings(self.token_embedder, tokens, config)
        if config.positions == "learned":
            x = x + self.position_embedder(positions, config.residual_dtype)
        return x


def scaled_embeddings(table: Embedding, tokens: jax.Array, config: DecoderConfig) -> jax.Array:
    """Embed token ids [batch, length] -> [batch, length, d_model], scaled."""
    x = table(tokens, config.residual_dtype)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    return x


def plans_of(
    config: DecoderConfig,
    segment_ids: jax.Array,
    branches: Branches | None,
    *,
    training: bool,
    bidirectional: bool = False,
) -> tuple[AttentionPlan, AttentionPlan]:
    """Return the attention plans of main and of other layers.

    Args:
      bidirectional: tokens see both ways; in windowed layers, `config.window` on either side.
    """
    window = config.window
    if bidirectional and window is not None:
        window += 1  # the token itself
    causal = not bidirectional
    local = plan_attention(
        config.attention,
        segment_ids,
        segment_ids,
        causal=causal,
        window=window,
        head_dim=config.head_dim,
        dtype=config.dtype,
        softcap=config.attention_softcap is not None,
        dropout_per_query=training and config.dropout_rate > 0,
        branches=branches,
    )
    if window is None:
        return local, local
    # NOTE: one compiled layer serves both kinds, so both have the kernel that windows need.
    further = {} if branches is None else {"branches": branches}
    everything = local.kernel.visibility(
        segment_ids, segment_ids, causal=causal, window=None, **further
    )
    return dataclasses.replace(local, visible=everything), local


def rotations_of(config: DecoderConfig, positions: jax.Array) -> tuple[Rotation, Rotation] | None:
    """Return the rotations of main and of other layers; None for learned positions."""
    if config.positions == "learned":
        return None
    dimensions = int(config.head_dim * config.rotary_fraction)
    main = rotary(positions, dimensions, config.rope_theta, config.rope_scaling)
    if config.unrotated_every:
        return main, unrotated(main)
    if config.local_rope_theta is None:
        return main, main
    return main, rotary(positions, dimensions, config.local_rope_theta)


def main_layers(config: DecoderConfig) -> np.ndarray:
    """Return which layers are of the main kind, bool [layers].

    They see all tokens, where the others see `config.window`; or they have rotary positions, where
    the others have none.
    """
    if config.unrotated_every:
        return np.arange(1, config.num_layers + 1) % config.unrotated_every != 0
    if config.window is None:
        return np.ones(config.num_layers, bool)
    if not config.global_every:
        return np.zeros(config.num_layers, bool)
    return np.arange(1, config.num_layers + 1) % config.global_every == 0


def choose(is_main: jax.Array, pair: tuple[Any, Any] | None) -> Any:
    """Return the first of a pair of trees where `is_main` (a traced bool), else the second."""
    if pair is None or pair[0] is pair[1]:
        return None if pair is None else pair[0]
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(is_main, a, b), *pair)


def _mlp(config: DecoderConfig, init: Initializer) -> MLP | ExpertMLPs:
    if config.experts is not None:
        return ExpertMLPs(config.d_model, config.experts, activation=config.activation, init=init)
    return MLP(
        config.d_model,
        config.d_ff,
        activation=config.activation,
        gated=config.gated,
        bias=config.mlp_bias,
        init=init,
        kernel=config.mlp_kernel,
    )


def attention_of(
    config: DecoderConfig, init: Initializer, *, source_size: int | None = None
) -> Attention:
    """Return an attention of the configuration's shape.

    Args:
      source_size: width of an encoder's states, to which it attends; None for self-attention.
    """
    scale = config.attention_scale
    return Attention(
        config.d_model,
        config.num_heads,
        config.head_dim,
        num_kv_heads=config.num_kv_heads,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm=functools.partial(_rms_norm, config) if config.qk_norm else None,
        joint_norm=config.qk_norm_joint,
        scale=config.head_dim**-0.5 if scale is None else scale,
        softcap=config.attention_softcap,
        dropout_rate=config.dropout_rate,
        init=init,
        cross=source_size is not None,
        source_size=source_size,
    )


def norm_of(config: DecoderConfig) -> RMSNorm | LayerNorm:
    """Return a norm over the residual stream."""
    if config.norm == "layer":
        return LayerNorm(config.d_model, epsilon=config.norm_epsilon, dtype=config.dtype)
    return _rms_norm(config, config.d_model, "embed")


def _rms_norm(config: DecoderConfig, features: int, axis: str) -> RMSNorm:
    return RMSNorm(
        features,
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        offset=config.norm_offset,
        axis=axis,
    )
