"""Damage to files: what disks, copies and people do to them.

Files are changed in place only where they keep their size: other processes may have them mapped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path


def flip(files: list[Path], rng: random.Random) -> list[Path]:
    """Flip one bit of one file, often near an end, where headers and footers are."""
    file = rng.choice(files)
    size = file.stat().st_size
    if not size:
        return []
    place = rng.randrange(size)
    if rng.random() < 0.25:
        place = rng.choice((rng.randrange(min(size, 64)), size - 1 - rng.randrange(min(size, 64))))
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0] ^ (1 << rng.randrange(8))
        stream.seek(place)
        stream.write(bytes([byte]))
    return [file]


def zero(files: list[Path], rng: random.Random) -> list[Path]:
    """Fill a block of one file with zeros, as after a crash of a file system."""
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    block = rng.choice((16, 512, 4096))
    start = rng.randrange(len(content) + 1) // block * block
    stop = min(start + block, len(content))
    if not any(content[start:stop]):
        return []
    content[start:stop] = bytes(stop - start)
    with file.open("r+b") as stream:
        stream.write(content)
    return [file]


def lose(files: list[Path], rng: random.Random) -> list[Path]:
    """Remove one file."""
    file = rng.choice(files)
    file.unlink()
    return [file]


def truncate(files: list[Path], rng: random.Random) -> list[Path]:
    """Cut one file off anywhere; a quarter of the time it is left empty."""
    file = rng.choice(files)
    content = file.read_bytes()
    if not content:
        return []
    kept = 0 if rng.random() < 0.25 else rng.randrange(len(content))
    _replace(file, content[:kept])
    return [file]


def swap(files: list[Path], rng: random.Random) -> list[Path]:
    """Exchange two files of the same kind."""
    file = rng.choice(files)
    alike = [other for other in files if _kind(other) == _kind(file) and other != file]
    if not alike:
        return []
    other = rng.choice(alike)
    first, second = file.read_bytes(), other.read_bytes()
    if first == second:
        return []
    _replace(file, second)
    _replace(other, first)
    return [file, other]


def swap_shards(files: list[Path], rng: random.Random) -> list[Path]:
    """Exchange two shards together with their digests."""
    shards = [file for file in files if file.with_name(f"{file.name}.xxh3") in files]
    if len(shards) < 2:
        return []
    one, two = rng.sample(shards, 2)
    for a, b in ((one, two), (_digests(one), _digests(two))):
        first, second = a.read_bytes(), b.read_bytes()
        _replace(a, second)
        _replace(b, first)
    return [one, two]


def _digests(shard: Path) -> Path:
    return shard.with_name(f"{shard.name}.xxh3")


def _kind(file: Path) -> tuple[Path, str, str]:
    return file.parent, file.name.partition("-")[0], file.suffix


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(f"{file.name}.new")
    temporary.write_bytes(content)
    temporary.replace(file)


KINDS: dict[str, Callable[[list[Path], random.Random], list[Path]]] = {
    "bit flipped": flip,
    "block zeroed": zero,
    "file lost": lose,
    "file truncated": truncate,
    "files exchanged": swap,
    "shards exchanged": swap_shards,
}
