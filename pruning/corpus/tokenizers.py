"""Tokenizers of models: text to ids and back, for every supported file format.

    tokenizer = load_tokenizer("Qwen/Qwen3-8B")
    tokenizer.encode("Rivers carry silt.")

Choices
- `Vocabulary` (vocabulary.py) is the tokenizer of a corpus for T5: SentencePiece with sentinels, or
  bytes. `JsonTokenizer` reads Hugging Face's tokenizer.json through the tokenizers library: byte
  level BPE, Unigram and WordPiece with their normalizers and added tokens.
- Documents are plain text. A special token spelled out in a document ("<|im_end|>") is encoded as
  ordinary characters, so no document can end its own turn or begin another. The library's switch
  for it (`encode_special_tokens`) leaves the pieces in the model's vocabulary, where Unigram and
  WordPiece find them: such tokenizers encode documents with a copy that has them renamed.
- A tokenizer is identified by a digest over its file and its special tokens: equal digests give
  equal ids. Compatibility of ids and models is checked by it.
- The library encodes a batch on all cores and releases the GIL, so that prefetching for an
  accelerator needs no processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from pruning.corpus.vocabulary import FILE, Vocabulary, VocabularyError, load_vocabulary
from pruning.store.artifact import load_artifact
from pruning.store.manifest import MANIFEST

JSON_FILE = "tokenizer.json"
SPECIAL_FILE = "special_tokens.json"  # file of this project, inside a token set
_CONFIG_FILE = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"
_TEMPLATE_FILE = "chat_template.jinja"
_ROLES = ("bos", "eos", "pad", "unk")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_KEY = secrets.token_hex(16)  # in names that no document knows; ids do not depend on it
_MOST_BYTES = 256 << 20  # the largest published tokenizer.json has 34 MB


class Tokenizer(Protocol):
    """Interface of tokenizers, implemented by `Vocabulary` and `JsonTokenizer`."""

    @property
    def kind(self) -> str:
        """Kind of tokenizer: "sentencepiece", "bytes" or "json"."""
        ...

    @property
    def digest(self) -> str:
        """Identity of the mapping from text to ids."""
        ...

    @property
    def size(self) -> int:
        """Number of ids; a model's vocabulary must be at least as large."""
        ...

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a sequence."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Id of the end of a sequence."""
        ...

    @property
    def start_id(self) -> int:
        """Id that a decoder begins with."""
        ...

    @property
    def unknown_id(self) -> int | None:
        """Id of text that the vocabulary cannot represent."""
        ...

    @property
    def num_sentinels(self) -> int:
        """Number of sentinels for span corruption."""
        ...

    @property
    def first_sentinel(self) -> int:
        """Id of the first sentinel; the others count down from it."""
        ...

    def sentinel(self, i: int) -> int:
        """Return the id of a sentinel."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Return the number of bytes of text for every id, int32 [size]."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of every id separately."""
        ...

    def token(self, text: str) -> int:
        """Return the id of a text; the text must be a single token."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the description that manifests hold."""
        ...

    def files(self) -> dict[str, bytes]:
        """Return the files that save the tokenizer in a directory: name -> content."""
        ...


class TextTokenizer(Tokenizer, Protocol):
    """Interface of tokenizers for prompts that are encoded as whole texts.

    It is implemented by `JsonTokenizer` and `TextVocabulary`.
    """

    def encode_template(self, text: str) -> list[int]:
        """Return the ids of trusted text, in which special tokens are recognized."""
        ...

    def encode_templates(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the result of `encode_template` for many texts."""
        ...

    def special_ids(self) -> list[int]:
        """Return the ids of special tokens, which documents cannot produce."""
        ...

    def rename_special(self, text: str) -> str:
        """Return trusted text with the special tokens' names of `encode_renamed`."""
        ...

    def encode_renamed(self, text: str) -> list[int]:
        """Return the ids of a text in which only the names of `rename_special` are special."""
        ...

    def token_ends(self, text: str) -> list[int]:
        """Return, for each id of a text, the index of the character after its span."""
        ...


@contextlib.contextmanager
def _encoding() -> Iterator[None]:
    """Re-raise the library's errors within the block; the library has no error class of its own."""
    try:
        yield
    except Exception as error:
        raise VocabularyError(
            f"the tokenizer cannot encode a text ({str(error)[:200]}): its tokenizer.json is "
            "damaged, or lacks its unknown token; copy or download it again."
        ) from error


@dataclasses.dataclass(frozen=True)
class JsonTokenizer:
    """A tokenizer of Hugging Face's tokenizer.json.

    Attributes:
      content: content of the file.
      special: role ("bos", "eos", "pad", "unk") -> token, as in tokenizer_config.json.
      chat_template: Jinja source of the model's chat template, or None.
    """

    content: bytes = dataclasses.field(repr=False)
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    kind = "json"

    @classmethod
    def from_directory(cls, directory: epath.PathLike) -> JsonTokenizer:
        """Read tokenizer.json and its accompanying files, as saved by transformers.

        Raises:
          VocabularyError: tokenizer.json is missing or cannot be read.
        """
        directory = epath.Path(directory)
        content = _bounded(directory / JSON_FILE)
        config = _object(directory / _CONFIG_FILE)
        roles = {f"{role}_token": role for role in _ROLES}
        special = {
            roles[name]: _token_text(value)
            for settings in (_object(directory / _SPECIAL_MAP), config)
            for name, value in settings.items()
            if name in roles and value is not None
        }
        template = config.get("chat_template")
        if isinstance(template, list):  # several by name; "default" is the one for plain chats
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if (file := directory / _TEMPLATE_FILE).exists():
            template = _bounded(file).decode()
        made = cls(content, special, template if isinstance(template, str) else None)
        made._require_readable(directory / JSON_FILE)
        return made

    def _require_readable(self, file: epath.Path) -> None:
        try:
            self.encode("a")
            unknown = [token for token in self.special.values() if self._id(token) is None]
        except VocabularyError:
            raise
        except Exception as error:
            raise VocabularyError(
                f"{file} is not a tokenizer of the tokenizers library ({error})."
            ) from error
        if unknown:
            raise VocabularyError(f"{file} does not hold the special token {unknown[0]!r}.")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the file and the special tokens."""
        head = json.dumps(dict(sorted(self.special.items())), ensure_ascii=True)
        # NOTE: these gave special ids for some documents before 2026-11-30, under "json:".
        kind = b"json-renamed:" if self._model_has_special else b"json:"
        return hashlib.sha256(kind + head.encode() + b":" + self.content).hexdigest()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError as error:
            raise VocabularyError(
                "a tokenizer.json needs the tokenizers library: install winnow-lm[hf]."
            ) from error
        tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # special tokens in a document are text
        return tokenizer

    @functools.cached_property
    def _with_special(self) -> Any:
        """A copy of the tokenizer that recognizes special tokens in the text: for templates."""
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_buffer(self.content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _with_renamed(self) -> tuple[Any, dict[str, str]]:
        """A copy whose special tokens have names that no document can spell, and these names."""
        import tokenizers

        content = json.loads(self.content)
        names: dict[str, str] = {}
        for token in _special_of(content):
            names[token["content"]] = token["content"] = f"{_KEY}{token['id']}x"
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [
                pair for *pair, made in _merges(model) if names.keys().isdisjoint([*pair, made])
            ]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        for special, name in names.items():
            assert tokenizer.token_to_id(name) == self._id(special), special
        return tokenizer, names

    @functools.cached_property
    def _model_has_special(self) -> bool:
        """True if the model itself, without its added tokens, makes a special id from text."""
        content = json.loads(self.content)
        model = content["model"]
        special = {token["content"] for token in _special_of(content)}
        vocab = model["vocab"]
        special &= vocab.keys() if isinstance(vocab, dict) else {piece for piece, _ in vocab}
        if not special or "merges" not in model or model.get("ignore_merges"):
            return bool(special)
        return any(len(piece) == 1 for piece in special) or any(
            made in special for *_, made in _merges(model)
        )

    @property
    def _for_documents(self) -> Any:
        """The tokenizer, or a copy of it, in which no special token can be spelled."""
        tokenizer = self._tokenizer  # first: it says what is wrong with a damaged file
        return self._with_renamed[0] if self._model_has_special else tokenizer

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._with_renamed[1], key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    @functools.cached_property
    def size(self) -> int:
        """Highest id plus one, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning of a sequence, where the tokenizer defines one."""
        return self._id(self.special.get("bos"))

    @property
    def eos_id(self) -> int | None:
        """Id of the end of a sequence, where the tokenizer defines one."""
        return self._id(self.special.get("eos"))

    @property
    def start_id(self) -> int:
        """Id that a decoder begins with: BOS, otherwise EOS.

        Raises:
          VocabularyError: the tokenizer defines neither.
        """
        found = self.eos_id if self.bos_id is None else self.bos_id
        if found is None:
            raise VocabularyError("this tokenizer names neither BOS nor EOS.")
        return found

    @property
    def num_sentinels(self) -> int:
        """Number of pieces `<extra_id_i>`."""
        count = 0
        while self._id(f"<extra_id_{count}>") is not None:
            count += 1
        return count

    @property
    def first_sentinel(self) -> int:
        """Id of `<extra_id_0>`; the others count down from it.

        Raises:
          VocabularyError: the tokenizer has no sentinels.
        """
        return self.sentinel(0)

    def sentinel(self, i: int) -> int:
        """Return the id of `<extra_id_i>`."""
        if (found := self._id(f"<extra_id_{i}>")) is None:
            raise VocabularyError(
                f"this tokenizer has no sentinel <extra_id_{i}>: span corruption needs one of T5's "
                "family. Use a causal objective or estimator."
            )
        return found

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """Id of text that the tokenizer cannot represent; None for byte-level tokenizers."""
        model = json.loads(self.content).get("model", {})
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._id(model.get("unk_token"))

    @functools.cached_property
    def frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special ids that the tokenizer adds before and after a text, such as BOS."""
        bare = self.encode("a")
        framed = self._with_special.encode("a", add_special_tokens=True).ids
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return tuple(framed[:start]), tuple(framed[start + len(bare) :])
        return (), ()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any special token."""
        with _encoding():
            return self._for_documents.encode(text, add_special_tokens=False).ids

    def encode_framed(self, text: str) -> list[int]:
        """Return the ids of trusted text, with the special ids around it (BOS, ...)."""
        begin, end = self.frame
        return [*begin, *self.encode_template(text), *end]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, encoded on all cores."""
        with _encoding():
            found = self._for_documents.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def encode_template(self, text: str) -> list[int]:
        """Return the ids of trusted text, in which special tokens are recognized."""
        return self._with_special.encode(text, add_special_tokens=False).ids

    def encode_templates(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the result of `encode_template` for many texts, encoded on all cores."""
        found = self._with_special.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def rename_special(self, text: str) -> str:
        """Return trusted text with the special tokens' names of `encode_renamed`."""
        names = self._with_renamed[1]
        if not names:
            return text
        return self._special_pattern.sub(lambda match: names[match.group()], text)

    def encode_renamed(self, text: str) -> list[int]:
        """Return the ids of a text in which only the names of `rename_special` are special."""
        return self._with_renamed[0].encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _added(self) -> dict[int, str]:
        added = self._with_special.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.special}

    def special_ids(self) -> list[int]:
        """Return the ids of special tokens, which documents cannot produce."""
        return list(self._added)

    def special_tokens(self) -> list[str]:
        """Return the special tokens."""
        return list(self._added.values())

    def prefix_of(self, text: str, tokens: int) -> str:
        """Return the prefix of a text that corresponds to its first `tokens` ids."""
        ends = self.token_ends(text)
        if len(ends) <= tokens:
            return text
        return text[: ends[tokens - 1]] if tokens > 0 else ""

    def token_ends(self, text: str) -> list[int]:
        """Return, for each id of a text, the index of the character after its span."""
        encoding = self._for_documents.encode(text, add_special_tokens=False)
        return [end for _, end in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        return self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of every id separately; a part of a character becomes U+FFFD."""
        return [self._tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids]

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of text for every id, int32 [size].

        It is 0 for special tokens and 1 for the unknown token.
        """
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        decoder = json.loads(self.content).get("decoder") or {}
        kinds = {decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", ()))}
        sizes = np.zeros(self.size, np.int32)
        for piece, i in vocabulary.items():
            if "ByteLevel" in kinds:  # one character a byte
                sizes[i] = len(piece)
            elif "ByteFallback" in kinds and _BYTE.fullmatch(piece):
                sizes[i] = 1
            else:
                sizes[i] = len(piece.removeprefix("##").replace("▁", " ").encode())
        sizes[self.special_ids()] = 0
        if self.unknown_id is not None:
            sizes[self.unknown_id] = 1
        return sizes

    def token(self, text: str) -> int:
        """Return the id of a text that must be a single token, such as an answer of Ask-LLM.

        Raises:
          VocabularyError: the text is several tokens.
        """
        ids = self.encode(text)
        if len(ids) != 1 or ids[0] == self.unknown_id:
            raise VocabularyError(
                f"{text!r} is not a single token of this tokenizer (it gives {self.pieces(ids)}); "
                "choose another answer word."
            )
        return ids[0]

    def describe(self) -> dict[str, Any]:
        """Return the description that manifests hold."""
        return {"kind": self.kind, "digest": self.digest, "size": self.size}

    def files(self) -> dict[str, bytes]:
        """Return the files that save the tokenizer in a directory: name -> content."""
        special = json.dumps(
            {"special": dict(sorted(self.special.items())), "chat_template": self.chat_template},
            indent=1,
        )
        return {JSON_FILE: self.content, SPECIAL_FILE: special.encode() + b"\n"}

    @classmethod
    def from_files(cls, directory: epath.PathLike) -> JsonTokenizer:
        """Read the files that `files` returned."""
        directory = epath.Path(directory)
        stored = _object(directory / SPECIAL_FILE)
        made = cls(_bounded(directory / JSON_FILE), stored["special"], stored["chat_template"])
        made._require_readable(directory / JSON_FILE)
        return made


def _special_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the special tokens of a tokenizer.json, pieces of bytes excepted."""
    return [
        token
        for token in content.get("added_tokens") or ()
        if token["special"] and not _BYTE.fullmatch(token["content"])
    ]


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the two pieces of every merge of a BPE model, and the piece that they make."""
    prefix = model.get("continuing_subword_prefix") or ""
    for pair in model["merges"]:
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        yield first, second, first + second.removeprefix(prefix)


def holds_tokenizer(directory: epath.PathLike) -> bool:
    """Return whether a directory holds the files of a tokenizer."""
    from models.weights import tokenizer_files

    directory = epath.Path(directory)
    names = (*tokenizer_files.SENTENCEPIECE, JSON_FILE, SPECIAL_FILE)
    return any((directory / name).exists() for name in names) or _is_bytes(directory)


def _is_bytes(directory: epath.Path) -> bool:
    return _object(directory / _CONFIG_FILE).get("tokenizer_class") == "ByT5Tokenizer"


def load_tokenizer(path: str, extra_ids: int | None = None) -> Tokenizer:
    """Open a tokenizer.

    Args:
      path: a SentencePiece file, a tokenizer.json, a directory with either (a saved model, a
        vocabulary, a corpus, a token set), the hub name of a model, or "bytes".
      extra_ids: number of sentinels of a SentencePiece vocabulary; None for that of its layout.

    Raises:
      VocabularyError: the tokenizer is missing or cannot be read.
      ModelNotFound: the hub does not have it.
      ArtifactError: the tokenizer is in an artifact, and damaged.
    """
    from models.weights import hub, tokenizer_files

    directory = epath.Path(path)
    if hub.is_name(path) and not directory.exists():
        if directory.suffix in (".json", ".model"):
            raise VocabularyError(f"the tokenizer file {path} does not exist.")
        directory = hub.download_tokenizer(path)
        path = os.fspath(directory)
    if path != "bytes" and directory.is_dir():
        _require_undamaged(directory, (SPECIAL_FILE, JSON_FILE, FILE))
        if (directory / SPECIAL_FILE).exists():
            return JsonTokenizer.from_files(directory)
        if tokenizer_files.find_sentencepiece(directory, tokenizer_files.T5_SENTENCEPIECE):
            return load_vocabulary(path, extra_ids)  # as T5 reads it
        if (directory / JSON_FILE).exists():
            return JsonTokenizer.from_directory(directory)
        if tokenizer_files.find_sentencepiece(directory):
            return load_vocabulary(path, extra_ids)
        if _is_bytes(directory):
            return Vocabulary("bytes", b"", 125)
        raise VocabularyError(
            f"{path} holds no tokenizer: none of "
            f"{', '.join((*tokenizer_files.SENTENCEPIECE, JSON_FILE))}."
        )
    if directory.name.endswith(".json"):
        return JsonTokenizer.from_directory(directory.parent)
    return load_vocabulary(path, extra_ids)


def _require_undamaged(directory: epath.Path, names: Sequence[str]) -> None:
    """Compare files of an artifact with its manifest; other directories are not checked.

    A saved model may have a manifest.json of another program.
    """
    file = directory / MANIFEST
    if not file.exists():
        return
    with contextlib.suppress(ValueError):
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or "kind" not in found:
            return
    artifact = load_artifact(directory)
    for name in names:
        if name in artifact.manifest.files:
            artifact.file(name)


def load_stored(path: epath.PathLike, described: Mapping[str, Any]) -> Tokenizer:
    """Open the tokenizer inside an artifact.

    Args:
      path: the artifact's directory.
      described: the tokenizer's description in its manifest (`Tokenizer.describe`).

    Raises:
      VocabularyError: the file is missing, or is not the tokenizer that made the ids.
    """
    if described["kind"] == "bytes":
        return Vocabulary("bytes", b"", described["extra_ids"])
    stored: Tokenizer
    if described["kind"] == "sentencepiece":
        stored = Vocabulary.from_file(epath.Path(path) / FILE, described["extra_ids"])
    else:
        stored = JsonTokenizer.from_files(path)
    if stored.digest != described["digest"]:
        raise VocabularyError(
            f"the tokenizer in {path} has the digest {stored.digest[:12]}, its manifest says "
            f"{described['digest'][:12]}: the file was changed. Run the command that made {path} "
            "again, into a new directory."
        )
    return stored


def require_sentencepiece(tokenizer: Tokenizer, purpose: str) -> Vocabulary:
    """Return the tokenizer as a `Vocabulary`.

    Raises:
      VocabularyError: the tokenizer is a tokenizer.json; the message says what `purpose` needs.
    """
    if not isinstance(tokenizer, Vocabulary):
        raise VocabularyError(
            f"{purpose} needs a SentencePiece vocabulary or bytes, as T5's family has; the corpus "
            f"has {named(tokenizer.describe())}. Ingest it with such a vocabulary."
        )
    return tokenizer


def require_tokenizer(
    needed: Tokenizer, described: Mapping[str, Any], what: str, model: str
) -> None:
    """Raise VocabularyError unless a model and some ids have the same tokenizer.

    SentencePiece vocabularies may differ in their number of sentinels.

    Args:
      needed: the model's tokenizer.
      described: the tokenizer that made the ids (`Tokenizer.describe`).
      what: name of the ids in the message: "the corpus runs/c4".
      model: name of the model in the message.
    """
    same: Tokenizer = needed
    if isinstance(needed, Vocabulary) and described["kind"] == needed.kind:
        same = dataclasses.replace(needed, extra_ids=described["extra_ids"])
    if same.digest != described["digest"]:
        raise VocabularyError(
            f"{what} was tokenized by {named(described)}, but the model {model} reads "
            f"{named(needed.describe())}: the same numbers would mean other words. Make a token "
            "set of the corpus for this model with `python -m pruning tokenize`, or give a model "
            "of the corpus's own vocabulary."
        )


def named(described: Mapping[str, Any]) -> str:
    """Return a tokenizer's name for messages, from its description in a manifest."""
    kind, digest, size = (described[name] for name in ("kind", "digest", "size"))
    return f"a {kind} tokenizer {digest[:12]} of {size:,} ids"


def _bounded(file: epath.Path) -> bytes:
    if not file.exists():
        raise VocabularyError(f"the tokenizer file {file} does not exist.")
    if (size := file.stat().length) > _MOST_BYTES:
        raise VocabularyError(f"{file} has {size:,} bytes; a tokenizer file has {_MOST_BYTES:,}.")
    return file.read_bytes()


def _object(file: epath.Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if the file does not exist."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_bounded(file))
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{file} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise VocabularyError(f"{file} holds {type(value).__name__}, not an object.")
    return value


def _token_text(value: Any) -> str:
    """Return a token of tokenizer_config.json, where it is text or an object with its content."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
