"""Classification heads of Hugging Face directories: config.json in and out, and tensors' names.

- transformers has one kind of head for each model type; `architectures` says whether there is one
  (`BertForSequenceClassification`). Its labels are `id2label`.
- A directory whose head is another one has a file `head.json` beside config.json, written by hand:

      {"pooling": "first", "layers": [{"tensor": "fc"}]}

  with the names of the layers' tensors before `.weight` and `.bias`, in order, each with an
  `activation` ("identity"). `prefix` is that of the encoder's own tensors where it is not the model
  type's ("model."), `labels` and `problem_type` are as in config.json, `file` names a safetensors
  file of its own for the head.
- Layers of sentence-transformers' Dense modules are read by `sentence_modules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from models import json_file
from models.config import HEAD_ACTIVATIONS, POOLINGS, Head, HeadLayer, ModelConfig
from models.errors import ModelError
from models.weights import safetensors_file
from models.weights.stored import StoredTensor
from models.weights.transfer import Source

FILE = "head.json"
CLASSIFIER = "ForSequenceClassification"
_MOST_LABELS = 4096
_KINDS = {
    "regression": "values",
    "single_label_classification": "classes",
    "multi_label_classification": "independent",
}
_ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu": "gelu_exact", "gelu_new": "gelu",
                "gelu_pytorch_tanh": "gelu", "tanh": "tanh"}  # fmt: skip
_TENSORS = {  # of the layers, by model type; those of decoders have one
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "xlm-roberta": ("classifier.dense", "classifier.out_proj"),
    "camembert": ("classifier.dense", "classifier.out_proj"),
    "modernbert": ("head.dense", "classifier"),
    "deberta-v2": ("pooler.dense", "classifier"),
    "t5": ("classification_head.dense", "classification_head.out_proj"),
    "mt5": ("classification_head.dense", "classification_head.out_proj"),
    "umt5": ("classification_head.dense", "classification_head.out_proj"),
}
_OWN = "head.json/"  # prefix given here to the tensors of a head that `head.json` describes


# --------------------------------------------------------------------------------------------------
# In


def with_classifier(config: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration with the head that config.json says it has, if any."""
    if not any(name.endswith(CLASSIFIER) for name in settings.get("architectures") or ()):
        return config
    labels = _labels(settings)
    head = Head(
        kind=_kind(settings.get("problem_type"), labels),
        labels=labels,
        **_shape(config, settings, len(labels)),
    )
    return dataclasses.replace(config, head=head, tie_embeddings=True)


def _shape(config: ModelConfig, settings: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    """Return pooling and layers of the head that transformers has for a model type."""
    kind, d_model = settings["model_type"], config.d_model
    last = HeadLayer(size=outputs)
    if kind not in _TENSORS:
        return {"pooling": "last", "layers": (HeadLayer(size=outputs, bias=False),)}
    if kind == "deberta-v2":
        activation = _activation(settings.get("pooler_hidden_act", "gelu"))
        size = settings.get("pooler_hidden_size", d_model)
        return {"pooling": "first", "layers": (HeadLayer(size=size, activation=activation), last)}
    if kind == "modernbert":
        pooling = settings.get("classifier_pooling", "cls")
        if pooling not in ("cls", "mean"):
            raise ModelError(f"classifier_pooling={pooling!r} is not supported")
        first = HeadLayer(
            size=d_model,
            activation=_activation(settings.get("classifier_activation", "gelu")),
            bias=settings.get("classifier_bias", False),
            norm_epsilon=settings.get("norm_eps", 1e-5),
            norm_bias=settings.get("norm_bias", False),
        )
        return {"pooling": "first" if pooling == "cls" else "mean", "layers": (first, last)}
    first = HeadLayer(size=d_model, activation="tanh")
    return {"pooling": "last" if kind.endswith("t5") else "first", "layers": (first, last)}


def _labels(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes, in order; without names there are two, as by default."""
    named = settings.get("id2label")
    if not named:
        count = settings.get("num_labels", 2)
        if not isinstance(count, int) or not 0 < count <= _MOST_LABELS:
            raise ModelError(f"num_labels={count!r} is not supported")
        return tuple(f"LABEL_{i}" for i in range(count))
    by_index = {int(index): str(label) for index, label in named.items()}
    if sorted(by_index) != list(range(len(named))) or len(named) > _MOST_LABELS:
        raise ModelError(f"id2label does not name classes 0 .. n - 1, n at most {_MOST_LABELS}")
    return tuple(by_index[i] for i in range(len(named)))


def _kind(problem: Any, labels: tuple[str, ...]) -> str:
    if problem is None:
        return "values" if len(labels) == 1 else "classes"
    if problem not in _KINDS:
        raise ModelError(f"problem_type={problem!r} is not supported")
    # One class of one would have probability 1 whatever the text.
    return "values" if len(labels) == 1 else _KINDS[problem]


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise ModelError(
            f"activation {name!r} of the head is not supported; supported are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


@dataclasses.dataclass(frozen=True)
class OwnHead:
    """A head that `head.json` describes.

    Attributes:
      head: the head; the sizes of its layers are those of the tensors.
      prefix: of the encoder's tensors; None: the model type's.
    """

    head: Head
    tensors: Mapping[str, StoredTensor]
    prefix: str | None


def read_own(
    directory: epath.Path, settings: Mapping[str, Any], tensors: dict[str, StoredTensor]
) -> OwnHead | None:
    """Return the head that `head.json` describes, or None where there is no such file.

    Args:
      settings: config.json.
      tensors: of the model's files; those of the head are taken out.

    Raises:
      ModelError: the file is damaged, or its tensors are missing or do not follow each other.
    """
    path = directory / FILE
    if not path.exists():
        return None
    described = json_file.read_object(path)
    try:
        return _own(directory, described, {**settings, **described}, tensors)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{path}: {what}") from error


def _own(
    directory: epath.Path,
    described: Mapping[str, Any],
    settings: Mapping[str, Any],
    tensors: dict[str, StoredTensor],
) -> OwnHead:
    known = {"pooling", "layers", "prefix", "file", "labels", "problem_type"}
    if unknown := sorted(set(described) - known):
        raise ModelError(f"unknown fields {unknown}; known are {', '.join(sorted(known))}")
    if described["pooling"] not in POOLINGS:
        raise ModelError(f"pooling is one of {', '.join(POOLINGS)}")
    if (file := described.get("file")) is not None:
        if not isinstance(file, str) or epath.Path(file).name != file:
            raise ModelError(f"file={file!r} is not the name of a file beside it")
        tensors = tensors | safetensors_file.read_file(directory / file)
    layers, found = [], {}
    for index, layer in enumerate(described["layers"]):
        name, activation = layer["tensor"], layer.get("activation", "identity")
        if activation not in HEAD_ACTIVATIONS:
            raise ModelError(f"activation is one of {', '.join(HEAD_ACTIVATIONS)}")
        if f"{name}.weight" not in tensors:
            raise ModelError(f"there is no tensor {name}.weight")
        for part in ("weight", "bias"):
            if f"{name}.{part}" in tensors:
                found[f"{_OWN}{index}.{part}"] = tensors.pop(f"{name}.{part}")
        size, bias = found[f"{_OWN}{index}.weight"].shape[0], f"{_OWN}{index}.bias" in found
        layers.append(HeadLayer(size=size, activation=activation, bias=bias))
    outputs = layers[-1].size
    labels = described.get("labels") or (
        _labels(settings) if settings.get("id2label") else [f"LABEL_{i}" for i in range(outputs)]
    )
    labels = tuple(labels)
    head = Head(
        kind=_kind(settings.get("problem_type"), labels),
        pooling=described["pooling"],
        layers=tuple(layers),
        labels=labels,
    )
    return OwnHead(head, found, described.get("prefix"))


# --------------------------------------------------------------------------------------------------
# Names


def sources(config: ModelConfig, kind: str) -> dict[str, Source]:
    """Return the tensor that holds each parameter of the head."""
    if config.head is None:
        return {}
    names = {}
    for index, layer in enumerate(config.head.layers):
        linear = _tensor(config, kind, index)
        ours = f"head/dense_{index}"
        names[f"{ours}/linear/kernel"] = Source(f"{linear}.weight", transposed=True)
        if layer.bias:
            names[f"{ours}/linear/bias"] = Source(f"{linear}.bias")
        if layer.norm_epsilon is not None:  # ModernBERT's
            names[f"{ours}/norm/scale"] = Source("head.norm.weight")
            if layer.norm_bias:
                names[f"{ours}/norm/bias"] = Source("head.norm.bias")
    return names


def _tensor(config: ModelConfig, kind: str, index: int) -> str:
    """Return the name of a layer's tensors, before `.weight` and `.bias`."""
    head = config.head
    assert head is not None
    if head.kind == "embedding":
        return f"{index + 2}_Dense/linear"
    if not is_standard(config, kind):
        return f"{_OWN}{index}"
    return _TENSORS[kind][index] if kind in _TENSORS else "score"


def is_standard(config: ModelConfig, kind: str) -> bool:
    """Return whether there is a classifier's head, of the shape that transformers has."""
    head = config.head
    if head is None or head.kind == "embedding":
        return False
    own = {"model_type": kind, **to_json(config, kind)}
    try:
        shape = _shape(config, own, len(head.labels))
    except ModelError:
        return False
    return (head.pooling, head.layers) == (shape["pooling"], shape["layers"])


# --------------------------------------------------------------------------------------------------
# Out


def to_json(config: ModelConfig, kind: str) -> dict[str, Any]:
    """Return the fields of config.json that describe a classifier's head, without its class."""
    head = config.head
    if head is None or head.kind == "embedding":
        return {}
    problems = {ours: theirs for theirs, ours in _KINDS.items()}
    values: dict[str, Any] = {
        "id2label": {str(i): label for i, label in enumerate(head.labels)},
        "label2id": {label: i for i, label in enumerate(head.labels)},
        "problem_type": problems[head.kind],
    }
    first = head.layers[0]
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    if kind == "deberta-v2":
        values["pooler_hidden_act"] = theirs.get(first.activation, first.activation)
        values["pooler_hidden_size"] = first.size
    if kind == "modernbert":
        values |= {
            "classifier_pooling": "cls" if head.pooling == "first" else head.pooling,
            "classifier_activation": theirs.get(first.activation, first.activation),
            "classifier_bias": first.bias,
            "norm_eps": first.norm_epsilon,
            "norm_bias": first.norm_bias,
        }
    return values
