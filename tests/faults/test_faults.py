"""Faults of many kinds: nothing lost, nothing wrong in silence, no traceback. A part of run.py."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import pipeline
import surroundings
import trials
from trials import Outcome, Workshop

from pruning.store.manifest import MANIFEST

NUMBER = {
    trials.damaged_artifact: 50,
    trials.damaged_work: 16,
    trials.killed: 8,
    trials.at_once: 4,
    trials.refused: 8,
    surroundings.full_disk: 8,
    surroundings.clocks: 4,
    surroundings.hostile_names: 6,
    surroundings.hostile_contents: 8,
}
KINDS = trials.TRIALS | surroundings.TRIALS


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("make", NUMBER, ids=lambda make: make.__name__)
def test_faults_end_in_the_same_bytes_or_in_one_line_that_helps(workshop, make):
    bad = []
    cases = trials.dealt(workshop, {make: KINDS[make]}, NUMBER[make], random.Random(0))
    for number, (_, case) in enumerate(cases):
        rng = random.Random(f"{number}")
        fault, stage, outcome, words = trials.trial(workshop, rng, make, case)
        if outcome not in (Outcome.IDENTICAL, Outcome.REPAIRED):
            bad.append(f"{number}: {fault}, {stage}: {outcome.value}\n{words}")
    assert not bad, "\n\n".join(bad)


def test_artifacts_of_earlier_versions_are_read_and_repaired_without_digests(workshop):
    """Without digests and seals, readers read the same, and lost shards are made again."""
    for name, stage in pipeline.STAGES.items():
        if stage.makes:
            _strip(workshop.root / name)
    stripped = {name: pipeline.content(workshop.root / name) for name in ("corpus", "selection")}
    try:
        for name in ("stream", "stream of tokens"):
            assert workshop.read(name, workshop.run(name).result)
        shutil.rmtree(workshop.root / "dataset")
        assert workshop.run("dataset").status == 0
        assert workshop.is_whole("dataset")
        for name in stripped:
            next(iter(sorted((workshop.root / name).glob("data-*")))).unlink()
            assert workshop.run(name).status == 0
            assert pipeline.content(workshop.root / name) == stripped[name]
    finally:
        workshop.restore()


def _strip(artifact: Path) -> None:
    """Take from an artifact what earlier versions did not write."""
    for file in artifact.glob("*.xxh3"):
        file.unlink()
    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["seal"]
    for shard in manifest["shards"]:
        del shard["blocks"]
    (artifact / MANIFEST).write_text(json.dumps(manifest))
