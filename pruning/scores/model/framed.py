"""Input format of a model with a head: special tokens, an optional prompt, truncation.

Choices
- The special tokens ([CLS] and [SEP], <s> and </s>, an EOS) are those that the tokenizer's own
  post-processor adds to a text. A tokenizer without a post-processor (SentencePiece, bytes) uses
  those of the model's family: T5's EOS.
- Stored tokens are used if the text is unchanged. A prompt, or lower-casing, changes the text,
  which is then tokenized again.
- Truncation removes the end of a text, never its special tokens or its prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from models.packing import Side, Windows, offsets_of, ranges
from pruning.corpus.tokenizers import JsonTokenizer
from pruning.scores.content import content_hashes
from pruning.scores.model.scorer import Documents, ScoreError

if TYPE_CHECKING:
    from models.config import ModelConfig
    from pruning.corpus.tokenizers import Tokenizer

ANSWER = "embedding"  # side of the windows with the answers, one position per text


@dataclasses.dataclass(frozen=True)
class Framed:
    """Input format of texts for a model.

    Attributes:
      side: "encoder" or "decoder".
      begin, end: special ids around a text.
      max_tokens: largest number of tokens, special ids included.
      prompt: text prepended to every text.
      lower_case: True if texts are lower-cased.
    """

    side: str
    begin: tuple[int, ...]
    end: tuple[int, ...]
    max_tokens: int
    prompt: str
    lower_case: bool

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        max_tokens: int,
        prompt: str = "",
        lower_case: bool = False,
    ) -> Framed:
        """Return the input format of a model.

        Raises:
          ScoreError: the tokenizer adds no special tokens and the family has no rule for it, or the
            length leaves no room for a text, or exceeds the model's positions.
        """
        begin, end = config.text_prefix, config.text_suffix
        if isinstance(tokenizer, JsonTokenizer):
            begin, end = tokenizer.frame
        elif config.framed_by_tokenizer:
            raise ScoreError(
                "an encoder of this family needs its tokenizer.json, which says what stands around "
                "a text ([CLS], [SEP]): name it with Score.tokenizer."
            )
        if (limit := config.max_positions) is not None and max_tokens > limit:
            raise ScoreError(
                f"max_tokens={max_tokens}, but the model has {limit} positions: give at most that."
            )
        if max_tokens <= len(begin) + len(end):
            raise ScoreError(f"max_tokens={max_tokens} leaves no room for a document.")
        side = "encoder" if config.has_encoder else "decoder"
        return cls(side, tuple(begin), tuple(end), max_tokens, prompt, lower_case)

    @property
    def room(self) -> int:
        """Largest number of tokens of a text, its prompt included."""
        return self.max_tokens - len(self.begin) - len(self.end)

    def reader(self, tokenizer: Tokenizer | None) -> Callable[[Sequence[str]], Documents] | None:
        """Return the function that tokenizes changed texts; None if stored tokens are read."""
        if not self.prompt and not self.lower_case:
            return None
        if tokenizer is None:
            raise ScoreError("a prompt needs a tokenizer.")
        encode, room = tokenizer.encode_batch, self.room
        lower = str.lower if self.lower_case else str
        alone = len(tokenizer.encode(lower(self.prompt))) if self.prompt else 0
        if alone >= room:
            raise ScoreError(
                f"max_tokens={self.max_tokens} leaves no room for a document: the prompt alone has "
                f"{alone} tokens."
            )

        def read(texts: Sequence[str]) -> Documents:
            filled = [i for i, text in enumerate(texts) if text]
            ids = encode([lower(self.prompt + texts[i]) for i in filled])
            lengths, lost = np.zeros((2, len(texts)), np.int64)
            lengths[filled] = [min(len(x), room) for x in ids]
            lost[filled] = [max(len(x) - room, 0) for x in ids]
            flat = [token for x in ids for token in x[:room]]
            return Documents(np.asarray(flat, np.int32), offsets_of(lengths), lost)

        return read

    def pretender(self, tokenizer: Tokenizer | None) -> Callable[[np.ndarray], Documents] | None:
        """Return a function that makes documents of the lengths of `reader`'s; None without one."""
        if self.reader(tokenizer) is None:
            return None
        assert tokenizer is not None  # otherwise there is no reader
        alone = len(tokenizer.encode(self.prompt)) if self.prompt else 0

        def pretend(lengths: np.ndarray) -> Documents:
            read = np.where(lengths > 0, np.minimum(lengths + alone, self.room), 0)
            return Documents(np.full(int(read.sum()), 3, np.int32), offsets_of(read))

        return pretend

    def windows(self, documents: Documents) -> Windows:
        """Return one window, with one answer position, for every document that is not empty."""
        some = np.flatnonzero(documents.lengths)
        shown, _ = documents.take(some).cut(self.room)
        before, after = len(self.begin), len(self.end)
        offsets = offsets_of(shown.lengths + before + after)
        tokens = np.empty(offsets[-1], np.int32)
        tokens[offsets[:-1, None] + np.arange(before)] = self.begin
        tokens[offsets[1:, None] - np.arange(after, 0, -1)] = self.end
        tokens[ranges(offsets[:-1] + before, shown.lengths)] = shown.tokens
        texts = Side(self.side, offsets, {f"{self.side}_input_tokens": tokens})
        return Windows(some, (texts, Side(ANSWER, np.arange(len(some) + 1), {})))

    def content_hashes(self, documents: Documents) -> np.ndarray:
        """Return hashes of the tokens that are read of each document, int64 [documents]."""
        shown, _ = documents.cut(self.room)
        flat = pa.array(shown.tokens.astype(np.int32))
        return content_hashes(pa.LargeListArray.from_arrays(pa.array(shown.offsets), flat))

    def vectors(self, module: Any, batch: Any) -> Any:
        """Return the module's vectors of a batch of packed windows, [rows, texts, size]."""
        # Windows have the segment ids 1, 2, ... in the order of their answer positions.
        return module.pool(
            batch[f"{self.side}_input_tokens"],
            batch[f"{self.side}_segment_ids"],
            max_segments=batch[f"{ANSWER}_segment_ids"].shape[1],
        )

    def truncated(self, documents: Documents) -> np.ndarray:
        """Return the number of tokens of each document that are not read, int32 [documents]."""
        lost = documents.lost
        if lost is None:
            lost = np.maximum(documents.lengths - self.room, 0)
        return lost.astype(np.int32)
