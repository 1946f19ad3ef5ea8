"""The manifest of an artifact: its kind, configuration, inputs, shards, counts and digest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pruning.store.atomic import pretty_json

FORMAT = 1

MANIFEST = "manifest.json"

MEASURED = "measured.json"

UNFINISHED = "unfinished"

_SEAL = "seal"  # key in JSON files: SHA-256 of the other values

_ADDED = "added"  # metadata of a field, see `added_setting`

Counts = dict[str, Any]  # leaves are integers; inner nodes are dictionaries


class ArtifactError(ValueError):
    """Error for a directory that is not the expected artifact, or is damaged."""


class FinishedElsewhere(ArtifactError):
    """Error for work whose artifact, `args[0]`, another process of the command has finished."""

    def __str__(self) -> str:
        return f"{self.args[0]} was finished by another process meanwhile."


class ConfigurationChanged(ArtifactError):
    """Error for a directory that holds work of another configuration."""


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """One data file.

    Attributes:
      file: file name.
      rows: number of rows.
      tokens: number of tokens; 0 for kinds without tokens.
      checksum: SHA-256 of the file.
      blocks: XXH3 of its file of digests (digests.py); empty for files of earlier versions. It is
        not part of an artifact's digest, because `checksum` already covers the data.
    """

    file: str
    rows: int
    tokens: int
    checksum: str
    blocks: str = ""

    def __post_init__(self) -> None:
        _require_plain_name(self.file)
        if type(self.rows) is not int or type(self.tokens) is not int or self.rows < 0:
            raise ValueError(f"{self.file} has {self.rows!r} rows and {self.tokens!r} tokens")

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; `blocks` is left out when empty."""
        value = dataclasses.asdict(self)
        return value if self.blocks else {k: v for k, v in value.items() if k != "blocks"}

    def identity(self) -> dict[str, Any]:
        """Return the values that an artifact's digest covers."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "blocks"}


def _require_plain_name(name: Any) -> None:
    """Raise ValueError unless a file of this name is directly in the artifact's directory."""
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        raise ValueError(f"{name!r} is not the name of a file in the artifact")


def size_in_words(rows: int, tokens: int) -> str:
    """Return a size as text, "1,000 rows, 250,000 tokens", without tokens where there are none."""
    return f"{rows:,} rows" + (f", {tokens:,} tokens" if tokens else "")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
      kind: "corpus", "scores", "selection", ...
      config: the operative configuration that made the data, as JSON values.
      inputs: `path` (for information) and `digest` of every input.
      shards: one record per data file, in shard order.
      files: checksum of every other file of the artifact.
      counts: numbers of items read, kept, dropped and truncated, by reason.
      summary: values specific to the kind (vocabulary, threshold, ...).
      code: version and revision of the code that finished it.
    """

    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    shards: Sequence[ShardRecord]
    files: Mapping[str, str]
    counts: Counts
    summary: Mapping[str, Any]
    code: Mapping[str, str]
    format: int = FORMAT

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def size(self) -> str:
        return size_in_words(self.rows, self.tokens)

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the content, equal for equal work, independent of place and time."""
        return digest_of(
            {
                "kind": self.kind,
                "format": self.format,
                "config": self.config,
                "inputs": {name: value["digest"] for name, value in self.inputs.items()},
                "shards": [shard.identity() for shard in self.shards],
                "files": self.files,
            }
        )

    def to_json(self) -> str:
        value = {"digest": self.digest, "rows": self.rows, "tokens": self.tokens}
        value |= dataclasses.asdict(self)
        value["shards"] = [shard.to_json() for shard in self.shards]
        return pretty_json(sealed(value))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Return the manifest that a text encodes.

        Raises:
          ValueError, TypeError, KeyError: the text is not a manifest, or was changed.
        """
        value = unsealed(json.loads(text))
        derived = {name: value.pop(name) for name in ("digest", "rows", "tokens") if name in value}
        value["shards"] = [ShardRecord(**shard) for shard in value["shards"]]
        manifest = cls(**value)
        for name in ("config", "inputs", "files", "counts", "summary", "code"):
            if not isinstance(value[name], dict):
                raise ValueError(f"{name} is not an object")
        for name in manifest.files:
            _require_plain_name(name)
        for name, said in derived.items():
            if said != getattr(manifest, name):
                raise ValueError(f"{name} is not what the rest of the file says")
        return manifest


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of itself."""
    return {**value, _SEAL: digest_of(value)}


def unsealed(value: Any) -> dict[str, Any]:
    """Return a JSON object without its checksum, after comparing it.

    Objects of earlier versions have no checksum.

    Raises:
      ValueError: the object was changed, or is not an object.
    """
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    rest = {key: item for key, item in value.items() if key != _SEAL}
    if _SEAL in value and value[_SEAL] != digest_of(rest):
        raise ValueError("its seal does not fit its content: it was changed after it was written")
    return rest


def digest_of(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def config_of(configuration: Any) -> dict[str, Any]:
    """Return a nested dataclass as JSON values, with names of classes under "class"."""
    return json.loads(json.dumps(_plain(configuration), ensure_ascii=False))


def added_setting(default: Any) -> Any:
    """Return a dataclass field for a setting that earlier versions did not have.

    `config_of` leaves it out while it has its default, so that work begun before the setting
    existed keeps its digest.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _plain(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get(_ADDED) and getattr(value, f.name) == f.default)
        }
        return {"class": type(value).__name__} | fields
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set) else value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def merge_counts(*counts: Counts) -> Counts:
    """Add nested counts key by key; keys are sorted, so the result is independent of the order."""
    merged: Counts = {}
    for count in counts:
        for key, value in count.items():
            if isinstance(value, dict):
                merged[key] = merge_counts(merged.get(key, {}), value)
            else:
                merged[key] = merged.get(key, 0) + int(value)
    return dict(sorted(merged.items()))


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return a line for every leaf in which two JSON values differ, as `a.b: 1 -> 2`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted(set(old) | set(new)):
            inner = f"{name}.{key}" if name else str(key)
            found += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), inner)
        return found
    return [] if old == new else [f"{name}: {_short(old)} -> {_short(new)}"]


def require_same_configuration(
    path: os.PathLike | str,
    begun: Mapping[str, Any],
    given: Mapping[str, Any],
    verb: str = "begun",
    further: Sequence[str] = (),
) -> None:
    """Raise ConfigurationChanged, listing every difference, unless two configurations are equal.

    Args:
      path: the output directory.
      begun: JSON values of the configuration that claimed the directory.
      given: JSON values of this process's configuration.
      verb: "begun" or "made".
      further: additional differences found by the caller.
    """
    changes = [*differences(begun, json.loads(json.dumps(given))), *further]
    if changes:
        raise ConfigurationChanged(
            f"{os.fspath(path)} was {verb} with another configuration:"
            + "".join(f"\n  {change}" for change in changes)
            + "\nGive another output directory, or delete this one."
        )


@functools.cache
def code_revision() -> dict[str, str]:
    """Return the version and, in a checkout, the commit ("+": with changes)."""
    try:
        version = metadata.version("winnow-lm")
    except metadata.PackageNotFoundError:
        version = "unknown"
    root = Path(__file__).resolve().parents[2]
    revision = "none"
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            head = subprocess.run(
                [*git, "rev-parse", "HEAD"], capture_output=True, check=True, text=True
            )
            dirty = subprocess.run(
                [*git, "status", "--porcelain", "-uno"], capture_output=True, check=True, text=True
            )
            revision = head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
    return {"version": version, "revision": revision}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
