"""Winnow's own directory of weights: safetensors under the parameters' names, and a configuration.

    winnow_model.json      the configuration, and the digests of the digests below
    model.safetensors      or several files and their index
    vocabulary.model       the SentencePiece vocabulary, where one was given
    *.digests              of each of these files, checked while it is read (`digests`)

Layers are written unrolled, whatever the model's layout, so that a file can be loaded in either.
The configuration has the name that a training run gives its own, and is written last: a directory
without it is unfinished.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from models import checkpoints, partitioning
from models.config import ModelConfig, from_dict
from models.errors import ModelError
from models.model import Model
from models.weights import digests, limits, orbax_arrays, safetensors_file, transfer
from models.weights.tokenizer_files import VOCABULARY
from models.weights.transfer import Params, Source, Stored


def read(path: epath.PathLike) -> Stored:
    """Return the model in a directory written by `save`, from its configuration and headers.

    Raises:
        ModelNotFound: a file is missing.
        ModelError: a file is damaged.
    """
    directory = epath.Path(path)
    config = read_config(directory)
    checkpoints.check_files(directory)
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
        ModelError: the parameters are not this model's.
    """
    directory = epath.Path(path)
    if (directory / checkpoints.MODEL_FILE).exists():
        raise FileExistsError(f"{directory} holds a model already; remove it, or choose another")
    tensors = transfer.pending(params, _sources(model.config))
    directory.mkdir(parents=True, exist_ok=True)
    files = safetensors_file.write_directory(directory, tensors, max_file_bytes)
    if vocabulary_file is not None:
        digests.copy_with_digests(epath.Path(vocabulary_file), directory / VOCABULARY)
        files.append(directory / VOCABULARY)
    written = [digests.digests_file(file).name for file in files]
    checkpoints.write_config(directory, model.config.to_dict(), written)


def load_run(
    path: epath.PathLike,
    step: int | None = None,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: partitioning.Rules | None = None,
    scan_layers: bool = True,
) -> tuple[Model, Params]:
    """Return the model of a training run with the parameters of its newest whole checkpoint.

    Raises:
        NoCheckpoint: there is none.
    """
    config = read_config(epath.Path(path))
    leaves = transfer.flatten(Model(config).shapes())

    def load(directory: epath.Path) -> tuple[tuple[Model, Params], list[int]]:
        sums = dict.fromkeys(leaves, 0)

        def observe(name: str, start: tuple[int, ...], values: np.ndarray) -> None:
            sums[name] += checkpoints.fingerprint_part(values, start)

        tensors = orbax_arrays.tensors(directory)
        sources = {
            name: Source(name, layers_axis=0 if "/layers/" in name else None) for name in leaves
        }
        loaded = transfer.load(
            Stored(config, sources, tensors, str(directory)),
            dtype=dtype, mesh=mesh, rules=rules, scan_layers=scan_layers, observe=observe,
        )  # fmt: skip
        ordered = jax.tree.leaves(transfer.unflatten(sums))
        return loaded, [value % 2**32 for value in ordered]

    return checkpoints.load_params(path, load, step)


def read_config(directory: epath.Path) -> ModelConfig:
    """Return the configuration in a directory of weights, or of a training run.

    Raises:
        ModelError: the file is damaged, or its numbers are out of bounds.
    """
    values = checkpoints.read_config(directory)
    try:
        return limits.checked(from_dict(values))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{directory / checkpoints.MODEL_FILE}: {error}") from error


def _sources(config: ModelConfig) -> dict[str, Source]:
    unrolled = Model(dataclasses.replace(config, scan_layers=False))
    return {path: Source(path) for path in transfer.flatten(unrolled.shapes())}
