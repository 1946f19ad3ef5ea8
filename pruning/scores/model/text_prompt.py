"""A question around a document's text, for tokenizers that encode a prompt as a whole.

    "###\\n{document}\\n###\\n\\nDoes the ..."  ->  ids of the whole text

Choices
- Byte-level BPE joins a line's end with the preceding text, and SentencePiece's choice between two
  equally likely segmentations depends on the preceding text, so the ids of a whole prompt are not
  those of its pieces. The whole text is encoded, once per question, in threads of the library.
- Documents are plain text. Around a document that spells out a special token, the special tokens
  of template and question get other names, which a copy of the tokenizer knows. Every prompt is
  encoded in one piece, because a special token may take the white space after it (Phi-3), and a
  text's first piece may differ from the same piece elsewhere (Mistral, Llama 2).
- Truncation of long documents, and several questions about one, are in text_questions.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from pruning.corpus.tokenizers import TextTokenizer
from pruning.scores.model.chat import Frame
from pruning.scores.model.prompt import PromptError

_SLOT = "{document}"


@dataclasses.dataclass(frozen=True)
class TextPrompt:
    """A prompt for texts.

    Attributes:
      tokenizer: the model's tokenizer.
      question: contains `{document}` once. Other braces are plain text.
      frame: trusted text around the question, such as a chat template's.
      begin, end: ids before and after everything, such as BOS, or an encoder's EOS.
    """

    tokenizer: TextTokenizer
    question: str
    frame: Frame = Frame("", "")  # noqa: RUF009  frozen
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (count := self.question.count(_SLOT)) != 1:
            raise PromptError(
                f"the prompt has {_SLOT} {count} times; it must have it once: {self.question!r}"
            )

    @functools.cached_property
    def _special_ids(self) -> np.ndarray:
        """Ids that documents cannot produce, int64 ascending."""
        return np.asarray(sorted(self.tokenizer.special_ids()), np.int64)

    @functools.cached_property
    def _expected(self) -> int:
        """Number of special ids in the prompt of any document."""
        return self._count_special(self.whole("a"))

    def _count_special(self, text: str) -> int:
        ids = np.asarray(self.tokenizer.encode_template(text), np.int64)
        return int(np.isin(ids, self._special_ids).sum())

    @functools.cached_property
    def _length(self) -> int:
        ids = self.tokenizer.encode_template(self.whole(""))
        return len(self.begin) + len(ids) + len(self.end)

    def __len__(self) -> int:
        """Return the number of ids around an empty document; a document may add one or two."""
        return self._length

    @functools.cached_property
    def before(self) -> str:
        """The text before the document, the frame's included."""
        return self.whole("\0").split("\0")[0]

    def _message(self, document: str) -> str:
        before, after = self.question.split(_SLOT)
        return self.frame.message(before + document + after)

    def whole(self, document: str) -> str:
        """Return the text of the prompt around a document."""
        return self.frame.before + self._message(document) + self.frame.after

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of the prompt around every text, without truncation."""
        return self.encode_checked(texts)[0]

    def encode_checked(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the ids of `encode`, and whether each text spells out no special token."""
        found = self.tokenizer.encode_templates([self.whole(text) for text in texts])
        special, expected = self._special_ids, self._expected
        plain = [int(np.isin(ids, special).sum()) == expected for ids in found]
        for i, is_plain in enumerate(plain):
            if not is_plain:
                found[i] = self._guarded(texts[i])
        return [[*self.begin, *ids, *self.end] for ids in found], plain

    def _guarded(self, document: str) -> list[int]:
        """Return the ids of a prompt around a document that spells out a special token."""
        begin, before, after, end = self._renamed
        message = self.frame.message(before + document + after)
        return self.tokenizer.encode_renamed(begin + message + end)

    @functools.cached_property
    def _renamed(self) -> tuple[str, str, str, str]:
        """The frame and, inside it, the question on both sides of the document, renamed."""
        before, after = self.question.split(_SLOT)
        begin, before, after, end = map(
            self.tokenizer.rename_special, (self.frame.before, before, after, self.frame.after)
        )
        return begin, before, after, end
