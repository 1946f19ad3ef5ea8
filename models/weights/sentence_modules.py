"""The modules of a sentence-transformers directory: pooling and dense layers, in and out.

modules.json                        the modules in order, with their directories
1_Pooling/config.json
2_Dense/, 3_Dense/, ...             layers: config.json, model.safetensors
sentence_bert_config.json           maximum length
config_sentence_transformers.json   prompts

Vectors are scaled to length 1 wherever they are used, so that a Normalize module at the end adds
nothing; anywhere else it is refused.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from models import json_file
from models.config import Head, HeadLayer
from models.errors import ModelError, first_line, reading
from models.weights import hub, safetensors_file
from models.weights.stored import StoredTensor

MODULES = "modules.json"
POOLING = "1_Pooling"
PROMPTS = "config_sentence_transformers.json"
LENGTHS = tuple(  # the same file by names of older releases
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

_CONFIG = "config.json"
_TOKENIZER = "tokenizer_config.json"
_ACTIVATIONS = {
    "Identity": "identity", "Tanh": "tanh", "Sigmoid": "sigmoid", "ReLU": "relu",
    "GELU": "gelu_exact", "SiLU": "silu",
}  # fmt: skip
_CLASSES = {
    "identity": "torch.nn.modules.linear.Identity",
    **{ours: f"torch.nn.modules.activation.{name}"
       for name, ours in _ACTIVATIONS.items() if ours != "identity"},
}  # fmt: skip
_POOLINGS = {"mean": "mean", "cls": "first", "max": "max", "lasttoken": "last"}
_LONGEST = 10**6  # tokenizers that know no limit name one of 10^30


@dataclasses.dataclass(frozen=True)
class Modules:
    """Settings of a directory besides its transformer.

    Attributes:
      head: pooling, layers, prompts and length.
      tensors: of the layers, as "2_Dense/linear.weight", "2_Dense/linear.bias", "3_Dense/...".
    """

    head: Head
    tensors: Mapping[str, StoredTensor]


def read(directory: epath.Path) -> Modules | None:
    """Return the modules of a directory, or None where there are none.

    Raises:
        ModelError: modules of other kinds or in another order, or a damaged file.
    """
    if not (directory / MODULES).exists():
        return None
    listed = _read_modules(directory / MODULES)
    kinds = [kind for kind, _ in listed]
    dense = [at for kind, at in listed if kind == "Dense"]
    expected = ["Transformer", "Pooling", *["Dense"] * len(dense)]
    if kinds not in (expected, [*expected, "Normalize"]):
        raise ModelError(
            f"{directory / MODULES} lists {', '.join(kinds)}; supported are Transformer, Pooling, "
            "any number of Dense, and Normalize, in this order"
        )
    layers: list[HeadLayer] = []
    tensors: dict[str, StoredTensor] = {}
    for index, at in enumerate(dense):
        layer, found = _read_dense(directory / at)
        layers.append(layer)
        tensors |= {f"{index + 2}_Dense/{name}": tensor for name, tensor in found.items()}
    if listed[0][1]:
        raise ModelError(
            f"{directory / MODULES}: the transformer is in {listed[0][1]!r}; supported is a "
            "transformer in the directory itself, as all newer releases save it"
        )
    prompts, default = _read_prompts(directory / PROMPTS)
    length, lower_case = _read_length(directory)
    pooling = _read_pooling(directory / listed[1][1] / _CONFIG, bool(default))
    head = Head(
        kind="embedding",
        pooling=pooling,
        layers=tuple(layers),
        max_tokens=length,
        prompts=tuple(prompts.items()),
        prompt=default,
        lower_case=lower_case,
    )
    return Modules(head, tensors)


def _read_pooling(path: epath.Path, prompted: bool) -> str:
    settings = json_file.read_object(path)
    modes = settings.get("pooling_mode")
    if modes is None:
        flags = [n for n, on in settings.items() if n.startswith("pooling_mode_") and on is True]
        modes = [name.removeprefix("pooling_mode_").removesuffix("_tokens") for name in flags]
        modes = [mode.removesuffix("_token") for mode in modes]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ModelError(
            f"{path}: pooling by {modes} is not supported; supported is one of "
            f"{', '.join(_POOLINGS)}"
        )
    if prompted and settings.get("include_prompt") is False:
        raise ModelError(f"{path}: pooling without the prompt's tokens is not supported")
    return _POOLINGS[modes[0]]


def _read_dense(directory: epath.Path) -> tuple[HeadLayer, dict[str, StoredTensor]]:
    settings = json_file.read_object(directory / _CONFIG)
    activation = str(settings.get("activation_function", "")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"{directory / _CONFIG}: activation {activation!r} is not supported; supported are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    hub.require_safetensors(directory)
    tensors = safetensors_file.read_directory(directory)
    bias = "linear.bias" in tensors
    shape = tensors["linear.weight"].shape if "linear.weight" in tensors else ()
    if set(tensors) != {"linear.weight", *(["linear.bias"] if bias else [])} or len(shape) != 2:
        raise ModelError(
            f"{directory} must hold one matrix, linear.weight, and may hold linear.bias; it holds "
            f"{sorted(tensors)[:5]}"
        )
    return HeadLayer(size=shape[0], activation=_ACTIVATIONS[activation], bias=bias), tensors


def _read_prompts(path: epath.Path) -> tuple[dict[str, str], str]:
    """Return the prompts by name, and the one that is used by default ("")."""
    if not path.exists():
        return {}, ""
    settings = json_file.read_object(path)
    prompts = settings.get("prompts") or {}
    texts = isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())
    default = settings.get("default_prompt_name")
    if not texts or (default is not None and default not in prompts):
        raise ModelError(f"{path}: prompts are texts by name, the default one of them")
    return prompts, "" if default is None else prompts[default]


def _read_length(directory: epath.Path) -> tuple[int | None, bool]:
    """Return the maximum length in tokens, and whether texts are lower-cased."""
    settings: dict[str, Any] = {}
    for name in LENGTHS:
        if not settings and (directory / name).exists():
            settings = json_file.read_object(directory / name)
    length = settings.get("max_seq_length")
    if length is None and (directory / _TOKENIZER).exists():
        length = json_file.read_object(directory / _TOKENIZER).get("model_max_length")
    if isinstance(length, float) and length.is_integer():
        length = int(length)
    known = isinstance(length, int) and not isinstance(length, bool) and 0 < length <= _LONGEST
    return length if known else None, settings.get("do_lower_case") is True


def _read_modules(path: epath.Path) -> list[tuple[str, str]]:
    """Return the kind ("Pooling", "Dense") and the directory of each module, in order."""
    with reading(path):
        content = path.read_bytes()
    try:
        listed = json.loads(content)
        if not isinstance(listed, list) or not listed:
            raise TypeError("an empty list, or none")
        modules = [(module["type"].rpartition(".")[2], module["path"]) for module in listed]
        if not all(isinstance(at, str) for _, at in modules):
            raise TypeError("a path is not text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{path} is not a list of modules ({first_line(error)}): copy or download it again"
        ) from error
    for _, at in modules:
        if at.startswith(("/", "\\")) or ".." in at.split("/"):
            raise ModelError(f"{path} names {at!r}, which is outside of its own directory")
    return modules


def write(
    directory: epath.Path, d_model: int, head: Head, tensors: dict[str, safetensors_file.Pending]
) -> None:
    """Write the modules beside a transformer of `d_model` states.

    `tensors` are the layers', named as in `Modules`.
    """
    paths = {"": "Transformer", POOLING: "Pooling"}
    inputs = d_model
    for index, layer in enumerate(head.layers):
        at = f"{index + 2}_Dense"
        (directory / at).mkdir(exist_ok=True)
        own = {n.removeprefix(f"{at}/"): t for n, t in tensors.items() if n.startswith(f"{at}/")}
        safetensors_file.write_directory(directory / at, own)
        settings = {
            "in_features": inputs,
            "out_features": layer.size,
            "bias": layer.bias,
            "activation_function": _CLASSES[layer.activation],
        }
        json_file.write(directory / at / _CONFIG, settings)
        paths[at], inputs = "Dense", layer.size
    (directory / POOLING).mkdir(exist_ok=True)
    mode = {ours: theirs for theirs, ours in _POOLINGS.items()}[head.pooling]
    flag = mode if mode == "lasttoken" else {"cls": "cls_token"}.get(mode, f"{mode}_tokens")
    pooling = {"word_embedding_dimension": d_model, f"pooling_mode_{flag}": True}
    json_file.write(directory / POOLING / _CONFIG, pooling)
    paths[f"{len(paths)}_Normalize"] = "Normalize"
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(paths.items())
    ]
    json_file.write(directory / MODULES, listed)
    texts: dict[str, Any] = {"max_seq_length": head.max_tokens}
    if head.lower_case:
        texts["do_lower_case"] = True
    json_file.write(directory / LENGTHS[0], texts)
    if head.prompts:
        default = next((name for name, text in head.prompts if text == head.prompt), None)
        prompts = {
            "prompts": dict(head.prompts),
            "default_prompt_name": default if head.prompt else None,
        }
        json_file.write(directory / PROMPTS, prompts)
