"""Intermediate results of a stage that needs two passes: counts, sketches, centroids, groups.

    parts = Parts(build, "sketch", 64)
    for part in parts.missing(worker, workers):
        parts.write(part, content)
    parts.wait()                                       # for those of other workers
    whole = sum(decode(parts.read(part)) for part in range(64))

Choices
- A part is a file among the unfinished work of the artefact that it helps to make. It comes into
  being whole or not at all, belongs to the same configuration, and is gone when the artefact is
  finished: a stage that was killed goes on with the parts that it had.
- Workers share parts as they share shards, by index, and meet in the files. Who is done first waits
  until the others' parts are there; a worker that died is started again by its launcher.
"""

from __future__ import annotations

import dataclasses
import sys
import time

from pruning.artefact import UNFINISHED, ArtefactError, Build, atomic_file

_LOOK_EVERY = 2.0  # seconds
_SAY_EVERY = 60.0


@dataclasses.dataclass(frozen=True)
class Parts:
    """`count` files of one name.

    Attributes:
      build: the artefact in the making.
      name: what they are, in a word; a stage may have several kinds.
      count: how many; it must not depend on the number of workers.
    """

    build: Build
    name: str
    count: int

    def _path(self, part: int):
        file = f"{self.name}-{part:05d}-of-{self.count:05d}.part"
        return self.build.path / UNFINISHED / file

    def missing(self, worker: int = 0, workers: int = 1) -> list[int]:
        """The parts that `worker` of `workers` has still to write, in order."""
        return [k for k in range(worker, self.count, workers) if not self._path(k).exists()]

    def write(self, part: int, content: bytes) -> None:
        with atomic_file(self._path(part)) as sink:
            sink.write(content)

    def read(self, part: int) -> bytes:
        path = self._path(part)
        if not path.exists():
            raise ArtefactError(f"{path} is missing: run the same command again, it will go on.")
        return path.read_bytes()

    def wait(self) -> None:
        """Returns when all parts are there; says from time to time what it waits for."""
        said = time.monotonic()
        while missing := self.missing():
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                print(
                    f"{self.name}: waiting for {len(missing)} of {self.count} parts of other "
                    f"workers, the first is {self._path(missing[0])}",
                    file=sys.stderr,
                )
            time.sleep(_LOOK_EVERY)
