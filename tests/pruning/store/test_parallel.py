"""The runners: whoever maps the shards, the bytes are the same; errors come out as themselves."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from pruning.cli import main as commands
from pruning.corpus.sources.document import SourceError
from pruning.store import parallel


def square(directory: Path, shard: int, report: parallel.Report) -> None:
    if shard < 0:
        raise SourceError(f"file {-shard} is damaged: fetch it again.")
    (directory / str(shard)).write_text(str(shard**2))
    report(shard, 1)


@pytest.fixture(scope="module")
def beam():
    return pytest.importorskip("apache_beam", reason="Apache Beam is not installed")


def test_beam_maps_every_shard_once_and_counts(beam, tmp_path):
    told = []
    with parallel.using("beam"):
        parallel.run_shards(
            functools.partial(square, tmp_path), [1, 2, 3], 0, lambda *counts: told.append(counts)
        )
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"1": "1", "2": "4", "3": "9"}
    assert tuple(map(sum, zip(*told, strict=True))) == (6, 3)


def test_errors_on_beam_are_those_of_the_work(beam, tmp_path):
    with (
        parallel.using("beam", "--job_name=test"),
        pytest.raises(SourceError, match="file 4 is damaged: fetch it again"),
    ):
        parallel.run_shards(functools.partial(square, tmp_path), [-4], 0, lambda *counts: None)


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        ("builtins", "ValueError", ValueError),
        ("pruning.corpus.sources.document", "SourceError", SourceError),
        ("subprocess", "SubprocessError", parallel.BeamError),  # not ours: only said
        ("builtins", "eval", parallel.BeamError),  # no error at all
    ],
)
def test_only_our_own_errors_are_made_from_words(module, name, kind):
    words = {"message": "1 + 1", "args": ["1 + 1"], "errno": None}
    said = json.dumps({"module": module, "name": name} | words)
    error = parallel._as_raised(RuntimeError(f"... winnow-error:{said.encode().hex()}:end ..."))
    assert type(error) is kind and "1 + 1" in str(error)


def test_stages_give_the_same_bytes_on_beam(beam, records, small_vocabulary_file, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for shard in range(3):
        lines = (json.dumps(record) for record in records(20, shard))
        (tmp_path / "in" / f"{shard}.jsonl").write_text("\n".join(lines))

    def run(stage, output, *arguments):
        assert commands.main([stage, f"--gin.OUTPUT={output}", *arguments]) == 0
        files = (f for f in output.rglob("*") if f.is_file() and f.name != "measured.json")
        return {str(f.relative_to(output)): f.read_bytes() for f in files}

    ingest = [
        "--gin_file=configs/ingest/jsonl.gin",
        f"--gin.FILES={tmp_path / 'in'}",
        f"--gin.VOCABULARY={small_vocabulary_file}",
        "--gin.Ingest.workers=1",
    ]
    local = run("ingest", tmp_path / "local", *ingest)
    assert run("ingest", tmp_path / "beam", *ingest, "--runner=beam") == local
    documents = [
        "--gin_file=configs/export.gin",
        f"--gin.CORPUS={tmp_path / 'local'}",
        "--gin.SELECTION=None",
        "--gin.Export.workers=1",
    ]
    local = run("export", tmp_path / "out", *documents)
    options = ["--runner=beam", "--beam_pipeline_options=runner=DirectRunner,direct_num_workers=1"]
    assert run("export", tmp_path / "out_beam", *documents, *options) == local
