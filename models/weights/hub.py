"""Models of the Hugging Face hub, downloaded by name: configuration, safetensors, tokenizers."""

import contextlib
import fnmatch
import re
from collections.abc import Iterator

from etils import epath

from models.errors import ModelError, ModelNotFound, first_line
from models.weights import safetensors_file

# Files with weights that are not read: pickles run code, and the others hold the same tensors.
NOT_SAFE = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "flax_model*.msgpack", "tf_model.h5")

# Files that tokenize; config.json tells ByT5's bytes.
TOKENIZER = (
    "tokenizer*.json",
    "*.model",
    "special_tokens_map.json",
    "chat_template*",
    "config.json",
)

_NAME = r"[\w.-]+/[\w.-]+(@[\w./-]+)?"


def is_name(text: str) -> bool:
    """Return whether `text` has the form of a name: `owner/model` or `owner/model@revision`."""
    return re.fullmatch(_NAME, text) is not None


def download(name: str, patterns: tuple[str, ...]) -> epath.Path:
    """Fetch the files of a model that match `patterns`, less those that are cached already.

    Args:
        name: `owner/model` or `owner/model@revision`.

    Returns:
        the directory of the files.

    Raises:
        ModelNotFound: no such model, no network and nothing cached, or no huggingface_hub.
        ModelError: the model has weights, but none in safetensors.
    """
    with _named(name):
        found = _fetched(name, patterns)
        if not _has_safetensors(found):
            import huggingface_hub

            repository, _, revision = name.partition("@")
            _refuse_pickles(name, huggingface_hub.list_repo_files(repository, revision=revision))
    return found


def download_tokenizer(name: str) -> epath.Path:
    """Fetch the tokenizer files of a model, less those that are cached already.

    Returns:
        the directory of the files.

    Raises:
        ModelNotFound: no such model, no network and nothing cached, or no huggingface_hub.
    """
    with _named(name):
        return _fetched(name, TOKENIZER)


def _fetched(name: str, patterns: tuple[str, ...]) -> epath.Path:
    import huggingface_hub

    repository, _, revision = name.partition("@")
    return epath.Path(
        huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=list(patterns)
        )
    )


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Raise errors of the hub's client as ModelNotFound, with the name."""
    try:
        yield
    except ModelError:
        raise
    except ImportError as error:
        raise ModelNotFound(f"to fetch {name!r}, install huggingface-hub") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelNotFound(
            f"{name!r} is no directory here, and the Hugging Face hub does not give it "
            f"({first_line(error)}); check the name and the network, or give a directory"
        ) from error


def require_safetensors(directory: epath.Path) -> None:
    """Raise unless a directory has weights in safetensors.

    Raises:
        ModelNotFound: there are no weights.
        ModelError: there are weights in other formats only.
    """
    if _has_safetensors(directory):
        return
    _refuse_pickles(str(directory), [child.name for child in directory.iterdir()])
    raise ModelNotFound(
        f"{directory} holds neither {safetensors_file.SINGLE} nor {safetensors_file.INDEX}: copy "
        "or download the weights"
    )


def _has_safetensors(directory: epath.Path) -> bool:
    names = (safetensors_file.SINGLE, safetensors_file.INDEX)
    return any((directory / name).exists() for name in names)


def _refuse_pickles(origin: str, files: list[str]) -> None:
    unsafe = [file for file in files for pattern in NOT_SAFE if fnmatch.fnmatch(file, pattern)]
    if unsafe:
        raise ModelError(
            f"{origin} holds {unsafe[0]} and no safetensors; pickles are not read, for they run "
            "code. Convert it: transformers' from_pretrained(...) and save_pretrained(...) write "
            "safetensors; or take a revision that has them (owner/model@refs/pr/1 on the hub)"
        )
