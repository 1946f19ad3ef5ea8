"""Lines and sentences of documents as sparse features: their words, their form, their neighbors'.

    Home | Products | Login            a line of a menu
    The mill was built in 1794.        a line of a text

What tells them apart is the words, and the form: number of words, a final period, shares of
function words, of capitals, digits and symbols. It also matters which lines stand around a line.

Choices
- Lines of over 200 characters are divided into sentences, so that a page that was stored as one
  line is judged by its parts too.
- Form is a set of one-hot intervals, so that a linear model can prefer the middle of a range.
- A line without a letter or digit is no line: rulers and bullets are left out.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import ClassVar

import numpy as np
import pyarrow as pa

from pruning.scores.text.hashing import Features, hashed_ngrams
from pruning.scores.text.linear import Bags

_LONG = 200  # characters, from which on a line is divided into sentences
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[A-Z\"'“(])")
_ENDS = re.compile(r"[.!?…。][\"')\]”’]*$")
_PLAIN = frozenset(".,'\"!?;:()-’“” \t")

# Function words, and others among the commonest of English.
STOP_WORDS = frozenset(
    """a about all also an and any are as at be been but by can could do even first for from had has
    have he her his i if in into is it its like may me more most my not now of on one only or other
    our out over she so some such than that the their them then there these they this time to two up
    was we were what when which who will with would you""".split()  # noqa: SIM905
)

# Form of a line: name -> number of intervals.
_OWN = {
    "length": 15,
    "ended": 2,
    "stop_words": 11,
    "capitalized": 7,
    "upper_case": 7,
    "digits": 9,
    "symbols": 9,
    "commas": 5,
    "lower_start": 2,
}
_LENGTHS, _ENDED = _OWN["length"], _OWN["ended"]
_AROUND = (-2, -1, 1, 2)  # places of the neighbors whose length and end are features
_BESIDE = _LENGTHS + _ENDED + 1  # intervals for each neighbor; the last for none

FORMS = sum(_OWN.values()) + len(_AROUND) * _BESIDE


@dataclasses.dataclass(frozen=True)
class LineFeatures:
    """The features of a line: `Features.buckets` of its words, then `FORMS` of form."""

    scheme: ClassVar[str] = "lines-1"

    words: Features = Features(n=1, buckets=1 << 18)  # noqa: RUF009  frozen

    @property
    def n(self) -> int:
        return self.words.n

    @property
    def size(self) -> int:
        return self.words.buckets + FORMS


@dataclasses.dataclass(frozen=True)
class Lines:
    """The lines of some documents, end to end.

    Attributes:
      texts: of all lines.
      offsets: int64 [documents + 1]; document d has the lines offsets[d]:offsets[d + 1].
      words: float64 [lines], numbers of words, at least 1.
      forms: int64 [lines, len(_OWN)], the interval of each feature of form.
    """

    texts: list[str]
    offsets: np.ndarray
    words: np.ndarray
    forms: np.ndarray

    @classmethod
    def of(cls, documents: list[str]) -> Lines:
        """Return the lines of documents."""
        texts: list[str] = []
        forms: list[tuple[int, ...]] = []
        words: list[int] = []
        offsets = [0]
        for document in documents:
            for text in split(document):
                if found := _WORD.findall(text):
                    texts.append(text)
                    words.append(len(found))
                    forms.append(_form(text, found))
            offsets.append(len(texts))
        form = np.array(forms, np.int64).reshape(-1, len(_OWN))
        return cls(texts, np.array(offsets), np.array(words, np.float64), form)

    def bags(self, features: LineFeatures) -> Bags:
        """Return every line as a sparse vector of ones."""
        words = Bags.counted(hashed_ngrams(pa.array(self.texts, pa.large_string()), features.words))
        ones = dataclasses.replace(words, values=np.ones(len(words.values), np.float32))
        return ones.beside(self._form_bags(features.words.buckets))

    def _form_bags(self, first: int) -> Bags:
        """Return the features of form alone, from bucket `first` on."""
        starts = np.cumsum([0, *_OWN.values()])
        columns = [self.forms + starts[:-1]]
        document = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))
        for place, shift in enumerate(_AROUND):
            own = starts[-1] + place * _BESIDE
            other = np.arange(len(self.texts)) + shift
            inside = (other >= 0) & (other < len(self.texts))
            other = np.clip(other, 0, max(len(self.texts) - 1, 0))
            inside &= document[other] == document
            length, ended = self.forms[other, 0], self.forms[other, 1]
            # NOTE: a missing neighbor has one feature, so it is named twice: see `distinct`.
            columns.append(np.where(inside, own + length, own + _BESIDE - 1)[:, None])
            columns.append(np.where(inside, own + _LENGTHS + ended, own + _BESIDE - 1)[:, None])
        entries = np.concatenate(columns, axis=1)
        distinct = np.ones(entries.shape, bool)
        distinct[:, 1:] = entries[:, 1:] != entries[:, :-1]
        counts = distinct.sum(axis=1)
        buckets = (first + entries[distinct]).astype(np.int32)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Bags(buckets, np.ones(len(buckets), np.float32), offsets)


def split(document: str) -> list[str]:
    """Return lines without white space around them, long ones divided into sentences."""
    found: list[str] = []
    for line in document.splitlines():
        if line := line.strip():
            found += _SENTENCE_END.split(line) if len(line) > _LONG else [line]
    return found


def words_of(text: str) -> str:
    """Return the words in lower case, with a space before and after each, to search among."""
    return f" {' '.join(_WORD.findall(text.lower()))} "


def _form(text: str, words: list[str]) -> tuple[int, ...]:
    """Return the interval of each feature of `_OWN`."""
    count, size = len(words), len(text)
    digits = plain = commas = 0
    for character in text:
        if character.isdigit():
            digits += 1
        elif character.isalpha() or character in _PLAIN:
            plain += 1
            commas += character == ","
    return (
        min(int(2 * math.log2(count)), _LENGTHS - 1),
        int(_ENDS.search(text) is not None),
        int(10 * sum(word.lower() in STOP_WORDS for word in words) / count),
        int(6 * sum(word[0].isupper() for word in words) / count),
        int(6 * sum(word.isupper() and len(word) > 1 for word in words) / count),
        int(8 * digits / size),
        min(int(20 * (size - digits - plain) / size), _OWN["symbols"] - 1),
        min(commas, _OWN["commas"] - 1),
        int(text[0].islower()),
    )
