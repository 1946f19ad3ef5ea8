"""fastText models (.bin, .ftz): quality classifiers and language identification.

    python -m pruning text_score --gin_file=configs/score/fasttext.gin --gin.MODEL=quality.bin ...

Choices
- Prediction is done by a library: `fasttext-predict`, an extra, imported when a document is scored.
  Scores are those of the library, for the text with line ends replaced by spaces.
- The score of a quality classifier is the probability of one label (`labels`); DCLM's has
  "__label__hq" and "__label__cc" (Li et al. 2024).
- The label itself, such as the language, is a column of strings beside its probability.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.scores.score_set import Column
from pruning.scores.text import model_files
from pruning.scores.text.model_files import ModelFileError

_MAGIC = (793712314).to_bytes(4, "little")
_PREFIX = "__label__"


@dataclasses.dataclass(frozen=True)
class FastText:
    """Settings of the score.

    Attributes:
      model: a supervised model, .bin or .ftz, on a local disk.
      labels: labels whose probabilities become columns, "probability_NAME"; "__label__" may be left
        out.
      lowercase: for models that were trained on lowercased text.
    """

    model: str
    labels: tuple[str, ...] = ()
    lowercase: bool = False

    def __post_init__(self) -> None:
        names = [_column(label) for label in self.labels]
        if len(set(names)) < len(names):
            raise ValueError(f"labels would give one column twice: {', '.join(self.labels)}.")

    @property
    def columns(self) -> Mapping[str, Column]:
        """Columns of the score set."""
        wanted = {
            _column(label): Column(pa.float32(), f"probability of the label {_full(label)}")
            for label in self.labels
        }
        return {
            "label": Column(pa.string(), "the most probable label, without __label__"),
            "label_probability": Column(pa.float32(), "its probability"),
            **wanted,
        }

    def digests(self) -> dict[str, str]:
        """Return the digest of the model file."""
        return {"model": model_files.digest(self.model, "fastText model")}

    def __call__(self, texts: pa.Array) -> dict[str, np.ndarray]:
        """Return every column, [texts] each.

        Raises:
          ModelFileError: the file is not a supervised fastText model, or has no such label.
        """
        model, known = _loaded(self.model)
        wanted = [_full(label) for label in self.labels]
        if absent := [label for label in wanted if label not in known]:
            raise ModelFileError(
                f"{self.model} has no label {absent[0]}; it has: {', '.join(sorted(known)[:20])}"
                f"{', ...' if len(known) > 20 else ''}."
            )
        labels: list[str] = []
        probabilities = np.zeros((len(texts), 1 + len(wanted)), np.float64)
        for row, text in enumerate(texts.to_pylist()):
            line = (text.lower() if self.lowercase else text).replace("\n", " ")
            found, values = model.predict(line, k=-1 if wanted else 1)
            labels.append(found[0].removeprefix(_PREFIX) if found else "")
            probabilities[row, 0] = values[0] if found else np.nan
            of = dict(zip(found, values, strict=True))
            probabilities[row, 1:] = [of.get(label, 0.0) for label in wanted]
        columns = dict(zip(map(_column, self.labels), probabilities.T[1:], strict=True))
        return {
            "label": np.array(labels, object),
            "label_probability": probabilities[:, 0],
            **columns,
        }


def _full(label: str) -> str:
    return label if label.startswith(_PREFIX) else _PREFIX + label


def _column(label: str) -> str:
    return "probability_" + re.sub(r"\W+", "_", label.removeprefix(_PREFIX))


@functools.lru_cache(maxsize=2)
def _loaded(path: str) -> tuple[Any, frozenset[str]]:
    """Return a model and its labels, cached for the process."""
    try:
        import fasttext
    except ImportError as error:
        raise ModelFileError(
            f"fastText's library is not there ({error}): install winnow-lm[fasttext]."
        ) from error
    model_files.digest(path, "fastText model")
    if model_files.magic(path, 4) != _MAGIC:
        raise ModelFileError(f"{path} is no fastText model: give a .bin or .ftz file.")
    try:
        model = fasttext.load_model(path)
        labels, _ = model.predict("", k=-1)
    except (ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"{path} cannot predict labels ({error}): give a supervised model."
        ) from error
    return model, frozenset(labels)
