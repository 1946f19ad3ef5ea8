"""Vocabularies: text to ids and back, by SentencePiece or by bytes.

Choices
- SentencePiece as T5 uses it: the ids of the model file, then `extra_ids` sentinels, then padding
  rows that only the model's embedding has. Sentinels count *down* from the end. mT5 has its
  sentinels as pieces of the model file, umT5 has 300, Llama and Gemma have none.
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
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

# T5's special ids.
PAD_ID = 0
EOS_ID = 1
UNKNOWN_ID = 2
FILE = "vocabulary.model"  # its name inside a corpus

_SPACE = "▁"  # SentencePiece's white space
_UMT5_PIECES, _UMT5_SENTINELS = 256_000, 300


class VocabularyError(ValueError):
    """The vocabulary is not the one that is needed here."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece model with sentinels, or bytes.

    Attributes:
      kind: "sentencepiece" or "bytes".
      model: the serialized SentencePiece model; empty for bytes.
      extra_ids: sentinels behind the model's own ids (100 in T5, 300 in umT5, 125 in ByT5; 0 where
        the model has them as pieces, or has none).
    """

    kind: str
    model: bytes = dataclasses.field(repr=False, default=b"")
    extra_ids: int = 100

    @classmethod
    def from_file(cls, path: epath.PathLike, extra_ids: int | None = None) -> Vocabulary:
        """Read a SentencePiece .model file; the word "bytes" instead of a path means ByT5's bytes.

        Args:
          path: the file.
          extra_ids: sentinels behind its ids; None takes what its layout tells: 100 for T5's (pad
            0, EOS 1), 300 for umT5's size, and none where the sentinels are pieces of the model or
            the layout is another model's (Llama, Gemma).

        Raises:
          VocabularyError: the file is missing or no SentencePiece model.
        """
        if str(path) == "bytes":
            return cls("bytes", b"", 125)
        path = epath.Path(path)
        if not path.exists():
            raise VocabularyError(f"the vocabulary {path} does not exist.")
        if path.is_dir():
            raise VocabularyError(f"the vocabulary {path} is a directory: name a file in it.")
        vocabulary = cls("sentencepiece", path.read_bytes(), 0)
        try:
            default = vocabulary._default_extra_ids()
        except Exception as error:
            raise VocabularyError(
                f"{path} is not a SentencePiece model ({error}): copy or download it again, or "
                "name another file."
            ) from error
        return dataclasses.replace(
            vocabulary, extra_ids=default if extra_ids is None else extra_ids
        )

    def _default_extra_ids(self) -> int:
        processor = self._processor
        if (processor.pad_id(), processor.eos_id()) != (PAD_ID, EOS_ID):
            return 0
        if self._first_sentinel_piece is not None:
            return 0
        return _UMT5_SENTINELS if processor.GetPieceSize() == _UMT5_PIECES else 100

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

    @property
    def pad_id(self) -> int | None:
        """Id of padding."""
        return self._special_id("pad_id")

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a sequence; T5 has none."""
        return self._special_id("bos_id")

    @property
    def eos_id(self) -> int | None:
        """Id of the end of a sequence."""
        return self._special_id("eos_id")

    @property
    def start_id(self) -> int:
        """Id that a decoder begins with: T5's padding; BOS, or else EOS, of other layouts."""
        for found in (self.pad_id if self.pad_id == PAD_ID else None, self.bos_id, self.eos_id):
            if found is not None:
                return found
        raise VocabularyError("this vocabulary has neither BOS nor EOS.")

    @property
    def unknown_id(self) -> int | None:
        """Id of what the vocabulary cannot express; None where bytes stand in for it."""
        if self.kind == "bytes" or self._falls_back_to_bytes:
            return None
        return self._special_id("unk_id")

    @functools.cached_property
    def joins_at_white_space(self) -> bool:
        """True if texts with white space between them have the ids of the texts, joined.

        SentencePiece models have this if they collapse white space and no piece spans it.
        """
        if self.kind == "bytes":
            return True
        if self.encode(" one \n\n two ") != self.encode("one") + self.encode("two"):
            return False
        return not any(" " in piece[1:] for piece in self.pieces(range(self.base_size)))

    def _special_id(self, name: str) -> int | None:
        if self.kind == "bytes":
            return {"pad_id": PAD_ID, "eos_id": EOS_ID}.get(name)
        found = getattr(self._processor, name)()
        return found if found >= 0 else None

    @functools.cached_property
    def _falls_back_to_bytes(self) -> bool:
        return any(self._processor.IsByte(i) for i in range(min(self.base_size, 512)))

    @functools.cached_property
    def _first_sentinel_piece(self) -> int | None:
        """Id of the piece "<extra_id_0>", where the model itself has the sentinels (mT5)."""
        for piece in ("▁<extra_id_0>", "<extra_id_0>"):
            found = self._processor.PieceToId(piece)
            if self._processor.IdToPiece(found) == piece:
                return found
        return None

    @functools.cached_property
    def _sentinel_pieces(self) -> int:
        """Number of pieces `<extra_id_i>` that count down from the first."""
        first, count = self._first_sentinel_piece or 0, 0
        while count <= first:
            piece = self._processor.IdToPiece(first - count)
            if piece.removeprefix(_SPACE) != f"<extra_id_{count}>":
                break
            count += 1
        return count

    @functools.cached_property
    def first_sentinel(self) -> int:
        """Id of `<extra_id_0>`; the others count down from it.

        Raises:
          VocabularyError: the vocabulary has no sentinels.
        """
        if self.extra_ids:
            return self.size - 1
        piece = self._first_sentinel_piece if self.kind == "sentencepiece" else None
        if piece is None:
            raise VocabularyError(
                "this vocabulary has no sentinels (<extra_id_0>): span corruption needs one of "
                "T5's family. Use a causal objective or estimator."
            )
        return piece

    @property
    def num_sentinels(self) -> int:
        """Number of sentinels: `extra_ids`, or how many pieces of the model they are."""
        if self.extra_ids or self.kind == "bytes" or self._first_sentinel_piece is None:
            return self.extra_ids
        return self._sentinel_pieces

    def sentinel(self, i: int) -> int:
        """Return the id of `<extra_id_i>`: they count down from `first_sentinel`."""
        first = self.first_sentinel
        if not 0 <= i < self.num_sentinels:
            raise VocabularyError(
                f"sentinel {i} is wanted, the vocabulary has {self.num_sentinels}."
            )
        return first - i

    def encode(self, text: str) -> list[int]:
        """Return ids of one text, without EOS."""
        if self.kind == "bytes":
            return [byte + 3 for byte in text.encode()]
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids of many texts, on this thread: stages are parallel over processes."""
        if self.kind == "bytes":
            return [self.encode(text) for text in texts]
        return self._processor.Encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, sentinels as `<extra_id_i>`, unknown ids as `<?>`."""
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
        """Return the text of every id, white space included, for showing tokens one by one."""
        if self.kind == "bytes":
            return [chr(i - 3) if 3 <= i < 259 else "" for i in map(int, ids)]
        return [
            self._processor.IdToPiece(i).replace(_SPACE, " ")
            if i < self.base_size
            else self.decode([i])
            for i in map(int, ids)
        ]

    def token_bytes(self) -> np.ndarray:
        """Return the UTF-8 bytes of the text that each id stands for, int32 [size].

        0 for padding, EOS and sentinels, which are no text. A piece that the vocabulary does not
        know counts 1: how many bytes it had is lost. Over C4 in T5's vocabulary the sum is within
        0.01% of the texts' size.
        """
        sizes = np.zeros(self.size, np.int32)
        for i, piece in enumerate(self.pieces(range(self.base_size))):
            byte = self.kind == "bytes" or self._processor.IsByte(i)
            sizes[i] = 1 if byte else len(piece.encode())
        for special, size in ((self.pad_id, 0), (self.bos_id, 0), (self.eos_id, 0)):
            if special is not None:
                sizes[special] = size
        if self.kind == "bytes" or self.unknown_id is not None:
            sizes[UNKNOWN_ID if self.unknown_id is None else self.unknown_id] = 1
        return sizes

    def token(self, text: str) -> int:
        """Return the id of a text that must be one token, such as an answer of Ask-LLM.

        Raises:
          VocabularyError: it is several tokens, or unknown.
        """
        ids = self.encode(text)
        if len(ids) != 1 or ids[0] == self.unknown_id:
            raise VocabularyError(
                f"{text!r} is not a single token of this vocabulary (it gives {self.pieces(ids)}); "
                "choose another answer word, or a vocabulary that has it."
            )
        return ids[0]

    def files(self) -> dict[str, bytes]:
        """Return the files by which a directory holds it: name -> content."""
        if self.kind == "bytes":
            settings = {"extra_ids": self.extra_ids, "tokenizer_class": "ByT5Tokenizer"}
            return {"tokenizer_config.json": json.dumps(settings).encode() + b"\n"}
        return {FILE: self.model}

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {
            "kind": self.kind,
            "digest": self.digest,
            "size": self.size,
            "extra_ids": self.extra_ids,
        }


@dataclasses.dataclass(frozen=True)
class TextVocabulary(Vocabulary):
    """A vocabulary that encodes prompts as whole texts, where no tokens of documents are stored.

    It has the ids and the digest of the vocabulary itself. No id is special here, because neither
    SentencePiece nor bytes recognize special tokens in a text.
    """

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> TextVocabulary:
        """Return the same vocabulary for whole texts."""
        return cls(vocabulary.kind, vocabulary.model, vocabulary.extra_ids)

    def encode_template(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode(text)

    def encode_templates(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts."""
        return self.encode_batch(texts)

    def special_ids(self) -> list[int]:
        """Return no ids."""
        return []

    def rename_special(self, text: str) -> str:
        """Return the text itself."""
        return text

    def encode_renamed(self, text: str) -> list[int]:
        """Return the ids of a text."""
        return self.encode(text)

    def token_ends(self, text: str) -> list[int]:
        """Return, for each id of a text, the index of the character after its span."""
        if self.kind == "bytes":
            return [i for i, character in enumerate(text, 1) for _ in character.encode()]
        pieces = self._processor.Encode(text, out_type="immutable_proto").pieces
        return [piece.end for piece in pieces]


def load_vocabulary(path: str, extra_ids: int | None = None) -> Vocabulary:
    """Open a .model file, a directory that holds one, or the word "bytes"."""
    from models.weights import tokenizer_files

    if path == "bytes":
        return Vocabulary.from_file(path)
    inside = tokenizer_files.find_sentencepiece(epath.Path(path))
    return Vocabulary.from_file(path if inside is None else inside, extra_ids)
