"""Hugging Face directories, in and out: safetensors, config.json, and the files that go with them.

- Nothing is unpickled. A directory with PyTorch's own files only is refused, and the error says
  how to convert it.
- Sentence-T5 is kept as sentence-transformers keeps it: the encoder, and the projection as a module
  of its own (`sentence_modules`).
- The tensors settle whether embeddings are tied. transformers 5 writes `tie_word_embeddings: true`
  for every T5, and then ties unless `lm_head.weight` is there and differs; so does this reader. The
  writer says `false` for an untied model and always writes its `lm_head`.
- Of a model of text and images (Gemma 3) the language model is read, and written as one of its own.
- One difference remains on their side: transformers 5 multiplies umT5's logits by d_model ** -0.5
  although umT5 is untied; T5X and earlier releases do not, and neither does this package.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from models import json_file
from models.config import EncoderConfig, Head, HeadLayer, ModelConfig, T5Config
from models.errors import ModelError
from models.model import Model
from models.weights import (
    digests,
    hub,
    huggingface_config,
    huggingface_heads,
    huggingface_names,
    limits,
    safetensors_file,
    sentence_modules,
    tokenizer_files,
    transfer,
)
from models.weights.stored import StoredTensor
from models.weights.transfer import Params, Stored

CONFIG = "config.json"

# Files copied along when a directory is converted: generation settings and tokenizers.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "spiece.model", "sentencepiece.model",
    "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "sentencepiece.bpe.model",
    "spm.model",
)  # fmt: skip
DOWNLOADED = (
    CONFIG, safetensors_file.SINGLE, safetensors_file.INDEX, "model-*-of-*.safetensors",
    sentence_modules.MODULES, f"{sentence_modules.POOLING}/config.json", "*_Dense/config.json",
    "*_Dense/model.safetensors", sentence_modules.PROMPTS, *sentence_modules.LENGTHS, *COMPANIONS,
)  # fmt: skip

_log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------
# In


def read(path: epath.PathLike) -> Stored:
    """Return a directory's model, from its configuration and the headers of its weights.

    Raises:
        ModelNotFound: a file is missing.
        ModelError: an unsupported model, weights in a format that cannot be read safely, or a
            damaged file.
    """
    directory = epath.Path(path)
    settings = json_file.read_object(directory / CONFIG)
    try:
        config = huggingface_config.from_json(settings)
    except ValueError as error:
        raise ModelError(f"{directory / CONFIG}: {error}") from error
    hub.require_safetensors(directory)
    kind = settings["model_type"]
    tensors = safetensors_file.read_directory(directory)
    if kind in huggingface_config.TEXT_PARTS:
        tensors = huggingface_names.of_text(tensors)
    prefix = huggingface_names.prefix(config, kind)
    extra: Mapping[str, StoredTensor] = {}
    if (own := huggingface_heads.read_own(directory, settings, tensors)) is not None:
        config, extra = _with_head(config, own.head), own.tensors
        if own.prefix is not None:
            tensors = _renamed(tensors, own.prefix, prefix)
    elif config.head is None and (modules := sentence_modules.read(directory)) is not None:
        config, extra = _with_head(config, modules.head), modules.tensors
    tensors = _named(config, kind, tensors)
    config = _settle_tying(config, kind, tensors, directory)
    sources = huggingface_names.sources(config, kind)
    return Stored(config, sources, {**tensors, **extra}, str(directory), {"model type": kind})


def _with_head(config: ModelConfig, head: Head) -> ModelConfig:
    """Return the configuration with a head that is not config.json's.

    Sentence-T5's has a field of its own, and a T5's other heads belong to its encoder.
    """
    if isinstance(config, T5Config):
        config = dataclasses.replace(config, num_decoder_layers=0)
        size = head.layers[0].size if head.layers else 0
        plain = Head(
            kind="embedding",
            pooling="mean",
            layers=(HeadLayer(size=size, bias=False),),
            max_tokens=head.max_tokens,
        )
        if head == plain:
            return dataclasses.replace(config, sentence_head=size)
    return limits.checked(dataclasses.replace(config, head=head, tie_embeddings=True))


def _renamed(tensors: dict[str, StoredTensor], theirs: str, ours: str) -> dict[str, StoredTensor]:
    """Return tensors of an encoder under other names: with another prefix."""
    return {
        ours + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor
        for name, tensor in tensors.items()
    }


def companions(directory: epath.Path) -> dict[str, epath.Path]:
    """Return the files beside a model's weights that are copied with it, by name."""
    return {name: directory / name for name in COMPANIONS if (directory / name).exists()}


def _named(
    config: ModelConfig, kind: str, tensors: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the tensors under the full model's names, without those that no model needs."""
    if "embed_out.weight" in tensors:  # GPT-NeoX, in files of before transformers 5
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    if isinstance(config, EncoderConfig):  # as TensorFlow called a norm's parameters
        tensors = {_with_norm_of_torch(name): tensor for name, tensor in tensors.items()}
    prefix = huggingface_names.prefix(config, kind)
    if prefix and not any(name.startswith(prefix) for name in tensors):
        tensors = {
            name if name.startswith("lm_head.") else prefix + name: tensor
            for name, tensor in tensors.items()
        }
    if isinstance(config, T5Config):
        shared = huggingface_names.sources(config, kind)["token_embedder/embedding"].tensor
        copies = [name for name in tensors if name.endswith(".embed_tokens.weight")]
        if copies and shared not in tensors:
            tensors[shared] = tensors[copies[0]]
    redundant = huggingface_names.redundant(config, kind)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in redundant)
    }


def _with_norm_of_torch(name: str) -> str:
    for theirs, ours in (("gamma", "weight"), ("beta", "bias")):
        name = re.sub(rf"LayerNorm\.{theirs}$", f"LayerNorm.{ours}", name)
    return name


def _settle_tying(
    config: ModelConfig,
    kind: str,
    tensors: dict[str, StoredTensor],
    directory: epath.Path,
) -> ModelConfig:
    """Return the configuration, tied or not as the tensors are; drop a tied embedding's copy."""
    head = huggingface_names.OUTPUT_HEADS.get(kind, "lm_head.weight")
    if head not in tensors:
        if isinstance(config, T5Config) and not config.tie_embeddings and config.num_decoder_layers:
            # A T5 of transformers 5 that says `false` and has no head is tied, and not scaled.
            return dataclasses.replace(config, tie_embeddings=True, scale_tied_logits=False)
        return config
    if not config.tie_embeddings:
        return config
    embedding = huggingface_names.sources(config, kind)["token_embedder/embedding"].tensor
    if embedding in tensors and _equal(tensors[head], tensors[embedding]):
        del tensors[head]
        return config
    scaled = isinstance(config, T5Config) and config.scale_tied_logits
    if scaled and kind == "t5":
        raise ModelError(
            f"{directory / CONFIG} says that embeddings are tied, and lm_head.weight differs from "
            "shared.weight; releases of transformers disagree on what that means. Say "
            '"tie_word_embeddings": false if it is a T5 v1.1, or remove lm_head.weight'
        )
    _log.info("%s: %s differs from the embeddings: not tied", directory, head)
    if isinstance(config, T5Config):  # scale_tied_logits has no meaning any more: its default
        return dataclasses.replace(config, tie_embeddings=False, scale_tied_logits=True)
    return dataclasses.replace(config, tie_embeddings=False)


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Return whether two matrices hold the same numbers; they are read in bands."""
    if a.shape != b.shape:
        return False
    for start in range(0, a.shape[0], rows):
        index = (slice(start, min(start + rows, a.shape[0])), slice(0, a.shape[1]))
        shape = [s.stop - s.start for s in index]
        of_a, of_b = np.empty(shape, np.float32), np.empty(shape, np.float32)
        a.copy_to(of_a, index)
        b.copy_to(of_b, index)
        if not np.array_equal(of_a, of_b):
            return False
    return True


# --------------------------------------------------------------------------------------------------
# Out


def save(
    path: epath.PathLike,
    model: Model,
    params: Params,
    *,
    companions: Mapping[str, epath.Path] | None = None,
    vocabulary_file: epath.PathLike | None = None,
    max_file_bytes: int = safetensors_file.MAX_FILE_BYTES,
) -> None:
    """Write a directory that transformers loads as the same model, in the parameters' dtype.

    Args:
        companions: files to copy along, by the names they get (`companions`).
        vocabulary_file: a SentencePiece model, for a tokenizer where the companions hold none.

    Raises:
        FileExistsError: the directory holds a model already.
        ModelError: transformers has no model of this shape.
    """
    directory = epath.Path(path)
    if (directory / CONFIG).exists():
        raise FileExistsError(f"{directory} holds a model already; remove it, or choose another")
    settings = huggingface_config.to_json(model.config)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    settings["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    sources = huggingface_names.sources(model.config, settings["model_type"])
    tensors = transfer.pending(params, sources)
    modules = {name: tensors.pop(name) for name in list(tensors) if "_Dense/" in name}
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_file.write_directory(directory, tensors, max_file_bytes)
    if (head := _sentence_head(model.config)) is not None:
        sentence_modules.write(directory, model.config.d_model, head, modules)
    _write_companions(directory, model.config, dict(companions or {}), vocabulary_file)
    json_file.write(directory / CONFIG, settings)  # last: without it the directory is unfinished


def _sentence_head(config: ModelConfig) -> Head | None:
    """Return the head that is written as modules of sentence-transformers, if there is one."""
    if isinstance(config, T5Config) and config.sentence_head:
        layer = HeadLayer(size=config.sentence_head, bias=False)
        return Head(kind="embedding", pooling="mean", layers=(layer,), max_tokens=256)
    return config.head if config.head and config.head.kind == "embedding" else None


def _write_companions(
    directory: epath.Path,
    config: ModelConfig,
    companions: dict[str, epath.Path],
    vocabulary_file: epath.PathLike | None,
) -> None:
    """Write the files beside the weights: tokenizer and generation settings."""
    tokenizers = {*tokenizer_files.SENTENCEPIECE, *tokenizer_files.HUGGING_FACE}
    if vocabulary_file is not None and not companions.keys() & tokenizers:
        t5 = isinstance(config, T5Config)
        companions["spiece.model" if t5 else "tokenizer.model"] = epath.Path(vocabulary_file)
    for name, source in companions.items():
        if name in tokenizer_files.SENTENCEPIECE:
            digests.copy_with_digests(source, directory / name)
        else:
            source.copy(directory / name, overwrite=True)
    if isinstance(config, T5Config):
        _complete_tokenizer(directory, config)
    if "generation_config.json" not in companions and not isinstance(config, EncoderConfig):
        json_file.write(directory / "generation_config.json", _generation_settings(config))


def _complete_tokenizer(directory: epath.Path, config: T5Config) -> None:
    """Write the files with which transformers opens a vocabulary, where they are missing."""
    vocabulary = directory / "spiece.model"
    made: dict[str, Any] = {}
    if vocabulary.exists():
        content = vocabulary.read_bytes()
        makers = {
            "tokenizer_config.json": tokenizer_files.settings,
            "tokenizer.json": tokenizer_files.tokenizer,
        }
        try:
            for name, make in makers.items():
                if not (directory / name).exists():
                    made[name] = make(content, config)
        except ModelError as error:
            _log.warning("%s: transformers will not open this vocabulary: %s", vocabulary, error)
            return
    elif tokenizer_files.is_bytes(config) and not (directory / "tokenizer_config.json").exists():
        made["tokenizer_config.json"] = tokenizer_files.byte_settings()
    for name, value in made.items():
        json_file.write(directory / name, value)


def _generation_settings(config: ModelConfig) -> dict[str, Any]:
    settings = {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    if config.start_id is None:
        return settings
    name = "decoder_start_token_id" if config.has_encoder else "bos_token_id"
    return {name: config.start_id, **settings}
