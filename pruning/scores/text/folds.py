"""Cross-fitting of linear models: no document is scored by a model that was fitted to it.

Documents are divided into folds by a hash of their content. The model of a fold is fitted to the
examples of all other folds, and every document, example or not, in this corpus or another, is
scored by the model of its own fold.

Choices
- Folds depend on content, so copies of an example are in its fold, whatever corpus they are in.
- Documents that were never examples are scored by one fold's model too, so that their scores have
  the same distribution as those of examples. A model of all examples would be slightly better on
  the former, which would show in a ranking.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np

from pruning.scores.text import pieces
from pruning.scores.text.hashing import SCHEME, Features
from pruning.scores.text.linear import Bags, Linear, LinearError, Table
from pruning.scores.text.pieces import Pieces
from pruning.store import randomness
from pruning.store.randomness import Stream


@dataclasses.dataclass(frozen=True)
class Folds:
    """A division of documents by content.

    Attributes:
      stream, seed: of the hash.
      count: number of folds.
    """

    stream: Stream
    seed: int
    count: int

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """Return the fold of each document, int64 [documents].

        Args:
          hashes: int64 [documents], of `content.content_hashes`.
        """
        return (randomness.uniform(self.stream, self.seed, hashes) * self.count).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class FoldedLinear:
    """One linear model for each fold."""

    folds: Folds
    models: tuple[Linear, ...]

    @property
    def features(self) -> Table:
        return self.models[0].features

    def __call__(self, bags: Bags, fold: np.ndarray) -> np.ndarray:
        """Return the value of each document under the model of its fold, float64 [documents]."""
        values = np.zeros(len(fold))
        for k in np.unique(fold):
            rows = np.flatnonzero(fold == k)
            values[rows] = self.models[k](bags.take(rows))
        return values

    def to_bytes(self, calibration: np.ndarray) -> bytes:
        """Return the models, and a calibration of their values, as an .npz file."""
        sink = io.BytesIO()
        of_pieces: dict[str, np.ndarray] = {}
        if isinstance(self.features, Pieces):
            of_pieces["first"] = np.array(self.features.first or 0)
            of_pieces["places"] = np.array(self.features.places)
        np.savez_compressed(
            sink,
            scheme=np.array(self.features.scheme),
            n=np.array(self.features.n),
            seed=np.array(self.folds.seed),
            weights=np.stack([model.weights for model in self.models]),
            bias=np.array([model.bias for model in self.models]),
            calibration=calibration,
            **of_pieces,  # type: ignore[arg-type]
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, stream: Stream) -> tuple[FoldedLinear, np.ndarray]:
        """Return models over words or tokens, and the calibration.

        Raises:
          LinearError: the models belong to other hashes.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        scheme, weights = str(found["scheme"]), found["weights"]
        if scheme not in (SCHEME, *pieces.SCHEMES) or weights.ndim != 2:
            raise LinearError(
                f"the model is of the hashes {scheme!r} or of an earlier version; this version "
                f"needs folds over {SCHEME!r} or one of {pieces.SCHEMES}: fit it again."
            )
        features: Table = Features(int(found["n"]), weights.shape[1])
        if scheme in pieces.SCHEMES:
            first = int(found["first"]) or None
            places = int(found.get("places", 0))  # earlier models have none
            features = Pieces.of_size(int(found["n"]), weights.shape[1], first, places)
        models = tuple(
            Linear(features, weights, float(bias))
            for weights, bias in zip(found["weights"], found["bias"], strict=True)
        )
        return cls(Folds(stream, int(found["seed"]), len(models)), models), found["calibration"]
