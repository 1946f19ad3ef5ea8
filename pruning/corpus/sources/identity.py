"""Identity of a source in a manifest: its settings and its content, not its location.

A source that was moved is the same source; one that was changed is refused on resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from pruning.corpus.sources.document import Fingerprint, Source
from pruning.store.manifest import config_of

_PLACE = ("paths", "data_dir")  # settings for the location, not the content
_THREADS = 16  # bound by latency of object storage, not by CPU


def identify(source: Source, pieces: Sequence[tuple[str, ...]]) -> tuple[dict[str, Any], list[int]]:
    """Describe a source for the configuration of an artifact.

    Args:
      pieces: the files of the source, grouped as they are read.

    Returns:
      `{"source": its settings, "files": {name: size and checksum}}`, and the size of every piece.
      Names are relative to the common directory of all files.
    """
    files = [file for piece in pieces for file in piece]
    with ThreadPoolExecutor(_THREADS) as pool:
        prints = dict(zip(files, pool.map(source.fingerprint, files), strict=True))
    names = names_of(files)
    described, sizes = {}, []
    for piece in pieces:
        together = _together([(names[file], prints[file]) for file in piece])
        name = names[piece[0]]
        if len(piece) > 1:
            name = f"{name} to {names[piece[-1]]} ({len(piece)} files)"
        described[name] = {"bytes": together.n_bytes, "xxh3": together.checksum}
        sizes.append(together.n_bytes)
    settings = {k: v for k, v in config_of(source).items() if k not in _PLACE}
    return {"source": settings, "files": described}, sizes


def names_of(files: Sequence[str]) -> dict[str, str]:
    """Return path -> name relative to the common directory of all files."""
    return dict(zip(files, _relative(files), strict=True))


def _relative(files: Sequence[str]) -> list[str]:
    parts = [file.split("/") for file in files]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def _together(prints: Sequence[tuple[str, Fingerprint]]) -> Fingerprint:
    """Return one fingerprint for several files; that of a single file is unchanged."""
    if len(prints) == 1:
        return prints[0][1]
    listed = "".join(f"{name}:{found.checksum}\n" for name, found in prints)
    n_bytes = sum(found.n_bytes for _, found in prints)
    return Fingerprint(n_bytes, xxhash.xxh3_64_hexdigest(listed.encode()))
