"""Weights in and out: Hugging Face directories, T5X checkpoints, training runs, and Winnow's own.

    model, params = weights.load("google/flan-t5-xl", dtype="bfloat16")
    weights.save("flan_t5_xl", model, params)

Whatever a model comes from, parameters arrive one by one in their final form on their devices,
and the names and shapes must be the model's exactly (`transfer`). The formats differ in names
only: `huggingface`, `t5x`, `winnow`.
"""

import re
from typing import TYPE_CHECKING, Any

from etils import epath

if TYPE_CHECKING:
    import jax

    from models.model import Model
    from models.partitioning import Rules
    from models.weights.transfer import Stored

Params = dict[str, Any]

FORMATS = ("huggingface", "winnow", "run", "t5x")


def load(
    path: epath.PathLike,
    *,
    dtype: Any = None,
    mesh: "jax.sharding.Mesh | None" = None,
    rules: "Rules | None" = None,
    scan_layers: bool = True,
) -> tuple["Model", Params]:
    """Load a model from wherever it is.

    Args:
        path: a directory of Winnow weights, a training run (its newest whole checkpoint is read;
            `run@20000` is the one of that step), a Hugging Face or sentence-transformers directory,
            a T5X checkpoint (TensorStore directory or msgpack file, or a directory of such), or a
            name on the Hugging Face hub, `owner/model` or `owner/model@revision`, which is
            downloaded.
        dtype: of the parameters, float32 by default. bfloat16 halves what they take on the devices,
            for scoring; it is not the compute dtype, which is the configuration's.
        mesh: spread the parameters over it by `rules` (default: `partitioning.RULES`). Without one
            they lie on the default device.
        scan_layers: stacked layers, or unrolled; however the file has them.

    Returns:
        (model, params)

    Raises:
        FileNotFoundError: nothing there that is known.
        ValueError: a file that does not fit its configuration, or is not supported; the message
            names the tensors, or the setting.
        OSError: a hub name that cannot be fetched.
    """
    from models.weights import transfer, winnow

    where, kind = locate(path)
    if kind == "run":
        return winnow.load_run(
            where, split_step(path)[1], dtype=dtype, mesh=mesh, rules=rules, scan_layers=scan_layers
        )
    stored = look(where, kind)
    return transfer.load(stored, dtype=dtype, mesh=mesh, rules=rules, scan_layers=scan_layers)


def look(path: epath.PathLike, kind: str) -> "Stored":
    """What is there to load, from headers and indexes alone; `kind` as `locate` found it."""
    from models.weights import huggingface, t5x, winnow

    return {"huggingface": huggingface.read, "winnow": winnow.read, "t5x": t5x.read}[kind](path)


def save(
    path: epath.PathLike,
    model: "Model",
    params: Params,
    vocabulary_file: epath.PathLike | None = None,
) -> None:
    """Write a directory of Winnow weights (`winnow.save`); `huggingface.save` is its sibling."""
    from models.weights import winnow

    winnow.save(path, model, params, vocabulary_file=vocabulary_file)


def locate(path: epath.PathLike) -> tuple[epath.Path, str]:
    """Where a model is, and in which of `FORMATS`; downloads what is a name on the hub.

    Raises:
        FileNotFoundError: nothing there that is known.
        OSError: a hub name that cannot be fetched.
    """
    from models import checkpoints
    from models.weights import huggingface, safetensors_file, t5x

    directory = epath.Path(split_step(path)[0])
    if (directory / checkpoints.MODEL_FILE).exists():
        names = (safetensors_file.SINGLE, safetensors_file.INDEX)
        whole = any((directory / name).exists() for name in names)
        return directory, "winnow" if whole else "run"
    if (directory / huggingface.CONFIG).exists():
        return directory, "huggingface"
    if t5x.find(directory) is not None:
        return directory, "t5x"
    if not directory.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(path)):
        return huggingface.download(str(path)), "huggingface"
    raise FileNotFoundError(
        f"no model at {path}: no {checkpoints.MODEL_FILE} (Winnow), no {huggingface.CONFIG} "
        f"(Hugging Face), no file {t5x.INDEX!r} (T5X), and not a hub name (owner/model)"
    )


def split_step(path: epath.PathLike) -> tuple[epath.PathLike, int | None]:
    """`run@20000` as a training run and the step of one of its checkpoints; None: the newest."""
    from models import checkpoints

    run, _, step = str(path).rpartition("@")
    if run and step.isdecimal() and (epath.Path(run) / checkpoints.MODEL_FILE).exists():
        return run, int(step)
    return path, None
