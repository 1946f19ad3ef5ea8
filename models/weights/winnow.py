"""Winnow's own directory of weights: safetensors under the parameters' names, and a configuration.

    winnow_model.json      the configuration
    model.safetensors      or several files and their index
    vocabulary.model       the SentencePiece vocabulary, where one was given

Layers are written unrolled, whatever the model's layout, so that a file can be loaded in either.
The configuration has the name that a training run gives its own, and is written last: a directory
without it is unfinished.
"""

import dataclasses
from typing import Any

import jax
from etils import epath

from models import checkpoints, partitioning
from models.config import ModelConfig, from_dict
from models.model import Model, stack_layers, unstack_layers
from models.weights import safetensors_file, transfer
from models.weights.transfer import Params, Source, Stored

VOCABULARY = "vocabulary.model"


def read(path: epath.PathLike) -> Stored:
    """Look into a directory written by `save`: reads the configuration and headers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file that cannot be understood.
    """
    directory = epath.Path(path)
    config = read_config(directory)
    tensors = safetensors_file.read_directory(directory)
    return Stored(config, _sources(config), tensors, str(directory))


def save(
    path: epath.PathLike,
    model: Model,
    params: Params,
    *,
    vocabulary_file: epath.PathLike | None = None,
    max_file_bytes: int = safetensors_file.MAX_FILE_BYTES,
) -> None:
    """Write a directory of weights, in the parameters' dtype; the host holds one tensor at a time.

    Raises:
        FileExistsError: the directory holds a model already.
        ValueError: the parameters are not this model's.
    """
    directory = epath.Path(path)
    if (directory / checkpoints.MODEL_FILE).exists():
        raise FileExistsError(f"{directory} holds a model already; remove it, or choose another")
    tensors = transfer.pending(params, _sources(model.config))
    directory.mkdir(parents=True, exist_ok=True)
    safetensors_file.write_directory(directory, tensors, max_file_bytes)
    if vocabulary_file is not None:
        epath.Path(vocabulary_file).copy(directory / VOCABULARY, overwrite=True)
    checkpoints.write_config(directory, model.config.to_dict())


def load_run(
    path: epath.PathLike,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: partitioning.Rules | None = None,
    scan_layers: bool = True,
) -> tuple[Model, Params]:
    """The model of a training run, and the parameters of its newest whole checkpoint."""
    trained = Model(read_config(epath.Path(path)))
    shapes = trained.shapes()
    if mesh is not None:
        shapes = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            transfer.shardings(trained, mesh, rules),
        )
    _, params = checkpoints.restore_params(path, shapes)
    model = Model(dataclasses.replace(trained.config, scan_layers=scan_layers))

    def change(params: Params) -> Params:
        if model != trained:
            params = stack_layers(params) if scan_layers else unstack_layers(params)
        return jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), params)

    placed = None if mesh is None else transfer.shardings(model, mesh, rules)
    return model, jax.jit(change, out_shardings=placed, donate_argnums=0)(params)


def read_config(directory: epath.Path) -> ModelConfig:
    """The configuration in a directory of weights, or of a training run.

    Raises:
        ValueError: the file cannot be understood.
    """
    try:
        return from_dict(checkpoints.read_config(directory))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory / checkpoints.MODEL_FILE}: {error}") from error


def _sources(config: ModelConfig) -> dict[str, Source]:
    unrolled = Model(dataclasses.replace(config, scan_layers=False))
    return {path: Source(path) for path in transfer.flatten(unrolled.shapes())}
