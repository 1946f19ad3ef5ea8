"""Perplexity under a KenLM n-gram model, as CCNet computes it (Wenzek et al. 2020, section 4.2).

    python -m pruning text_score --gin_file=configs/score/kenlm.gin --gin.MODEL=en.arpa.bin ...

Choices
- The score is computed by a library (`kenlm`, an extra); this module prepares the text.
- "ccnet" normalizes as CCNet does before its SentencePiece models: lower case, no accents, every
  digit 0, punctuation in ASCII, no control characters. Line ends are control characters. As in
  CCNet, the document therefore is one sentence, and words at line ends are joined.
- Without normalization, every line with a token is a sentence.
- A perplexity is 10^(-sum of log10 / (tokens + sentences)): the end of each sentence is scored.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from pruning.scores.score_set import Column
from pruning.scores.text import model_files
from pruning.scores.text.model_files import ModelFileError

# CCNet's table, by replacement. NOTE: its full-width digit one is also mapped to a quotation mark,
# but digits have been replaced by zeros before.
_ASCII = {
    '"': "„”“«»１」「《》",
    "'": "´’",
    ",": "，、",
    ".": "。",
    ". ": "．",
    ":": "∶：",
    ";": "；",
    "?": "？",
    "!": "！",
    "(": "（",
    ")": "）",
    "-": "–━►",
    " - ": "—",
    "~": "～",
    "...": "…",
    "<": "〈",
    ">": "〉",
    "[": "【",
    "]": "】",
    "%": "％",
}
_CONTROL = dict.fromkeys([*range(32), *range(127, 160)])
_PUNCTUATION = str.maketrans(
    {mark: ascii_ for ascii_, marks in _ASCII.items() for mark in marks} | _CONTROL
)
_DIGIT = re.compile(r"\d")


def normalized(text: str) -> str:
    """Return the text in the normalization of CCNet's language models."""
    text = text.strip().lower()
    if not text.isascii():
        decomposed = unicodedata.normalize("NFD", text)
        text = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    return _DIGIT.sub("0", text).translate(_PUNCTUATION)


@dataclasses.dataclass(frozen=True)
class KenLM:
    """Settings of the score.

    Attributes:
      model: an n-gram model, .arpa or KenLM's binary, on a local disk.
      sentencepiece: the SentencePiece .model of the pieces it was trained on; None for words
        separated by spaces.
      normalization: "ccnet" or "none".
    """

    columns: ClassVar[Mapping[str, Column]] = {
        "perplexity": Column(pa.float32(), "of the document under the n-gram model"),
        "log10": Column(pa.float64(), "log10 of its probability, ends of sentences included"),
        "scored_tokens": Column(pa.int32(), "tokens and ends of sentences that it is a sum over"),
    }

    model: str
    sentencepiece: str | None = None
    normalization: Literal["ccnet", "none"] = "ccnet"

    def digests(self) -> dict[str, str]:
        """Return the digests of the model files."""
        found = {"model": model_files.digest(self.model, "KenLM model")}
        if self.sentencepiece is not None:
            found["sentencepiece"] = model_files.digest(self.sentencepiece, "SentencePiece model")
        return found

    def __call__(self, texts: pa.Array) -> dict[str, np.ndarray]:
        """Return every column, [texts] each; NaN for a text without tokens.

        Raises:
          ModelFileError: a file is not a model of its kind.
        """
        model = _language_model(self.model)
        pieces = None if self.sentencepiece is None else _pieces(self.sentencepiece)
        total = np.zeros(len(texts))
        count = np.zeros(len(texts))
        for row, text in enumerate(texts.to_pylist()):
            tokens = 0
            for line in [normalized(text)] if self.normalization == "ccnet" else text.split("\n"):
                words = line.split() if pieces is None else pieces.encode(line, out_type=str)
                if words:
                    total[row] += model.score(" ".join(words))
                    tokens += len(words) + 1
            count[row] = tokens or np.nan
        return {
            "perplexity": 10.0 ** (-total / count),
            "log10": np.where(np.isnan(count), np.nan, total),
            "scored_tokens": count,
        }


@functools.lru_cache(maxsize=2)
def _language_model(path: str) -> Any:
    try:
        import kenlm
    except ImportError as error:
        raise ModelFileError(
            f"KenLM's library is not there ({error}): install winnow-lm[kenlm], which needs a C++ "
            "compiler."
        ) from error
    model_files.digest(path, "KenLM model")
    try:
        return kenlm.Model(path)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(f"{path} is no KenLM model ({str(error).strip()}).") from error


@functools.lru_cache(maxsize=2)
def _pieces(path: str) -> Any:
    import sentencepiece

    model_files.digest(path, "SentencePiece model")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(f"{path} is no SentencePiece model ({error}).") from error
