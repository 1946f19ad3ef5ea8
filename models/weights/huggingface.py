"""Hugging Face directories, in and out: safetensors, config.json, and the files that go with them.

- Nothing is unpickled. A directory with PyTorch's own files only is refused, and the error says
  how to convert it.
- Sentence-T5 is kept as sentence-transformers keeps it: the encoder, `1_Pooling`, and `2_Dense`
  with the projection.
- Whether embeddings are tied is settled by the tensors. transformers 5 writes
  `tie_word_embeddings: true` for every T5, and then ties unless `lm_head.weight` is there and
  differs; so does this reader. The writer says `false` for an untied model and always writes its
  `lm_head`.
- One trap remains on their side: transformers 5 multiplies umT5's logits by d_model ** -0.5
  although umT5 is untied; T5X and earlier releases do not, and neither do we.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from models.config import ModelConfig, T5Config
from models.model import Model
from models.weights import (
    huggingface_config,
    huggingface_names,
    safetensors_file,
    tokenizer_files,
    transfer,
)
from models.weights.huggingface_names import DENSE
from models.weights.stored import StoredTensor
from models.weights.transfer import Params, Stored

CONFIG = "config.json"
_DENSE_DIRECTORY = DENSE.rstrip("/")

# What is copied along when a directory is converted: how to generate, and tokenizers.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "spiece.model", "sentencepiece.model",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
_TOKENIZERS = (
    "spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json", "vocab.json",
)  # fmt: skip
_DOWNLOADED = (
    CONFIG, safetensors_file.SINGLE, safetensors_file.INDEX, "model-*-of-*.safetensors",
    "modules.json", "1_Pooling/config.json", f"{DENSE}*", *COMPANIONS,
)  # fmt: skip
_NOT_SAFE = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "flax_model*.msgpack", "tf_model.h5")

_log = logging.getLogger(__name__)


def read(path: epath.PathLike) -> Stored:
    """Look into a directory: reads its configuration and the headers of its weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unsupported model, or weights in a format that cannot be read safely.
    """
    directory = epath.Path(path)
    _require_safetensors(directory)
    try:
        settings = json.loads((directory / CONFIG).read_text())
        config = huggingface_config.from_json(settings)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    tensors: dict[str, StoredTensor] = dict(safetensors_file.read_directory(directory))
    tensors = _named(config, tensors)
    config = _settle_tying(config, settings, tensors, directory)
    if isinstance(config, T5Config) and (dense := _dense(directory)) is not None:
        weight = safetensors_file.read_directory(directory / dense)
        tensors |= {f"{DENSE}{name}": tensor for name, tensor in weight.items()}
        config = dataclasses.replace(config, sentence_head=weight["linear.weight"].shape[0])
    notes = {"model type": settings["model_type"]}
    return Stored(config, huggingface_names.sources(config), tensors, str(directory), notes)


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
        ValueError: transformers has no model of this shape.
    """
    directory = epath.Path(path)
    if (directory / CONFIG).exists():
        raise FileExistsError(f"{directory} holds a model already; remove it, or choose another")
    settings = huggingface_config.to_json(model.config)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    settings["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    tensors = transfer.pending(params, huggingface_names.sources(model.config))
    dense = {name.removeprefix(DENSE): tensors.pop(name) for name in list(tensors) if DENSE in name}
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_file.write_directory(directory, tensors, max_file_bytes)
    if dense:
        _write_sentence_modules(directory, model.config, dense)
    companions = dict(companions or {})
    if vocabulary_file is not None and not companions.keys() & set(_TOKENIZERS):
        t5 = isinstance(model.config, T5Config)
        companions["spiece.model" if t5 else "tokenizer.model"] = epath.Path(vocabulary_file)
    for name, source in companions.items():
        source.copy(directory / name, overwrite=True)
    if isinstance(model.config, T5Config):
        _complete_tokenizer(directory, model.config)
    if "generation_config.json" not in companions:
        _write_json(directory / "generation_config.json", _generation_settings(model.config))
    _write_json(directory / CONFIG, settings)  # last: without it the directory is unfinished


def companions(directory: epath.Path) -> dict[str, epath.Path]:
    """The files beside a model's weights that go where it goes."""
    return {name: directory / name for name in COMPANIONS if (directory / name).exists()}


def download(name: str) -> epath.Path:
    """Fetch `owner/model`, or `owner/model@revision`, from the hub; what is cached is not fetched.

    Raises:
        OSError: no such model, no network and nothing cached, or no huggingface_hub.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise OSError(f"to fetch {name!r}, install huggingface-hub") from error
    repository, _, revision = name.partition("@")
    try:
        found = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(_DOWNLOADED)
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"{name!r} is no directory here, and the Hugging Face hub does not give it ({reason}); "
            "check the name and the network, or give a directory"
        ) from error
    return epath.Path(found)


# --------------------------------------------------------------------------------------------------
# In


def _require_safetensors(directory: epath.Path) -> None:
    names = (safetensors_file.SINGLE, safetensors_file.INDEX)
    if any((directory / name).exists() for name in names):
        return
    unsafe = [child.name for pattern in _NOT_SAFE for child in directory.glob(pattern)]
    if unsafe:
        raise ValueError(
            f"{directory} holds {unsafe[0]} and no safetensors; pickles are not read, for they run "
            "code. Convert it: transformers' from_pretrained(...) and save_pretrained(...) write "
            "safetensors; or take a revision that has them (owner/model@refs/pr/1 on the hub)"
        )
    raise FileNotFoundError(f"{directory} holds neither {names[0]} nor {names[1]}")


def _named(config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under the full model's names, without those that no model needs."""
    prefix = huggingface_names.prefix(config)
    if prefix and not any(name.startswith(prefix) for name in tensors):
        tensors = {
            name if name.startswith("lm_head.") else prefix + name: tensor
            for name, tensor in tensors.items()
        }
    if isinstance(config, T5Config) and "shared.weight" not in tensors:
        copies = [name for name in tensors if name.endswith(".embed_tokens.weight")]
        if copies:
            tensors["shared.weight"] = tensors[copies[0]]
    redundant = huggingface_names.REDUNDANT[config.family]
    if isinstance(config, T5Config) and not config.num_decoder_layers:
        redundant += (r"decoder\..*", r"lm_head\.weight")  # a whole model saved, its encoder wanted
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not any(re.fullmatch(pattern, name) for pattern in redundant)
    }


def _settle_tying(
    config: ModelConfig,
    settings: Mapping[str, Any],
    tensors: dict[str, StoredTensor],
    directory: epath.Path,
) -> ModelConfig:
    """Tied or not, as the tensors have it; drops the copy of a tied embedding."""
    t5 = isinstance(config, T5Config)
    if "lm_head.weight" not in tensors:
        # A T5 of transformers 5 that says `false` and has no head is tied, and not scaled.
        untied_by_name = t5 and not config.tie_embeddings and config.num_decoder_layers
        if not untied_by_name:
            return config
        return dataclasses.replace(config, tie_embeddings=True, scale_tied_logits=False)
    if not config.tie_embeddings:
        return config
    embedding = huggingface_names.sources(config)["token_embedder/embedding"].tensor
    if embedding in tensors and _equal(tensors["lm_head.weight"], tensors[embedding]):
        del tensors["lm_head.weight"]
        return config
    if t5 and settings["model_type"] == "t5" and config.scale_tied_logits:
        raise ValueError(
            f"{directory / CONFIG} says that embeddings are tied, and lm_head.weight differs from "
            "shared.weight; releases of transformers disagree on what that means. Say "
            '"tie_word_embeddings": false if it is a T5 v1.1, or remove lm_head.weight'
        )
    _log.info("%s: lm_head.weight differs from the embeddings: not tied", directory)
    untied = {"scale_tied_logits": True} if t5 else {}  # the default: it says nothing any more
    return dataclasses.replace(config, tie_embeddings=False, **untied)


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Whether two matrices hold the same numbers; read in bands."""
    if a.shape != b.shape:
        return False
    for start in range(0, a.shape[0], rows):
        index = (slice(start, min(start + rows, a.shape[0])), slice(0, a.shape[1]))
        bands = [np.empty([s.stop - s.start for s in index], np.float32) for _ in (a, b)]
        a.copy_to(bands[0], index)
        b.copy_to(bands[1], index)
        if not np.array_equal(*bands):
            return False
    return True


def _dense(directory: epath.Path) -> str | None:
    """The subdirectory of a sentence-transformers model's projection, or None if it is not one."""
    if not (directory / "modules.json").exists():
        return None
    modules = {
        module["type"].rpartition(".")[2]: module["path"]
        for module in json.loads((directory / "modules.json").read_text())
    }
    if "Dense" not in modules:
        return None
    pooling = json.loads((directory / modules["Pooling"] / CONFIG).read_text())
    dense = json.loads((directory / modules["Dense"] / CONFIG).read_text())
    if not pooling.get("pooling_mode_mean_tokens") and pooling.get("pooling_mode") != "mean":
        raise ValueError(f"{directory}: only the mean over tokens is supported as pooling")
    if not dense.get("activation_function", "").endswith("Identity") or dense.get("bias"):
        raise ValueError(f"{directory}: only a plain projection, without bias, is supported")
    _require_safetensors(directory / modules["Dense"])
    return modules["Dense"]


# --------------------------------------------------------------------------------------------------
# Out


def _write_sentence_modules(
    directory: epath.Path, config: T5Config, dense: dict[str, safetensors_file.Pending]
) -> None:
    (directory / _DENSE_DIRECTORY).mkdir(exist_ok=True)
    (directory / "1_Pooling").mkdir(exist_ok=True)
    safetensors_file.write_directory(directory / _DENSE_DIRECTORY, dense)
    projection = {
        "in_features": config.d_model,
        "out_features": config.sentence_head,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    pooling = {"word_embedding_dimension": config.d_model, "pooling_mode_mean_tokens": True}
    _write_json(directory / _DENSE_DIRECTORY / CONFIG, projection)
    _write_json(directory / "1_Pooling" / CONFIG, pooling)
    modules = {
        "Transformer": "",
        "Pooling": "1_Pooling",
        "Dense": "2_Dense",
        "Normalize": "3_Normalize",
    }
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules.items())
    ]
    _write_json(directory / "modules.json", listed)
    _write_json(directory / "sentence_bert_config.json", {"max_seq_length": 256})


def _complete_tokenizer(directory: epath.Path, config: T5Config) -> None:
    """Write what transformers wants beside a vocabulary to open it, where it is not there yet."""
    vocabulary = directory / "spiece.model"
    made: dict[str, Any] = {}
    if vocabulary.exists():
        content = vocabulary.read_bytes()
        made["tokenizer_config.json"] = tokenizer_files.settings
        made["tokenizer.json"] = tokenizer_files.tokenizer
        made = {name: make for name, make in made.items() if not (directory / name).exists()}
        try:
            made = {name: make(content, config) for name, make in made.items()}
        except ValueError as error:
            _log.warning("%s: transformers will not open this vocabulary: %s", vocabulary, error)
            return
    elif tokenizer_files.is_bytes(config) and not (directory / "tokenizer_config.json").exists():
        made["tokenizer_config.json"] = tokenizer_files.byte_settings()
    for name, value in made.items():
        _write_json(directory / name, value)


def _generation_settings(config: ModelConfig) -> dict[str, Any]:
    settings = {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    if isinstance(config, T5Config):
        return {"decoder_start_token_id": config.decoder_start_id, **settings}
    return settings if config.bos_id is None else {"bos_token_id": config.bos_id, **settings}


def _write_json(path: epath.Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
