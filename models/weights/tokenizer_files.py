"""Tokenizer files beside weights: their names, and those that transformers opens a T5 with.

- `tokenizer.json` is written as the tokenizers library reads it: the only form in which
  transformers 5 opens umT5's vocabulary, and what it converts `spiece.model` of other T5s into.
- The sentinels are not in T5's SentencePiece model: `<extra_id_0>` is the last id, as in seqio.
- The model's protocol buffer is parsed here: its few fields do not justify another package.
"""

import base64
import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

from etils import epath

from models.config import T5Config
from models.errors import ModelError
from models.weights.digests import read_digests

VOCABULARY = "vocabulary.model"  # in a directory of Winnow weights, and in a corpus

# Names of a SentencePiece model, in the order in which they are looked for.
T5_SENTENCEPIECE = (VOCABULARY, "spiece.model", "sentencepiece.model")
SENTENCEPIECE = (*T5_SENTENCEPIECE, "tokenizer.model")
HUGGING_FACE = ("tokenizer.json", "tokenizer.model", "vocab.json")

_UNIGRAM = 1  # TrainerSpec.model_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # SentencePiece.type
_SPACE = {"replacement": "▁", "prepend_scheme": "always", "split": True}
_BYTES = 384  # ids of ByT5: 3 special ones, 256 bytes, 125 sentinels


def find_sentencepiece(
    directory: epath.Path, names: tuple[str, ...] = SENTENCEPIECE
) -> epath.Path | None:
    """Return the SentencePiece model beside weights, checked where it has digests, or None.

    Raises:
        ModelError: the file is damaged.
    """
    found = next((directory / name for name in names if (directory / name).exists()), None)
    if found is not None and (digests := read_digests(found)) is not None:
        digests.check_all()
    return found


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    pieces: list[tuple[str, float, int]]  # piece, score, type
    unigram: bool
    normalizer: bytes  # SentencePiece's table of character replacements


def is_bytes(config: T5Config) -> bool:
    """Return whether this is the shape of ByT5, whose tokenizer needs no vocabulary."""
    return config.vocab_size == _BYTES


def byte_settings() -> dict[str, Any]:
    """Return ByT5's tokenizer_config.json."""
    return {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125}


def settings(spiece_model: bytes, config: T5Config) -> dict[str, Any]:
    """Return the tokenizer_config.json of a SentencePiece model."""
    vocabulary = _parse(spiece_model)
    special = _special(vocabulary)
    return {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": _sentinels(vocabulary, config),
        "pad_token": special[0],
        "eos_token": special[1],
        "unk_token": special[2],
    }


def tokenizer(spiece_model: bytes, config: T5Config) -> dict[str, Any]:
    """Return the tokenizer.json of a SentencePiece model.

    Raises:
        ModelError: not a SentencePiece model, or not a unigram model with pad 0 and EOS 1.
    """
    vocabulary = _parse(spiece_model)
    if not vocabulary.unigram:
        raise ModelError("T5 vocabularies are unigram models; this SentencePiece model is not")
    _, eos, unknown = _special(vocabulary)
    pieces = [(piece, score) for piece, score, _ in vocabulary.pieces]
    added = {
        index: (piece, kind != _USER_DEFINED or piece.startswith("<extra_id_"))
        for index, (piece, _, kind) in enumerate(vocabulary.pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    for sentinel in reversed(range(_sentinels(vocabulary, config))):
        added[len(pieces)] = (f"<extra_id_{sentinel}>", True)
        pieces.append((f"<extra_id_{sentinel}>", 0.0))
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    normalizer = None
    if vocabulary.normalizer:
        table = base64.b64encode(vocabulary.normalizer).decode()
        normalizer = {"type": "Precompiled", "precompiled_charsmap": table}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index, "content": piece, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": special,
            }
            for index, (piece, special) in sorted(added.items())
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "Metaspace", **_SPACE}],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {eos: {"id": eos, "ids": [1], "tokens": [eos]}},
        },
        "decoder": {"type": "Metaspace", **_SPACE},
        "model": {
            "type": "Unigram",
            "unk_id": [piece for piece, _ in pieces].index(unknown),
            "vocab": pieces,
            "byte_fallback": False,
        },
    }  # fmt: skip


def _special(vocabulary: _Vocabulary) -> tuple[str, str, str]:
    """Return the pieces of padding, end of sequence and unknown."""
    pieces = vocabulary.pieces
    unknown = [piece for piece, _, kind in pieces if kind == _UNKNOWN]
    if len(pieces) < 3 or len(unknown) != 1 or {kind for *_, kind in pieces[:2]} != {_CONTROL}:
        raise ModelError(
            "the SentencePiece model is not one of T5's: id 0 must be padding, 1 the end of a "
            "sequence, and one piece unknown"
        )
    return pieces[0][0], pieces[1][0], unknown[0]


def _sentinels(vocabulary: _Vocabulary, config: T5Config) -> int:
    """Return the number of sentinels after the pieces: none where they are pieces, as in mT5."""
    if any(piece.lstrip("▁") == "<extra_id_0>" for piece, *_ in vocabulary.pieces):
        return 0
    umt5 = config.relpos_per_layer and len(vocabulary.pieces) + 300 <= config.vocab_size
    return 300 if umt5 else 100


# --------------------------------------------------------------------------------------------------
# The protocol buffer: sentencepiece_model.proto


def _parse(spiece_model: bytes) -> _Vocabulary:
    pieces: list[tuple[str, float, int]] = []
    model_type, normalizer = _UNIGRAM, b""
    try:
        for field, value in _fields(spiece_model):
            if field == 1:  # ModelProto.pieces
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), piece.get(2, 0.0), piece.get(3, 1)))
            elif field == 2:  # trainer_spec
                model_type = dict(_fields(value)).get(3, _UNIGRAM)
            elif field == 3:  # normalizer_spec
                normalizer = dict(_fields(value)).get(2, b"")
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, AttributeError) as error:
        raise ModelError("the vocabulary is not a SentencePiece model") from error
    return _Vocabulary(pieces, model_type == _UNIGRAM, normalizer)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a message's fields: integers, floats and bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise KeyError("an integer of over 64 bits")

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
        elif wire in (1, 5):
            form = "<d" if wire == 1 else "<f"
            yield number, struct.unpack_from(form, message, at)[0]
            at += struct.calcsize(form)
        elif wire == 2:
            size = varint()
            if at + size > len(message):
                raise IndexError("a field ends beyond its message")
            yield number, message[at : at + size]
            at += size
        else:
            raise KeyError(f"wire type {wire}")
