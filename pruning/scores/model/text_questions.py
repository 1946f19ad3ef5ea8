"""Questions around the texts of documents, for tokenizers that encode a prompt as a whole.

    "Text: {document} Is it clear?"   \\   ids of both, and the length of their common
    "Text: {document} Is it true?"    /    prefix, which is computed once

Choices
- The ids of every question are those of its whole prompt. The common prefix is found in the ids,
  not assumed, because a token at the document's end may extend into the question.
- A document that is too long is cut after a whole token of its own, so that the prompts of all
  questions fit. Questions are never cut. Its next window begins where the previous one ended.
- All questions of a judge see the same part of a document.
- The whole text is encoded for the first question of a group. For the others only its end is, from
  a space between two words well before the document's end. The preceding ids are reused if the end
  of the first question, encoded separately, gives the last ids of its whole text: then the ids
  after such a space do not depend on those before it. If there is no such space, or the ids differ,
  the whole text is encoded for every question.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from models.packing import offsets_of
from pruning.corpus.tokenizers import TextTokenizer
from pruning.scores.model.prompt import PromptError, require_room
from pruning.scores.model.scorer import Documents
from pruning.scores.model.stored_questions import Parts, Piece, Spans
from pruning.scores.model.text_prompt import TextPrompt

_TRIES = 4  # cuts of a document until the prompt fits; tokens at its end may change with the cut
_END = 48  # characters at a document's end that are encoded for every question
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
_SLACK = 8  # tokens at a document's end that may merge with a question


@dataclasses.dataclass(frozen=True)
class TextQuestions:
    """Prompts around texts.

    Attributes:
      prompts: one per question.
      groups: questions that share a window.
      max_tokens: largest number of tokens of a prompt and its part of the document.
      most: largest number of windows of a document; None for all of it.
      counted: count the document's tokens of every window, which takes one more encoding.
    """

    prompts: Sequence[TextPrompt]
    groups: Sequence[Sequence[int]]
    max_tokens: int
    most: int | None = 1
    counted: bool = False

    def __post_init__(self) -> None:
        require_room(max(map(len, self.prompts)), self.max_tokens)

    @property
    def _tokenizer(self) -> TextTokenizer:
        return self.prompts[0].tokenizer

    @functools.cached_property
    def _before(self) -> list[int]:
        """Numbers of tokens before the document, by question."""
        encoded = self._tokenizer.encode_template
        return [len(prompt.begin) + len(encoded(prompt.before)) for prompt in self.prompts]

    @functools.cached_property
    def _bounds(self) -> list[int]:
        return [self.longest(group) for group in self.groups]

    def longest(self, group: Sequence[int]) -> int:
        """Return the largest number of tokens of a window of the group."""
        behind = sorted(len(self.prompts[q]) - self._before[q] + _SLACK for q in group)
        return self.max_tokens + sum(behind[:-1])

    def read(self, texts: Sequence[str]) -> Documents:
        """Return the tokens of all windows of every text; an empty text has none.

        The tokens of a window are, group by group, the common prefix of all questions and the rest
        of each. `notes` holds, window by window, the tokens of the document and these lengths.
        """
        filled = [i for i, text in enumerate(texts) if text]
        encoded = self.encode([texts[i] for i in filled])
        tokens: list[list[int]] = [[] for _ in texts]
        notes: list[list[int]] = [[] for _ in texts]
        lost = np.zeros(len(texts), np.int64)
        for place, i in enumerate(filled):
            whole = [ids[place] for ids in encoded]
            if self._excess(whole) <= 0:
                count = len(self._tokenizer.encode(texts[i])) if self.counted else 1
                self._add(whole, count, tokens[i], notes[i])
            else:
                lost[i] = self._cut(texts[i], whole, tokens[i], notes[i])
        found = Documents.of(tokens)
        return Documents(found.tokens, found.offsets, lost, Documents.of(notes))

    def encode(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Return the ids of every question around every text, untruncated: [questions][texts]."""
        found: list[list[list[int]]] = [[] for _ in self.prompts]
        for group in self.groups:
            first = self.prompts[group[0]]
            whole, plain = first.encode_checked(texts)
            found[group[0]] = whole
            if len(group) == 1:
                continue
            start = len(first.before)
            cuts = [
                # A template may strip the document's beginning.
                _cut_between_words(start, text)
                if fit and first.whole(text).startswith(text[:1], start)
                else 0
                for text, fit in zip(texts, plain, strict=True)
            ]
            some = [i for i, cut in enumerate(cuts) if cut]
            ends = self._tokenizer.encode_templates(
                [first.whole(texts[i])[cuts[i] :] for i in some]
            )
            before = {
                i: whole[i][: -len(end)]
                for i, end in zip(some, ends, strict=True)
                if end and whole[i][-len(end) :] == end
            }
            for question in group[1:]:
                found[question] = self._like(self.prompts[question], texts, cuts, before)
        return found

    def _like(
        self,
        prompt: TextPrompt,
        texts: Sequence[str],
        cuts: list[int],
        before: dict[int, list[int]],
    ) -> list[list[int]]:
        """Return the ids of a question, if those before a character are known for some texts."""
        rest = [i for i in range(len(texts)) if i not in before]
        found: dict[int, list[int]] = dict(
            zip(rest, prompt.encode([texts[i] for i in rest]), strict=True)
        )
        ends = self._tokenizer.encode_templates([prompt.whole(texts[i])[cuts[i] :] for i in before])
        for (i, ids), end in zip(before.items(), ends, strict=True):
            found[i] = ids + end
        return [found[i] for i in range(len(texts))]

    def pretend(self, lengths: np.ndarray) -> Documents:
        """Return documents as `read` would, of these lengths and with arbitrary ids."""
        room = self.max_tokens - max(map(len, self.prompts))
        tokens: list[list[int]] = []
        notes: list[list[int]] = []
        for length in lengths.tolist():
            count = -(-length // room)
            count = count if self.most is None else min(count, self.most)
            rows = [self._sizes(min(length - w * room, room)) for w in range(count)]
            notes.append([number for row in rows for number in row])
            tokens.append([0] * sum(sum(row[1:]) for row in rows))
        found = Documents.of(tokens)
        lost = np.zeros(len(lengths), np.int64)
        return Documents(found.tokens, found.offsets, lost, Documents.of(notes))

    def _sizes(self, shown: int) -> list[int]:
        row = [shown]
        for group in self.groups:
            shared = min(self._before[q] for q in group) + shown if len(group) > 1 else 0
            row += [shared, *(len(self.prompts[q]) + shown - shared for q in group)]
        return row

    def _excess(self, whole: Sequence[Sequence[int]]) -> int:
        """Return the number of tokens by which prompts exceed the limit; 0 or less if they fit."""
        excess = max(map(len, whole)) - self.max_tokens
        for group, bound in zip(self.groups, self._bounds, strict=True):
            if len(group) > 1:
                ids = [whole[q] for q in group]
                shared = _shared(ids)
                excess = max(excess, shared + sum(len(own) - shared for own in ids) - bound)
        return excess

    def _add(
        self, whole: Sequence[list[int]], count: int, tokens: list[int], notes: list[int]
    ) -> None:
        """Append one window's tokens, and its notes."""
        notes.append(max(count, 1))
        for group in self.groups:
            ids = [whole[q] for q in group]
            shared = _shared(ids) if len(ids) > 1 else 0
            notes.append(shared)
            tokens += ids[0][:shared]
            for own in ids:
                notes.append(len(own) - shared)
                tokens += own[shared:]

    def _cut(
        self, text: str, whole: Sequence[list[int]], tokens: list[int], notes: list[int]
    ) -> int:
        """Append the windows of a document that does not fit into one; return the tokens lost."""
        ends = self._tokenizer.token_ends(text)
        begin, begin_text, size, windows = 0, 0, len(ends), 0
        excess = self._excess(whole)
        while begin < len(ends) and windows != self.most:
            end = min(len(ends), begin + size)
            for _ in range(_TRIES):
                end = max(end - max(excess, 0), begin)
                end_text = len(text) if end == len(ends) else ends[end - 1] if end else 0
                part = text[begin_text:end_text]
                ids = [of_question[0] for of_question in self.encode([part])]
                excess = self._excess(ids)
                if excess <= 0:
                    break
            if excess > 0 or (end <= begin and windows):
                raise PromptError(
                    f"a document cannot be cut so that its prompt has {self.max_tokens} tokens: it "
                    f"has {excess} more."
                )
            self._add(ids, end - begin, tokens, notes)
            if windows == 0:
                size = max(end, 1)
            begin, begin_text, windows, excess = end, end_text, windows + 1, 0
            if end == 0:  # the first token alone does not fit
                break
        return len(ends) - begin

    # ----------------------------------------------------------------------------------------------
    # Results of `read`

    def _notes(self, documents: Documents) -> np.ndarray:
        assert documents.notes is not None  # set by `read`
        width = 1 + sum(1 + len(group) for group in self.groups)
        return documents.notes.tokens.reshape(-1, width).astype(np.int64)

    def spans(self, documents: Documents) -> Spans:
        """Return the windows of documents that were read."""
        notes = self._notes(documents)
        assert documents.notes is not None and documents.lost is not None
        counts = documents.notes.lengths // notes.shape[1]
        document = np.repeat(np.arange(len(documents)), counts)
        return Spans(document, notes[:, 0], documents.lost)

    def parts(self, documents: Documents, group: Sequence[int]) -> Parts:
        """Return the tokens of all windows for one of the groups."""
        lengths = self._notes(documents)[:, 1:]
        starts = offsets_of(lengths.reshape(-1))[:-1].reshape(lengths.shape)
        column = 0
        for other in self.groups:
            if list(other) == list(group):
                break
            column += 1 + len(other)
        pieces = [
            Piece(documents.tokens, starts[:, k], lengths[:, k])
            for k in range(column, column + 1 + len(group))
        ]
        return Parts(pieces[:1], [[piece] for piece in pieces[1:]])


def _cut_between_words(before: int, text: str) -> int:
    """Return the index in its prompt of a space between two words of a document; 0 for none.

    Another such space, and _END characters, are between it and the document's end.

    Args:
      before: number of characters before the document.
    """
    start = max(len(text) - 4 * _END, 0)
    spaces = [found.start() for found in _BETWEEN_WORDS.finditer(text, start, len(text) - _END)]
    return before + spaces[-2] if len(spaces) > 1 else 0


def _shared(ids: Sequence[Sequence[int]]) -> int:
    """Return the length of the common prefix of all sequences, leaving at least one id of each."""
    most = min(map(len, ids)) - 1
    first = np.asarray(ids[0][:most])
    for other in ids[1:]:
        differ = np.flatnonzero(first[:most] != np.asarray(other[:most]))
        most = int(differ[0]) if len(differ) else most
    return most
