"""Division of the work among hosts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pruning.store import parallel, progress
from pruning.store.intermediate import Parts


@dataclasses.dataclass(frozen=True)
class Share:
    """The share of the work of this host.

    Attributes:
      host, hosts: this host processes the parts whose index is `host` modulo `hosts`.
      workers: number of local processes; 0 for one per CPU.
    """

    host: int
    hosts: int
    workers: int

    def run(
        self, name: str, work: parallel.Work, parts: Parts, sizes: Sequence[int], unit: str
    ) -> None:
        """Call `work(part, report)` for this host's missing parts; wait for those of other hosts.

        Args:
          name: name of the work, for the progress line.
          work: writes a part and reports its size.
          sizes: sizes of the parts, in `unit`.
        """
        missing = parts.missing(self.host, self.hosts)
        total = sum(sizes[part] for part in range(self.host, parts.count, self.hosts))
        left = sum(sizes[part] for part in missing)
        with progress.track(name, total, unit, initial=total - left) as task:
            parallel.run_shards(work, missing, self.workers, lambda done, _: task.advance(done))
        parts.wait()
