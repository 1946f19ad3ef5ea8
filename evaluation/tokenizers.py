"""The tokenizer that a model was made with, found beside it or given.

Choices
- A model and a wrong tokenizer give numbers that look right: what is not found is asked for, never
  guessed. Looked at, in this order: what is given; the files beside the weights; for a training
  run the corpus that it was trained on, or the model that it was fine-tuned from.
- Hugging Face's tokenizers are loaded by transformers (the "hf" extra), and only where there is
  nothing that SentencePiece reads as T5 does.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

from etils import epath

from models import weights
from pruning import corpus
from pruning.artefact import MANIFEST
from pruning.vocabulary import Vocabulary, VocabularyError

_SENTENCEPIECE = ("vocabulary.model", "spiece.model", "sentencepiece.model")
_HUGGING_FACE = ("tokenizer.json", "tokenizer.model", "vocab.json")


class Tokenizer(Protocol):
    """Text to ids and back. `Vocabulary` is one."""

    @property
    def digest(self) -> str:
        """Names the mapping from text to ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids without any special token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class HuggingFaceTokenizer:
    """A tokenizer of transformers.

    Args:
      directory: that it is saved in.
    """

    def __init__(self, directory: epath.PathLike):
        try:
            import transformers
        except ImportError as error:
            raise VocabularyError(
                f"the tokenizer in {directory} needs transformers: install winnow-lm[hf]."
            ) from error
        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(directory))
        files = [epath.Path(directory) / name for name in _HUGGING_FACE]
        content = b"".join(file.read_bytes() for file in files if file.exists())
        self.digest = hashlib.sha256(b"huggingface:" + content).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_with_special(self, text: str) -> list[int]:
        """Ids with the special tokens that this tokenizer adds by itself, such as Llama's BOS."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


@functools.lru_cache(maxsize=4)
def find(model: str, given: str | None = None) -> Tokenizer:
    """The tokenizer of a model.

    Args:
      model: whatever `models.weights.load` takes.
      given: a SentencePiece file, "bytes", a corpus, or a directory with a Hugging Face tokenizer.

    Raises:
      VocabularyError: there is none, or it cannot be read.
    """
    if given is not None:
        return _given(given)
    directory, kind = weights.locate(model)
    for name in _SENTENCEPIECE:
        if (directory / name).exists():
            return Vocabulary.from_file(directory / name)
    if kind == "huggingface" and any((directory / name).exists() for name in _HUGGING_FACE):
        return HuggingFaceTokenizer(directory)
    if kind == "run":
        begun = json.loads((directory / "config.json").read_text())
        trained_on = begun["inputs"].get("train", {}).get("corpus")
        if trained_on is not None and (epath.Path(trained_on["path"]) / MANIFEST).exists():
            return corpus.load_corpus(trained_on["path"]).vocabulary
        if (source := begun["train"].get("initial_weights")) is not None:
            return find(source)
    raise VocabularyError(
        f"no tokenizer lies beside the model {model}: give one (Inference.vocabulary): a "
        'SentencePiece file, "bytes", a corpus, or a directory with a Hugging Face tokenizer.'
    )


def _given(path: str) -> Tokenizer:
    if path == "bytes":
        return Vocabulary.from_file(path)
    directory = epath.Path(path)
    if (directory / MANIFEST).exists():
        return corpus.load_corpus(path).vocabulary
    if directory.is_dir():
        for name in _SENTENCEPIECE:
            if (directory / name).exists():
                return Vocabulary.from_file(directory / name)
        return HuggingFaceTokenizer(directory)
    return Vocabulary.from_file(path)
