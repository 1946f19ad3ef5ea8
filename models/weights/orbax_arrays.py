"""Arrays of a tree that Orbax wrote, read one by one through TensorStore, a slice at a time.

    _METADATA          the tree: names, and whether arrays are kept in one database (OCDBT) and how
    checkpoint         in its place before 2024: msgpack, with a placeholder for each array, or the
                       array itself where it was small
    manifest.ocdbt     the database, if there is one; else a zarr directory for each array

Orbax itself restores a whole tree at a time, each array in one piece. The name of an array is its
path in the tree, joined by dots.
"""

from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from models import json_file
from models.errors import ModelError
from models.weights import flax_msgpack
from models.weights.stored import (
    StoredTensor,
    ZarrTensor,
    kvstore,
    open_zarr,
    tensorstore_reason,
)

METADATA = "_METADATA"
_OLD_INDEX = "checkpoint"
_PLACEHOLDER = "PLACEHOLDER://"
_NO_ARRAYS = ("None", "Dict", "List", "Tuple", "NamedTuple", "string", "Empty")


def is_tree(directory: epath.Path) -> bool:
    """Return whether a directory holds a tree that Orbax wrote."""
    names = (METADATA, "manifest.ocdbt")
    return any((directory / name).exists() for name in names)


def names(directory: epath.Path) -> dict[str, Any]:
    """Return the tree's leaves: paths, joined by slashes, to an array's name, or to the array.

    Raises:
        ModelError: an index that is damaged.
    """
    if (directory / _OLD_INDEX).exists():  # complete where both are there; _METADATA lacks values
        tree = flax_msgpack.read_file(directory / _OLD_INDEX)
        return dict(_placed(tree, ()))
    try:
        entries = json_file.read_object(directory / METADATA)["tree_metadata"].values()
        paths = [
            [str(key["key"]) for key in entry["key_metadata"]]
            for entry in entries
            if entry["value_metadata"]["value_type"] not in _NO_ARRAYS
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{directory / METADATA} is not Orbax's index of a tree ({error!r}): copy or download "
            "the checkpoint again"
        ) from error
    return {"/".join(path): ".".join(path) for path in paths}


def tensors(
    directory: epath.Path, wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, StoredTensor]:
    """Return the arrays under the paths that are `wanted`; only their shapes are read.

    Raises:
        ModelError: an array that the index names is missing, or cannot be opened.
    """
    metadata = directory / METADATA
    settings = json_file.read_object(metadata) if metadata.exists() else {}
    database = (directory / "manifest.ocdbt").exists()
    driver = "zarr3" if settings.get("use_zarr3") else "zarr"
    # Earlier releases of Orbax left out chunks of zeros. In a database a chunk is missing for no
    # other reason; a missing file may be the fault of an incomplete copy.
    sparse = database and not settings.get("store_array_data_equal_to_fill_value", False)
    found = {path: value for path, value in names(directory).items() if wanted(path)}
    stores: dict[str, dict[str, Any]] = {}
    opening: dict[str, Any] = {}
    for path, name in found.items():
        if isinstance(name, str):
            stores[path] = _kvstore(directory, name, database)
            opening[path] = open_zarr(stores[path], driver, sparse)
    for path, future in opening.items():
        try:
            shape = tuple(future.result().shape)
        except (ValueError, OSError) as error:
            raise ModelError(
                f"{directory} lacks the array of {path} ({tensorstore_reason(error)}): copy or "
                "download the checkpoint again"
            ) from error
        found[path] = ZarrTensor(shape, stores[path], driver, sparse)
    return found


def _kvstore(directory: epath.Path, name: str, database: bool) -> dict[str, Any]:
    if name.startswith("/") or ".." in name.split("/"):
        raise ModelError(f"{directory} names the array {name!r}, which is outside of it")
    if not database:
        return kvstore(directory / name)
    return {"driver": "ocdbt", "base": kvstore(directory), "path": f"{name}/"}


def _placed(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield (path, name of the array or the array) of an index of before 2024."""
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from _placed(child, (*path, str(name)))
    elif isinstance(tree, str):
        if tree.startswith(_PLACEHOLDER):
            yield "/".join(path), tree.removeprefix(_PLACEHOLDER)
    elif tree is not None:
        yield "/".join(path), tree
