"""Questions to a judge about every document: packed windows out, answers by document back.

    decoder-only    one window per document: shared tokens | question | question | ...
    encoder-decoder one window per document and question; the decoder reads the answers

Choices
- Decoder-only judges compute the common prefix of the questions, which includes the document, once.
  Each question is a branch: it attends to the prefix and to itself, at the positions that it would
  have alone. The document has to come before the question, because only equal beginnings of prompts
  are shared. A question whose prompt begins differently has a separate window.
- An encoder reads its whole input in both directions, so several questions are several inputs.
- Answers of several tokens are branches after their question, or, in a decoder, parallel targets;
  one pass reads all of them.
- A single question with answers of one token needs neither branches nor explicit positions: its
  program is that of a packed row of texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from models.packing import Side, Windows, offsets_of, within
from pruning.corpus.tokenizers import JsonTokenizer, Tokenizer, require_sentencepiece
from pruning.corpus.vocabulary import TextVocabulary
from pruning.scores.model.answers import Reading
from pruning.scores.model.chat import render
from pruning.scores.model.prompt import Prompt
from pruning.scores.model.scorer import Documents, ScoreError
from pruning.scores.model.stored_questions import Piece, Spans, StoredQuestions, joined
from pruning.scores.model.text_prompt import TextPrompt
from pruning.scores.model.text_questions import TextQuestions

ONE_POINT = Reading((), ((),), ())  # the end of the question


@dataclasses.dataclass(frozen=True)
class Wording:
    """Wording of questions to a judge.

    Attributes:
      max_tokens, chat, system, thinking: as in `AskLLM`.
    """

    max_tokens: int
    chat: bool
    system: str | None
    thinking: bool

    def prompt(self, question: str, tokenizer: Tokenizer, config: Any) -> Prompt | TextPrompt:
        """Return a question's prompt for a model with this configuration.

        Raises:
          ScoreError, VocabularyError: prompt, chat template and tokenizer are incompatible.
        """
        if not isinstance(tokenizer, JsonTokenizer):
            vocabulary = require_sentencepiece(tokenizer, "a prompt around stored tokens")
            if self.chat:
                raise ScoreError(
                    "chat=True wants a model with a tokenizer.json and a chat template."
                )
            begin, end = config.text_prefix, config.text_suffix
            if isinstance(vocabulary, TextVocabulary) or not vocabulary.joins_at_white_space:
                whole = TextVocabulary.of(vocabulary)
                return TextPrompt(whole, question, begin=begin, end=end)
            return Prompt.of(question, vocabulary, begin, end)
        if self.chat:
            if tokenizer.chat_template is None:
                raise ScoreError(
                    "chat=True wants a chat template, and none lies beside this model's tokenizer "
                    "(tokenizer_config.json or chat_template.jinja): set chat=False."
                )
            frame = render(tokenizer.chat_template, tokenizer.special, self.system, self.thinking)
            return TextPrompt(tokenizer, question, frame)
        begin, end = tokenizer.frame
        if not config.has_encoder:
            end = ()  # the answer follows the question without an EOS
        return TextPrompt(tokenizer, question, begin=begin, end=end)


@dataclasses.dataclass(frozen=True)
class Inquiry:
    """Questions prepared for one model and tokenizer.

    Attributes:
      config: configuration of the model.
      prompts: one per question, all `Prompt` or all `TextPrompt`.
      readings: the points where answers are read, one per question.
      max_tokens: largest number of tokens of a prompt and its part of a document.
      most: largest number of windows of a document; None for all of it.
      counted: count the document's tokens of every window exactly.
      numbered: give every answer position the number of its point.
    """

    config: Any
    prompts: Sequence[Prompt | TextPrompt]
    readings: Sequence[Reading]
    max_tokens: int
    most: int | None = 1
    counted: bool = False
    numbered: bool = True
    groups: list[list[int]] = dataclasses.field(init=False)
    source: StoredQuestions | TextQuestions = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        positions = self.config.max_positions
        longest = self.max_tokens + max(len(t) for r in self.readings for t in ((), *r.tails))
        if not self.config.has_encoder and positions is not None and longest > positions:
            raise ScoreError(
                f"max_tokens={self.max_tokens} with the answers' tokens makes {longest}, and the "
                f"model has {positions} positions: give less."
            )
        by_beginning: dict[Any, list[int]] = {}
        for number, prompt in enumerate(self.prompts):
            begins = prompt.before if isinstance(prompt, TextPrompt) else prompt.prefix.tobytes()
            by_beginning.setdefault(number if self.config.has_encoder else begins, []).append(
                number
            )
        groups = list(by_beginning.values())
        texts = [prompt for prompt in self.prompts if isinstance(prompt, TextPrompt)]
        stored = [prompt for prompt in self.prompts if isinstance(prompt, Prompt)]
        source: StoredQuestions | TextQuestions
        if texts:
            source = TextQuestions(texts, groups, self.max_tokens, self.most, self.counted)
        else:
            source = StoredQuestions(stored, self.max_tokens, self.most)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "source", source)

    @property
    def read(self) -> Callable[[Sequence[str]], Documents] | None:
        """Documents from texts, see `Prepared.read`."""
        return self.source.read if isinstance(self.source, TextQuestions) else None

    @property
    def pretend(self) -> Callable[[np.ndarray], Documents] | None:
        """Documents of given lengths, see `Prepared.pretend`."""
        return self.source.pretend if isinstance(self.source, TextQuestions) else None

    @property
    def sides(self) -> tuple[str, str]:
        """Names of the windows' sides."""
        return ("encoder", "decoder") if self.config.has_encoder else ("decoder", "answer")

    @property
    def longest(self) -> tuple[int, int]:
        """Largest number of positions of a window, for each side."""
        if self.config.has_encoder:
            return self.max_tokens, max(map(self._points, self.groups))
        first = max(
            self.source.longest(group) + sum(len(t) for q in group for t in self.readings[q].tails)
            for group in self.groups
        )
        return first, max(map(self._points, self.groups))

    @property
    def _branched(self) -> bool:
        """True if a window holds more than one text."""
        return any(len(group) > 1 for group in self.groups) or any(r.tails for r in self.readings)

    def _points(self, group: Sequence[int]) -> int:
        return sum(self.readings[question].points for question in group)

    @property
    def point_tokens(self) -> np.ndarray:
        """The candidates of every point, in the order of the groups, int32 [points, most]."""
        points = [
            ids for group in self.groups for q in group for ids in self.readings[q].candidates
        ]
        table = np.zeros((len(points), max(map(len, points))), np.int32)
        for row, ids in zip(table, points, strict=True):
            row[: len(ids)] = ids
        return table

    def spans(self, documents: Documents) -> Spans:
        """Return the document and the part of it that every window of a group shows."""
        filled = np.flatnonzero(documents.lengths)
        spans = self.source.spans(documents.take(filled))
        lost = np.zeros(len(documents), np.int64)
        lost[filled] = spans.lost
        return Spans(filled[spans.document], spans.tokens, lost)

    def windows(self, documents: Documents) -> Windows:
        """Return the concatenated windows of all groups."""
        filled = np.flatnonzero(documents.lengths)
        shown = documents.take(filled)
        owner = filled[self.source.spans(shown).document]
        sides = []
        point = 0
        for group in self.groups:
            make = self._encoded if self.config.has_encoder else self._decoded
            sides.append(make(shown, group, len(owner), point))
            point += self._points(group)
        both = tuple(_concatenated(parts) for parts in zip(*sides, strict=True))
        return Windows(np.tile(owner, len(self.groups)), both)

    def _encoded(
        self, documents: Documents, group: Sequence[int], count: int, point: int
    ) -> tuple[Side, Side]:
        """Return the prompts of one question, and the decoder's targets for its answers."""
        shared, own = self.source.parts(documents, group)
        tokens, lengths = joined([*shared, *own[0]], count)
        encoder = Side("encoder", offsets_of(lengths.sum(axis=1)), {"encoder_input_tokens": tokens})
        tails = self.readings[group[0]].tails
        start = (self.config.start_id,)
        targets = [start, *tails]
        inputs = np.array([token for target in targets for token in target], np.int32)
        features = {"decoder_input_tokens": np.tile(inputs, count)}
        if self.numbered:
            points = point + np.arange(len(inputs), dtype=np.int32)
            features["decoder_points"] = np.tile(points, count)
        if self._branched:
            reach = [np.arange(len(target) - 1, -1, -1, dtype=np.int32) for target in targets]
            features["decoder_reach"] = np.tile(np.concatenate(reach), count)
        return encoder, Side("decoder", np.arange(count + 1) * len(inputs), features)

    def _decoded(
        self, documents: Documents, group: Sequence[int], count: int, point: int
    ) -> tuple[Side, Side]:
        """Return the shared tokens followed by their branches, and the points of the answers."""
        shared, own = self.source.parts(documents, group)
        blocks = [shared]
        for question, pieces in zip(group, own, strict=True):
            blocks.append(pieces)
            blocks += [[Piece.fixed(tail, count)] for tail in self.readings[question].tails]
        tokens, of_pieces = joined([piece for block in blocks for piece in block], count)
        total = of_pieces.sum(axis=1)
        features = {"decoder_input_tokens": tokens}
        points = self._points(group)
        answer: dict[str, np.ndarray] = {}
        if self.numbered:
            answer["answer_points"] = np.tile(point + np.arange(points, dtype=np.int32), count)
        if self._branched:
            ends = np.cumsum([0, *map(len, blocks)])
            lengths = np.add.reduceat(of_pieces, ends[:-1], axis=1)  # [windows, blocks]
            tree = _Tree.of(lengths, [len(self.readings[question].tails) for question in group])
            flat = lengths.reshape(-1)
            index = within(total)
            features["decoder_positions"] = index - np.repeat(tree.shift.reshape(-1), flat)
            features["decoder_reach"] = np.repeat(tree.until.reshape(-1), flat) - index
            answer["answer_before_last"] = (total[:, None] - 1 - tree.points).reshape(-1)
        return (
            Side("decoder", offsets_of(total), features),
            Side("answer", np.arange(count + 1) * points, answer),
        )

    def by_question(self, answers: np.ndarray) -> list[np.ndarray]:
        """Return the answers of every question, [windows of a group, points, ...] each.

        Args:
          answers: at the positions of the last side of all windows, [positions, ...].
        """
        windows = len(answers) // sum(map(self._points, self.groups))
        found: dict[int, np.ndarray] = {}
        first = 0
        for group in self.groups:
            points = self._points(group)
            part = answers[first : first + windows * points]
            part = part.reshape(windows, points, *answers.shape[1:])
            first += windows * points
            before = 0
            for question in group:
                found[question] = part[:, before : before + self.readings[question].points]
                before += self.readings[question].points
        return [found[question] for question in range(len(self.prompts))]


@dataclasses.dataclass(frozen=True)
class _Tree:
    """Structure of blocks of tokens: questions after shared tokens, spellings after questions.

    Attributes:
      shift: int64 [windows, blocks], index of a block's tokens minus their position in its text.
      until: int64 [windows, blocks], the last index that attends to a block's tokens.
      points: int64 [windows, points], indices at which answers are read.
    """

    shift: np.ndarray
    until: np.ndarray
    points: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, tails: Sequence[int]) -> _Tree:
        """Build from the blocks' lengths [windows, blocks] and the number of tails per question."""
        starts = np.cumsum(lengths, axis=1) - lengths
        ends = starts + lengths
        shift, until = np.zeros_like(lengths), ends - 1
        until[:, 0] = ends[:, -1] - 1
        points: list[np.ndarray] = []
        block = 1
        for count in tails:
            own = range(block + 1, block + 1 + count)
            shift[:, block] = starts[:, block] - ends[:, 0]
            until[:, block] = ends[:, block + count] - 1
            points.append(ends[:, block, None] - 1)
            for tail in own:
                shift[:, tail] = starts[:, tail] - ends[:, block] + shift[:, block]
                size = int(lengths[0, tail]) if len(lengths) else 0
                points.append(starts[:, tail, None] + np.arange(size))
            block += 1 + count
        return cls(shift, until, np.concatenate(points, axis=1))


def _concatenated(parts: Sequence[Side]) -> Side:
    """Return the concatenated windows of several sides of one name."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    features = {
        name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features
    }
    return Side(parts[0].name, offsets_of(lengths), features)
