"""Late processes: what another process has finished is found, not made again and no error."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pruning.store import late
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build
from pruning.store.intermediate import Parts
from pruning.store.manifest import FinishedElsewhere

SCHEMA = pa.schema([("doc_id", pa.int64())])


def begun(path) -> Build:
    return Build(path, "scores", {"a": 1}, {}, 2, SCHEMA)


def finished(path) -> Artifact:
    build = begun(path)
    for shard in build.pending():
        with build.shard(shard) as writer:
            writer.write({"doc_id": np.arange(3)})
    return build.finish()


def test_a_late_process_returns_what_another_has_finished(tmp_path, capsys):
    @late.stage
    def run(path) -> Artifact:
        build = begun(path)
        if build.finished:
            return load_artifact(path)
        finished(path)  # meanwhile
        with build.shard(0) as writer:
            writer.write({"doc_id": np.arange(3)})
        raise AssertionError

    assert run(tmp_path / "a") == load_artifact(tmp_path / "a")
    assert "finished by another process" in capsys.readouterr().err
    assert not (tmp_path / "a" / "unfinished").exists()


@pytest.mark.parametrize("repairs", [False, True], ids=["new", "lost files"])
def test_waiting_for_parts_ends_when_another_has_finished(tmp_path, repairs):
    if repairs:
        made = finished(tmp_path)
        (tmp_path / made.manifest.shards[0].file).unlink()
    parts = Parts(begun(tmp_path), "count", 1)
    finished(tmp_path)
    with pytest.raises(FinishedElsewhere):
        parts.wait()


def test_a_part_without_those_beside_it_is_missing(tmp_path):
    build = begun(tmp_path)
    first = Parts(build, "first", 2)
    second = Parts(build, "second", 2, beside=(first,))
    for part in range(2):
        first.write(part, b"a")
        second.write(part, b"b")
    assert second.missing() == []
    first.path(1).unlink()
    assert second.missing() == [1]
