"""What a stage that reads a source remembers of it: its settings and its content, not its place.

A moved source is the same source; a changed one is refused when the work goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from pruning.artefact import config_of
from pruning.sources.document import Fingerprint, Source

_PLACE = ("paths", "data_dir")  # settings that say where, not what
_THREADS = 16  # they mostly wait, on object storage


def identify(source: Source, pieces: Sequence[tuple[str, ...]]) -> tuple[dict[str, Any], list[int]]:
    """Describes a source for the configuration of an artefact.

    Args:
      pieces: the files of the source, grouped as they are read.

    Returns:
      `{"source": its settings, "files": {name: size and checksum}}`, and the size of every piece.
      Names are seen from the directory that all files share.
    """
    files = [file for piece in pieces for file in piece]
    with ThreadPoolExecutor(_THREADS) as pool:
        prints = dict(zip(files, pool.map(source.fingerprint, files), strict=True))
    names = dict(zip(files, _relative(files), strict=True))
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


def _relative(files: Sequence[str]) -> list[str]:
    parts = [file.split("/") for file in files]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def _together(prints: Sequence[tuple[str, Fingerprint]]) -> Fingerprint:
    """One fingerprint for several files; one file's is its own."""
    if len(prints) == 1:
        return prints[0][1]
    listed = "".join(f"{name}:{found.checksum}\n" for name, found in prints)
    n_bytes = sum(found.n_bytes for _, found in prints)
    return Fingerprint(n_bytes, xxhash.xxh3_64_hexdigest(listed.encode()))
