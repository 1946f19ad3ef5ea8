"""Generation of text: greedy, sampled, or by beam search, with a cache of keys and values.

    found = generate(model, params, tokens, max_new_tokens=64)                        # greedy
    found = generate(model, params, tokens, max_new_tokens=64, how=Sample(top_p=0.9), key=key)
    found = generate(model, params, tokens, max_new_tokens=64, how=Beam(beams=4))

Choices
- There is one compiled program for each (model, method, shape): encode or prefill, then a
  `while_loop` that ends when every row has ended. Other tokens, lengths or keys compile nothing.
- The loop sees any model as a start token for each row and a function from the rows' last tokens to
  the logits of the next (`LanguageModel.start_decoding`). An encoder-decoder starts from its start
  id, a decoder-only model from the last token of the prompt after reading the others.
- Prompts are ragged on the right. Generated tokens stand behind the longest prompt in the cache, at
  one slot for all rows, so that a step writes one slice; positions and masks differ by row.
- A cache is [layers, rows, slots, kv_heads, head_dim] in the compute dtype. A step reads it and
  adds one slot; the loop updates it in place.
- Keys and values of the encoder are computed once. The beams of a row share them: they are queries
  of one attention, so that its keys are not copied.
- A row's tokens do not depend on the other rows, sampled tokens included.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention import KeyValues
from models.errors import ModelError
from models.language_model import Decoding
from models.model import Model, Params

_NEVER = -1e9  # a score that no sequence has; finite, so that differences of two are not NaN

Pick = Callable[[jax.Array, jax.Array], jax.Array]  # float32 [rows, vocab] and step -> tokens


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Settings of greedy search: the likeliest token at every step."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Settings of sampling from softmax(logits / temperature), truncated to likely tokens.

    Attributes:
        top_k: number of likeliest tokens that are kept; 0 keeps all.
        top_p: of those, the likeliest that together reach this probability are kept.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ModelError(f"temperature={self.temperature} must be positive; see Greedy")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ModelError(f"top_p={self.top_p} is not in (0, 1], or top_k={self.top_k} negative")


@dataclasses.dataclass(frozen=True)
class Beam:
    """Settings of beam search with `beams` unfinished sequences, as in transformers.

    A finished sequence's score is its log-likelihood / (number of tokens, the end of text included)
    ** length_penalty; positive penalties favor long sequences.

    Attributes:
        keep: number of finished sequences to return for each row, at most `beams`.
        early_stopping: when a row that has `beams` finished sequences stops. True: at once. False:
            when its best unfinished sequence, ended now, would not beat the worst finished one.
            "never": when it could not at any length up to the maximum.
    """

    beams: int = 4
    length_penalty: float = 1.0
    keep: int = 1
    early_stopping: bool | str = False

    def __post_init__(self) -> None:
        if not 1 <= self.keep <= self.beams:
            raise ModelError(f"keep={self.keep} must be between 1 and beams={self.beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ModelError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")


class Generated(NamedTuple):
    """The result of `generate`. With `Beam` there is an axis [keep] after [batch], best first.

    Attributes:
        tokens: int32 [batch, max_new_tokens], up to the end of text and filled with the pad id.
        lengths: int32 [batch]: tokens up to and including the end of text.
        scores: float32 [batch]: natural-log likelihood of the tokens under the model; for `Beam`
            the score that ranks them.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


def generate(
    model: Model,
    params: Params,
    tokens: jax.Array,
    *,
    max_new_tokens: int,
    lengths: jax.Array | None = None,
    how: Greedy | Sample | Beam = Greedy(),
    key: jax.Array | None = None,
    eos_ids: Sequence[int] | None = None,
) -> Generated:
    """Generate at most `max_new_tokens` tokens for each row.

    Args:
        params: float32 or bfloat16, sharded or not.
        tokens: int32 [batch, length]: the encoder's input, or prompts of at least one token, padded
            on the right.
        lengths: int32 [batch], tokens of each row. None: an encoder's input ends at its padding,
            and a prompt fills its row, since the pad id may be one of its tokens.
        key: for `Sample`; the same key gives the same tokens.
        eos_ids: tokens that end a text; by default the configuration's `eos_id`.

    Raises:
        ValueError: an encoder without a decoder, `Sample` without a key, or more tokens than the
            model has positions.
    """
    config = model.config
    if not config.has_decoder:
        raise ModelError("the model has an encoder only: it cannot generate")
    prompt = 0 if config.has_encoder else tokens.shape[1]  # tokens in the decoder
    positions = config.max_positions
    if positions is not None and prompt + max_new_tokens > positions + 1:
        raise ModelError(
            f"prompts of {prompt} and {max_new_tokens} new tokens exceed the model's "
            f"{positions} positions"
        )
    if isinstance(how, Sample) != (key is not None):
        raise ModelError("Sample needs a key, and only Sample takes one")
    ends = (config.eos_id,) if eos_ids is None else tuple(eos_ids)
    return _generate(model, how, max_new_tokens, ends, params, jnp.asarray(tokens), lengths, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    model: Model,
    how: Greedy | Sample | Beam,
    steps: int,
    ends: tuple[int, ...],
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array | None,
    key: jax.Array | None,
) -> Generated:
    module = model.bind(params)
    beams = how.beams if isinstance(how, Beam) else 1
    decoding = module.start_decoding(tokens, lengths, beams=beams, steps=steps)
    end_ids, pad = jnp.asarray(ends), model.config.pad_id
    if isinstance(how, Beam):
        return _search(how, decoding, steps, end_ids, pad)
    pick: Pick = _likeliest
    if isinstance(how, Sample) and key is not None:
        pick = functools.partial(_draw, how, key)
    return _follow(pick, decoding, steps, end_ids, pad)


# --------------------------------------------------------------------------------------------------
# One sequence a row


def _follow(pick: Pick, decoding: Decoding, steps: int, ends: jax.Array, pad: int) -> Generated:
    """Extend every row by the token that `pick(logits, step)` returns, until all have ended."""
    rows = decoding.start.shape[0]

    def unfinished(state: tuple) -> jax.Array:
        step, _, _, _, ended, _ = state
        return (step < steps) & ~jnp.all(ended)

    def extend(state: tuple) -> tuple:
        step, token, tokens, scores, ended, cache = state
        logits, cache = decoding.step(token, step, cache)
        token = pick(logits, step).astype(jnp.int32)
        gained = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        scores = scores + jnp.where(ended, 0.0, gained)
        token = jnp.where(ended, pad, token)
        tokens = tokens.at[:, step].set(token)
        return step + 1, token, tokens, scores, ended | jnp.isin(token, ends), cache

    tokens = jnp.full((rows, steps), pad, jnp.int32)
    ended = jnp.zeros(rows, bool)
    state = (jnp.int32(0), decoding.start, tokens, jnp.zeros(rows), ended, decoding.cache)
    _, _, tokens, scores, _, _ = jax.lax.while_loop(unfinished, extend, state)
    return Generated(tokens, _lengths(tokens, ends), scores)


def _likeliest(logits: jax.Array, step: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1)


def _draw(how: Sample, key: jax.Array, logits: jax.Array, step: jax.Array) -> jax.Array:
    """Draw a token for each row; its noise depends on the key, the step and the row's index."""
    logits = logits / how.temperature
    ordered = -jnp.sort(-logits, axis=-1)  # [rows, vocab], likeliest first
    kept = jnp.ones(ordered.shape, bool)
    if how.top_k:
        kept &= jnp.arange(ordered.shape[-1]) < how.top_k
    if how.top_p < 1.0:
        probability = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf))
        # A token stays while those before it have not reached top_p; the first always stays.
        kept &= jnp.cumsum(probability, axis=-1) - probability < how.top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, step)))(
        jnp.arange(logits.shape[0])
    )
    return jax.vmap(jax.random.categorical)(keys, logits)


# --------------------------------------------------------------------------------------------------
# Beam search


class _Beams(NamedTuple):
    """State of a beam search."""

    step: jax.Array
    alive: jax.Array  # [batch, beams, steps] tokens of the unfinished
    alive_scores: jax.Array  # [batch, beams] log-likelihoods, best first
    done: jax.Array  # [batch, beams, steps] tokens of the finished
    done_scores: jax.Array  # [batch, beams] with the length penalty, best first
    is_done: jax.Array  # [batch, beams] whether the place holds a finished sequence
    open: jax.Array  # [batch] whether the row can still improve
    cache: KeyValues


class _Candidates(NamedTuple):
    """The likeliest continuations of a row's beams, [batch, width] each, best first."""

    scores: jax.Array
    parent: jax.Array  # the beam that is continued
    tokens: jax.Array  # [batch, width, steps]
    ended: jax.Array


def _search(how: Beam, decoding: Decoding, steps: int, ends: jax.Array, pad: int) -> Generated:
    """Search as transformers does, step for step, so that both find the same sequences."""
    beams = how.beams
    batch = decoding.start.shape[0] // beams
    # At most `beams` times the number of end tokens of a step's candidates end: with this many more
    # candidates, `beams` unfinished ones remain.
    width = beams * (1 + max(1, len(ends)))

    def unfinished(state: _Beams) -> jax.Array:
        stopped = jnp.all(state.is_done) if how.early_stopping is True else False
        return (state.step < steps) & jnp.any(state.open) & ~jnp.bool_(stopped)

    def extend(state: _Beams) -> _Beams:
        last = jax.lax.dynamic_index_in_dim(state.alive, state.step - 1, axis=2, keepdims=False)
        token = jnp.where(state.step == 0, decoding.start, last.reshape(-1))
        logits, cache = decoding.step(token, state.step, state.cache)
        candidates = _continue(state, logits, width, ends, steps)
        alive, alive_scores, cache = _keep_alive(candidates, cache, beams)
        done, done_scores, is_done = _finish(how, state, candidates)
        is_open = state.open & _can_improve(
            how, state.step, steps, alive_scores, done_scores, is_done
        )
        return _Beams(
            state.step + 1, alive, alive_scores, done, done_scores, is_done, is_open, cache
        )

    blank = jnp.full((batch, beams, steps), pad, jnp.int32)
    never = jnp.full((batch, beams), _NEVER)
    state = _Beams(
        step=jnp.int32(0),
        alive=blank,
        alive_scores=never.at[:, 0].set(0.0),  # all beams are equal at first: continue one
        done=blank,
        done_scores=never,
        is_done=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        cache=decoding.cache,
    )
    state = jax.lax.while_loop(unfinished, extend, state)
    tokens, scores = state.done[:, : how.keep], state.done_scores[:, : how.keep]
    return Generated(tokens, _lengths(tokens, ends), scores)


def _continue(
    state: _Beams, logits: jax.Array, width: int, ends: jax.Array, steps: int
) -> _Candidates:
    """Return the `width` likeliest continuations of each row by one token."""
    batch, beams = state.alive_scores.shape
    vocab = logits.shape[-1]
    scores = state.alive_scores[:, :, None] + jax.nn.log_softmax(logits).reshape(
        batch, beams, vocab
    )
    scores, index = jax.lax.top_k(scores.reshape(batch, -1), width)  # [batch, width]
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    sequences = jnp.take_along_axis(state.alive, parent[:, :, None], axis=1)
    sequences = sequences.at[:, :, state.step].set(token)
    ended = jnp.isin(token, ends) | (state.step == steps - 1)
    return _Candidates(scores, parent, sequences, ended)


def _keep_alive(
    candidates: _Candidates, cache: KeyValues, beams: int
) -> tuple[jax.Array, jax.Array, KeyValues]:
    """Return tokens, scores and cache of the best candidates that have not ended."""
    batch = candidates.scores.shape[0]
    scores, best = jax.lax.top_k(jnp.where(candidates.ended, _NEVER, candidates.scores), beams)
    alive = jnp.take_along_axis(candidates.tokens, best[:, :, None], axis=1)
    parents = jnp.take_along_axis(candidates.parent, best, axis=1)
    rows = jnp.arange(batch)[:, None] * beams + parents
    return alive, scores, KeyValues(*(jnp.take(x, rows.reshape(-1), axis=1) for x in cache))


def _finish(
    how: Beam, state: _Beams, candidates: _Candidates
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return tokens, scores and presence of the best finished sequences, with the new ones."""
    # Only a candidate among the best `beams` may finish; the others are spares.
    among_best = jnp.arange(candidates.scores.shape[1]) < how.beams
    finishes = candidates.ended & among_best & state.open[:, None]
    if how.early_stopping is True:
        finishes &= ~jnp.all(state.is_done, axis=1, keepdims=True)
    length = (state.step + 1).astype(jnp.float32)
    finals = jnp.where(finishes, candidates.scores / length**how.length_penalty, _NEVER)
    scores, best = jax.lax.top_k(jnp.concatenate([state.done_scores, finals], axis=1), how.beams)
    done = jnp.concatenate([state.done, candidates.tokens], axis=1)
    is_done = jnp.concatenate([state.is_done, finishes], axis=1)
    done = jnp.take_along_axis(done, best[:, :, None], axis=1)
    return done, scores, jnp.take_along_axis(is_done, best, axis=1)


def _can_improve(
    how: Beam,
    step: jax.Array,
    steps: int,
    alive_scores: jax.Array,
    done_scores: jax.Array,
    is_done: jax.Array,
) -> jax.Array:
    """Return whether an unfinished sequence of a row may beat its worst finished one, [batch]."""
    length: jax.Array | float = (step + 1).astype(jnp.float32)
    if how.early_stopping == "never" and how.length_penalty > 0:
        length = float(steps)
    hope = alive_scores[:, 0] / length**how.length_penalty
    worst = jnp.where(jnp.all(is_done, axis=1), done_scores[:, -1], _NEVER)
    return hope > worst


def _lengths(tokens: jax.Array, ends: jax.Array) -> jax.Array:
    """Return the number of tokens up to and including the first end of text, or of all tokens."""
    ended = jnp.cumsum(jnp.isin(tokens, ends), axis=-1)
    return jnp.sum((ended == 0) | ((ended == 1) & jnp.isin(tokens, ends)), axis=-1)
