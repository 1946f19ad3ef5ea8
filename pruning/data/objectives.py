"""Objectives: inputs and targets of a model from a chunk of text.

    chunk        Thank you for inviting me to your party last week
    span         inputs   Thank you <X> me to your party <Y> week </s>
                 targets  <X> for inviting <Y> last </s>
    prefix LM    inputs   Thank you for </s>
                 targets  inviting me to your party last week </s>
    causal LM    targets  Thank you for inviting me to your party last week

(<X> is `<extra_id_0>`, the last id of the vocabulary; sentinels count down from there.)

Choices
- An example is a pure function of (chunk, seed, i). Its random numbers are hashes of (seed, i,
  place in the chunk), computed by NumPy for a whole batch at once. A generator per example would
  cost more than everything else.
- Chunks of one length go through together: under span corruption they all have the same numbers of
  noise tokens and of spans, so every step is one operation on a matrix.
- Span corruption is exactly T5's (Raffel et al. 2020, section 3.1.4, and its code): rounding in
  float32, half to even; a chunk begins with text and ends with noise; uniformly random span lengths
  given their number and sum; no last sentinel after the targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from pruning.corpus.tokenizers import Tokenizer
from pruning.corpus.vocabulary import PAD_ID
from pruning.store import randomness
from pruning.store.randomness import Stream

# Streams of random numbers.
_PLACES = 1 << 20  # (i, place) is hashed as i * 2^20 + place

Example = dict[str, np.ndarray]
"""Feature -> int32 [length], without padding: "inputs" and "targets", or "targets" alone."""


class ObjectiveError(ValueError):
    """Lengths and objective do not fit together."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Interface of objectives.

    Attributes:
      separates: an EOS follows every document within a chunk.
    """

    separates: ClassVar[bool] = False

    def chunk_length(self, input_length: int, target_length: int, vocabulary: Tokenizer) -> int:
        """Return the number of tokens of a chunk whose example fills and never exceeds the lengths.

        Raises:
          ObjectiveError: the lengths do not fit; the message gives lengths that would.
        """
        raise NotImplementedError

    def examples(
        self, chunks: np.ndarray, seed: int, indices: np.ndarray, vocabulary: Tokenizer
    ) -> list[Example]:
        """Build n examples from n chunks of one length.

        Args:
          chunks: integers [n, length].
          seed: of the stream.
          indices: int64 [n], the numbers of the examples in the stream.
          vocabulary: whose sentinels are used.
        """
        raise NotImplementedError

    def batch(
        self,
        examples: Sequence[Example],
        input_length: int,
        target_length: int,
        vocabulary: Tokenizer,
    ) -> dict[str, np.ndarray]:
        """Pad examples to the features of an encoder-decoder, [examples, length] each."""
        inputs, _ = _pad([example["inputs"] for example in examples], input_length)
        targets, is_token = _pad([example["targets"] for example in examples], target_length)
        return {
            "encoder_input_tokens": inputs,
            "decoder_input_tokens": _shift_right(targets, PAD_ID),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": is_token.astype(np.float32),
        }


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Objective):
    """T5's pretraining: spans of noise are replaced by sentinels, and the targets hold the spans.

    With 512 input tokens a chunk has 568 tokens: 483 of text and 85 of noise in 28 spans, so
    483 + 28 + 1 inputs and 85 + 28 + 1 = 114 targets.

    Attributes:
      noise_density: share of the tokens that is noise.
      mean_span: mean length of a span of noise.
    """

    noise_density: float = 0.15
    mean_span: float = 3.0

    def __post_init__(self) -> None:
        if not (0 < self.noise_density < 1 and self.mean_span >= 1):
            raise ObjectiveError(
                f"noise_density must lie between 0 and 1 and mean_span be 1 or more: {self}."
            )

    def noise(self, length: int) -> tuple[int, int]:
        """Return the numbers of noise tokens and noise spans of a chunk."""
        length = max(length, 2)
        tokens = int(np.rint(np.float32(length) * np.float32(self.noise_density)))
        tokens = min(max(tokens, 1), length - 1)
        spans = max(int(np.rint(np.float32(tokens) / np.float32(self.mean_span))), 1)
        return tokens, min(spans, length - tokens)  # T5 fails where text is scarcer than spans

    def chunk_length(self, input_length: int, target_length: int, vocabulary: Tokenizer) -> int:
        def lengths(chunk: int) -> tuple[int, int]:
            tokens, spans = self.noise(chunk)
            return chunk - tokens + spans + 1, tokens + spans + 1

        chunk = max(input_length - 1, 1)
        while lengths(chunk + 1)[0] <= input_length:
            chunk += 1
        inputs, targets = lengths(chunk)
        if self.noise_density == 0.5 and targets > inputs:  # as T5: equal lengths where it can be
            chunk -= 1
            inputs, targets = lengths(chunk)
        if inputs > input_length or targets > target_length:
            raise ObjectiveError(
                f"chunks of {chunk} tokens give {inputs} inputs and {targets} targets, more than "
                f"{input_length} and {target_length}: raise target_length to {targets}, or lower "
                "input_length."
            )
        spans = self.noise(chunk)[1]
        if spans > vocabulary.num_sentinels:
            raise ObjectiveError(
                f"chunks of {chunk} tokens have {spans} spans of noise, the vocabulary has "
                f"{vocabulary.num_sentinels} sentinels: raise SpanCorruption.mean_span or lower "
                "input_length."
            )
        return chunk

    def examples(
        self, chunks: np.ndarray, seed: int, indices: np.ndarray, vocabulary: Tokenizer
    ) -> list[Example]:
        rows, length = chunks.shape
        end = end_id(vocabulary)
        is_noise = self.noise_mask(length, seed, indices)  # [rows, length]
        follows_noise = np.zeros_like(is_noise)
        follows_noise[:, 1:] = is_noise[:, :-1]
        follows_text = ~follows_noise
        follows_text[:, 0] = False

        def replaced(mask: np.ndarray, follows: np.ndarray) -> np.ndarray:
            """Return the chunks with runs of `mask` as sentinels, and EOS: int32 [rows, length]."""
            first = mask & ~follows
            spans = np.cumsum(first, axis=1)
            sentinels = [vocabulary.sentinel(i) for i in range(max(int(spans.max()), 1))]
            sentinel = np.array(sentinels, np.int32)[np.maximum(spans - 1, 0)]
            kept = np.where(first, sentinel, chunks)[~(mask & follows)]
            kept = kept.reshape(rows, -1)  # as many in every row
            return np.pad(kept, ((0, 0), (0, 1)), constant_values=end).astype(np.int32)

        inputs, targets = replaced(is_noise, follows_noise), replaced(~is_noise, follows_text)
        return [{"inputs": inputs[i], "targets": targets[i]} for i in range(rows)]

    def noise_mask(self, length: int, seed: int, indices: np.ndarray) -> np.ndarray:
        """Return a noise mask, bool [examples, length]; all such masks are equally likely."""
        tokens, spans = self.noise(length)
        text = max(length, 2) - tokens
        lengths = np.empty((len(indices), spans, 2), np.int64)
        lengths[..., 0] = _random_parts(text, spans, seed, indices, Stream.TEXT_LENGTHS)
        lengths[..., 1] = _random_parts(tokens, spans, seed, indices, Stream.NOISE_LENGTHS)
        starts = np.cumsum(lengths.reshape(len(indices), -1), axis=1)[
            :, :-1
        ]  # of all but the first
        changes = np.zeros((len(indices), max(length, 2)), np.int8)
        np.put_along_axis(changes, starts, 1, axis=1)
        return np.bitwise_xor.accumulate(changes, axis=1).astype(bool)[:, :length]


def _random_parts(
    total: int, parts: int, seed: int, indices: np.ndarray, stream: Stream
) -> np.ndarray:
    """Divide `total` into positive parts, uniformly over all such divisions.

    A division is a choice of `parts` - 1 of the `total` - 1 places between items: those with the
    lowest random numbers.

    Returns:
      int64 [examples, parts].
    """
    ends = np.full((len(indices), parts + 1), total, np.int64)
    ends[:, 0] = 0
    if parts > 1:
        places = indices[:, None] * _PLACES + np.arange(total - 1)
        draws = randomness.hashed(stream, seed, places)
        highest = np.partition(draws, parts - 2, axis=1)[:, parts - 2 : parts - 1]
        ends[:, 1:-1] = np.nonzero(draws <= highest)[1].reshape(len(indices), -1) + 1
    return np.diff(ends, axis=1)


@dataclasses.dataclass(frozen=True)
class PrefixLM(Objective):
    """Prefix language modeling: a chunk is split at a random place (Raffel et al. 2020)."""

    def chunk_length(self, input_length: int, target_length: int, vocabulary: Tokenizer) -> int:
        chunk = min(input_length, target_length)  # the longer part has a token less, and EOS
        if chunk < 2:
            raise ObjectiveError("a prefix LM wants input_length and target_length of 2 or more.")
        return chunk

    def examples(
        self, chunks: np.ndarray, seed: int, indices: np.ndarray, vocabulary: Tokenizer
    ) -> list[Example]:
        splits, end = chunks.shape[1] - 1, end_id(vocabulary)
        draws = randomness.uniform(Stream.PREFIX_LENGTH, seed, indices)
        prefix = np.minimum(1 + (draws * splits).astype(np.int64), splits)  # in [1, length)
        return [
            {
                "inputs": np.append(chunk[:split], end).astype(np.int32),
                "targets": np.append(chunk[split:], end).astype(np.int32),
            }
            for chunk, split in zip(chunks, prefix, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Causal language modeling, for decoder-only models. EOS separates documents.

    The decoder reads the targets shifted to the right, beginning with the tokenizer's start id: 0
    (padding) of T5's vocabularies, else BOS or, without one, EOS.

    Attributes:
      segments: documents within a chunk do not see one another; positions count from each one's
        start.
    """

    separates: ClassVar[bool] = True

    segments: bool = False

    def chunk_length(self, input_length: int, target_length: int, vocabulary: Tokenizer) -> int:
        return target_length

    def examples(
        self, chunks: np.ndarray, seed: int, indices: np.ndarray, vocabulary: Tokenizer
    ) -> list[Example]:
        return [{"targets": chunk.astype(np.int32)} for chunk in chunks]

    def batch(
        self,
        examples: Sequence[Example],
        input_length: int,
        target_length: int,
        vocabulary: Tokenizer,
    ) -> dict[str, np.ndarray]:
        """Pad examples to the features of a decoder, [examples, target_length] each."""
        targets, is_token = _pad([example["targets"] for example in examples], target_length)
        start = vocabulary.start_id
        starts = np.zeros_like(is_token)
        starts[:, 0] = True
        if self.segments:
            starts[:, 1:] = targets[:, :-1] == vocabulary.eos_id
        segment_ids = np.cumsum(starts, axis=1, dtype=np.int32) * is_token
        places = np.arange(target_length, dtype=np.int32)
        begun = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        return {
            "decoder_input_tokens": np.where(starts, start, _shift_right(targets, start)),
            "decoder_target_tokens": targets,
            "decoder_loss_weights": is_token.astype(np.float32),
            "decoder_segment_ids": segment_ids,
            "decoder_positions": (places - begun) * is_token,
        }


CONFIGURABLES: dict[str, type] = {
    "SpanCorruption": SpanCorruption,
    "PrefixLM": PrefixLM,
    "CausalLM": CausalLM,
}


def end_id(vocabulary: Tokenizer) -> int:
    """Return the id that ends a text.

    Raises:
      ObjectiveError: the tokenizer names no EOS.
    """
    if vocabulary.eos_id is None:
        raise ObjectiveError("this tokenizer names no EOS, with which documents are divided.")
    return vocabulary.eos_id


def _pad(rows: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows padded with id 0, int32 [rows, length], and where they hold tokens, bool.

    NOTE: tokens are told from padding by their place, because 0 is a word in some tokenizers.
    """
    padded = np.full((len(rows), length), PAD_ID, np.int32)
    is_token = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        is_token[i, : len(row)] = True
    return padded, is_token


def _shift_right(targets: np.ndarray, start: int) -> np.ndarray:
    """Return the decoder's inputs: the start id, then all targets but the last."""
    shifted = np.full_like(targets, start)
    shifted[:, 1:] = targets[:, :-1]
    return shifted
