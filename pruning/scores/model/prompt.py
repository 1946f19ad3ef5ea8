"""A question around a document, assembled from token pieces: for tokens that a corpus stores.

    "###\\n{document}\\n###\\n\\nDoes the ..."  ->  prefix's ids + document's ids + suffix's ids

Choices
- The corpus is tokenized once; only the prompt's two pieces are tokenized here. SentencePiece with
  T5's vocabulary never merges across white space and collapses it. With white space on either side
  of `{document}`, the joined ids therefore are those of the whole text. Prompts for which this does
  not hold are refused; for such vocabularies whole texts are encoded (text_prompt.py).
- NOTE: there is one exception. Where two segmentations of a word have exactly the same probability
  ("!!!!!!" as 1 + 5 or as 5 + 1 marks), SentencePiece's choice depends on the rounding of the
  log-probability summed so far, and a prefix changes that sum: 2 of 4,980 C4 documents. They have
  as many tokens, of the same text and the same probability. A corpus of another tokenizer is not
  affected: its prompts are encoded as whole texts (text_prompt.py).
- If the whole is too long, the document is truncated, never the question.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from models.packing import offsets_of, ranges
from pruning.corpus.vocabulary import Vocabulary, VocabularyError
from pruning.scores.model.scorer import Documents, ScoreError

_SLOT = "{document}"


class PromptError(ScoreError):
    """Error for a prompt that cannot be put around stored tokens."""


def require_room(prompt: int, max_tokens: int) -> None:
    """Raise PromptError unless a prompt of this number of tokens leaves room for a document."""
    if prompt >= max_tokens:
        raise PromptError(
            f"max_tokens={max_tokens} leaves no room for a document: the prompt alone has "
            f"{prompt} tokens."
        )


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The ids before and after the document.

    Attributes:
      prefix, suffix: int32.
    """

    prefix: np.ndarray
    suffix: np.ndarray

    @classmethod
    def of(
        cls,
        text: str,
        vocabulary: Vocabulary,
        begin: tuple[int, ...] = (),
        end: tuple[int, ...] = (),
    ) -> Prompt:
        """Tokenize a prompt.

        Args:
          text: contains `{document}` once. Other braces are plain text.
          begin: ids before everything, such as a decoder's BOS.
          end: ids after everything, such as an encoder's EOS.

        Raises:
          PromptError: `{document}` does not occur exactly once, or without white space around it.
          VocabularyError: the vocabulary has tokens that span white space.
        """
        if text.count(_SLOT) != 1:
            raise PromptError(
                f"the prompt has {_SLOT} {text.count(_SLOT)} times; it must have it once: {text!r}"
            )
        before, after = text.split(_SLOT)
        if vocabulary.kind == "sentencepiece":
            if not (_ends(before[-1:]) and _ends(after[:1])):
                raise PromptError(
                    f"{_SLOT} needs white space on both sides, else its tokens would depend on "
                    f"what it touches: ...{before[-10:]}{_SLOT}{after[:10]}..."
                )
            if not vocabulary.joins_at_white_space:
                raise VocabularyError(
                    "this vocabulary does not break at white space, so a prompt cannot be put "
                    "around stored tokens exactly. Use a vocabulary trained with SentencePiece's "
                    "defaults (split_by_whitespace, remove_extra_whitespaces), such as T5's."
                )
        prefix = [*begin, *vocabulary.encode(before)]
        suffix = [*vocabulary.encode(after), *end]
        return cls(np.asarray(prefix, np.int32), np.asarray(suffix, np.int32))

    def __len__(self) -> int:
        """Return the number of ids of the prompt itself."""
        return len(self.prefix) + len(self.suffix)

    def around(self, documents: Documents, max_tokens: int) -> tuple[Documents, np.ndarray]:
        """Put the prompt around every document.

        Args:
          documents: their stored tokens.
          max_tokens: largest number of tokens of prompt and document together; longer documents are
            truncated at their end.

        Returns:
          The whole inputs, ids int32, and the number of tokens each document lost, int64.

        Raises:
          PromptError: the prompt alone has `max_tokens` or more.
        """
        require_room(len(self), max_tokens)
        room = max_tokens - len(self)
        lengths = documents.lengths
        kept = np.minimum(lengths, room)
        offsets = offsets_of(kept + len(self))
        tokens = np.empty(offsets[-1], np.int32)
        tokens[offsets[:-1, None] + np.arange(len(self.prefix))] = self.prefix
        tokens[offsets[1:, None] - np.arange(len(self.suffix), 0, -1)] = self.suffix
        at = ranges(offsets[:-1] + len(self.prefix), kept)
        tokens[at] = documents.tokens[ranges(documents.offsets[:-1], kept)]
        return Documents(tokens, offsets), lengths - kept


def _ends(character: str) -> bool:
    return not character or character.isspace()
