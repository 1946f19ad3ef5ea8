"""Log-likelihood: how surprising is a document to a language model, token by token?

A document's NLL is the sum over its tokens of -log P(token | what the estimator lets the model
see), in nats. An encoder-decoder has no single such number, so every score set names its estimator:

    prefix   the tokens before in the encoder, the tokens at hand in the decoder; slid along
    span     the document with some spans masked in the encoder, the spans in the decoder; as many
             such masks as it takes to mask every token once (a pseudo-likelihood)
    causal   left to right: a decoder-only model, or a T5 decoder whose encoder reads only EOS

Choices
- Every token is scored exactly once, but the very first where nothing comes before it (prefix;
  causal without BOS). Long documents are cut into windows that overlap; the overlap is context.
- EOS is not scored: documents in a corpus have none, and sums over tokens stay comparable between
  estimators. Sentinels are not scored either.
- Sums are taken on the host in float64 from the model's float32 per token, so that they do not
  depend on how tokens were spread over rows.
- `span` suits a T5 pretrained by span corruption, whose decoder knows no other task; `prefix` one
  that was trained on prefix language modelling. The first model of that kind and the paper that
  used it (Sachdeva et al., arXiv 2402.09668) do not say how they computed perplexity.
- Masks are laid out in turn (span 0 to mask 0, span 1 to mask 1, ...), which spreads a mask's spans
  evenly: 7 masks of spans of 3 are close to the density of 0.15 that T5 was pretrained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from pruning.scorers import TOO_SHORT, Column, Documents, Prepared, ScoreError, Scores
from pruning.scoring.packing import Side, Windows, offsets_of, ranges, within

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.vocabulary import Vocabulary

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
      window: the most tokens that the model sees at once.
      overlap: how many of them are context, scored by a neighbouring window: in "prefix" the most
        that the encoder holds, in "causal" the first of a window, in "span" half on either side.
      span_length, masks: of "span".
      max_tokens: longer documents are cut; None scores them whole.
      token_nll: also keep every token's value.
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

    def prepare(self, model: Model, vocabulary: Vocabulary) -> Prepared:
        """Raises ScoreError where the model has no such likelihood, or the vocabulary too few
        sentinels."""
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
            sides=("encoder", "decoder") if model.config.family == "t5" else ("decoder",),
            longest=cutter.longest,
            answer_shape=(),
            windows=windows,
            step=step,
            finish=finish,
            summary={"estimator": self.estimator},
        )

    def _cutter(self, config: Any, vocabulary: Vocabulary) -> _Prefix | _Span | _Causal:
        if self.estimator == "causal":
            return _Causal(self.window, self.overlap, config)
        if config.family != "t5":
            raise ScoreError(
                f"the estimator {self.estimator!r} needs an encoder; this model has none: "
                'use "causal".'
            )
        if self.estimator == "prefix":
            return _Prefix(self.window, self.overlap, config)
        spans = -(-self.window // (self.span_length * self.masks))  # of one mask in one window
        if spans > vocabulary.extra_ids:
            raise ScoreError(
                f"a window of {self.window} tokens has {spans} spans of a mask, the vocabulary "
                f"{vocabulary.extra_ids} sentinels: give a shorter window, longer spans or more "
                "masks."
            )
        sentinels = np.array([vocabulary.sentinel(i) for i in range(spans)], np.int32)
        return _Span(self.window, self.overlap, self.span_length, self.masks, sentinels, config)

    def _sum(
        self, documents: Documents, lost: np.ndarray, windows: Windows, answers: np.ndarray
    ) -> Scores:
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


def token_nll(model: Model, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """-log P(decoder target) in nats at every decoder position, float32 [rows, length].

    Args:
      model, params: the language model.
      batch: int32 [rows, length] of each side: `decoder_input_tokens`, `decoder_target_tokens`,
        `decoder_segment_ids`, and with an encoder `encoder_input_tokens`, `encoder_segment_ids`.
    """
    from models.losses import token_log_likelihood

    module = model.bind(params)
    hidden = module.forward(batch)  # [rows, length, d_model]
    kernel, scale = module.output_embedding()
    return -token_log_likelihood(
        hidden,
        kernel,
        batch["decoder_target_tokens"],
        chunk=_chunk(),
        scale=scale,
        softcap=getattr(model.config, "logit_softcap", None),
    )


def _chunk() -> int:
    """How many tokens have their logits in memory at a time, over all devices.

    On a CPU those of 256 stay in its cache, which halves the time of the head in bfloat16. On a
    TPU fewer than some hundred a device leave its matrix units idle.
    """
    from models.partitioning import parts, platform

    return parts("batch") * (256 if platform() == "cpu" else 1024)


# --------------------------------------------------------------------------------------------------
# Documents into windows


@dataclasses.dataclass(frozen=True)
class _Pieces:
    """Parts of documents, as positions in their flat tokens; [pieces] each.

    Attributes:
      document: which document.
      start, stop: what the model sees.
      first, last: what is scored, the half-open range [first, last).
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray
    last: np.ndarray


def _slide(documents: Documents, window: int, before: int, after: int) -> _Pieces:
    """Cuts every document into windows of which the inner parts, laid end to end, are the document.

    The parts outside, `before` tokens in front and `after` behind, are another window's to score;
    a document's first window has nothing in front, its last nothing behind.
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
    """Decoder inputs: targets moved right by one in every window, the start id in front."""
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
    """Encoder: up to `overlap` tokens before. Decoder: the next `window - overlap`."""

    window: int
    overlap: int
    config: Any

    @property
    def longest(self) -> tuple[int, int]:
        return self.overlap, self.window - self.overlap

    def windows(self, documents: Documents) -> Windows:
        pieces = _slide(documents, self.window - self.overlap, 0, 0)
        begin = documents.offsets[pieces.document]
        # The first token of all is in the encoder only: nothing comes before it.
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
                    self.config.decoder_start_id,
                ),
            ),
            source,
        )


@dataclasses.dataclass(frozen=True)
class _Causal:
    """Windows of `window` tokens, the first `overlap` of each but the first being context."""

    window: int
    overlap: int
    config: Any

    @property
    def longest(self) -> tuple[int, ...]:
        return (1, self.window) if self.config.family == "t5" else (self.window,)

    def windows(self, documents: Documents) -> Windows:
        pieces = _slide(documents, self.window, self.overlap, 0)
        start, stop, first = pieces.start, pieces.stop, pieces.first
        t5 = self.config.family == "t5"
        start_id = self.config.decoder_start_id if t5 else self.config.bos_id
        if start_id is None:  # the first token of a window is input only
            first = np.maximum(first, start + 1)
            some = np.flatnonzero(first < stop)
            pieces = dataclasses.replace(pieces, document=pieces.document[some])
            start, stop, first = start[some], stop[some], first[some]
            inputs = ranges(start, stop - start - 1)
            targets = inputs + 1
            offsets = offsets_of(stop - start - 1)
            features = {
                "decoder_input_tokens": documents.tokens[inputs].astype(np.int32),
                "decoder_target_tokens": documents.tokens[targets].astype(np.int32),
            }
            decoder = Side("decoder", offsets, features)
        else:
            targets = ranges(start, stop - start)
            decoder = _decoder(offsets_of(stop - start), documents.tokens[targets], start_id)
        source = np.where(targets >= np.repeat(first, decoder.lengths), targets, -1)
        if not t5:
            return Windows(pieces.document, (decoder,), source)
        eos = np.full(len(start), self.config.eos_id, np.int32)
        encoder = Side("encoder", np.arange(len(start) + 1), {"encoder_input_tokens": eos})
        return Windows(pieces.document, (encoder, decoder), source)


_BLOCK = 1 << 18  # tokens laid out at a time: bounds the temporary arrays


@dataclasses.dataclass(frozen=True)
class _Span:
    """As many windows per piece as there are masks, each with its share of the spans masked.

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
        # A sentinel takes the place of at least one token; EOS comes on top.
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
                _decoder(offsets_of(target_lengths), targets, self.config.decoder_start_id),
            ),
            source,
        )

    def _lay_out(
        self, documents: Documents, pieces: _Pieces, block: np.ndarray
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """The windows of some pieces, one mask after the other.

        Yields the pieces that have this mask, their encoder tokens and lengths, decoder targets and
        lengths, and the targets' sources.
        """
        # What is the same for all masks is worked out once: a place per token, and one for EOS
        # behind every piece.
        lengths = pieces.stop[block] - pieces.start[block] + 1
        at = ranges(pieces.start[block], lengths)  # in the documents' tokens
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

            # Encoder: a masked span is its sentinel alone.
            kept = ~masked
            kept[opening] = True
            covered = tokens[opening]
            tokens[opening] = sentinels
            has = spans > number
            encoder = tokens[kept if has.all() else kept & has[piece]]
            tokens[opening] = covered
            masked_lengths = np.bincount(piece[places], minlength=len(block))
            opening_lengths = np.bincount(piece[opening], minlength=len(block))

            # Decoder: every masked span, its sentinel in front.
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
