"""Objectives: nothing is lost, the numbers are T5's, and the masks are equally likely."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pruning.corpus.vocabulary import EOS_ID, Vocabulary
from pruning.data.objectives import CausalLM, ObjectiveError, PrefixLM, SpanCorruption

BYTES = Vocabulary("bytes", b"", 125)
FIRST_SENTINEL = BYTES.size - 1
LAST_SENTINEL = BYTES.size - BYTES.extra_ids


def is_sentinel(tokens):
    return np.asarray(tokens) >= LAST_SENTINEL


def restore(inputs, targets):
    """Puts the spans of the targets back where the inputs have their sentinels."""
    spans = {}
    for token in targets[:-1].tolist():
        if token >= LAST_SENTINEL:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    whole = []
    for token in inputs[:-1].tolist():
        whole += spans.pop(token) if token >= LAST_SENTINEL else [token]
    return whole, spans


# --------------------------------------------------------------------------------------------------
# Span corruption


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 300),
    density=st.floats(0.05, 0.5),
    mean_span=st.floats(1, 10),
    seed=st.integers(-5, 5),
    index=st.integers(0, 2**42),
)
def test_inputs_and_targets_hold_the_chunk(length, density, mean_span, seed, index):
    objective = SpanCorruption(density, mean_span)
    if objective.noise(length)[1] > BYTES.extra_ids:
        return
    chunk = np.random.default_rng(0).integers(3, 259, (2, length)).astype(np.uint16)
    for row, example in enumerate(
        objective.examples(chunk, seed, np.asarray([index, index + 1]), BYTES)
    ):
        inputs, targets = example["inputs"], example["targets"]
        assert inputs[-1] == targets[-1] == EOS_ID
        whole, unused = restore(inputs, targets)
        if length == 1:  # T5 too corrupts nothing of a single token, but announces a span
            assert unused == {FIRST_SENTINEL: []}
        else:
            assert not unused
            tokens, spans = objective.noise(length)
            sentinels = np.arange(FIRST_SENTINEL, FIRST_SENTINEL - spans, -1)  # they count down
            np.testing.assert_array_equal(inputs[is_sentinel(inputs)], sentinels)
            np.testing.assert_array_equal(targets[is_sentinel(targets)], sentinels)
            assert len(targets) == tokens + spans + 1
            assert len(inputs) == length - tokens + spans + 1
            assert not is_sentinel(inputs[0])  # begins with text
            assert is_sentinel(inputs[-2])  # ends with noise
        np.testing.assert_array_equal(whole, chunk[row])


def test_an_example_depends_on_its_own_number_only():
    chunks = np.random.default_rng(0).integers(3, 259, (8, 100)).astype(np.uint16)
    indices = np.asarray([5, 9, 2**40, 0, 1, 2, 3, 77])
    objective = SpanCorruption()
    together = objective.examples(chunks, 3, indices, BYTES)
    for i in range(8):
        [alone] = objective.examples(chunks[i : i + 1], 3, indices[i : i + 1], BYTES)
        np.testing.assert_array_equal(alone["inputs"], together[i]["inputs"])
        np.testing.assert_array_equal(alone["targets"], together[i]["targets"])


@pytest.mark.parametrize(
    ("input_length", "chunk", "targets"),
    # The first is the T5 paper's setting; all are what T5's own random_spans_helper answers.
    [(512, 568, 114), (256, 284, 58), (128, 141, 29), (1024, 1137, 229), (64, 70, 14)],
)
def test_lengths_are_those_of_t5(input_length, chunk, targets):
    objective = SpanCorruption()
    vocabulary = Vocabulary("bytes", b"", 125)
    assert objective.chunk_length(input_length, targets, vocabulary) == chunk
    [example] = objective.examples(np.full((1, chunk), 5), 0, np.zeros(1, np.int64), vocabulary)
    assert len(example["inputs"]) <= input_length
    assert len(example["targets"]) == targets
    with pytest.raises(ObjectiveError, match=f"raise target_length to {targets}"):
        objective.chunk_length(input_length, targets - 1, vocabulary)


def test_more_spans_than_sentinels_are_refused():
    with pytest.raises(ObjectiveError, match="114 spans of noise, the vocabulary has 100"):
        SpanCorruption().chunk_length(2048, 512, Vocabulary("bytes", b"", 100))


def t5_noise(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """Tokens and spans of noise as T5's code computes them, in TensorFlow's float32."""
    import tensorflow as tf

    length = tf.maximum(length, 2)
    tokens = tf.cast(tf.round(tf.cast(length, tf.float32) * density), tf.int32)
    tokens = tf.minimum(tf.maximum(tokens, 1), length - 1)
    spans = tf.cast(tf.round(tf.cast(tokens, tf.float32) / mean_span), tf.int32)
    return int(tokens), int(tf.maximum(spans, 1))


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.3, 2.0)])
def test_noise_is_rounded_as_in_t5(density, mean_span):
    pytest.importorskip("tensorflow")
    objective = SpanCorruption(density, mean_span)
    for length in [*range(1, 80), 90, 110, 130, 150, 170, 568, 1137]:
        assert objective.noise(length) == t5_noise(length, density, mean_span), length


def test_all_masks_are_equally_likely():
    # 12 tokens, 5 of them noise in 2 spans: 4 divisions of the noise times 6 of the text.
    objective = SpanCorruption(0.4, 2.5)
    assert objective.noise(12) == (5, 2)
    masks = objective.noise_mask(12, 0, np.arange(24_000))
    found = collections.Counter(map(tuple, masks.astype(int).tolist()))
    expected = set()
    for noise, text in itertools.product(range(1, 5), range(1, 7)):
        parts = [[0] * text, [1] * noise, [0] * (7 - text), [1] * (5 - noise)]
        expected.add(tuple(itertools.chain(*parts)))
    assert set(found) == expected
    assert stats.chisquare([found[mask] for mask in expected]).pvalue > 1e-3


def test_agrees_with_t5_in_distribution():
    """Where noise falls in a chunk of 568, against a direct transcription of T5's algorithm."""
    objective, rng = SpanCorruption(), np.random.default_rng(0)

    def segments(total, parts):
        starts = rng.permutation(np.arange(total - 1) < parts - 1)
        return np.bincount(np.concatenate([[0], np.cumsum(starts)]), minlength=parts)

    def reference():
        lengths = np.stack([segments(483, 28), segments(85, 28)], axis=1).ravel()
        return np.repeat(np.arange(56) % 2, lengths)

    ours = objective.noise_mask(568, 1, np.arange(4000))
    theirs = np.stack([reference() for _ in range(4000)])
    assert (ours.sum(axis=1) == 85).all() and (theirs.sum(axis=1) == 85).all()
    by_place = [part.mean(axis=0) for part in (ours, theirs)]
    error = np.sqrt(2 * 0.15 * 0.85 / 4000)
    assert np.abs(by_place[0] - by_place[1]).max() < 5 * error

    def run_lengths(masks):
        edges = np.flatnonzero(np.diff(masks.astype(int).ravel()))
        return np.diff(edges)

    assert stats.ks_2samp(run_lengths(ours), run_lengths(theirs)).pvalue > 1e-3


# --------------------------------------------------------------------------------------------------
# Prefix LM and causal LM


def test_prefix_lm_divides_the_chunk_anywhere():
    objective = PrefixLM()
    assert objective.chunk_length(10, 8, BYTES) == 8
    chunks = np.random.default_rng(0).integers(3, 259, (7000, 8))
    examples = objective.examples(chunks, 0, np.arange(7000), BYTES)
    splits = collections.Counter()
    for chunk, example in zip(chunks, examples, strict=True):
        inputs, targets = example["inputs"], example["targets"]
        np.testing.assert_array_equal(np.concatenate([inputs[:-1], targets[:-1]]), chunk)
        assert inputs[-1] == targets[-1] == EOS_ID
        assert len(targets) <= 8 and len(inputs) <= 8
        splits[len(inputs) - 1] += 1
    assert set(splits) == set(range(1, 8))
    assert stats.chisquare(list(splits.values())).pvalue > 1e-3
    [single] = objective.examples(chunks[:1, :1], 0, np.zeros(1, np.int64), BYTES)
    assert len(single["inputs"]) == 1 and len(single["targets"]) == 2


def test_features_of_an_encoder_decoder():
    batch = SpanCorruption().batch(
        [{"inputs": np.asarray([5, 6, 1]), "targets": np.asarray([383, 7, 1])}], 5, 4, BYTES
    )
    assert {name: value.tolist() for name, value in batch.items()} == {
        "encoder_input_tokens": [[5, 6, 1, 0, 0]],
        "decoder_input_tokens": [[0, 383, 7, 1]],
        "decoder_target_tokens": [[383, 7, 1, 0]],
        "decoder_loss_weights": [[1.0, 1.0, 1.0, 0.0]],
    }
    assert batch["decoder_loss_weights"].dtype == np.float32
    assert batch["encoder_input_tokens"].dtype == np.int32


@pytest.mark.parametrize(
    ("segments", "inputs", "segment_ids", "positions"),
    [
        (False, [0, 5, 6, 1, 7, 1, 8, 0], [1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 2, 3, 4, 5, 6, 0]),
        (True, [0, 5, 6, 0, 7, 0, 8, 0], [1, 1, 1, 2, 2, 3, 3, 0], [0, 1, 2, 0, 1, 0, 1, 0]),
    ],
)
def test_features_of_a_decoder(segments, inputs, segment_ids, positions):
    targets = [5, 6, 1, 7, 1, 8, 9]  # three documents, the last cut off
    objective = CausalLM(segments)
    [example] = objective.examples(np.asarray([targets]), 0, np.zeros(1, np.int64), BYTES)
    batch = objective.batch([example], 0, 8, BYTES)
    assert batch["decoder_target_tokens"].tolist() == [[*targets, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1.0] * 7 + [0.0]]
    real = slice(0, 7)  # what stands in the padding does not matter but for its segment id
    assert batch["decoder_input_tokens"][0, real].tolist() == inputs[real]
    assert batch["decoder_segment_ids"].tolist() == [segment_ids]
    assert batch["decoder_positions"].tolist() == [positions]
