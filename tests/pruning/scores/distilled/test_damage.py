"""Damage: keyed by document, growing with the strength, and each kind changes what it says."""

from __future__ import annotations

import difflib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.scores.distilled import damage
from pruning.scores.distilled.damage import KINDS, STRENGTHS, DamageError, damaged

texts = st.text("ab cdé.!?\n'\")漢 ", max_size=200)


def sentences(count: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        words = [f"word{rng.integers(1000)}" for _ in range(rng.integers(5, 12))]
        made.append(f"Sentence{i} {' '.join(words)}.")
    return " ".join(made)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts, donor=texts, strength=st.sampled_from(STRENGTHS), doc_id=st.integers(0, 2**62))
def test_any_text_is_damaged_in_one_way_per_document(kind, text, donor, strength, doc_id):
    """Never fails; the same document gets the same damage, an empty one stays empty."""
    first = damaged(text, kind, strength, 3, doc_id, donor)
    assert isinstance(first, str)
    assert damaged(text, kind, strength, 3, doc_id, donor) == first
    if not text:
        assert first == ""


@settings(max_examples=200, deadline=None)
@given(texts)
def test_units_put_together_are_the_text(text):
    assert "".join(damage._WORD.findall(text)) == text
    assert "".join(damage._SENTENCE.findall(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_seed_document_and_strength_each_change_the_damage(kind):
    text, donor = sentences(40), sentences(40, seed=1)
    versions = [
        damaged(text, kind, 0.25, 0, 1, donor),
        damaged(text, kind, 0.25, 0, 2, donor),
        damaged(text, kind, 0.25, 1, 1, donor),
        damaged(text, kind, 0.5, 0, 1, donor),
        text,
    ]
    if kind == "truncated":  # half of the time only the end is cut: such versions can coincide
        assert len(set(versions)) >= 3
    else:
        assert len(set(versions)) == len(versions)


@pytest.mark.parametrize("kind", KINDS)
def test_stronger_damage_leaves_less_as_it_was(kind):
    donor = sentences(40, seed=1)
    kept = []
    for strength in STRENGTHS:
        share = []
        for doc_id in range(10):
            text = sentences(40, seed=100 + doc_id)
            version = damaged(text, kind, strength, 0, doc_id, donor)
            matcher = difflib.SequenceMatcher(None, text.split(), version.split(), autojunk=False)
            share.append(sum(block.size for block in matcher.get_matching_blocks()))
        kept.append(np.mean(share))
    assert all(a > b for a, b in itertools.pairwise(kept)), kept


@pytest.mark.parametrize("strength", STRENGTHS)
def test_each_kind_does_what_it_says(strength):
    text, donor = sentences(40), sentences(40, seed=1)
    words = text.split()

    shuffled = damaged(text, "shuffled_words", strength, 0, 5).split()
    assert Counter(shuffled) == Counter(words)
    moved = sum(a != b for a, b in zip(words, shuffled, strict=True))
    assert abs(moved / len(words) - strength) < 0.06  # equal words may change places unseen

    repeated = damage._SENTENCE.findall(damaged(text, "repeated_spans", strength, 0, 5))
    assert len(repeated) == 40
    copies = sum(a.strip() == b.strip() for a, b in itertools.pairwise(repeated))
    assert copies == round(39 * strength)

    noisy = damaged(text, "character_noise", strength, 0, 5).split()
    changed = sum(a != b for a, b in zip(words, noisy, strict=True))
    assert 0.8 * strength < changed / len(words) <= strength + 0.01

    cut = damaged(text, "truncated", strength, 0, 5)
    assert cut in text and len(cut) <= max(len(text) * (1 - strength), 24) + 20
    at = text.index(cut) + len(cut)
    starts = text.startswith(cut)
    assert at == len(text) or (text[at - 1].isalnum() and text[at].isalnum())
    assert starts or text[text.index(cut) - 1].isalnum()

    stuffed = damaged(text, "boilerplate", strength, 0, 5)
    own = [sentence for sentence in damage._SENTENCE.findall(text) if sentence in stuffed]
    assert len(own) == 40 - round(40 * strength)

    mixed = damaged(text, "mixed_sentences", strength, 0, 5, donor)
    foreign = [s for s in damage._SENTENCE.findall(donor) if s.strip() in mixed]
    assert 0 < len(foreign) <= round(40 * strength / 2)


def test_untouched_text_stays_as_it_was():
    text = "One  two\tthree.\n\n  Four five.\nSix seven eight nine ten. Eleven twelve."
    noisy = damaged(text, "character_noise", 0.1, 0, 1)
    matcher = difflib.SequenceMatcher(None, text, noisy, autojunk=False)
    assert matcher.ratio() > 0.95
    assert [c for c in noisy if c.isspace()] == [c for c in text if c.isspace()]


def test_furniture_is_of_many_kinds():
    rng = np.random.default_rng(0)
    lines = [damage.furniture(rng) for _ in range(300)]
    assert len(set(lines)) > 200
    assert not any("{" in line for line in lines)


def test_wrong_kinds_and_strengths_are_refused():
    with pytest.raises(
        DamageError, match="no damage is called 'shuffle'; there are: shuffled_words"
    ):
        damaged("text", "shuffle", 0.5, 0, 0)
    for strength in (0, 1.5):
        with pytest.raises(DamageError, match=r"a strength is in \(0, 1\]"):
            damaged("text", "truncated", strength, 0, 0)
