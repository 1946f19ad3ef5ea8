"""Ridge regression by folds: penalties and layers do not depend on their own fold or on copies."""

from __future__ import annotations

import numpy as np

from pruning.scores.distilled.ridge import folded
from pruning.scores.text.folds import Folds
from pruning.store.randomness import Stream

FOLDS = Folds(Stream.EMBEDDING_STUDENT_FOLD, 0, 4)


def layers_of(vectors, targets, hashes, l2):
    penalty = Stream.EMBEDDING_STUDENT_PENALTY
    return folded(vectors, targets, FOLDS.of(hashes), FOLDS, l2, hashes, penalty)


def hashes_of(count, random):
    return random.integers(-(2**62), 2**62, count)


def test_copies_do_not_favor_a_small_penalty():
    """Only copies of a document predict its noise, so the largest penalty has the least error."""
    random = np.random.default_rng(3)
    copies = np.repeat(np.arange(80), 10)
    vectors, noise = random.normal(size=(80, 60)), random.normal(size=80)
    hashes = hashes_of(80, random)
    *_, penalties = layers_of(vectors[copies], noise[copies], hashes[copies], (1e-3, 1e4))
    assert penalties == [1e4] * 4


def test_a_layer_and_its_penalty_do_not_depend_on_their_own_fold():
    random = np.random.default_rng(4)
    hashes = hashes_of(300, random)
    vectors = random.normal(size=(300, 8))
    targets = vectors @ random.normal(size=8) + random.normal(size=300)
    l2 = (0.1, 1.0, 10.0, 100.0)
    weights, biases, penalties = layers_of(vectors, targets, hashes, l2)
    other = np.where(FOLDS.of(hashes) == 2, 50 * random.normal(size=300), targets)
    changed, offsets, chosen = layers_of(vectors, other, hashes, l2)
    assert chosen[2] == penalties[2]
    np.testing.assert_allclose(changed[2], weights[2], rtol=1e-6)
    np.testing.assert_allclose(offsets[2], biases[2], rtol=1e-6, atol=1e-8)
    assert not np.allclose(changed[1], weights[1], rtol=0.1)
