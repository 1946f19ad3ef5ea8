"""`LanguageModel`: the calls that every model answers, whatever its family.

- Batches are dictionaries of int32 arrays with seqio's names, packed or not: `encoder_input_tokens`
  and `encoder_segment_ids` of a model with an encoder, `decoder_input_tokens` and
  `decoder_segment_ids` of one with a decoder. Segment ids are 1, 2, ... per example in a row, 0 for
  padding.
- Callers ask the configuration what a model is (`config.has_encoder`), never which family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from flax import nnx

from models.attention import KeyValues
from models.config import ModelConfig
from models.heads import SequenceHead
from models.logits import OutputHead, vocabulary_logits
from models.pooling import mean_of_segments, scaled_to_unit_length

Batch = Mapping[str, jax.Array]

# (last token of each row [rows], index of the step, cache)
#   -> (float32 logits [rows, vocab] of the next token, cache)
DecodeStep = Callable[[jax.Array, jax.Array, KeyValues], tuple[jax.Array, KeyValues]]


class Decoding(NamedTuple):
    """A model ready to generate. Rows are [batch * beams], the beams of a batch row side by side.

    Attributes:
      start: int32 [rows], the token from which the first step predicts.
      cache: keys and values, [layers, rows, slots, kv_heads, head_dim] in the compute dtype.
      step: computes one step. Rows of the cache may be reordered within a batch row in between.
    """

    start: jax.Array
    cache: KeyValues
    step: DecodeStep


class LanguageModel(nnx.Module):
    """A model with its parameters. Built and filled by `models.model.Model`."""

    config: ModelConfig
    head: SequenceHead  # where the configuration has one

    def __call__(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the logits of a batch, float32 [rows, length, vocab]."""
        return self.logits(self.forward(batch, dropout_key=dropout_key))

    def forward(self, batch: Batch, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Return the last layer's states of a batch, [rows, length, d_model] in the compute dtype.

        They are the decoder's, or the encoder's if the model has no decoder.
        """
        raise NotImplementedError

    def answer_states(self, batch: Batch) -> jax.Array:
        """Return the states that predict the first token after each document of packed rows.

        Args:
          batch: with an encoder, the documents in `encoder_input_tokens`, the start token of each
            in `decoder_input_tokens` [rows, documents], and segment ids of both. Without, the
            documents in `decoder_input_tokens`, their segment ids, and in `answer_segment_ids`
            [rows, documents] the segments that are asked about. Optionally, of several texts in a
            segment: `decoder_reach` (see `models.kernels.segments.Branches`), `decoder_positions`,
            and `answer_before_last`, how many tokens before the segment's last one to answer from.

        Returns:
          [rows, documents, d_model]; without meaning where the segment is 0.
        """
        raise NotImplementedError

    def output_head(self) -> OutputHead:
        """Return the map from states to logits, for losses that work in chunks.

        Raises:
          ValueError: the model has no decoder, or a head for whole texts in its place.
        """
        raise NotImplementedError

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Return the logits of states [rows, length, d_model]: float32 [rows, length, vocab]."""
        return vocabulary_logits(hidden, self.output_head())

    def start_decoding(
        self, tokens: jax.Array, lengths: jax.Array | None, *, beams: int, steps: int
    ) -> Decoding:
        """Read inputs or prompts, and return what generates from them token by token.

        Args:
          tokens: int32 [batch, length], an encoder's input or prompts of at least one token, padded
            on the right.
          lengths: int32 [batch], tokens of each row. None: an encoder's input ends at its padding,
            and a prompt fills its row, since the pad id may be one of its tokens.
          beams: rows per batch row.
          steps: most tokens that will be generated.
        """
        raise NotImplementedError

    def pool(
        self, tokens: jax.Array, segment_ids: jax.Array | None = None, *, max_segments: int = 1
    ) -> jax.Array:
        """Return each segment's vector: its pooled states, through the head if there is one.

        Without a head the mean is taken.

        Args:
          tokens: int32 [rows, length].
          segment_ids: [rows, length]; None: a row is one segment, and the pad id padding.
          max_segments: number of segments to return, 1 .. max_segments. Missing ones give zeros
            before the head.

        Returns:
          float32 [rows, max_segments, config.sentence_size or d_model].

        Raises:
          ModelError: the model has neither an encoder nor a head.
        """
        if segment_ids is None:
            segment_ids = (tokens != self.config.pad_id).astype(tokens.dtype)
        states = self.text_states(tokens, segment_ids)
        if self.config.head is None:
            return mean_of_segments(states, segment_ids, max_segments)
        return self.head(states, segment_ids, max_segments)

    def text_states(self, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Return the states that `pool` pools.

        Takes int32 [rows, length] each; returns [rows, length, d_model] in the compute dtype.

        Raises:
          ModelError: the model has neither an encoder nor a head.
        """
        raise NotImplementedError

    def embed(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        *,
        max_segments: int | None = None,
    ) -> jax.Array:
        """Return `pool` scaled to unit length; without `max_segments`, [rows, size]."""
        pooled = self.pool(tokens, segment_ids, max_segments=max_segments or 1)
        pooled = scaled_to_unit_length(pooled)
        return pooled if max_segments else pooled[:, 0]
