"""Sentence-T5 embeddings: where documents lie, for density, clusters and near twins.

Ni et al., "Sentence-T5" (arXiv 2108.08877): the encoder's outputs, averaged over the text's tokens
and EOS, projected, scaled to length 1. Sachdeva et al. (arXiv 2402.09668) sample by the density of
the Base model's.

Choices
- A document is embedded by its beginning: 256 tokens, which is what the published models were made
  for. The score set says how many tokens of each document were not seen.
- A T5 without Sentence-T5's projection gives the plain mean of its encoder's outputs. It was never
  trained to put alike documents near each other, and does so worse; the score set says which it is.
  They lie in one narrow cone: `python -m pruning whiten` takes away what all of them share.
- float16 by default: 1.5 kB for 768 dimensions instead of 3, and an error (2e-5) below that of
  computing in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from pruning.scorers import Column, Documents, Prepared, ScoreError, Scores
from pruning.scorers.ask_llm import TRUNCATED
from pruning.scoring.packing import Side, Windows, offsets_of, ranges

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from pruning.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Settings of the embedding scorer.

    Attributes:
      max_tokens: of the document and EOS together; longer documents are cut.
      store: the column's number type.
    """

    max_tokens: int = 256
    store: Literal["float16", "float32"] = "float16"

    def prepare(self, model: Model, vocabulary: Vocabulary) -> Prepared:
        """Raises ScoreError where the model has no encoder."""
        config = model.config
        if config.family != "t5":
            raise ScoreError(
                "this model has no encoder: give a Sentence-T5, such as "
                "sentence-transformers/sentence-t5-base, or another T5."
            )
        width = config.sentence_head or config.d_model
        kind = "Sentence-T5 embedding" if config.sentence_head else "mean encoder output"
        if self.max_tokens < 2:
            raise ScoreError(f"max_tokens={self.max_tokens} leaves no room for a document.")

        def windows(documents: Documents) -> Windows:
            some = np.flatnonzero(documents.lengths)
            shown, _ = documents.take(some).cut(self.max_tokens - 1)
            offsets = offsets_of(shown.lengths + 1)
            tokens = np.full(offsets[-1], config.eos_id, np.int32)
            tokens[ranges(offsets[:-1], shown.lengths)] = shown.tokens
            encoder = Side("encoder", offsets, {"encoder_input_tokens": tokens})
            return Windows(some, (encoder, Side("embedding", np.arange(len(some) + 1), {})))

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            # Windows have the segment ids 1, 2, ... in the order of their one position each.
            return model.bind(params).embed(
                batch["encoder_input_tokens"],
                batch["encoder_segment_ids"],
                max_segments=batch["embedding_segment_ids"].shape[1],
            )

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            embeddings = np.zeros((len(documents), width), self.store)
            embeddings[windows.document] = answers
            cut = np.maximum(documents.lengths - (self.max_tokens - 1), 0)
            return Scores({"embedding": embeddings, "truncated_tokens": cut.astype(np.int32)})

        number = pa.float16() if self.store == "float16" else pa.float32()
        embedding = Column(pa.list_(number, width), f"{kind}, of length 1")
        return Prepared(
            name="embedding",
            columns={"embedding": embedding, "truncated_tokens": TRUNCATED},
            sides=("encoder", "embedding"),
            longest=(self.max_tokens, 1),
            answer_shape=(width,),
            windows=windows,
            step=step,
            finish=finish,
            summary={"dimensions": width, "sentence_head": config.sentence_head is not None},
        )
