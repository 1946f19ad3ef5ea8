"""Packing is invisible: a document computes the same alone, padded, and packed beside others.

In the encoder, the decoder, across, in losses and their gradients, and for one-step scoring; for
decoder-only models too, whose positions start anew in every segment.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import DecoderConfig, T5Config
from models.losses import chunked_cross_entropy, token_log_likelihood
from models.model import Model

TINY = {"vocab_size": 80, "d_model": 32, "d_ff": 48}
T5 = T5Config(**TINY, d_kv=8, num_heads=4, num_encoder_layers=2, num_decoder_layers=2)
UMT5 = T5Config(
    **TINY, d_kv=8, num_heads=4, num_encoder_layers=2, num_decoder_layers=2, relpos_per_layer=True
)
LLAMA = DecoderConfig(
    **TINY, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, window=6, global_every=2
)
GPT2 = DecoderConfig(
    **TINY,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    positions="learned",
    max_length=64,
    norm="layer",
    gated=False,
    activation="gelu",
    qkv_bias=True,
    tie_embeddings=True,
)
TOLERANCE = 1e-5

# (encoder length, decoder length) of each document, in rows: packed, they leave some padding.
ROWS = [[(21, 9), (5, 14), (30, 3)], [(44, 17), (1, 1)], [(12, 8)]]
LENGTH, TARGET_LENGTH = 60, 28


@functools.cache
def params_of(config):
    """Random parameters; the relative biases large, so that a wrong distance would be seen."""

    def draw(key):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * 5 if "rel_embedding" in jax.tree_util.keystr(path) else leaf,
            Model(config).init(key),
        )

    return jax.jit(draw)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: Model, params, batch):
    return model.bind(params)(batch)


def documents():
    random = np.random.default_rng(0)
    return [
        [
            (random.integers(2, 80, length).astype(np.int32), random.integers(2, 80, target))
            for length, target in row
        ]
        for row in ROWS
    ]


def packed():
    """The documents as a packed batch, with a trap: the padding does not hold the pad id."""
    rows = len(ROWS)
    batch = {
        "encoder_input_tokens": np.full((rows, LENGTH), 7, np.int32),
        "encoder_segment_ids": np.zeros((rows, LENGTH), np.int32),
        "decoder_input_tokens": np.full((rows, TARGET_LENGTH), 7, np.int32),
        "decoder_target_tokens": np.zeros((rows, TARGET_LENGTH), np.int32),
        "decoder_segment_ids": np.zeros((rows, TARGET_LENGTH), np.int32),
    }
    for row, texts in enumerate(documents()):
        at = target_at = 0
        for segment, (tokens, targets) in enumerate(texts, start=1):
            here = slice(at, at := at + len(tokens))
            there = slice(target_at, target_at := target_at + len(targets))
            batch["encoder_input_tokens"][row, here] = tokens
            batch["encoder_segment_ids"][row, here] = segment
            batch["decoder_input_tokens"][row, there] = np.pad(targets[:-1], (1, 0))
            batch["decoder_target_tokens"][row, there] = targets
            batch["decoder_segment_ids"][row, there] = segment
    return batch


def padded():
    """The documents as an unpacked batch, one per row, padded with the pad id; no segment ids."""
    texts = [text for row in documents() for text in row]
    batch = {
        "encoder_input_tokens": np.zeros((len(texts), LENGTH), np.int32),
        "decoder_input_tokens": np.zeros((len(texts), TARGET_LENGTH), np.int32),
        "decoder_target_tokens": np.zeros((len(texts), TARGET_LENGTH), np.int32),
    }
    for row, (tokens, targets) in enumerate(texts):
        batch["encoder_input_tokens"][row, : len(tokens)] = tokens
        batch["decoder_input_tokens"][row, 1 : len(targets)] = targets[:-1]
        batch["decoder_target_tokens"][row, : len(targets)] = targets
    return batch


def pieces(packed_array, segment_ids, lengths):
    """The documents' slices of a packed array, in order."""
    found = []
    for row, row_lengths in enumerate(lengths):
        for segment, length in enumerate(row_lengths, start=1):
            piece = packed_array[row, segment_ids[row] == segment]
            assert len(piece) == length
            found.append(piece)
    return found


def assert_same_documents(packed_array, segment_ids, padded_array, side):
    lengths = [[document[side] for document in row] for row in ROWS]
    packed_pieces = pieces(np.asarray(packed_array), segment_ids, lengths)
    for piece, row in zip(packed_pieces, np.asarray(padded_array), strict=True):
        scale = np.abs(row[: len(piece)]).max()
        np.testing.assert_allclose(piece, row[: len(piece)], rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("config", [T5, UMT5], ids=["t5", "umt5"])
def test_encoder_decoder(config):
    model, params = Model(config), params_of(config)
    batch, apart = packed(), padded()
    run = jax.jit(lambda params, *ids: model.bind(params).encode(*ids))
    encode, logits = functools.partial(run, params), functools.partial(logits_of, model, params)
    encoder_ids, decoder_ids = batch["encoder_segment_ids"], batch["decoder_segment_ids"]
    assert_same_documents(
        encode(batch["encoder_input_tokens"], encoder_ids),
        encoder_ids,
        encode(apart["encoder_input_tokens"]),
        side=0,
    )
    assert_same_documents(logits(batch), decoder_ids, logits(apart), side=1)


def test_neighbors_have_no_influence():
    """Exactly none: changing one document leaves every bit of the others."""
    model, params = Model(T5), params_of(T5)
    logits = functools.partial(logits_of, model, params)
    batch = packed()
    before = np.asarray(logits(batch))
    second = batch["encoder_segment_ids"][0] == 2
    batch["encoder_input_tokens"][0, second] = 3
    after = np.asarray(logits(batch))
    others = batch["decoder_segment_ids"] > 0
    others[0, batch["decoder_segment_ids"][0] == 2] = False
    np.testing.assert_array_equal(before[others], after[others])
    changed = batch["decoder_segment_ids"][0] == 2
    assert (before[0, changed] != after[0, changed]).any()


def test_losses_and_their_gradients():
    model, params = Model(T5), params_of(T5)

    def loss(params, batch):
        module = model.bind(params)
        head = module.output_head()
        targets = batch["decoder_target_tokens"]
        weights = (targets > 0).astype(jnp.float32)
        total, weight, _ = chunked_cross_entropy(
            module.forward(batch), head, targets, weights, z_loss=1e-3, chunk=16
        )
        return total / weight

    run = jax.jit(jax.value_and_grad(loss))
    value, gradient = run(params, packed())
    expected, expected_gradient = run(params, padded())
    assert value == pytest.approx(float(expected), rel=TOLERANCE)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * jnp.abs(b).max()),
        gradient,
        expected_gradient,
    )


def test_one_step_scoring():
    """One decoder position per document of a packed row scores as each document does alone."""
    model, params = Model(T5), params_of(T5)
    answers = np.array([3, 17, 40])

    @jax.jit
    def run(params, tokens, segment_ids, decoder_segment_ids):
        module = model.bind(params)
        encoded = module.encode(tokens, segment_ids)
        start = jnp.full(decoder_segment_ids.shape, T5.decoder_start_id)
        hidden = module.decode(encoded, segment_ids, start, decoder_segment_ids)
        head = module.output_head()
        candidates = jnp.broadcast_to(answers, (*start.shape, len(answers)))
        return token_log_likelihood(hidden, head, candidates, chunk=4)

    scores = functools.partial(run, params)
    batch, apart = packed(), padded()
    questions = np.broadcast_to(np.arange(1, 5), (len(ROWS), 4))  # a fourth that is never there
    together = scores(batch["encoder_input_tokens"], batch["encoder_segment_ids"], questions)
    tokens = apart["encoder_input_tokens"]
    alone = scores(tokens, (tokens > 0).astype(np.int32), np.ones((len(tokens), 1), np.int32))
    together, alone = np.asarray(together), np.asarray(alone)
    row_scores = [together[row, : len(texts)] for row, texts in enumerate(ROWS)]
    np.testing.assert_allclose(np.concatenate(row_scores), alone[:, 0], rtol=0, atol=TOLERANCE)
    assert np.isfinite(together).all()


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_decoder_only(config):
    model, params = Model(config), params_of(config)
    logits = functools.partial(logits_of, model, params)
    batch, apart = packed(), padded()
    given = {name: batch[name] for name in ("decoder_input_tokens", "decoder_segment_ids")}
    assert_same_documents(
        logits(given),
        batch["decoder_segment_ids"],
        logits({"decoder_input_tokens": apart["decoder_input_tokens"]}),
        side=1,
    )


def test_padding_at_the_front_may_be_given_positions():
    """As batched decoding pads: the same logits as without."""
    model, params = Model(LLAMA), params_of(LLAMA)
    tokens = np.random.default_rng(0).integers(2, 80, (2, 10))
    logits = jax.jit(lambda *ids: model.bind(params).logits(model.bind(params).hidden(*ids)))
    shifted = np.pad(tokens, ((0, 0), (3, 0)))
    segment_ids = np.pad(np.ones_like(tokens), ((0, 0), (3, 0)))
    positions = np.pad(np.tile(np.arange(10), (2, 1)), ((0, 0), (3, 0)))
    np.testing.assert_allclose(
        logits(shifted, segment_ids, positions)[:, 3:], logits(tokens), atol=TOLERANCE
    )
