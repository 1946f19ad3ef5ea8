"""Splitting of long documents into parts of a bounded number of tokens.

Choices
- Parts are substrings: concatenated they are the text, to the character.
- A part is tokenized on its own, as a document is. Its number of tokens is counted, not estimated.
- A part ends after a paragraph, a line, a sentence or a word, the first of these that occurs in the
  second half of the part; text without any is cut between characters.
- Parts of a document are of about equal size, so that no short remainder is left.
- Whitespace stays at the end of the part before it. Text without tokens (whitespace, invisible
  characters) is no part of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

LEAST_TOKENS = 64  # a single character (U+FDFA) is 33 bytes after NFKC, and as many tokens

_SEPARATORS = ("\n\n", "\n", ". ", "。", " ")


def split(text: str, n_tokens: int, most: int, count: Callable[[str], int]) -> list[str]:
    """Return the parts of a text, each of 1 to `most` tokens; concatenated, they are the text.

    A part that ends with text without tokens of its own can exceed `most`, where a tokenizer counts
    more tokens for the whole than for its pieces.

    Args:
      text: a text of `n_tokens` tokens.
      most: largest number of tokens of a part, at least `LEAST_TOKENS`.
      count: returns the number of tokens of a text.
    """
    parts: list[str] = []
    begin, left = 0, n_tokens  # `left` is exact at the start, then an estimate
    while begin < len(text):
        if left <= most:
            left = count(text[begin:])
        if left <= most:
            end = len(text)
        else:
            guess = begin + (len(text) - begin) // math.ceil(left / most)
            end = _end(text, begin, guess, most, count)
        part = text[begin:end]
        n = count(part)
        if not n and parts:
            parts[-1] += part
        else:
            parts.append(part)
        begin, left = end, max(left - n, 0)
    return parts


def _end(text: str, begin: int, guess: int, most: int, count: Callable[[str], int]) -> int:
    """Return where the part from `begin` ends; bisects where the density of tokens varies."""
    low, high = begin, len(text)  # up to `low` there are no tokens, up to `high` too many
    while high - low > 1:
        end = _boundary(text, low, min(max(guess, low + 1), high - 1))
        n = count(text[begin:end])
        if 0 < n <= most:
            return end
        if n:
            high = end
            guess = low + int((end - low) * min(most / n, 1.0) * 0.95)
        else:
            low = end
            guess = low + (high - low) // 2
    return high


def _boundary(text: str, low: int, end: int) -> int:
    """Return the last boundary of words or more in the second half of `low` to `end`, or `end`."""
    middle = low + (end - low) // 2
    for separator in _SEPARATORS:
        found = text.rfind(separator, middle, end)
        if found >= 0:
            cut = found + len(separator)
            while cut < end and text[cut].isspace():
                cut += 1
            return cut
    return end
