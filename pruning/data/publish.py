"""Publication of an exported dataset in a repository of the Hugging Face hub.

    python -m pruning export --selection=runs/c4/top ... --output=runs/c4/dataset
    python -m pruning publish --dataset=runs/c4/dataset --repository=owner/name --dry-run

Choices
- Files are compared with the checksums of the manifest before anything is sent, and with those of
  the repository: what is there already is not sent again, so the same command continues after an
  interruption.
- The card is committed last. A repository without it is incomplete.
- A repository with other files, or with other content in files of the same names, is refused: a
  mixture of two exports would be read as one dataset.
- The manifest is not sent, because it holds paths of this machine.
- A new repository is private unless `public` is set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from models.terminal import say
from pruning.data.export import CARD, KIND
from pruning.store import progress
from pruning.store.artifact import load_artifact
from pruning.store.manifest import ArtifactError

NAME = "Publish"

_OF_THE_HUB = (".gitattributes",)
_BLOCK = 1 << 22


class PublishError(ValueError):
    """A dataset that cannot be published as it was asked."""


@dataclasses.dataclass(frozen=True)
class PublishConfig:
    """Settings of `publish`.

    Attributes:
      dataset: directory that `export` made, on a local disk.
      repository: "owner/name" of a dataset repository; it is made if it does not exist. The token
        is that of `hf auth login`, or of the variable HF_TOKEN.
      public: make a new repository public.
      dry_run: print what would be sent, and send nothing.
      files_per_commit: largest number of files in a commit.
    """

    dataset: str
    repository: str
    public: bool = False
    dry_run: bool = False
    files_per_commit: int = 50

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository):
            raise ValueError(f"repository is {self.repository!r}: write owner/name.")
        if self.files_per_commit < 1:
            raise ValueError(f"files_per_commit is at least 1, not {self.files_per_commit}.")


CONFIGURABLES: dict[str, type] = {NAME: PublishConfig}


def run(config: PublishConfig) -> None:
    """Send the files that the repository does not have.

    Raises:
      ArtifactError: the dataset is not finished, damaged, or not on a local disk.
      PublishError: the repository has other files, or other content in them.
    """
    dataset = load_artifact(config.dataset, KIND)
    directory = Path(os.fspath(dataset.path))
    if "://" in config.dataset or not directory.is_dir():
        raise ArtifactError(f"{config.dataset}: copy the dataset to a local disk first.")
    files = [*(shard.file for shard in dataset.manifest.shards), CARD]
    size = sum((directory / name).stat().st_size for name in files)
    where = f"dataset repository {config.repository}"
    if config.dry_run:
        for name in files:
            say(f"{(directory / name).stat().st_size:>15,}  {name}")
        say(f"{len(files):,} files, {size:,} bytes would be sent to the {where}")
        return
    dataset.verify()
    api = _api()
    api.create_repo(
        config.repository, repo_type="dataset", private=not config.public, exist_ok=True
    )
    there = _listing(api, config.repository)
    if other := sorted(there.keys() - set(files) - set(_OF_THE_HUB)):
        raise PublishError(
            f"the {where} has {len(other)} files that are not of {config.dataset}, such as "
            f"{other[0]!r}: name another repository, or delete them there."
        )
    missing = [name for name in files if not _is_there(directory / name, there.get(name))]
    if changed := [name for name in missing if name in there and name != CARD]:
        raise PublishError(
            f"the {where} has {len(changed)} files of the same names as {config.dataset} and other "
            f"content, such as {changed[0]!r}: name another repository, or delete them there."
        )
    with progress.track("publish", len(files), "files", len(files) - len(missing)) as task:
        for batch in _batches(missing, config.files_per_commit):
            _commit(api, config.repository, directory, batch)
            task.advance(len(batch))
    say(f"{len(missing):,} of {len(files):,} files were sent to the {where}")


def _api() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise PublishError(
            f"huggingface-hub is not there ({error}): install winnow-lm[cloud]."
        ) from error
    return huggingface_hub.HfApi()


def _listing(api: Any, repository: str) -> dict[str, Any]:
    """Return the files of a repository by path."""
    tree = api.list_repo_tree(repository, repo_type="dataset", recursive=True)
    return {item.path: item for item in tree if hasattr(item, "blob_id")}


def _is_there(file: Path, remote: Any | None) -> bool:
    """Return whether the repository has this content, by SHA-256 or by git's own digest."""
    if remote is None or remote.size != file.stat().st_size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == _digest(file, hashlib.sha256())
    git = hashlib.sha1(b"blob %d\0" % file.stat().st_size, usedforsecurity=False)
    return remote.blob_id == _digest(file, git)


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _batches(files: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield files of at most `size`, with the card in the last commit of its own."""
    data = [name for name in files if name != CARD]
    for first in range(0, len(data), size):
        yield data[first : first + size]
    if len(data) < len(files):
        yield [CARD]


def _commit(api: Any, repository: str, directory: Path, files: Sequence[str]) -> None:
    from huggingface_hub import CommitOperationAdd

    named: Mapping[str, str] = {name: os.fspath(directory / name) for name in files}
    api.create_commit(
        repository,
        [CommitOperationAdd(name, path) for name, path in named.items()],
        commit_message="Card" if list(files) == [CARD] else f"{len(files)} files of data",
        repo_type="dataset",
    )
