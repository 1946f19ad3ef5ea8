"""Embeddings of documents, for density, clusters and near-duplicates.

The paper uses Sentence-T5's (Ni et al., arXiv 2108.08877): the encoder's outputs, averaged over the
text's tokens and EOS, projected, scaled to length 1. Sachdeva et al. (arXiv 2402.09668) sample by
the density of the Base model's. Any directory of sentence-transformers can be used as well, with
its pooling, dense layers, prompts and maximum length.

Choices
- The beginning of a document is embedded, up to the model's maximum length: 256 tokens for
  Sentence-T5. The score set has the number of tokens of each document that were not read.
- A T5 without Sentence-T5's projection gives the plain mean of its encoder's outputs, and so does
  any encoder without a head. It was not trained to map similar documents to similar vectors, and
  works less well; the score set records the kind. Such vectors lie in a narrow cone; `python -m
  pruning whiten` removes the shared directions.
- Vectors are scaled to length 1 in any case, because every stage that reads them compares
  directions.
- float16 by default: 1.5 kB for 768 dimensions instead of 3, and an error (2e-5) below that of
  computing in bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from models.packing import Windows
from pruning.scores.model.document_windows import TRUNCATED
from pruning.scores.model.framed import ANSWER, Framed
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scores
from pruning.scores.score_set import Column
from pruning.store.manifest import added_setting

if TYPE_CHECKING:
    import jax

    from models.config import Head
    from models.model import Model
    from pruning.corpus.tokenizers import Tokenizer

MAX_TOKENS = 256  # default, if the model's directory has none


@dataclasses.dataclass(frozen=True)
class Embedding:
    """Settings of the embedding scorer.

    Attributes:
      max_tokens: largest number of tokens of a document, special tokens included; longer documents
        are truncated. None: that of the model's directory, or 256.
      store: number type of the column.
      prompt: a text prepended to every document, such as "passage: "; None: the directory's default
        prompt, if it has one.
      prompt_name: name of a prompt of the directory.
    """

    max_tokens: int | None = None
    store: Literal["float16", "float32"] = "float16"
    prompt: str | None = added_setting(None)
    prompt_name: str | None = added_setting(None)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ScoreError(f"max_tokens={self.max_tokens} leaves no room for a document.")
        if self.prompt is not None and self.prompt_name is not None:
            raise ScoreError("prompt and prompt_name exclude each other.")

    def prepare(self, model: Model, tokenizer: Tokenizer | None) -> Prepared:
        """Raise ScoreError if the model gives no vectors of texts, or the prompt is unknown."""
        config = model.config
        if config.head is not None and config.head.kind != "embedding":
            raise ScoreError(
                f"this model is a classifier ({len(config.head.labels)} outputs): use "
                "@SequenceClassifier(), or give a model that embeds texts."
            )
        if not config.has_encoder and config.head is None:
            raise ScoreError(
                "this model has no encoder: give a Sentence-T5, such as "
                "sentence-transformers/sentence-t5-base, another T5, an encoder such as BERT, or a "
                "directory of sentence-transformers."
            )
        head = config.head
        max_tokens = self.max_tokens or (head and head.max_tokens) or MAX_TOKENS
        if self.max_tokens is None and config.max_positions is not None:
            max_tokens = min(max_tokens, config.max_positions)
        prompt, lower_case = self._prompt(head), head is not None and head.lower_case
        framed = Framed.of(config, tokenizer, max_tokens, prompt, lower_case)
        width = config.sentence_size or config.d_model
        kind = "mean encoder output"
        if config.sentence_size:
            kind = "Sentence-T5 embedding" if head is None else "sentence embedding"

        def step(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            from models.pooling import scaled_to_unit_length

            return scaled_to_unit_length(framed.vectors(model.bind(params), batch))

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            embeddings = np.zeros((len(documents), width), self.store)
            embeddings[windows.document] = answers
            cut = framed.truncated(documents)
            return Scores({"embedding": embeddings, "truncated_tokens": cut})

        number = pa.float16() if self.store == "float16" else pa.float32()
        embedding = Column(pa.list_(number, width), f"{kind}, of length 1")
        summary: dict[str, Any] = {
            "dimensions": width,
            "sentence_head": config.sentence_size is not None,
        }
        if prompt:
            summary["prompt"] = prompt
        return Prepared(
            name="embedding",
            columns={"embedding": embedding, "truncated_tokens": TRUNCATED},
            sides=(framed.side, ANSWER),
            longest=(max_tokens, 1),
            answer_shape=(width,),
            windows=framed.windows,
            step=step,
            finish=finish,
            summary=summary,
            read=framed.reader(tokenizer),
            pretend=framed.pretender(tokenizer),
            settings={"max_tokens": max_tokens} | ({"prompt": prompt} if prompt else {}),
        )

    def _prompt(self, head: Head | None) -> str:
        """Return the text that is prepended to documents."""
        if self.prompt is not None:
            return self.prompt
        prompts = dict(head.prompts) if head is not None else {}
        if self.prompt_name is None:
            return head.prompt if head is not None else ""
        if self.prompt_name not in prompts:
            known = ", ".join(map(repr, prompts)) or "none"
            raise ScoreError(
                f"the model has no prompt {self.prompt_name!r}; it has: {known}. Give the text "
                "itself as Embedding.prompt."
            )
        return prompts[self.prompt_name]
