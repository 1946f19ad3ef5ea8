"""Text out of a model: greedy, sampled, or by beam search, with a cache of keys and values.

    found = generate(model, params, tokens, max_new_tokens=64)                        # greedy
    found = generate(model, params, tokens, max_new_tokens=64, how=Sample(top_p=0.9), key=key)
    found = generate(model, params, tokens, max_new_tokens=64, how=Beam(beams=4))

Choices
- One compiled program for each (model, way, shape): encode or prefill, then a `while_loop` that
  ends when every row has ended. Nothing is compiled anew for other tokens, lengths, or keys.
- Both families look the same from the loop: a start token for each row, and a function that takes
  the rows' last tokens and returns the logits of the next. An encoder-decoder starts from its
  start id. A decoder-only model starts from the last token of the prompt, after the others were
  prefilled.
- Prompts are ragged on the right. A row's generated tokens lie behind the longest prompt in the
  cache, at one slot for all rows, so that a step writes one slice; positions and masks are each
  row's own.
- A cache is [layers, rows, slots, kv_heads, head_dim], in the compute dtype. A step reads it and
  adds one slot; the loop updates it in place.
- Keys and values of the encoder are computed once. Beams of a row share them: they stand as
  queries of one attention, not as copies of its keys.
- What a row gets does not depend on the rows beside it, sampled tokens included.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.config import T5Config
from models.decoder import DecoderLM, choose, global_layers
from models.layers import add
from models.model import Model
from models.t5 import T5

Params = dict[str, Any]

_NEVER = -1e9  # a score that no sequence has; finite, so that differences of two are not NaN


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Take the likeliest token."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw each token from softmax(logits / temperature), cut to its likeliest part.

    Attributes:
        top_k: only so many likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability, after `top_k`.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive; see Greedy")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1], or top_k={self.top_k} negative")


@dataclasses.dataclass(frozen=True)
class Beam:
    """Keep the best `beams` unfinished sequences at every step, as transformers does.

    A finished sequence's score is its log-likelihood / (its tokens, the end of text included) **
    length_penalty; positive penalties favour long ones.

    Attributes:
        keep: how many finished sequences to return for each row, at most `beams`.
        early_stopping: what happens when a row has `beams` finished sequences. True: it stops.
            False: it goes on while its best unfinished one, if it ended now, would beat the worst
            finished one. "never": while it could, at any length up to the maximum.
    """

    beams: int = 4
    length_penalty: float = 1.0
    keep: int = 1
    early_stopping: bool | str = False

    def __post_init__(self):
        if not 1 <= self.keep <= self.beams:
            raise ValueError(f"keep={self.keep} must be between 1 and beams={self.beams}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f"early_stopping={self.early_stopping!r}: True, False or 'never'")


class Generated(NamedTuple):
    """What `generate` found. With `Beam` there is an axis [keep] after [batch], best first.

    Attributes:
        tokens: int32 [batch, max_new_tokens]; the end of text is included, then the pad id follows.
        lengths: int32 [batch]: tokens up to and including the end of text.
        scores: float32 [batch]: natural-log likelihood of the tokens under the model; for `Beam`
            the score by which they were ranked.
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
    """Generate at most `max_new_tokens` for each row.

    Args:
        params: float32 or bfloat16, sharded or not.
        tokens: int32 [batch, length]: the encoder's input, or prompts of at least one token, padded
            on the right.
        lengths: int32 [batch], tokens of each row. None: an encoder's input ends at its padding; a
            prompt fills its row, because the pad id may well be a token of it.
        key: for `Sample`; the same key gives the same tokens.
        eos_ids: what ends a text; the configuration's `eos_id` by default.

    Raises:
        ValueError: an encoder without a decoder, `Sample` without a key, or more tokens than the
            model has learned positions for.
    """
    config = model.config
    if isinstance(config, T5Config):
        if not config.num_decoder_layers:
            raise ValueError("the model has an encoder only: it cannot generate")
    elif config.positions == "learned" and tokens.shape[1] + max_new_tokens > config.max_length + 1:
        raise ValueError(
            f"prompts of {tokens.shape[1]} and {max_new_tokens} new tokens exceed the model's "
            f"{config.max_length} positions"
        )
    if isinstance(how, Sample) != (key is not None):
        raise ValueError("Sample needs a key, and only Sample takes one")
    ends = (config.eos_id,) if eos_ids is None else tuple(eos_ids)
    return _generate(model, how, max_new_tokens, ends, params, jnp.asarray(tokens), lengths, key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(model, how, steps, ends, params, tokens, lengths, key) -> Generated:
    module = model.bind(params)
    prepare = _prepare_t5 if isinstance(model.config, T5Config) else _prepare_decoder
    beams = how.beams if isinstance(how, Beam) else 1
    start, cache, advance = prepare(module, tokens, lengths, beams, steps)
    ends, pad = jnp.asarray(ends), model.config.pad_id
    if isinstance(how, Beam):
        return _search(how, start, cache, advance, steps, ends, pad)
    pick = functools.partial(_draw, how, key) if isinstance(how, Sample) else _likeliest
    return _follow(pick, start, cache, advance, steps, ends, pad)


# --------------------------------------------------------------------------------------------------
# One step of a model


class Cache(NamedTuple):
    """Keys and values of a stack: [layers, rows, slots, kv_heads, head_dim] each."""

    key: jax.Array
    value: jax.Array


# (the last token of every row [rows], the step, cache) -> (float32 logits [rows, vocab], cache)
Advance = Callable[[jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


def _prepare_t5(module: T5, tokens, lengths, beams, steps) -> tuple[jax.Array, Cache, Advance]:
    """Encode. Rows are [batch * beams], the beams of a batch row side by side."""
    config, decoder = module.config, module.decoder
    batch, length = tokens.shape
    segment_ids = (tokens != config.pad_id).astype(jnp.int32)
    if lengths is not None:
        segment_ids = (jnp.arange(length) < lengths[:, None]).astype(jnp.int32)
    encoded = module.encode(tokens, segment_ids)
    cross_mask = segment_ids[:, None, None, :] > 0  # [batch, 1, 1, length]

    def project(layer, _, __):
        return None, layer.encoder_decoder_attention.keys_values(encoded)

    _, cross = decoder.over_layers(project, None)  # [layers, batch, length, heads, d_kv], twice
    shape = (config.num_decoder_layers, batch * beams, steps, config.num_heads, config.d_kv)
    cache = Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def advance(token, step, cache):
        x = module.token_embedder(token[:, None], config.residual_dtype)  # [rows, 1, d_model]
        mask = jnp.arange(steps) <= step
        shared = None if config.relpos_per_layer else decoder.relpos_bias(1, steps, step)

        def through(layer, x, given):
            old, (cross_key, cross_value) = given
            bias = layer.relpos_bias(1, steps, step) if shared is None else shared
            attention = layer.self_attention
            y = layer.pre_self_attention_layer_norm(x)
            new = Cache(*attention.keys_values(y))
            now = _write(old, new, step)
            x = add(x, attention.attend(attention.queries(y), *now, bias=bias, mask=mask))
            attention = layer.encoder_decoder_attention
            y = layer.pre_cross_attention_layer_norm(x).reshape(batch, beams, -1)
            y = attention.attend(attention.queries(y), cross_key, cross_value, mask=cross_mask)
            x = add(x, y.reshape(x.shape))
            return add(x, layer.mlp(layer.pre_mlp_layer_norm(x))), new

        x, new = decoder.over_layers(through, x, (cache, cross))
        logits = module.logits(decoder.decoder_norm(x))[:, 0]
        return logits, jax.vmap(_write, in_axes=(0, 0, None))(cache, new, step)

    return jnp.full(batch * beams, config.decoder_start_id, jnp.int32), cache, advance


def _prepare_decoder(
    module: DecoderLM, tokens, lengths, beams, steps
) -> tuple[jax.Array, Cache, Advance]:
    """Prefill the prompts, less the last token of each. Rows are [batch * beams], as above."""
    config = module.config
    batch, length = tokens.shape
    lengths = jnp.full(batch, length) if lengths is None else lengths
    before = lengths - 1  # [batch]: tokens that are in the cache when the first step begins
    slots = jnp.arange(length)
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    cache = Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    positions = jnp.broadcast_to(slots, tokens.shape)
    _, cache = _run_decoder(module, tokens, positions, positions, slots < before[:, None], cache, 0)

    room = ((0, 0), (0, 0), (0, steps), (0, 0), (0, 0))
    cache = Cache(*(jnp.pad(jnp.repeat(x, beams, axis=1), room) for x in cache))
    before = jnp.repeat(before, beams)[:, None]  # [rows, 1]
    generated = before + jnp.arange(steps)
    key_positions = jnp.concatenate(
        [jnp.broadcast_to(slots, (batch * beams, length)), generated], 1
    )
    prompted = slots < before

    def advance(token, step, cache):
        written = jnp.broadcast_to(jnp.arange(steps) <= step, generated.shape)
        filled = jnp.concatenate([prompted, written], axis=1)  # [rows, slots]
        x, cache = _run_decoder(
            module, token[:, None], before + step, key_positions, filled, cache, length + step
        )
        return module.logits(module.decoder.decoder_norm(x))[:, 0], cache

    start = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
    return jnp.repeat(start, beams), cache, advance


def _run_decoder(module: DecoderLM, tokens, positions, key_positions, filled, cache, slot):
    """Tokens [rows, queries] at `positions` through the layers, and into the cache from `slot` on.

    `key_positions` and `filled` [rows, slots] say where each slot's token stands in its text, and
    whether there is one.
    """
    config = module.config
    distance = positions[:, :, None] - key_positions[:, None, :]  # [rows, queries, slots]
    mask = (filled[:, None, :] & (distance >= 0))[:, None]
    masks = mask, mask if config.window is None else mask & (distance < config.window)[:, None]
    rotations = module.rotations(positions)

    def through(layer, x, given):
        old, is_global = given
        attention, rotation = layer.self_attention, choose(is_global, rotations)
        y = layer.pre_self_attention_layer_norm(x)
        new = Cache(*attention.keys_values(y, rotation))
        now = _write(old, new, slot)
        mask = choose(is_global, masks)
        return layer.finish(
            x, attention.attend(attention.queries(y, rotation), *now, mask=mask)
        ), new

    x = module.embed(tokens, positions)
    x, new = module.decoder.over_layers(through, x, (cache, global_layers(config)))
    return x, jax.vmap(_write, in_axes=(0, 0, None))(cache, new, slot)


def _write(cache: Cache, new: Cache, slot) -> Cache:
    """One layer's cache [rows, slots, heads, head_dim] with `new` [rows, n, ...] from `slot` on."""
    update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    return Cache(*map(update, cache, new))


# --------------------------------------------------------------------------------------------------
# One sequence a row


def _follow(pick, start, cache, advance, steps, ends, pad) -> Generated:
    """Extend every row by the token that `pick(logits, step)` picks, until all have ended."""
    rows = start.shape[0]

    def unfinished(state):
        step, _, _, _, ended, _ = state
        return (step < steps) & ~jnp.all(ended)

    def extend(state):
        step, token, tokens, scores, ended, cache = state
        logits, cache = advance(token, step, cache)
        token = pick(logits, step).astype(jnp.int32)
        gained = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        scores = scores + jnp.where(ended, 0.0, gained)
        token = jnp.where(ended, pad, token)
        tokens = tokens.at[:, step].set(token)
        return step + 1, token, tokens, scores, ended | jnp.isin(token, ends), cache

    tokens = jnp.full((rows, steps), pad, jnp.int32)
    ended = jnp.zeros(rows, bool)
    state = (jnp.int32(0), start, tokens, jnp.zeros(rows), ended, cache)
    _, _, tokens, scores, _, _ = jax.lax.while_loop(unfinished, extend, state)
    return Generated(tokens, _lengths(tokens, ends), scores)


def _likeliest(logits, step) -> jax.Array:
    return jnp.argmax(logits, axis=-1)


def _draw(how: Sample, key, logits, step) -> jax.Array:
    """A token for each row: its noise depends on the key, the step and the row's index alone."""
    logits = logits / how.temperature
    ordered = -jnp.sort(-logits, axis=-1)  # [rows, vocab], likeliest first
    kept = jnp.ones(ordered.shape, bool)
    if how.top_k:
        kept &= jnp.arange(ordered.shape[-1]) < how.top_k
    if how.top_p < 1.0:
        probability = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf))
        # A token stays while those before it have not reached top_p; the first always does.
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
    step: jax.Array
    alive: jax.Array  # [batch, beams, steps] tokens of the unfinished
    alive_scores: jax.Array  # [batch, beams] log-likelihoods, best first
    done: jax.Array  # [batch, beams, steps] tokens of the finished
    done_scores: jax.Array  # [batch, beams] with the length penalty, best first
    is_done: jax.Array  # [batch, beams] whether there is a sequence
    open: jax.Array  # [batch] whether the row can still improve
    cache: Cache


def _search(how: Beam, start, cache, advance, steps, ends, pad) -> Generated:
    """transformers' beam search, step for step, so that both find the same sequences."""
    beams = how.beams
    batch = start.shape[0] // beams
    # At most `beams` times the number of end tokens of a step's candidates end: so many more are
    # taken that `beams` unfinished ones remain.
    width = beams * (1 + max(1, len(ends)))

    def unfinished(state: _Beams):
        stopped = jnp.all(state.is_done) if how.early_stopping is True else False
        return (state.step < steps) & jnp.any(state.open) & ~jnp.bool_(stopped)

    def extend(state: _Beams) -> _Beams:
        step = state.step
        last = jax.lax.dynamic_index_in_dim(state.alive, step - 1, axis=2, keepdims=False)
        token = jnp.where(step == 0, start, last.reshape(-1))
        logits, cache = advance(token, step, state.cache)
        vocab = logits.shape[-1]
        scores = state.alive_scores[:, :, None] + jax.nn.log_softmax(logits).reshape(
            batch, beams, vocab
        )
        scores, index = jax.lax.top_k(scores.reshape(batch, -1), width)  # [batch, width]
        parent, token = index // vocab, (index % vocab).astype(jnp.int32)
        sequences = jnp.take_along_axis(state.alive, parent[:, :, None], axis=1)
        sequences = sequences.at[:, :, step].set(token)
        ended = jnp.isin(token, ends) | (step == steps - 1)

        alive_scores, best = jax.lax.top_k(jnp.where(ended, _NEVER, scores), beams)
        alive = jnp.take_along_axis(sequences, best[:, :, None], axis=1)
        rows = jnp.arange(batch)[:, None] * beams + jnp.take_along_axis(parent, best, axis=1)
        cache = Cache(*(jnp.take(x, rows.reshape(-1), axis=1) for x in cache))

        # Only what is among the best `beams` candidates may finish; the others are spares.
        length = (step + 1).astype(jnp.float32)
        finishes = ended & (jnp.arange(width) < beams) & state.open[:, None]
        if how.early_stopping is True:
            finishes &= ~jnp.all(state.is_done, axis=1, keepdims=True)
        finals = jnp.where(finishes, scores / length**how.length_penalty, _NEVER)
        done_scores, best = jax.lax.top_k(
            jnp.concatenate([state.done_scores, finals], axis=1), beams
        )
        done = jnp.concatenate([state.done, sequences], axis=1)
        is_done = jnp.concatenate([state.is_done, finishes], axis=1)
        done = jnp.take_along_axis(done, best[:, :, None], axis=1)
        is_done = jnp.take_along_axis(is_done, best, axis=1)

        if how.early_stopping == "never" and how.length_penalty > 0:
            length = float(steps)
        hope = alive_scores[:, 0] / length**how.length_penalty
        worst = jnp.where(jnp.all(is_done, axis=1), done_scores[:, -1], _NEVER)
        is_open = state.open & (hope > worst)
        return _Beams(step + 1, alive, alive_scores, done, done_scores, is_done, is_open, cache)

    blank = jnp.full((batch, beams, steps), pad, jnp.int32)
    never = jnp.full((batch, beams), _NEVER)
    state = _Beams(
        step=jnp.int32(0),
        alive=blank,
        alive_scores=never.at[:, 0].set(0.0),  # all beams are equal as yet: go on from one
        done=blank,
        done_scores=never,
        is_done=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        cache=cache,
    )
    state = jax.lax.while_loop(unfinished, extend, state)
    tokens, scores = state.done[:, : how.keep], state.done_scores[:, : how.keep]
    return Generated(tokens, _lengths(tokens, ends), scores)


def _lengths(tokens: jax.Array, ends: jax.Array) -> jax.Array:
    """Tokens up to and including the first end of text; all, where there is none."""
    ended = jnp.cumsum(jnp.isin(tokens, ends), axis=-1)
    return jnp.sum((ended == 0) | ((ended == 1) & jnp.isin(tokens, ends)), axis=-1)
