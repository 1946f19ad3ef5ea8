"""Answers to a question: token ids of their spellings, and probabilities from a model's answers.

    "yes" -> ("yes", "Yes")            spellings; the answer's probability is the sum of theirs
    "Yes, indeed" -> 5 71 9            several tokens: P(5) P(71 | 5) P(9 | 5 71), all in one pass

Choices
- An answer's probability is the probability that the model's reply begins with one of its
  spellings. Equal token sequences count once, and a spelling that begins with another one of the
  same answer adds nothing. Two answers that one reply may both give are refused, because their
  probabilities would not add up.
- Every spelling is encoded separately: " yes" and "yes" differ if they do in the tokenizer.
- The model reads the tokens of a spelling before its last one after the question, in a separate
  branch: no spelling attends to another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pruning.corpus.tokenizers import Tokenizer
from pruning.scores.model.scorer import ScoreError

Ids = tuple[int, ...]


def spelled(
    question: str, answers: Mapping[str, Sequence[str]], tokenizer: Tokenizer
) -> dict[str, tuple[Ids, ...]]:
    """Return the distinct token sequences of every answer.

    Args:
      question: name of the question, for errors.
      answers: name -> spellings.

    Raises:
      ScoreError: an answer has no spelling, a spelling has no tokens or unknown ones, or one reply
        may give two answers.
    """
    found: dict[str, tuple[Ids, ...]] = {}
    for name, spellings in answers.items():
        if not spellings:
            raise ScoreError(
                f"{question}: the answer {name!r} is empty: give at least one spelling."
            )
        ids = dict.fromkeys(_ids(question, spelling, tokenizer) for spelling in spellings)
        found[name] = tuple(
            own for own in ids if not any(own != o and own[: len(o)] == o for o in ids)
        )
    every = [(name, own) for name, spellings in found.items() for own in spellings]
    for name, own in every:
        for other, longer in every:
            if name != other and longer[: len(own)] == own:
                raise ScoreError(
                    f"{question}: the tokens {tokenizer.pieces(list(own))} of the answer {name!r} "
                    f"begin an answer of {other!r}, too: a reply could count for both. Give "
                    'spellings that end, such as "1." and "10.".'
                )
    return found


def _ids(question: str, spelling: str, tokenizer: Tokenizer) -> Ids:
    ids = tuple(int(i) for i in tokenizer.encode(spelling))
    if not ids or tokenizer.unknown_id in ids:
        what = "no tokens" if not ids else f"unknown tokens ({tokenizer.pieces(list(ids))})"
        raise ScoreError(
            f"{question}: the spelling {spelling!r} has {what} in this tokenizer; choose another."
        )
    return ids


@dataclasses.dataclass(frozen=True)
class Reading:
    """Tokens that a model reads after a question, and the points where answers are read.

    Attributes:
      tails: the tokens of every branch after the question.
      candidates: for every point, the tokens whose probabilities are read there. The first point is
        the question's end; the others are the positions of all tails, in order.
      terms: answer -> spelling -> (point, index of the candidate) of each of its tokens.
    """

    tails: tuple[Ids, ...]
    candidates: tuple[Ids, ...]
    terms: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]

    @classmethod
    def of(cls, answers: Sequence[Sequence[Ids]], start: int | None) -> Reading:
        """Lay out the spellings of every answer.

        Args:
          answers: from `spelled`.
          start: the id that a decoder begins with, which every tail repeats; None if the answer
            follows the question in the same text.
        """
        first = tuple(dict.fromkeys(own[0] for answer in answers for own in answer))
        tails: list[Ids] = []
        candidates: list[Ids] = [first]
        terms = []
        for answer in answers:
            of_answer = []
            for own in answer:
                places = [(0, first.index(own[0]))]
                if len(own) > 1:
                    tails.append(own[:-1] if start is None else (start, *own[:-1]))
                    if start is not None:
                        candidates.append(())
                    for token in own[1:]:
                        places.append((len(candidates), 0))
                        candidates.append((token,))
                of_answer.append(tuple(places))
            terms.append(tuple(of_answer))
        return cls(tuple(tails), tuple(candidates), tuple(terms))

    @property
    def points(self) -> int:
        """Number of points."""
        return len(self.candidates)

    def log_probabilities(self, read: np.ndarray) -> np.ndarray:
        """Return log P of every answer, float64 [windows, answers].

        Args:
          read: log-probabilities of the candidates, [windows, points, candidates].
        """
        columns = []
        for answer in self.terms:
            spellings = [
                np.sum([read[:, point, place] for point, place in places], axis=0, dtype=np.float64)
                for places in answer
            ]
            columns.append(np.logaddexp.reduce(np.stack(spellings), axis=0))
        return np.stack(columns, axis=1)


def expected_weight(log_probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean weight of the answer, conditional on being one of the answers, float64 [n].

    Args:
      log_probabilities: [n, answers].
      weights: [answers].
    """
    highest = log_probabilities.max(axis=1, keepdims=True, initial=-np.inf)
    shares = np.exp(log_probabilities - highest)
    return shares @ weights / shares.sum(axis=1)


def mass_on_none(log_probabilities: np.ndarray) -> np.ndarray:
    """Return the probability of a reply that begins with none of the answers, float64 [n]."""
    return np.maximum(1 - np.exp(log_probabilities).sum(axis=1), 0.0)
