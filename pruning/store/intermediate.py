"""Intermediate results of a stage that needs two passes: counts, sketches, centroids, groups.

    parts = Parts(build, "sketch", 64)
    for part in parts.missing(worker, workers):
        parts.write(part, content)
    parts.wait()                                       # for those of other workers
    whole = sum(decode(parts.read(part)) for part in range(64))

Choices
- A part is a file in the unfinished work of an artifact. It appears complete or not at all, belongs
  to the artifact's configuration, and is removed when the artifact is finished. A stage that was
  killed resumes with the parts that it had.
- Workers divide parts by index, as they divide shards, and exchange them through the files. The
  first to finish waits for the others' parts. A worker that died is restarted by its launcher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
from etils import epath

from models.terminal import say
from pruning.store import shuffle
from pruning.store.atomic import HashingFile, atomic_file
from pruning.store.block_hasher import checksum
from pruning.store.build import Build
from pruning.store.manifest import UNFINISHED, ArtifactError

_LOOK_EVERY = 2.0  # seconds
_SAY_EVERY = 60.0

_MARK = b"xxh3"  # follows the content; then a digest of the content and the file's name
_DIGITS = 16
_TAIL = len(_MARK) + _DIGITS


def _digest(content: bytes, name: str) -> bytes:
    return checksum(content + name.encode()).encode()


@dataclasses.dataclass(frozen=True)
class Parts:
    """A numbered set of intermediate files with a common name.

    Attributes:
      build: the artifact under construction.
      name: kind of the parts, in one word; a stage may have several kinds.
      count: number of parts; must not depend on the number of workers.
      beside: names of other parts that the same work writes before these. A part without them
        counts as missing.
    """

    build: Build
    name: str
    count: int
    beside: tuple[Parts, ...] = ()

    def path(self, part: int) -> epath.Path:
        """Return the path of a part."""
        file = f"{self.name}-{part:05d}-of-{self.count:05d}.part"
        return self.build.path / UNFINISHED / file

    def missing(self, worker: int = 0, workers: int = 1) -> list[int]:
        """Return the parts that `worker` of `workers` has yet to write, in order."""
        return [
            part
            for part in range(worker, self.count, workers)
            if not all(parts.path(part).exists() for parts in (*self.beside, self))
        ]

    @contextlib.contextmanager
    def opened(self, part: int, *, first_wins: bool = False) -> Iterator[HashingFile]:
        """Open a part for writing; it appears when the block ends without an error.

        For formats with checksums of their own, as `shuffle.Grouped`. `read` cannot read them.
        """
        with self.build.yielding(), atomic_file(self.path(part), first_wins=first_wins) as sink:
            yield sink

    def write(self, part: int, content: bytes, *, first_wins: bool = False) -> None:
        """Write a complete part, with a digest.

        Args:
          first_wins: keep the part that another process has written meanwhile, if any.
        """
        with self.opened(part, first_wins=first_wins) as sink:
            sink.write(content)
            sink.write(_MARK + _digest(content, sink.name))

    def read_bucket(self, part: int, dtype: np.dtype, bucket: int) -> np.ndarray:
        """Return one bucket of a part that was written by `shuffle.Grouped`.

        Raises:
          ArtifactError: the part is missing or damaged.
          FinishedElsewhere: another process has finished the artifact.
        """
        with self.build.yielding():
            return shuffle.read(self.path(part), dtype, bucket)

    def read(self, part: int) -> bytes:
        """Return the content that was passed to `write`.

        Raises:
          ArtifactError: the part is missing or damaged.
          FinishedElsewhere: another process has finished the artifact.
        """
        path = self.path(part)
        try:
            with self.build.yielding():
                stored = path.read_bytes()
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is missing: run the same command again, it will go on."
            ) from None
        content, mark, digest = stored[:-_TAIL], stored[-_TAIL:-_DIGITS], stored[-_DIGITS:]
        if mark != _MARK or digest != _digest(content, path.name):
            raise ArtifactError(
                f"{path} is damaged, or of an earlier version: delete this file and run the same "
                "command again, it makes it anew."
            )
        return content

    def wait(self) -> None:
        """Wait until all parts exist; report the missing ones once a minute."""
        said = time.monotonic()
        while missing := self.missing():
            self.build.require_wanted()
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                say(
                    f"{self.name}: waiting for {len(missing)} of {self.count} parts of other "
                    f"workers, the first is {self.path(missing[0])}",
                    error=True,
                )
            time.sleep(_LOOK_EVERY)
