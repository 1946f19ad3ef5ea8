"""Smoothed n-gram language models of token ids: the floors that a neural model has to beat.

    model = fit(documents, order=3, vocabulary_size=32_000)
    model.log_probabilities(tokens, offsets)        # float64 [tokens]

Choices
- Interpolated Kneser-Ney with one discount per order (Kneser and Ney 1995, in the form of Chen and
  Goodman 1998): D = n1 / (n1 + 2 n2), lower orders count distinct contexts. Order 1 discounts the
  token counts and interpolates with the uniform distribution over the vocabulary.
- Documents are independent: each begins with order - 1 boundary tokens, and no end of text is
  predicted, as none is scored by the likelihood scorers.
- An n-gram is a pair (id of its first n - 1 tokens, last token), so that keys of any order fit in
  64 bits. Fitting takes one sort per order: about 2 s per 10 million tokens and order on one core.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from evaluation.errors import EvaluationError


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one order, in ascending order of `keys`.

    Attributes:
      keys: int64 [m], context id * (vocabulary + 1) + token.
      counts: float64 [m], how often; below the highest order, the number of distinct contexts.
      totals, types: float64 [contexts], the sum of counts and the number of n-grams of a context.
      discount: subtracted from every count.
    """

    keys: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    types: np.ndarray
    discount: float


@dataclasses.dataclass(frozen=True)
class NgramModel:
    """Smoothed probabilities of a token after the `order` - 1 tokens before it."""

    orders: tuple[_Order, ...]
    vocabulary_size: int
    tokens: int  # of the training documents

    def log_probabilities(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return the natural log probability of every token.

        Args:
          tokens: integers [tokens], documents end to end.
          offsets: int64 [documents + 1], where each document begins.

        Returns:
          float64 [tokens].
        """
        padded, real = _padded(tokens, offsets, len(self.orders) - 1, self.vocabulary_size)
        context = np.zeros(len(padded), np.int64)  # id of the n-gram that ends before a position
        probability = np.full(len(padded), 1.0 / self.vocabulary_size)
        for order in self.orders:
            known = context >= 0
            key = np.where(known, context * (self.vocabulary_size + 1) + padded, -1)
            place = np.minimum(np.searchsorted(order.keys, key), len(order.keys) - 1)
            found = order.keys[place] == key
            count = np.where(found, order.counts[place], 0.0)
            safe = np.where(known, context, 0)
            total, types = order.totals[safe], order.types[safe]
            usable = known & (total > 0)
            total = np.where(usable, total, 1.0)
            discounted = np.maximum(count - order.discount, 0.0) / total
            mixed = discounted + order.discount * types / total * probability
            probability = np.where(usable, mixed, probability)
            context = _moved(np.where(found, place, -1))
        return np.log(probability[real])


def fit(documents: Sequence[np.ndarray], order: int, vocabulary_size: int) -> NgramModel:
    """Fit a model to documents of token ids in [0, vocabulary_size).

    Raises:
      ValueError: there is no token, or an id is outside the vocabulary.
    """
    lengths = np.asarray([len(one) for one in documents], np.int64)
    if not lengths.sum():
        raise EvaluationError("an n-gram model needs at least one token.")
    tokens = np.concatenate(documents).astype(np.int64)
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise EvaluationError(
            f"token ids {tokens.min()} to {tokens.max()} do not fit a vocabulary of "
            f"{vocabulary_size}."
        )
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    padded, real = _padded(tokens, offsets, order - 1, vocabulary_size)
    event = np.zeros(len(padded), bool)  # boundary tokens are contexts only
    event[real] = True

    context = np.zeros(len(padded), np.int64)
    tables = []  # keys, first occurrences, token counts of every order
    shorter = np.zeros(len(padded), np.int64)  # id of the n-gram one token shorter, at its end
    suffixes: list[np.ndarray] = []
    for _ in range(order):
        key = context * (vocabulary_size + 1) + padded
        keys, first, ids = np.unique(key, return_index=True, return_inverse=True)
        tables.append(
            (keys, context[first], event[first], np.bincount(ids[event], minlength=len(keys)))
        )
        suffixes.append(shorter[first])
        shorter, context = ids, np.maximum(_moved(ids), 0)  # the first is a boundary

    orders = []
    for n, (keys, contexts, is_event, counts) in enumerate(tables):
        if n + 1 < order:
            longer = tables[n + 1][2]
            counts = np.bincount(suffixes[n + 1][longer], minlength=len(keys))
        counts = np.where(is_event, counts, 0).astype(np.float64)
        size = 1 if n == 0 else len(tables[n - 1][0])
        orders.append(
            _Order(
                keys,
                counts,
                np.bincount(contexts, counts, minlength=size),
                np.bincount(contexts[counts > 0], minlength=size).astype(np.float64),
                _discount(counts),
            )
        )
    return NgramModel(tuple(orders), vocabulary_size, len(tokens))


def _discount(counts: np.ndarray) -> float:
    """Return n1 / (n1 + 2 n2), with n1 and n2 the numbers of n-grams of count 1 and 2."""
    once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return min(max(once / (once + 2 * twice), 0.1), 0.95) if once else 0.5


def _padded(
    tokens: np.ndarray, offsets: np.ndarray, pads: int, boundary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens with `pads` boundary ids before every document, and the tokens' places."""
    lengths = np.diff(offsets)
    real = np.arange(len(tokens)) + pads * (1 + np.repeat(np.arange(len(lengths)), lengths))
    padded = np.full(len(tokens) + pads * len(lengths), boundary, np.int64)
    padded[real] = tokens
    return padded, real


def _moved(ids: np.ndarray) -> np.ndarray:
    """Return the ids one position later; the first position has none."""
    moved = np.empty_like(ids)
    moved[0], moved[1:] = -1, ids[:-1]
    return moved
