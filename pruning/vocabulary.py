"""The vocabulary: text to ids and back, the same for corpus, scorers and models.

Choices
- SentencePiece as T5 uses it: the ids of the model file, then `extra_ids` sentinels, then padding
  rows that only the model's embedding has. Sentinels count *down* from the end.
- Bytes as ByT5 uses them: byte b is id b + 3.
- A vocabulary is a small file and travels inside the corpus directory, so that a corpus can be
  read, scored and shown without anything else.
- The SentencePiece library is loaded when the first text is encoded: a process that only moves
  tokens around never pays for it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2
FILE = "vocabulary.model"  # its name inside a corpus

_SPACE = "▁"  # SentencePiece's white space


class VocabularyError(ValueError):
    """The vocabulary is not the one that is needed here."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model with sentinels, or bytes.

    Attributes:
      kind: "sentencepiece" or "bytes".
      model: the serialised SentencePiece model; empty for bytes.
      extra_ids: number of sentinels (100 in T5; ByT5 has 125).
    """

    kind: str
    model: bytes = dataclasses.field(repr=False, default=b"")
    extra_ids: int = 100

    @classmethod
    def from_file(cls, path: epath.PathLike, extra_ids: int = 100) -> Vocabulary:
        """Reads a SentencePiece .model file; the word "bytes" instead of a path means ByT5's bytes.

        Raises:
          VocabularyError: the file is missing or no SentencePiece model, or its special ids are not
            T5's (pad 0, EOS 1).
        """
        if str(path) == "bytes":
            return cls("bytes", b"", 125)
        path = epath.Path(path)
        if not path.exists():
            raise VocabularyError(f"the vocabulary {path} does not exist.")
        vocabulary = cls("sentencepiece", path.read_bytes(), extra_ids)
        try:
            processor = vocabulary._processor
        except Exception as error:
            raise VocabularyError(f"{path} is not a SentencePiece model ({error}).") from error
        if (processor.pad_id(), processor.eos_id()) != (PAD_ID, EOS_ID):
            raise VocabularyError(
                f"{path} has pad id {processor.pad_id()} and EOS id {processor.eos_id()}; T5 has "
                f"{PAD_ID} and {EOS_ID}. Train it with pad_id=0, eos_id=1, unk_id=2, bos_id=-1."
            )
        return vocabulary

    @functools.cached_property
    def digest(self) -> str:
        """Names the mapping from text to ids: SHA-256 over kind, sentinels and model file."""
        head = f"{self.kind}:{self.extra_ids}:".encode()
        return hashlib.sha256(head + self.model).hexdigest()

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(self.model)
        return processor

    @functools.cached_property
    def base_size(self) -> int:
        """Ids without the sentinels."""
        return 259 if self.kind == "bytes" else self._processor.GetPieceSize()

    @property
    def size(self) -> int:
        """Ids in all; a model's vocab_size must be at least this (T5: 32,100, padded to 32,128)."""
        return self.base_size + self.extra_ids

    def sentinel(self, i: int) -> int:
        """The id of `<extra_id_i>`: 0 is the last id of all, and they count down."""
        if not 0 <= i < self.extra_ids:
            raise VocabularyError(f"sentinel {i} is wanted, the vocabulary has {self.extra_ids}.")
        return self.size - 1 - i

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without EOS."""
        if self.kind == "bytes":
            return [byte + 3 for byte in text.encode()]
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on this thread: stages are parallel over processes."""
        if self.kind == "bytes":
            return [self.encode(text) for text in texts]
        return self._processor.Encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; sentinels come out as `<extra_id_i>`, ids beyond the vocabulary as `<?>`."""
        parts: list[str] = []
        run: list[int] = []

        def flush() -> None:
            if run:
                parts.append(self._decode_run(run))
                run.clear()

        for token in map(int, ids):
            if token < self.base_size:
                run.append(token)
                continue
            flush()
            known = token < self.size
            parts.append(f"<extra_id_{self.size - 1 - token}>" if known else "<?>")
        flush()
        return "".join(parts)

    def _decode_run(self, ids: list[int]) -> str:
        if self.kind == "bytes":
            return bytes(i - 3 for i in ids if i >= 3).decode(errors="replace")
        return self._processor.DecodeIds(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of every id, white space included, for showing tokens one by one."""
        if self.kind == "bytes":
            return [chr(i - 3) if 3 <= i < 259 else "" for i in map(int, ids)]
        return [
            self._processor.IdToPiece(i).replace(_SPACE, " ")
            if i < self.base_size
            else self.decode([i])
            for i in map(int, ids)
        ]

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the text that each id stands for, int32 [size].

        0 for padding, EOS and sentinels, which are no text. A piece that the vocabulary does not
        know counts 1: how many bytes it had is lost. Over C4 in T5's vocabulary the sum is within
        0.01% of the texts' size.
        """
        sizes = np.zeros(self.size, np.int32)
        for i, piece in enumerate(self.pieces(range(self.base_size))):
            byte = self.kind == "bytes" or self._processor.IsByte(i)
            sizes[i] = 1 if byte else len(piece.encode())
        sizes[[PAD_ID, EOS_ID, UNKNOWN_ID]] = 0, 0, 1
        return sizes

    def token(self, text: str) -> int:
        """The id of a text that must be one token, such as an answer of Ask-LLM.

        Raises:
          VocabularyError: it is several tokens, or unknown.
        """
        ids = self.encode(text)
        if len(ids) != 1 or ids[0] == UNKNOWN_ID:
            raise VocabularyError(
                f"{text!r} is not a single token of this vocabulary (it gives {self.pieces(ids)}); "
                "choose another answer word, or a vocabulary that has it."
            )
        return ids[0]

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "kind": self.kind,
            "digest": self.digest,
            "size": self.size,
            "extra_ids": self.extra_ids,
        }


def load_from_corpus(path: epath.PathLike, described: dict[str, Any]) -> Vocabulary:
    """The vocabulary inside a corpus directory.

    Args:
      path: the corpus directory.
      described: `summary["vocabulary"]` of its manifest.

    Raises:
      VocabularyError: the file is missing or not the one the corpus was tokenised with.
    """
    if described["kind"] == "bytes":
        return Vocabulary("bytes", b"", described["extra_ids"])
    vocabulary = Vocabulary.from_file(epath.Path(path) / FILE, described["extra_ids"])
    require_same(vocabulary, described["digest"], f"{path}/{FILE}")
    return vocabulary


def require_same(vocabulary: Vocabulary, digest: str, what: str) -> None:
    """Raises VocabularyError when `what` was made with another vocabulary."""
    if vocabulary.digest != digest:
        raise VocabularyError(
            f"{what} has the vocabulary {vocabulary.digest[:12]}, but {digest[:12]} is needed: the "
            "ids would mean other words. Use the vocabulary that the corpus was tokenised with, or "
            "ingest the corpus again with this one."
        )
