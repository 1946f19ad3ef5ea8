"""What an evaluation leaves: a result per task as soon as there is one, and the whole written last.

    config.json       what the results belong to
    results/<task>.json
    result.json       all of them; with it there is nothing left to do

Choices
- An evaluation that was interrupted goes on with the tasks that it lacks. One that was begun with
  another model or other settings is refused, naming the difference, as an artefact is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from pruning.artefact import ConfigurationChanged, code_revision, differences, digest_of, write_text

CONFIG, RESULT, RESULTS = "config.json", "result.json", "results"


class Record:
    """The directory of an evaluation.

    Args:
      output: the directory.
      identity: JSON values: all that the results depend on.

    Raises:
      ConfigurationChanged: it was begun with another identity.
    """

    def __init__(self, output: epath.PathLike, identity: Mapping[str, Any]):
        self.path = epath.Path(output)
        self.identity = json.loads(json.dumps(identity))
        file = self.path / CONFIG
        if file.exists():
            if changes := differences(json.loads(file.read_text()), self.identity):
                raise ConfigurationChanged(
                    f"{self.path} was begun with another configuration:"
                    + "".join(f"\n  {change}" for change in changes)
                    + "\nGive another output, or delete this one."
                )
        else:
            (self.path / RESULTS).mkdir(parents=True, exist_ok=True)
            write_text(file, _json(self.identity))

    def each(
        self, names: Sequence[str], evaluate: Callable[[str], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Results by name; those that are there already are read. Writes result.json at the end."""
        found = {}
        for name in names:
            file = self.path / RESULTS / f"{name}.json"
            if not file.exists():
                write_text(file, _json(evaluate(name)))
            found[name] = json.loads(file.read_text())
        digest = digest_of({"identity": self.identity, "results": found})
        whole = self.path / RESULT
        if not whole.exists() or json.loads(whole.read_text())["digest"] != digest:
            summary = {"digest": digest, "results": found, "code": code_revision()}
            write_text(whole, _json(summary))
        return found


def results(path: epath.PathLike) -> dict[str, Any]:
    """What `each` found, by name, of a finished evaluation."""
    return json.loads((epath.Path(path) / RESULT).read_text())["results"]


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
