"""Overlap of selections: which of them kept a document, pairs, and shares kept by group.

Choices
- A document's pattern is the set of selections that kept it, as the bits of an integer. All counts
  of overlap follow from the numbers of documents and tokens per pattern, which are exact and take
  no memory per document.
- Overlap by chance is that of independent selections of the same sizes. Selections that keep 20%
  each share 11% of their union by chance alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST = 20  # selections
LENGTHS = (0, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens, where groups of lengths begin


def patterns(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the pattern of every document, int64 [documents]: bit i if selection i kept it.

    Args:
      masks: bool [documents], of each selection.
    """
    codes = np.zeros(len(masks[0]), np.int64)
    for i, mask in enumerate(masks):
        codes |= mask.astype(np.int64) << i
    return codes


@dataclasses.dataclass
class Patterns:
    """Numbers of documents and tokens per pattern."""

    names: Sequence[str]
    documents: Counter[int] = dataclasses.field(default_factory=Counter)
    tokens: Counter[int] = dataclasses.field(default_factory=Counter)

    def add(self, codes: np.ndarray, n_tokens: np.ndarray) -> None:
        """Count documents.

        Args:
          codes: int64 [documents], see `patterns`.
          n_tokens: int [documents].
        """
        values, places = np.unique(codes, return_inverse=True)
        counts = np.bincount(places, minlength=len(values))
        tokens = np.zeros(len(values), np.int64)
        np.add.at(tokens, places, n_tokens)
        for value, count, total in zip(values.tolist(), counts, tokens, strict=True):
            self.documents[value] += int(count)
            self.tokens[value] += int(total)

    def members(self, code: int) -> list[int]:
        """Return the selections of a pattern."""
        return [i for i in range(len(self.names)) if code >> i & 1]

    def kept(self) -> list[dict[str, Any]]:
        """Return documents and tokens of each selection, with their shares of all."""
        all_documents, all_tokens = self.documents.total(), self.tokens.total()
        found = []
        for i, name in enumerate(self.names):
            n = sum(count for code, count in self.documents.items() if code >> i & 1)
            tokens = sum(count for code, count in self.tokens.items() if code >> i & 1)
            shares = {
                "share": n / max(all_documents, 1),
                "token_share": tokens / max(all_tokens, 1),
            }
            found.append({"name": name, "documents": n, "tokens": tokens} | shares)
        return found

    def pairs(self) -> list[list[dict[str, Any]]]:
        """Return for each pair of selections: `both`, `jaccard`, and `chance`, that by chance.

        `jaccard` is documents of both over documents of either; None where there are none.
        """
        size, total = len(self.names), self.documents.total()
        both = np.zeros((size, size), np.int64)
        for code, count in self.documents.items():
            inside = self.members(code)
            both[np.ix_(inside, inside)] += count
        rows = []
        for i in range(size):
            row = []
            for j in range(size):
                either = both[i, i] + both[j, j] - both[i, j]
                expected = both[i, i] * both[j, j] / max(total, 1)
                expected_either = both[i, i] + both[j, j] - expected
                row.append(
                    {
                        "both": int(both[i, j]),
                        "jaccard": float(both[i, j] / either) if either else None,
                        "chance": float(expected / expected_either) if expected_either else None,
                    }
                )
            rows.append(row)
        return rows

    def intersections(self, most: int) -> list[dict[str, Any]]:
        """Return the largest patterns: names of the selections, documents and tokens of each.

        The documents that no selection kept come first.
        """
        ranked = sorted(self.documents, key=lambda code: (-self.documents[code], code))
        ranked = [0, *[code for code in ranked if code][:most]]
        return [
            {
                "members": self.members(code),
                "names": [self.names[i] for i in self.members(code)],
                "documents": self.documents[code],
                "tokens": self.tokens[code],
            }
            for code in ranked
        ]


class Groups:
    """Shares of documents and tokens that selections kept, by group.

    Args:
      names: of the groups.
      size: number of selections.
    """

    def __init__(self, names: Sequence[str], size: int):
        self.names = list(names)
        shape = (len(self.names), size + 1)  # the last column is of all documents
        self._documents, self._tokens = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def add(self, group: np.ndarray, masks: Sequence[np.ndarray], n_tokens: np.ndarray) -> None:
        """Count documents.

        Args:
          group: int [documents], indices of their groups.
          masks: bool [documents], of each selection.
          n_tokens: int [documents].
        """
        for column, mask in enumerate([*masks, np.ones(len(group), bool)]):
            self._documents[:, column] += np.bincount(group[mask], minlength=len(self.names))
            tokens = np.zeros(len(self.names), np.int64)
            np.add.at(tokens, group[mask], n_tokens[mask])
            self._tokens[:, column] += tokens

    def rows(self) -> list[dict[str, Any]]:
        """Return the groups that have documents, each with the shares that selections kept."""
        found = []
        for i, name in enumerate(self.names):
            *kept, documents = self._documents[i].tolist()
            *kept_tokens, tokens = self._tokens[i].tolist()
            if documents:
                shares = [n / documents for n in kept]
                token_shares = [n / max(tokens, 1) for n in kept_tokens]
                row = {"name": name, "documents": documents, "tokens": tokens}
                found.append(row | {"shares": shares, "token_shares": token_shares})
        return found


def length_names() -> list[str]:
    """Return the names of the groups of lengths."""
    ends = [f"{a:,} to {b - 1:,}" for a, b in itertools.pairwise(LENGTHS)]
    return [*ends, f"{LENGTHS[-1]:,} and more"]
