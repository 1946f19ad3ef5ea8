"""Log-likelihood of documents under a language model, token by token.

A document's NLL is the sum over its tokens of -log P(token | context of the estimator), in nats.
For an encoder-decoder there is no single such number, so every score set names its estimator:

    prefix   preceding tokens in the encoder, the scored tokens in the decoder; a sliding window
    span     the document with some spans masked in the encoder, the spans in the decoder; as many
             such masks as it takes to mask every token once (a pseudo-likelihood)
    causal   left to right: a decoder-only model, or a T5 decoder whose encoder reads only EOS

Choices
- Every token is scored exactly once. The first token is predicted from the model's start id
  (`start_id`), except in "prefix", where the encoder needs an input. Long documents are cut into
  windows that overlap; the overlap is context.
- EOS is not scored: documents in a corpus have none, and sums over tokens stay comparable between
  estimators. Sentinels are not scored either.
- Sums are computed on the host in float64 from the model's float32 per token, so that they do not
  depend on the packing.
- `span` is for a T5 pretrained by span corruption, whose decoder was trained for no other task;
  `prefix` for one that was trained on prefix language modeling. The first model of that kind and
  the paper that used it (Sachdeva et al., arXiv 2402.09668) do not say how they computed
  perplexity.
- Spans are assigned to masks in turn (span 0 to mask 0, span 1 to mask 1, ...), which spreads a
  mask's spans evenly. 7 masks of spans of 3 are close to T5's pretraining density of 0.15.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from models.packing import Side, Windows, offsets_of, ranges, within
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scores, require_predictions
from pruning.scores.score_set import TOO_SHORT, Column

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.corpus.tokenizers import Tokenizer

COLUMNS = {
    "nll": Column(pa.float32(), "sum of -log P(token) over the scored tokens, in nats"),
    "n_scored_tokens": Column(pa.int32(), "how many tokens the sum is over"),
    "truncated_tokens": Column(pa.int32(), "tokens at the document's end beyond max_tokens"),
}
TOKEN_NLL = Column(
    pa.list_(pa.float16()), "-log P of every token that was not cut; null where it was not scored"
)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Settings of the log-likelihood scorer.

    Attributes:
      estimator: "prefix", "span" or "causal".
      window: largest number of tokens that the model reads at once.
      overlap: number of these that are context and scored by a neighboring window: in "prefix" the
        largest number in the encoder, in "causal" the first of a window, in "span" half on either
        side.
      span_length, masks: length of spans and number of masks of "span".
      max_tokens: longer documents are truncated; None scores them whole.
      token_nll: store every token's value as well.
    """

    estimator: Literal["prefix", "span", "causal"]
    window: int = 512
    overlap: int = 128
    span_length: int = 3
    masks: int = 7
    max_tokens: int | None = None
    token_nll: bool = False

    def __post_init__(self):
        if not 0 < self.overlap < self.window:
            raise ValueError(f"overlap={self.overlap} must be in 1 .. window={self.window} - 1.")
        if self.span_length < 1 or self.masks < 2:
            raise ValueError(
                f"span_length={self.span_length} must be at least 1, masks={self.masks} at least 2."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be positive, or None.")

    def prepare(self, model: Model, vocabulary: Tokenizer) -> Prepared:
        """Raise ScoreError if the model has no such likelihood, or the vocabulary too few
        sentinels."""
        require_predictions(model.config, "Likelihood")
        cutter = self._cutter(model.config, vocabulary)

        def windows(documents: Documents) -> Windows:
            return cutter.windows(documents.cut(self.max_tokens)[0])

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            return token_nll(model, params, batch)

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            return self._sum(*documents.cut(self.max_tokens), windows, answers)

        return Prepared(
            name="likelihood",
            columns=COLUMNS | ({"token_nll": TOKEN_NLL} if self.token_nll else {}),
            sides=("encoder", "decoder") if model.config.has_encoder else ("decoder",),
            longest=cutter.longest,
            answer_shape=(),
            windows=windows,
            step=step,
            finish=finish,
            summary={"estimator": self.estimator},
        )

    def _cutter(self, config: Any, vocabulary: Tokenizer) -> _Prefix | _Span | _Causal:
        if self.estimator == "causal":
            return _Causal(self.window, self.overlap, config, start_id(config, vocabulary))
        if not config.has_encoder:
            raise ScoreError(
                f"the estimator {self.estimator!r} needs an encoder; this model has none: "
                'use "causal".'
            )
        if self.estimator == "prefix":
            return _Prefix(self.window, self.overlap, config)
        spans = -(-self.window // (self.span_length * self.masks))  # spans per mask and window
        if spans > vocabulary.num_sentinels:
            raise ScoreError(
                f"a window of {self.window} tokens has {spans} spans of a mask, the vocabulary "
                f"{vocabulary.num_sentinels} sentinels: give a shorter window, longer spans or "
                "more masks."
            )
        sentinels = np.array([vocabulary.sentinel(i) for i in range(spans)], np.int32)
        return _Span(self.window, self.overlap, self.span_length, self.masks, sentinels, config)

    def _sum(
        self, documents: Documents, lost: np.ndarray, windows: Windows, answers: np.ndarray
    ) -> Scores:
        assert windows.source is not None  # the windows were made by `_cutter`
        scored = windows.source >= 0
        nll = np.zeros(len(documents.tokens), np.float64)
        nll[windows.source[scored]] = answers[scored]
        is_scored = np.zeros(len(documents.tokens), bool)
        is_scored[windows.source[scored]] = True
        owner = np.repeat(np.arange(len(documents)), documents.lengths)
        count = np.bincount(owner[is_scored], minlength=len(documents))
        columns: dict[str, Any] = {
            "nll": np.bincount(owner, nll, minlength=len(documents)).astype(np.float32),
            "n_scored_tokens": count.astype(np.int32),
            "truncated_tokens": lost.astype(np.int32),
        }
        if self.token_nll:
            values = pa.array(nll.astype(np.float16), mask=~is_scored)
            columns["token_nll"] = pa.ListArray.from_arrays(
                documents.offsets.astype(np.int32), values
            )
        return Scores(columns, {TOO_SHORT: (documents.lengths > 0) & (count == 0)})


def start_id(config: Any, tokenizer: Tokenizer) -> int:
    """Return the id after which a model was trained to predict the first token of a text.

    This is an encoder-decoder's start id, or a decoder-only model's BOS. If its configuration has
    none, it is the tokenizer's: padding for models that are trained here on T5's vocabularies,
    otherwise BOS or EOS.
    """
    return tokenizer.start_id if config.start_id is None else config.start_id


def token_nll(model: Model, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Return -log P(decoder target) in nats at every position, float32 [rows, length].

    Args:
      model, params: the language model.
      batch: int32 [rows, length] of each side: `decoder_input_tokens`, `decoder_target_tokens`,
        `decoder_segment_ids`, and with an encoder `encoder_input_tokens`, `encoder_segment_ids`.
    """
    from models.losses import token_log_likelihood

    module = model.bind(params)
    hidden = module.forward(batch)  # [rows, length, d_model]
    return -token_log_likelihood(
        hidden, module.output_head(), batch["decoder_target_tokens"], chunk=_chunk()
    )


def _chunk() -> int:
    """Return the number of tokens whose logits are in memory at a time, over all devices.

    On a CPU the logits of 256 tokens fit into its cache, which halves the time of the head in
    bfloat16. On a TPU less than a few hundred tokens per device leave its matrix units idle.
    """
    from models.partitioning import parts, platform

    return parts("batch") * (256 if platform() == "cpu" else 1024)


# --------------------------------------------------------------------------------------------------
# Documents into windows


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Parts of documents, as positions in their flat tokens; [pieces] each.

    Attributes:
      document: index of the document.
      start, stop: range that the model reads.
      first, last: range that is scored, half-open: [first, last).
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _slide(documents: Documents, window: int, before: int, after: int) -> _Pieces:
    """Cut every document into windows whose scored parts, concatenated, are the document.

    The context, `before` tokens in front and `after` behind, is scored by other windows. A
    document's first window has no context in front, its last none behind.
    """
    stride = window - before - after
    lengths = documents.lengths
    count = np.where(lengths > 0, 1 + np.maximum(-((window - lengths) // stride), 0), 0)
    document = np.repeat(np.arange(len(documents)), count)
    index = within(count)
    begin = documents.offsets[document]
    end = documents.offsets[document + 1]
    start = begin + index * stride
    stop = np.minimum(start + window, end)
    is_last = index == count[document] - 1
    return _Pieces(
        document,
        start,
        stop,
        first=np.where(index == 0, start, start + before),
        last=np.where(is_last, stop, stop - after),
    )


def _shifted(targets: np.ndarray, offsets: np.ndarray, start_id: int) -> np.ndarray:
    """Return the decoder's side: targets shifted right in every window, after the start id."""
    inputs = np.empty_like(targets)
    inputs[1:] = targets[:-1]
    inputs[offsets[:-1]] = start_id
    return inputs


def _decoder(offsets: np.ndarray, targets: np.ndarray, start_id: int) -> Side:
    targets = targets.astype(np.int32)
    inputs = _shifted(targets, offsets, start_id)
    features = {"decoder_input_tokens": inputs, "decoder_target_tokens": targets}
    return Side("decoder", offsets, features)


@dataclasses.dataclass(frozen=True)
class _Prefix:
    """Windows of up to `overlap` encoder tokens, and the next `window - overlap` in the decoder."""

    window: int
    overlap: int
    config: Any

    @property
    def longest(self) -> tuple[int, int]:
        return self.overlap, self.window - self.overlap

    def windows(self, documents: Documents) -> Windows:
        pieces = _slide(documents, self.window - self.overlap, 0, 0)
        begin = documents.offsets[pieces.document]
        # The document's first token is in the encoder only, because nothing precedes it.
        first = np.maximum(pieces.first, begin + 1)
        some = np.flatnonzero(first < pieces.last)
        first, last, begin = first[some], pieces.last[some], begin[some]
        start = np.maximum(begin, first - self.overlap)
        offsets = offsets_of(first - start)
        context = documents.tokens[ranges(start, first - start)].astype(np.int32)
        source = ranges(first, last - first)
        return Windows(
            pieces.document[some],
            (
                Side("encoder", offsets, {"encoder_input_tokens": context}),
                _decoder(
                    offsets_of(last - first),
                    documents.tokens[source],
                    self.config.start_id,
                ),
            ),
            source,
        )


@dataclasses.dataclass(frozen=True)
class _Causal:
    """Windows of `window` tokens, of which the first `overlap` are context, except in the first."""

    window: int
    overlap: int
    config: Any
    start: int

    @property
    def longest(self) -> tuple[int, ...]:
        return (1, self.window) if self.config.has_encoder else (self.window,)

    def windows(self, documents: Documents) -> Windows:
        pieces = _slide(documents, self.window, self.overlap, 0)
        start, stop, first = pieces.start, pieces.stop, pieces.first
        targets = ranges(start, stop - start)
        decoder = _decoder(offsets_of(stop - start), documents.tokens[targets], self.start)
        source = np.where(targets >= np.repeat(first, decoder.lengths), targets, -1)
        if not self.config.has_encoder:
            return Windows(pieces.document, (decoder,), source)
        eos = np.full(len(start), self.config.eos_id, np.int32)
        encoder = Side("encoder", np.arange(len(start) + 1), {"encoder_input_tokens": eos})
        return Windows(pieces.document, (encoder, decoder), source)


_BLOCK = 1 << 18  # tokens laid out at a time: bounds the temporary arrays


@dataclasses.dataclass(frozen=True)
class _Span:
    """Windows of masked pieces: one window per mask, each with its share of the spans masked.

    tokens   a b c d e f g h i, spans of 2, masks of 2
    mask 0   encoder  <0> c d <1> g h <2> EOS     decoder  <0> a b <1> e f <2> i
    mask 1   encoder  a b <0> e f <1> i EOS       decoder  <0> c d <1> g h
    """

    window: int
    overlap: int
    span_length: int
    masks: int
    sentinels: np.ndarray
    config: Any

    @property
    def longest(self) -> tuple[int, int]:
        # A sentinel replaces at least one token; EOS is added.
        return self.window + 1, len(self.sentinels) * (self.span_length + 1)

    def windows(self, documents: Documents) -> Windows:
        before = self.overlap // 2
        pieces = _slide(documents, self.window, before, self.overlap - before)
        ends = np.cumsum(pieces.stop - pieces.start)
        cuts = np.searchsorted(ends, np.arange(_BLOCK, ends[-1:].sum(), _BLOCK))
        laid_out = [
            one
            for block in np.split(np.arange(len(ends)), cuts)
            for one in self._lay_out(documents, pieces, block)
        ]
        piece, encoder, encoder_lengths, targets, target_lengths, source = (
            np.concatenate(parts) for parts in zip(*laid_out, strict=True)
        )
        return Windows(
            pieces.document[piece],
            (
                Side("encoder", offsets_of(encoder_lengths), {"encoder_input_tokens": encoder}),
                _decoder(offsets_of(target_lengths), targets, self.config.start_id),
            ),
            source,
        )

    def _lay_out(
        self, documents: Documents, pieces: _Pieces, block: np.ndarray
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield the windows of some pieces, one mask after the other.

        Yields the pieces that have this mask, their encoder tokens and lengths, decoder targets and
        lengths, and the targets' sources.
        """
        # Arrays that are the same for all masks are computed once, with one entry per token, and
        # one for EOS after every piece.
        lengths = pieces.stop[block] - pieces.start[block] + 1
        at = ranges(pieces.start[block], lengths)  # indices into the documents' tokens
        piece = np.repeat(np.arange(len(block)), lengths)
        offset = (at - pieces.first[block][piece]).astype(np.int32)  # from the first scored token
        scored = (offset >= 0) & (at < pieces.last[block][piece])
        span = offset // np.int32(self.span_length)
        begins = offset == span * np.int32(self.span_length)
        mask = np.where(scored, span % np.int32(self.masks), -1).astype(np.int32)
        tokens = documents.tokens[np.minimum(at, len(documents.tokens) - 1)].astype(np.int32)
        tokens[np.cumsum(lengths) - 1] = self.config.eos_id
        spans = -(-(pieces.last[block] - pieces.first[block]) // self.span_length)

        for number in range(self.masks):
            masked = mask == number
            places = np.flatnonzero(masked)
            opens = begins[places]
            opening = places[opens]
            sentinels = self.sentinels[span[opening] // self.masks]

            # Encoder: a masked span is replaced by its sentinel.
            kept = ~masked
            kept[opening] = True
            covered = tokens[opening]
            tokens[opening] = sentinels
            has = spans > number
            encoder = tokens[kept if has.all() else kept & has[piece]]
            tokens[opening] = covered
            masked_lengths = np.bincount(piece[places], minlength=len(block))
            opening_lengths = np.bincount(piece[opening], minlength=len(block))

            # Decoder: every masked span, preceded by its sentinel.
            entry = np.repeat(places, 1 + opens)
            is_sentinel = np.zeros(len(entry), bool)
            is_sentinel[np.flatnonzero(opens) + np.arange(len(opening))] = True
            targets = tokens[entry]
            targets[is_sentinel] = sentinels
            yield (
                block[has],
                encoder,
                (lengths - masked_lengths + opening_lengths)[has],
                targets,
                (masked_lengths + opening_lengths)[has],
                np.where(is_sentinel, -1, at[entry]),
            )
