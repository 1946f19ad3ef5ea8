"""Prompts for a server: windows of a document in the prompts of all questions.

    IdPrompts     with the model's tokenizer: ids of the whole prompts, as a local judge reads them
    TextPrompts   without it: texts, which the server tokenizes, or messages for its chat template

Choices
- Ids are the same as a local judge's, with the same windows, templates and answers of several
  tokens. No document can end its own turn.
- Without a tokenizer, documents are cut between words, and their tokens are counted with the
  corpus's vocabulary. The server recognizes special tokens in documents, and answers have to be
  single tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pruning.corpus.tokenizers import JsonTokenizer, Tokenizer
from pruning.scores.model.answers import Reading, spelled
from pruning.scores.model.inquiry import Wording
from pruning.scores.model.prompt import require_room
from pruning.scores.model.scorer import ScoreError
from pruning.scores.model.served import listing
from pruning.scores.model.served.listing import Candidate
from pruning.scores.model.text_prompt import TextPrompt
from pruning.scores.model.text_questions import TextQuestions

_SLOT = "{document}"
_WORD = re.compile(r"\S+\s*|\s+")

Request = tuple[str, dict[str, Any]]  # path and body


class Question(NamedTuple):
    """A question to a judge.

    Attributes:
      name: for errors.
      prompt: contains `{document}` once.
      answers: name -> spellings.
    """

    name: str
    prompt: str
    answers: Mapping[str, Sequence[str]]


class Window(NamedTuple):
    """A part of a document in the prompts of all questions.

    Attributes:
      tokens: number of the document's tokens in it.
      prompts: one per question; ids or text.
    """

    tokens: int
    prompts: list[Any]


class Point(NamedTuple):
    """A position at which answers are read.

    Attributes:
      after: ids between the prompt and the position.
      candidates: tokens whose probabilities are read there.
    """

    after: tuple[int, ...]
    candidates: list[Candidate]


class Prompts(Protocol):
    """Prompts of all questions around documents."""

    @property
    def readings(self) -> list[Reading]:
        """Places at which answers are read, one per question."""
        ...

    @property
    def points(self) -> list[list[Point]]:
        """The positions of every question."""
        ...

    @property
    def chats(self) -> bool:
        """True if the server applies its chat template."""
        ...

    def windows(self, text: str) -> tuple[list[Window], int]:
        """Return the windows of a document and the number of tokens that none shows."""
        ...

    def request(
        self, model: str, prompt: Any, after: tuple[int, ...], top: int, further: Mapping[str, Any]
    ) -> Request:
        """Return the request for the token after a prompt."""
        ...

    def count(self, prompt: Any) -> int:
        """Return the number of tokens of a prompt, exact or estimated."""
        ...


class IdPrompts:
    """Prompts as ids, by the model's tokenizer."""

    chats = False

    def __init__(
        self,
        questions: Sequence[Question],
        wording: Wording,
        tokenizer: Tokenizer,
        most: int | None,
    ):
        """Encode prompts and answers.

        Raises:
          ScoreError, VocabularyError: prompts, template, answers or tokenizer are unsuitable.
        """
        if not isinstance(tokenizer, JsonTokenizer):
            raise ScoreError(
                "a served judge's tokenizer is a tokenizer.json; without Score.tokenizer the "
                "server tokenizes the prompts."
            )
        decoder: Any = types.SimpleNamespace(has_encoder=False)
        prompts = [wording.prompt(q.prompt, tokenizer, decoder) for q in questions]
        answers = [spelled(q.name, q.answers, tokenizer) for q in questions]
        self._tokenizer = tokenizer
        self.readings = [Reading.of(list(found.values()), None) for found in answers]
        self.points = [self._points(reading, tokenizer) for reading in self.readings]
        self._source = TextQuestions(
            [prompt for prompt in prompts if isinstance(prompt, TextPrompt)],
            [[number] for number in range(len(questions))],
            wording.max_tokens,
            most,
            counted=True,
        )

    @staticmethod
    def _points(reading: Reading, tokenizer: Tokenizer) -> list[Point]:
        after = [(), *(tail[:n] for tail in reading.tails for n in range(1, len(tail) + 1))]
        found = []
        for ids, wanted in zip(after, reading.candidates, strict=True):
            texts = [piece.encode() for piece in tokenizer.pieces(wanted)]
            found.append(Point(ids, list(map(Candidate, wanted, texts))))
        return found

    def require_same_tokens(
        self, ids: Sequence[int], texts: Collection[bytes | None], address: str
    ) -> None:
        """Raise ScoreError if a server's most probable tokens have other texts here."""
        theirs = {text.strip() for text in texts if text is not None}
        size = self._tokenizer.size
        own = [p.encode().strip() for p in self._tokenizer.pieces([i for i in ids if i < size])]
        known = [
            piece for piece in own if piece and "\N{REPLACEMENT CHARACTER}".encode() not in piece
        ]
        same = sum(piece in theirs for piece in known)
        if 2 * same < len(known):
            raise ScoreError(
                f"Score.tokenizer is not the one of the model at {address}: of its {len(known)} "
                f"most probable tokens, {len(known) - same} have other texts in this tokenizer."
            )

    def windows(self, text: str) -> tuple[list[Window], int]:
        """Return the windows of a document and the number of tokens that none shows."""
        read = self._source.read([text])
        spans = self._source.spans(read)
        pieces = [self._source.parts(read, [q]).own[0][0] for q in range(len(self.readings))]
        found = [
            Window(
                int(spans.tokens[w]),
                [p.source[p.starts[w] : p.starts[w] + p.lengths[w]].tolist() for p in pieces],
            )
            for w in range(len(spans.tokens))
        ]
        return found, int(spans.lost[0])

    def request(
        self, model: str, prompt: Any, after: tuple[int, ...], top: int, further: Mapping[str, Any]
    ) -> Request:
        """Return the request for the token after a prompt."""
        return listing.completion(model, [*prompt, *after], top, further)

    def count(self, prompt: Any) -> int:
        """Return the number of ids."""
        return len(prompt)


@dataclasses.dataclass(frozen=True)
class TextPrompts:
    """Prompts as texts, for a server that tokenizes them.

    Attributes:
      questions: all questions.
      wording: max_tokens counts tokens of `vocabulary`.
      vocabulary: the corpus's.
      most: largest number of windows of a document; None for all of it.
    """

    questions: Sequence[Question]
    wording: Wording
    vocabulary: Tokenizer
    most: int | None

    def __post_init__(self) -> None:
        for question in self.questions:
            if (count := question.prompt.count(_SLOT)) != 1:
                raise ScoreError(
                    f"{question.name}: the prompt has {_SLOT} {count} times; it must have it once."
                )
        require_room(self._longest, self.wording.max_tokens)

    @property
    def chats(self) -> bool:
        return self.wording.chat

    @functools.cached_property
    def _longest(self) -> int:
        texts = [q.prompt.replace(_SLOT, " ") + (self.wording.system or "") for q in self.questions]
        return max(map(self.count, texts))

    @functools.cached_property
    def readings(self) -> list[Reading]:
        found = []
        for question in self.questions:
            answers, place = [], 0
            for spellings in question.answers.values():
                distinct = range(place, place := place + len(dict.fromkeys(spellings)))
                answers.append([(number,) for number in distinct])
            found.append(Reading.of(answers, None))
        return found

    @functools.cached_property
    def points(self) -> list[list[Point]]:
        return [
            [
                Point(
                    (),
                    [
                        Candidate(None, spelling.encode())
                        for spellings in question.answers.values()
                        for spelling in dict.fromkeys(spellings)
                    ],
                )
            ]
            for question in self.questions
        ]

    def windows(self, text: str) -> tuple[list[Window], int]:
        """Return the windows of a document and the number of tokens that none shows."""
        room = self.wording.max_tokens - self._longest
        parts = _cut(text, room, self.count)
        shown = parts if self.most is None else parts[: self.most]
        found = [Window(n, [q.prompt.replace(_SLOT, p) for q in self.questions]) for p, n in shown]
        return found, sum(count for _, count in parts[len(shown) :])

    def request(
        self, model: str, prompt: Any, after: tuple[int, ...], top: int, further: Mapping[str, Any]
    ) -> Request:
        """Return the request for the first token of the reply."""
        if not self.wording.chat:
            return listing.completion(model, prompt, top, further)
        system = self.wording.system
        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return listing.chat(model, messages, top, further)

    def count(self, prompt: Any) -> int:
        """Return the number of tokens, by the corpus's vocabulary."""
        return len(self.vocabulary.encode(prompt))


def _cut(text: str, room: int, count: Callable[[str], int]) -> list[tuple[str, int]]:
    """Cut a text between words into parts of at most `room` tokens; return parts and counts."""
    whole = count(text)
    if whole <= room:
        return [(text, whole)]
    parts: list[tuple[str, int]] = []
    first, held = 0, 0
    for found in _WORD.finditer(text):
        own = count(found[0])
        if held and held + own > room:
            parts.append((text[first : found.start()], held))
            first, held = found.start(), 0
        begin = found.start()
        while own > room:  # a word longer than a window
            size = max((found.end() - begin) * room // own, 1)
            while (taken := count(text[begin : begin + size])) > room and size > 1:
                size //= 2
            parts.append((text[begin : begin + size], taken))
            begin += size
            first, own = begin, own - taken
            # NOTE: counting the rest after every part would be quadratic.
            if own <= room or begin == found.end():
                own = count(text[begin : found.end()])
        held += own
    if first < len(text):
        parts.append((text[first:], held))
    return parts
