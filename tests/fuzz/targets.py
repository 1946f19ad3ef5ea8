"""Readers of bytes that strangers wrote, each with the errors that it declares.

A target takes bytes and reads them as one file. What it raises beyond its declared errors is a bug.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from etils import epath

from models import json_file
from models.errors import ModelError
from models.weights import flax_msgpack, huggingface_config, safetensors_file
from pruning.cli import values
from pruning.cli.configuration import ConfigurationError
from pruning.corpus.sources.csv_files import CsvSource
from pruning.corpus.sources.document import SourceError
from pruning.corpus.sources.jsonl import JsonlSource
from pruning.corpus.tokenizers import load_tokenizer
from pruning.corpus.vocabulary import VocabularyError
from pruning.store.artifact import load_artifact
from pruning.store.manifest import ArtifactError

_DIRECTORY = Path(tempfile.mkdtemp(prefix="winnow_fuzz_"))


class Target(NamedTuple):
    """A reader.

    Attributes:
      read: reads a file of these bytes.
      errors: that it declares.
      seeds: files from which mutations start.
    """

    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    seeds: tuple[bytes, ...]


def _file(name: str, content: bytes) -> str:
    path = _DIRECTORY / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return str(path)


def _rows(kind: type, suffix: str) -> Callable[[bytes], object]:
    def read(content: bytes) -> None:
        path = _file(f"rows{suffix}", content)
        for row in kind((path,)).read(path, ("url", "meta.a"), lambda n: None):
            assert row is not None

    return read


def _manifest(content: bytes) -> None:
    path = _file("artifact/manifest.json", content)
    load_artifact(Path(path).parent)


def _tokenizer(content: bytes) -> None:
    _file("tokenizer/tokenizer.json", content)
    load_tokenizer(str(_DIRECTORY / "tokenizer")).encode("a river")


def _sentencepiece(content: bytes) -> None:
    load_tokenizer(_file("some.model", content)).encode("a river")


def _gin(content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape")
    for hint in (str, float | None, tuple[str, ...], int, dict[str, int]):
        with contextlib.suppress(ConfigurationError):
            source = values.source_of("NAME", text, [values.Place("A.b", hint)])
            assert values.read(source)[0], source


def _config(content: bytes) -> None:
    huggingface_config.from_json(json_file.parse_object(content, "config.json"))


_MANIFEST = {
    "kind": "corpus", "format": 1, "config": {"a": [1]}, "inputs": {}, "files": {"a": "0"},
    "shards": [{"file": "data-00000-of-00001.parquet", "rows": 2, "tokens": 3, "checksum": "0"}],
    "counts": {"rows": 2}, "summary": {"vocabulary": {"digest": "0"}}, "code": {"version": "1"},
}  # fmt: skip
_HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
_SAFETENSORS = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(4)
_TOKENIZER = json.dumps(
    {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
        "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
    }
).encode()  # fmt: skip
_T5 = {"model_type": "t5", "vocab_size": 32, "num_layers": 1}
_T5 |= {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2}

TARGETS = {
    "jsonl": Target(
        _rows(JsonlSource, ".jsonl"),
        (SourceError,),
        (b'{"text": "a", "url": null, "meta": {"a": [1.5e3]}}\n{"text": "\\ud800"}\n\n[1]',),
    ),
    "jsonl_gz": Target(
        _rows(JsonlSource, ".jsonl.gz"),
        (SourceError,),
        (gzip.compress(b'{"text": "a"}\n' * 20, mtime=0),),
    ),
    "csv": Target(_rows(CsvSource, ".csv"), (SourceError,), (b'text,url\n"a\nb",c\nd,"e""f"\n',)),
    "manifest": Target(_manifest, (ArtifactError,), (json.dumps(_MANIFEST).encode(),)),
    "safetensors": Target(
        lambda content: safetensors_file.read_file(epath.Path(_file("a.safetensors", content))),
        (ModelError,),
        (_SAFETENSORS,),
    ),
    "msgpack": Target(
        lambda content: flax_msgpack.read_file(epath.Path(_file("checkpoint", content))),
        (ModelError,),
        (b"\x82\xa1a\x93\x01\xc0\xcb\x00\x00\x00\x00\x00\x00\x00\x00\xa1b\xc4\x02ab",),
    ),
    "tokenizer": Target(_tokenizer, (VocabularyError, ModelError), (_TOKENIZER,)),
    "sentencepiece": Target(
        _sentencepiece,
        (VocabularyError, ModelError),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x08\n\x01a\x15\x00\x00\x00\x00",),
    ),
    "config": Target(_config, (ModelError,), (json.dumps(_T5).encode(),)),
    "gin": Target(_gin, (ConfigurationError,), (b"('a', 1.5, [%x, @b()])", b'{"a": 1}', b"20%")),
}
