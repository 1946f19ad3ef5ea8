"""Artifacts: whole or absent, resumable by any number of processes, refused when they don't fit."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pruning.store.artifact import (
    Artifact,
    is_finished,
    load_artifact,
    require_input,
    require_same_documents,
)
from pruning.store.build import Build, encoding_of_numbers
from pruning.store.manifest import (
    MEASURED,
    ArtifactError,
    ConfigurationChanged,
    config_of,
    merge_counts,
)

SCHEMA = pa.schema([("doc_id", pa.int64()), ("score", pa.float32())])


def write_shard(build: Build, shard: int, rows: int = 50) -> None:
    ids = (np.int64(shard) << 32) + np.arange(rows)
    with build.shard(shard) as writer:
        writer.write({"doc_id": ids, "score": np.sqrt(ids).astype(np.float32)})
        writer.tokens = rows * 7
        writer.counts = {"dropped": {"empty": shard}, "documents": rows}
        writer.measured = {"seconds": 0.5}


def build_all(path: Path, config: dict | None = None, shards: int = 4) -> Artifact:
    build = Build(path, "scores", config or {"a": 1}, {}, shards, SCHEMA)
    for shard in build.pending():
        write_shard(build, shard)
    finished = build.finish({"note": "x"})
    assert finished is not None
    return finished


def content(path: Path) -> dict[str, bytes]:
    """All files but the one that holds times."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != MEASURED
    }


def test_what_is_written_is_read_and_counted_once(tmp_path):
    built = build_all(tmp_path / "a")
    assert built.manifest.rows == 200
    assert built.manifest.tokens == 1400
    assert built.manifest.counts == {"dropped": {"empty": 0 + 1 + 2 + 3}, "documents": 200}
    again = load_artifact(tmp_path / "a", "scores")
    assert again.manifest == built.manifest
    assert again.digest == built.digest
    again.verify()
    assert again.read(2, ["doc_id"])["doc_id"].to_pylist() == [(2 << 32) + i for i in range(50)]


def test_order_and_number_of_workers_do_not_change_a_byte(tmp_path):
    build_all(tmp_path / "one")
    for worker in (2, 0, 1):
        build = Build(tmp_path / "three", "scores", {"a": 1}, {}, 4, SCHEMA)
        for shard in reversed(build.pending(worker, workers=3)):
            write_shard(build, shard)
        done = build.finish({"note": "x"})
        assert (done is None) == (worker != 1)  # only the last one finds all records
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_an_error_inside_a_shard_leaves_nothing(tmp_path):
    build = Build(tmp_path / "a", "scores", {}, {}, 2, SCHEMA)
    with pytest.raises(RuntimeError), build.shard(0) as writer:
        writer.write({"doc_id": np.arange(3), "score": np.zeros(3, np.float32)})
        raise RuntimeError
    assert build.pending() == [0, 1]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["unfinished"]


KILLED = textwrap.dedent("""
    import sys, time
    import numpy as np, pyarrow as pa
    from pruning.store.build import Build
    schema = pa.schema([("doc_id", pa.int64()), ("score", pa.float32())])
    build = Build(sys.argv[1], "scores", {"a": 1}, {}, 40, schema)
    for shard in build.pending():
        ids = (np.int64(shard) << 32) + np.arange(2000)
        with build.shard(shard) as writer:
            for part in np.split(ids, 20):
                writer.write({"doc_id": part, "score": np.sqrt(part).astype(np.float32)})
                time.sleep(0.0005)
    build.finish()
""")


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "calm")], check=True)
    generator = np.random.default_rng(0)
    kills = 0
    while not is_finished(tmp_path / "killed"):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")])
        if kills < 8:
            time.sleep(0.35 + generator.uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert content(tmp_path / "calm") == content(tmp_path / "killed")


def _claim(path: str) -> None:
    build = Build(path, "scores", {"a": 1}, {}, 6, SCHEMA)
    for shard in build.pending():
        write_shard(build, shard)
    build.finish({"note": "x"})


def test_processes_that_race_for_the_same_shards_do_no_harm(tmp_path):
    build_all(tmp_path / "one", shards=6)
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_claim, args=(str(tmp_path / "raced"),)) for _ in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    _claim(str(tmp_path / "raced"))  # a loser may have stopped on a file that the winner took away
    assert content(tmp_path / "one") == content(tmp_path / "raced")


def test_another_configuration_is_refused_by_name(tmp_path):
    build = Build(tmp_path / "a", "scores", {"row_length": 512, "x": {"y": 1}}, {}, 2, SCHEMA)
    write_shard(build, 0)
    with pytest.raises(ConfigurationChanged, match=r"row_length: 512 -> 1024"):
        Build(tmp_path / "a", "scores", {"row_length": 1024, "x": {"y": 1}}, {}, 2, SCHEMA)
    write_shard(build, 1)
    build.finish()
    with pytest.raises(ConfigurationChanged, match=r"x\.y: 1 -> 2"):
        Build(tmp_path / "a", "scores", {"row_length": 512, "x": {"y": 2}}, {}, 2, SCHEMA)
    same = Build(tmp_path / "a", "scores", {"row_length": 512, "x": {"y": 1}}, {}, 2, SCHEMA)
    assert same.finished and same.pending() == []


def test_another_input_is_refused(tmp_path):
    first, second = build_all(tmp_path / "c1"), build_all(tmp_path / "c2", {"a": 2})
    scores = Build(tmp_path / "s", "scores", {}, {"corpus": first}, 1, SCHEMA)
    write_shard(scores, 0)
    done = scores.finish()
    require_input(done, "corpus", first)
    with pytest.raises(ArtifactError, match=r"was made from the corpus at .*c1"):
        require_input(done, "corpus", second)
    with pytest.raises(ConfigurationChanged, match=r"inputs\.corpus"):
        Build(tmp_path / "s", "scores", {}, {"corpus": second}, 1, SCHEMA)


def test_a_copy_elsewhere_is_the_same_artifact(tmp_path):
    assert build_all(tmp_path / "a").digest == build_all(tmp_path / "b").digest
    assert build_all(tmp_path / "c", {"a": 3}).digest != build_all(tmp_path / "a").digest


def test_damage_is_found_and_named(tmp_path):
    built = build_all(tmp_path / "a")
    file = tmp_path / "a" / built.manifest.shards[1].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-200])
    with pytest.raises(ArtifactError, match=r"data-00001-of-00004.parquet is damaged"):
        built.read(1)
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ArtifactError, match=r"data-00001-of-00004.parquet is damaged"):
        built.verify()
    file.unlink()
    with pytest.raises(ArtifactError, match=r"data-00001-of-00004.parquet is missing"):
        built.verify()


def test_loading_what_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        load_artifact(tmp_path / "nothing", "corpus")
    (tmp_path / "other").mkdir()
    with pytest.raises(ArtifactError, match=r"holds no manifest\.json"):
        load_artifact(tmp_path / "other", "corpus")
    Build(tmp_path / "begun", "scores", {}, {}, 2, SCHEMA)
    with pytest.raises(ArtifactError, match="unfinished"):
        load_artifact(tmp_path / "begun", "scores")
    build_all(tmp_path / "scores")
    with pytest.raises(ArtifactError, match="holds scores, not corpus"):
        load_artifact(tmp_path / "scores", "corpus")
    with pytest.raises(ArtifactError, match="has no column nll; it has: doc_id, score"):
        load_artifact(tmp_path / "scores").read(0, ["nll"])


def test_a_directory_with_something_else_is_not_taken(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match=r"not an artifact \(it holds thesis.tex\)"):
        Build(tmp_path / "home", "scores", {}, {}, 1, SCHEMA)


def test_an_unwritable_output_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot be created"):
        Build(tmp_path / "file" / "below", "scores", {}, {}, 1, SCHEMA)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_leaves_nothing_and_work_goes_on_after_it(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        build = Build(disk / "a", "scores", {}, {}, 4, SCHEMA)
        write_shard(build, 0)
        (disk / "ballast").write_bytes(b"x" * 560_000)
        ids = np.random.default_rng(0).integers(0, 1 << 60, 50_000)
        with pytest.raises(OSError, match=r"cannot write .*data-00001.*make room"):  # noqa: SIM117
            with build.shard(1) as writer:
                writer.write({"doc_id": ids, "score": ids.astype(np.float32)})
        assert build.pending() == [1, 2, 3]
        assert not list((disk / "a").glob(".*.tmp"))
        (disk / "ballast").unlink()
        for shard in build.pending():
            write_shard(build, shard)
        assert build.finish().manifest.rows == 200
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_rows_of_another_corpus_are_named():
    require_same_documents(np.arange(5), np.arange(5), "x")
    with pytest.raises(ArtifactError, match=r"s\.parquet, row 3: document 9 .* has 3"):
        require_same_documents(np.arange(5), np.asarray([0, 1, 2, 9, 4]), "s.parquet")
    with pytest.raises(ArtifactError, match="has 4 rows where its corpus has 5"):
        require_same_documents(np.arange(5), np.arange(4), "s.parquet")


def test_configurations_become_plain_values_with_their_class():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        names: tuple[str, ...] = ("a", "b")

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner
        path: Path

    assert config_of(Outer(Inner(), Path("x/y"))) == {
        "class": "Outer",
        "inner": {"class": "Inner", "names": ["a", "b"]},
        "path": "x/y",
    }


def test_counts_merge_by_addition_in_any_order():
    one, two = {"a": 1, "b": {"c": 2}}, {"b": {"c": 3, "d": 1}}
    assert merge_counts(one, two) == {"a": 1, "b": {"c": 5, "d": 1}}
    assert merge_counts(one, two) == merge_counts(two, one)


def test_numbers_take_no_dictionary_and_come_back(tmp_path):
    """What is written with `numbers` reads as anything else, in less room."""
    rng = np.random.default_rng(0)
    word = pa.dictionary(pa.int8(), pa.string())
    rows = 5000
    columns = {
        "doc_id": pa.array((np.int64(3) << 32) + np.arange(rows)),
        "status": pa.array(rng.choice(["ok", "empty"], rows)).cast(word),
        "nll": pa.array(rng.standard_normal(rows).astype(np.float32)),
        "token_nll": pa.array([[1.5, 2.5]] * rows, pa.list_(pa.float32())),
    }
    table = pa.table(columns)
    sizes = {}
    for name, encoding in (("plain", None), ("numbers", encoding_of_numbers(table.schema))):
        build = Build(tmp_path / name, "scores", {}, {}, 1, table.schema, encoding)
        with build.shard(0) as shard:
            shard.write(table)
        made = build.finish()
        assert made.read(0).equals(table)
        sizes[name] = len((made.path / made.manifest.shards[0].file).read_bytes())
    assert sizes["numbers"] < 0.8 * sizes["plain"]


def test_the_name_of_a_directory_is_no_pattern(tmp_path):
    """Work in "a*" leaves the files of "ab" alone, and odd names work."""
    schema = pa.schema([("doc_id", pa.int64())])
    for other in ("ab", "a1"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "data-00000-of-00001.parquet").write_text("of another")
        (tmp_path / other / ".running.tmp").write_text("of another")
    for name in ("a*", "a[b1]", "a?", "**"):
        refused = Build(tmp_path / name, "scores", {"a": 1}, {}, 1, schema)
        with refused.shard(0) as writer:
            writer.write({"doc_id": [1]})
        refused.refuse()
        build = Build(tmp_path / name, "scores", {"a": 2}, {}, 1, schema)
        with build.shard(0) as writer:
            writer.write({"doc_id": [2]})
        assert build.finish().manifest.rows == 1
        assert not (tmp_path / name / "unfinished").exists()
    for other in ("ab", "a1"):
        assert len(list((tmp_path / other).iterdir())) == 2
