"""Damaged documents: bad examples by construction, to train judges and to measure scorers.

    bad = damaged(text, "shuffled_words", strength=0.25, seed=0, doc_id=17)

Choices
- Each kind imitates a defect of real corpora: scrambled extraction, repetition, OCR noise,
  truncated texts, boilerplate of web pages, concatenated pages.
- The strength is the share of the document's units (words, sentences, characters) that are changed.
  A good scorer ranks the strengths.
- All randomness is keyed by (seed, document, kind, strength), so damage is reproducible.
- Damage is a function of strings alone. Units keep their trailing white space, so that unchanged
  parts of the text stay the same to the byte.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

import numpy as np

from pruning.store import randomness
from pruning.store.randomness import Stream

STRENGTHS = (0.1, 0.25, 0.5, 1.0)

_WORD = re.compile(r"\S+\s*|\s+")
_SENTENCE = re.compile(r".+?(?:[.!?][\"')\]]*\s+|\n+|$)", re.DOTALL)


class DamageError(ValueError):
    """Error for an unknown kind of damage."""


def damaged(
    text: str,
    kind: str,
    strength: float,
    seed: int,
    doc_id: int,
    donor: str = "",
) -> str:
    """Return a damaged version of a document.

    Args:
      text: the document.
      kind: a key of `KINDS`.
      strength: share of the units that are affected, in (0, 1].
      seed, doc_id: keys of the randomness.
      donor: another document's text, for "mixed_sentences".

    Returns:
      The damaged text. A text that is too short for this kind of damage is returned unchanged.
    """
    if kind not in KINDS:
        raise DamageError(f"no damage is called {kind!r}; there are: {', '.join(KINDS)}.")
    if not 0 < strength <= 1:
        raise DamageError(f"a strength is in (0, 1], not {strength}.")
    which = list(KINDS).index(kind)
    rng = randomness.generator(Stream.DAMAGE, seed, doc_id, which, round(strength * 1_000_000))
    return KINDS[kind](text, strength, rng, donor)


# --------------------------------------------------------------------------------------------------
# The kinds: (text, strength, generator, donor) -> text


def shuffled_words(text: str, strength: float, rng: np.random.Generator, donor: str) -> str:
    """Permute the positions of a share of the words."""
    words = _WORD.findall(text)
    places = _chosen(len(words), strength, rng, least=2)
    moved = _deranged(places, rng)
    result = list(words)
    for place, source in zip(places, moved, strict=True):
        result[place] = _swapped(words[place], words[source])
    return "".join(result)


def repeated_spans(text: str, strength: float, rng: np.random.Generator, donor: str) -> str:
    """Replace a share of the sentences by copies of the preceding sentence."""
    sentences = _SENTENCE.findall(text)
    for place in _chosen(len(sentences) - 1, strength, rng):
        sentences[place + 1] = _separated(sentences[place])
    return "".join(sentences)


def character_noise(text: str, strength: float, rng: np.random.Generator, donor: str) -> str:
    """Replace, drop, double or transpose a character in a share of the words."""
    words = _WORD.findall(text)
    for place in _chosen(len(words), strength, rng):
        words[place] = _misspelt(words[place], rng)
    return "".join(words)


def truncated(text: str, strength: float, rng: np.random.Generator, donor: str) -> str:
    """Remove a share of the text at either end, cutting within a word."""
    keep = max(round(len(text) * (1 - strength)), min(len(text), 24))
    start = int(rng.integers(0, len(text) - keep + 1)) if rng.random() < 0.5 else 0
    return _inside_words(text, start, start + keep)


def boilerplate(text: str, strength: float, rng: np.random.Generator, donor: str) -> str:
    """Replace a share of the sentences by the boilerplate of web pages; all of them at 1."""
    sentences = _SENTENCE.findall(text)
    for place in _chosen(len(sentences), strength, rng):
        sentences[place] = furniture(rng) + "\n"
    return "".join(sentences)


def mixed_sentences(text: str, strength: float, rng: np.random.Generator, donor: str) -> str:
    """Replace a share of the sentences by sentences of another document, out of order."""
    sentences, foreign = _SENTENCE.findall(text), _SENTENCE.findall(donor)
    if not foreign:
        return text
    for place in _chosen(len(sentences), strength / 2, rng):
        sentences[place] = _separated(foreign[int(rng.integers(len(foreign)))])
    order = _chosen(len(sentences), strength, rng, least=2)
    moved = _deranged(order, rng)
    result = list(sentences)
    for place, source in zip(order, moved, strict=True):
        result[place] = _separated(sentences[source])
    return "".join(result)


KINDS: dict[str, Callable[[str, float, np.random.Generator, str], str]] = {
    "shuffled_words": shuffled_words,
    "repeated_spans": repeated_spans,
    "character_noise": character_noise,
    "truncated": truncated,
    "boilerplate": boilerplate,
    "mixed_sentences": mixed_sentences,
}


# --------------------------------------------------------------------------------------------------
# Boilerplate of web pages, written for this module

_SUBJECTS = ("shop", "forum", "blog", "news", "store", "gallery", "club", "service", "magazine")
_PAGES = (
    "Home", "About us", "Contact", "Products", "Services", "FAQ", "Log in", "Register",
    "My account", "Basket (0)", "Checkout", "Search", "Site map", "Newsletter", "Careers",
    "Press", "Archive", "Privacy", "Imprint", "Terms", "Help", "Language", "Next page",
    "Previous page", "Back to top",
)  # fmt: skip
_SENTENCES = (
    "This {subject} uses cookies to give you a better experience. By going on you accept them.",
    "Please turn on JavaScript in your browser to see this {subject}.",
    "Copyright {year} {name}. All rights reserved.",
    "Sign up for our {subject} newsletter and never miss an offer again!",
    "You must be logged in to post a comment. Not a member yet? Register now.",
    "Share this: Facebook | Twitter | E-mail | Print",
    "Posted by {name} on {day}/{month}/{year} | {n} comments | Reply | Report",
    "Click here to read more. Click here to see the full size picture.",
    "This software is provided as it stands, without warranty of any kind, to the extent that the "
    "law permits. {name} is not liable for any damage that follows from its use.",
    "No part of this {subject} may be copied in any form without written leave from {name}.",
    "Sorry, the page that you asked for was not found (error {n}).",
    "{n} items found. Sort by: price | newest | rating. Show: 10 | 20 | 50 per page.",
    "Free shipping on orders over ${n}! Limited time only. Add to basket. Add to wish list.",
    "Tags: {subject}, {name}, {year}, best {subject}, cheap {subject}, {subject} online",
    "You are visitor number {n}. Last updated {day}/{month}/{year}.",
    "Loading... Please wait...",
)  # fmt: skip


def furniture(rng: np.random.Generator) -> str:
    """Return a line of web boilerplate: a menu, a notice, a form."""
    if rng.random() < 0.4:
        picked = rng.permutation(len(_PAGES))[: int(rng.integers(3, 9))]
        return (" | ", " ", "\n", " > ")[int(rng.integers(4))].join(_PAGES[i] for i in picked)
    letters = "".join(
        string.ascii_lowercase[i] for i in rng.integers(0, 26, int(rng.integers(4, 9)))
    )
    return _SENTENCES[int(rng.integers(len(_SENTENCES)))].format(
        subject=_SUBJECTS[int(rng.integers(len(_SUBJECTS)))],
        name=letters.capitalize(),
        year=int(rng.integers(1998, 2026)),
        month=int(rng.integers(1, 13)),
        day=int(rng.integers(1, 29)),
        n=int(rng.integers(1, 5000)),
    )


# --------------------------------------------------------------------------------------------------
# Units


def _chosen(count: int, share: float, rng: np.random.Generator, least: int = 1) -> list[int]:
    """Return a share of 0..count-1, at least `least` of them if possible, in order."""
    if count <= 0:
        return []
    size = min(max(round(count * share), least), count)
    return sorted(rng.permutation(count)[:size].tolist())


def _deranged(places: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Return a random permutation of the positions without a fixed point (a random cycle)."""
    order = rng.permutation(len(places)).tolist()
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [places[following[i]] for i in range(len(places))]


def _swapped(place: str, word: str) -> str:
    """Return the word with the white space of its new position."""
    return word.rstrip() + place[len(place.rstrip()) :]


def _separated(sentence: str) -> str:
    return sentence if sentence[-1:].isspace() else sentence + " "


def _misspelt(word: str, rng: np.random.Generator) -> str:
    body = word.rstrip()
    if not body:
        return word
    at = int(rng.integers(len(body)))
    choice = int(rng.integers(4))
    if choice == 0 or len(body) == 1:
        other = string.ascii_lowercase[int(rng.integers(26))]
        other = other if other != body[at] else "#"
        noisy = body[:at] + other + body[at + 1 :]
    elif choice == 1:
        noisy = body[:at] + body[at + 1 :]
    elif choice == 2:
        noisy = body[:at] + body[at] + body[at:]
    else:
        at = min(at, len(body) - 2)
        noisy = body[:at] + body[at + 1] + body[at] + body[at + 2 :]
    return noisy + word[len(body) :]


def _inside_words(text: str, start: int, end: int) -> str:
    """Return text[start:end], with each cut moved forward to the next position inside a word."""

    def inside(i: int) -> bool:
        return 0 < i < len(text) and text[i - 1].isalnum() and text[i].isalnum()

    def moved(i: int) -> int:
        return next((j for j in range(i, min(i + 200, len(text))) if inside(j)), i)

    return text[moved(start) if start else 0 : moved(end) if end < len(text) else len(text)]
