"""Publication through the hub's own client, to a stand-in of the hub on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pruning.cli.main import main
from pruning.data import export
from pruning.data.export import ExportConfig
from pruning.data.publish import PublishConfig, PublishError, run
from pruning.store.manifest import ArtifactError
from tests import hub_server


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub_server.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def dataset(make_corpus, records, tmp_path) -> Path:
    corpus = make_corpus(tmp_path / "c", [records(30, seed) for seed in range(5)])
    at = tmp_path / "dataset"
    export.run(ExportConfig(corpus=str(corpus.artifact.path), output=str(at), workers=1))
    return at


def names_of(dataset: Path) -> list[str]:
    return sorted([path.name for path in dataset.glob("data-*.parquet")] + ["README.md"])


def test_an_interrupted_publication_is_continued_by_the_same_command(hub, dataset):
    config = PublishConfig(str(dataset), "me/it", files_per_commit=2)
    hub.failing = 2
    with pytest.raises(Exception, match="no room"):
        run(config)
    assert len(hub.files) == 4 and "README.md" not in hub.files and hub.private is True
    hub.failing = None
    run(config)
    assert hub.commits[-1] == ["README.md"] and len(hub.commits) == 4
    assert len(hub.uploads) == len(set(hub.uploads)) == 5  # nothing was sent twice
    assert sorted(hub.files) == names_of(dataset)
    assert all(hub.files[name] == (dataset / name).read_bytes() for name in hub.files)
    commits = len(hub.commits)
    run(config)
    assert len(hub.commits) == commits


def test_a_dry_run_sends_nothing(hub, dataset, capsys):
    arguments = [f"--dataset={dataset}", "--repository=me/it", "--dry-run"]
    assert main(["publish", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "6 files, " in shown and "data-00004-of-00005.parquet" in shown
    assert hub.private is None and not hub.files


def test_what_must_not_be_published_is_refused(hub, dataset, capsys):
    hub.files["data-00000-of-00009.parquet"] = b"of another export"
    with pytest.raises(PublishError, match=r"1 files that are not of .*data-00000-of-00009"):
        run(PublishConfig(str(dataset), "me/it"))
    hub.files = {"data-00001-of-00005.parquet": b"of another export", "README.md": b"of it"}
    with pytest.raises(PublishError, match=r"1 files of the same names .*data-00001-of-00005"):
        run(PublishConfig(str(dataset), "me/it"))
    assert not hub.commits
    hub.files.clear()
    file = dataset / "data-00002-of-00005.parquet"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError):
        run(PublishConfig(str(dataset), "me/it"))
    assert not hub.files
    with pytest.raises(ValueError, match="write owner/name"):
        PublishConfig(str(dataset), "it")
