"""Results directory of an evaluation: one file per finished task, and a summary written last.

    config.json       what the results depend on
    results/<task>.json
    result.json       all results; the evaluation is finished if it exists

Choices
- An interrupted evaluation continues with the missing tasks. One that was begun with another model
  or other settings is refused with the difference, as an artifact is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from evaluation.errors import EvaluationError
from models import json_file
from pruning.store.atomic import write_text
from pruning.store.manifest import (
    code_revision,
    digest_of,
    require_same_configuration,
    sealed,
    unsealed,
)

CONFIG, RESULT, RESULTS = "config.json", "result.json", "results"


class ResultsDirectory:
    """The directory of an evaluation.

    Args:
      output: the directory.
      identity: JSON values that the results depend on.

    Raises:
      ConfigurationChanged: the directory belongs to another identity.
    """

    def __init__(self, output: epath.PathLike, identity: Mapping[str, Any]):
        self.path = epath.Path(output)
        self.identity = json.loads(json.dumps(identity))
        file = self.path / CONFIG
        if file.exists():
            require_same_configuration(self.path, _read(file), self.identity)
        else:
            (self.path / RESULTS).mkdir(parents=True, exist_ok=True)
            write_text(file, _json(self.identity))

    def each(
        self, names: Sequence[str], evaluate: Callable[[str], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return results by name, reading those that exist; write result.json at the end."""
        found = {}
        for name in names:
            file = self.path / RESULTS / f"{name}.json"
            if not file.exists():
                write_text(file, _json(evaluate(name)))
            found[name] = _read(file)
        digest = digest_of({"identity": self.identity, "results": found})
        whole = self.path / RESULT
        if not whole.exists() or _read(whole).get("digest") != digest:
            summary = {"digest": digest, "results": found, "code": code_revision()}
            write_text(whole, _json(summary))
        return found


def read_results(path: epath.PathLike) -> dict[str, Any]:
    """Read the results of a finished evaluation, by name."""
    return _read(epath.Path(path) / RESULT, "results")["results"]


def _read(file: epath.Path, *keys: str) -> dict[str, Any]:
    again = "delete it and run the command that made it again"
    found = json_file.read_object(file, keys=keys, mend=again)
    try:
        return unsealed(found)
    except ValueError as error:
        raise EvaluationError(f"{file} is damaged ({error}): {again}.") from error


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(sealed(value), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
