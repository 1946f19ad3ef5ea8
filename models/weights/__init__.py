"""Weights in and out: Hugging Face directories, T5X checkpoints, training runs, and Winnow's own.

    model, params = weights.load("google/flan-t5-xl", dtype="bfloat16")
    weights.save("flan_t5_xl", model, params)

Parameters arrive one by one in their final form on their devices, and their names and shapes must
be the model's exactly (`transfer`). The formats differ in names only: `huggingface`, `t5x`,
`winnow`. An error that the user can cause is a `ModelError` of one line.
"""

import re
from typing import TYPE_CHECKING, Any

from etils import epath

from models.errors import ModelError, ModelNotFound, first_line, reading

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
    """Load a model of any supported format.

    Args:
        path: a directory of Winnow weights, a training run (its newest whole checkpoint is read;
            `run@20000` is the one of that step), a Hugging Face or sentence-transformers directory,
            a T5X checkpoint (TensorStore directory or msgpack file, or a directory of such), or a
            name on the Hugging Face hub, `owner/model` or `owner/model@revision`, which is
            downloaded.
        dtype: of the parameters, float32 by default. bfloat16 halves their memory on the devices,
            for scoring; it is not the compute dtype, which is the configuration's.
        mesh: to spread the parameters over by `rules` (default: `partitioning.RULES`). Without one
            they lie on the default device.
        scan_layers: stack the layers, or unroll them, independently of the file's layout.

    Returns:
        (model, params)

    Raises:
        ModelNotFound: there is no model, or a hub name cannot be fetched.
        ModelError: a file that is damaged, does not fit its configuration, or is not supported; the
            message names the tensors, or the setting.
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
    """Return the model at `path`, from headers and indexes alone; `locate` gives both arguments."""
    from models.weights import huggingface, t5x, winnow

    return {"huggingface": huggingface.read, "winnow": winnow.read, "t5x": t5x.read}[kind](path)


def save(
    path: epath.PathLike,
    model: "Model",
    params: Params,
    vocabulary_file: epath.PathLike | None = None,
) -> None:
    """Write a directory of Winnow weights (`winnow.save`); see also `huggingface.save`."""
    from models.weights import winnow

    winnow.save(path, model, params, vocabulary_file=vocabulary_file)


def locate(path: epath.PathLike) -> tuple[epath.Path, str]:
    """Return the directory of a model and its format, one of `FORMATS`; download a hub name.

    Raises:
        ModelNotFound: there is no model, or a hub name cannot be fetched.
        ModelError: a path that cannot be read.
    """
    scheme = _scheme(path)
    if scheme is None:
        with reading(path):
            return _locate(path)
    try:
        return _locate(path)
    except ModelError:
        raise
    # NOTE: each client of an object store has exceptions of its own; an ImportError among them
    # where none is installed.
    except Exception as error:
        raise ModelError(
            f"{path} cannot be reached ({first_line(error)}): check the name, the credentials and "
            f"the client of {scheme}:// storage, or copy the model to this machine"
        ) from error


def _scheme(path: epath.PathLike) -> str | None:
    """Return the scheme of a URL, or None for a local path.

    Raises:
        ModelError: a scheme that is not object storage.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(path))
    if match is None:
        return None
    scheme = match[1].lower()
    if scheme == "hf":
        raise ModelError(f"{path}: give a model of the Hugging Face hub as owner/model[@revision]")
    if scheme not in ("gs", "s3"):
        raise ModelError(
            f"{path}: models are not read over {scheme}://; give a local directory, gs://, s3://, "
            "or a name on the Hugging Face hub (owner/model[@revision])"
        )
    return scheme


def _locate(path: epath.PathLike) -> tuple[epath.Path, str]:
    from models import checkpoints
    from models.weights import hub, huggingface, safetensors_file, t5x

    directory = epath.Path(split_step(path)[0])
    if (directory / checkpoints.MODEL_FILE).exists():
        names = (safetensors_file.SINGLE, safetensors_file.INDEX)
        whole = any((directory / name).exists() for name in names)
        return directory, "winnow" if whole else "run"
    if (directory / huggingface.CONFIG).exists():
        return directory, "huggingface"
    if t5x.find(directory) is not None:
        return directory, "t5x"
    if not directory.exists() and hub.is_name(str(path)):
        return hub.download(str(path), huggingface.DOWNLOADED), "huggingface"
    raise ModelNotFound(
        f"no model at {path}: no {checkpoints.MODEL_FILE} (Winnow), no {huggingface.CONFIG} "
        f"(Hugging Face), no file {t5x.INDEX!r} (T5X), and not a hub name (owner/model)"
    )


def split_step(path: epath.PathLike) -> tuple[epath.PathLike, int | None]:
    """Split `run@20000` into a training run and a step; the step is None without one."""
    from models import checkpoints

    run, _, step = str(path).rpartition("@")
    if run and step.isdecimal() and (epath.Path(run) / checkpoints.MODEL_FILE).exists():
        return run, int(step)
    return path, None
