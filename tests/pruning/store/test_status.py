"""Status: says what is done, who runs, who failed and who fell silent, from the directory alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pruning.cli import main as commands
from pruning.store import heartbeat, status
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

REPOSITORY = Path(__file__).resolve().parents[3]
SHARDS = 6

# Takes shards by index modulo 2, as a worker of any stage does; slow on the last it reaches.
WORKER = """
import sys, time
from tests_status_build import make
build, worker = make(sys.argv[1]), int(sys.argv[2])
for shard in build.pending(worker, 2):
    with build.shard(shard) as writer:
        writer.write({"doc_id": [shard]})
        if shard == 3:
            raise ValueError("row 7 is\\x1b[2J no text")
        if shard == 4:
            print("holding", flush=True)
            time.sleep(60)
build.finish()
"""
MAKE = """
import pyarrow as pa
from pruning.store.build import Build
def make(path):
    return Build(path, "numbers", {}, {}, 6, pa.schema([("doc_id", pa.int64())]))
"""


@pytest.fixture
def start(tmp_path):
    """start(worker) -> Popen: one of two workers on `tmp_path / "work"`."""
    (tmp_path / "tests_status_build.py").write_text(MAKE)
    paths = os.pathsep.join([str(REPOSITORY), str(tmp_path)])
    running = []

    def start(worker: int) -> subprocess.Popen:
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(tmp_path / "work"), str(worker)],
                env=os.environ | {"PYTHONPATH": paths},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


def test_two_workers_one_failing_one_killed(start, tmp_path):
    path = tmp_path / "work"
    first, second = start(0), start(1)
    assert first.stdout.readline() == b"holding\n"
    assert second.wait(60) == 1
    _until(lambda: heartbeat.file_of(path / "unfinished", 4, SHARDS))
    found = status.look(path)
    assert (found.done, found.rows) == (3, 3)  # 0 and 2; 1
    assert found.waiting == [5]
    [running] = found.of("running")
    assert (running.shard, running.progress["done"]) == (4, 1)
    assert f"process {first.pid}" in running.who
    [failed] = found.of("failed")
    assert failed.shard == 3 and failed.error.startswith("ValueError: row 7")
    assert found.done + len(found.workers) + len(found.waiting) == SHARDS

    first.send_signal(signal.SIGKILL)
    first.wait()
    later = status.look(path, now=time.time() + 1000)
    [lost] = later.of("lost")
    assert lost.shard == 4 and not later.of("running") and later.seconds_left is None
    text = "\n".join(status.lines(path, now=time.time() + 1000))
    assert "3 done, 0 running, 1 failed, 1 lost, 1 waiting, of 6 shards" in text
    assert "no process works on it: run the command that makes it again" in text
    assert "row 7 is\\x1b[2J no text" in text  # no orders for the terminal


def test_a_shard_that_was_failed_on_is_done_by_the_next_attempt(tmp_path):
    build = Build(tmp_path, "numbers", {}, {}, 2, pa.schema([("doc_id", pa.int64())]))
    with pytest.raises(ValueError, match="once"), build.shard(1):
        raise ValueError("once")
    assert [worker.state for worker in status.look(tmp_path).workers] == ["failed"]
    with build.shard(1) as writer:
        writer.write({"doc_id": [1]})
    found = status.look(tmp_path)
    assert found.done == 1 and not found.workers and found.waiting == [0]
    assert not heartbeat.file_of(build.path / "unfinished", 1, 2).exists()
    with pytest.raises(KeyboardInterrupt), build.shard(0):
        raise KeyboardInterrupt  # not the work's fault
    assert [worker.state for worker in status.look(tmp_path).workers] == ["stopped"]
    text = "\n".join(status.lines(tmp_path))
    assert "1 done, 0 running, 0 failed, 1 stopped, 0 waiting" in text
    assert "was told to end" in text and "no process works on it" in text


def test_what_workers_expect_decides_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "_FIRST", 0.01)
    build = Build(tmp_path, "numbers", {}, {}, 4, pa.schema([("doc_id", pa.int64())]))
    inside = build.path / "unfinished"
    for shard, left in ((0, 50.0), (1, 90.0)):
        told = {"done": 5, "total": 10, "unit": "documents", "rate": 2.0, "seconds_left": left}
        beat = heartbeat.Heartbeat(inside, 4, worker=f"{shard} of 2")
        beat.__enter__()
        beat.on(shard, "scores", lambda told=told: told)
        _until(lambda shard=shard: heartbeat.file_of(inside, shard, 4))
    assert status.look(tmp_path).seconds_left == 90.0
    text = "\n".join(status.lines(tmp_path))
    assert "4 documents/s, 1 min 30 s left" in text
    assert "shard 1 running: worker 1 of 2" in text and "5 of 10 documents" in text


def test_files_of_workers_that_say_nothing_are_seen(tmp_path):
    Build(tmp_path, "numbers", {}, {}, 4, pa.schema([("doc_id", pa.int64())]))
    (tmp_path / ".data-00002-of-00004.parquet.0123abcd.tmp").write_bytes(b"1234")
    [worker] = status.look(tmp_path).workers
    assert (worker.shard, worker.state, worker.progress["done"]) == (2, "running", 4)
    [worker] = status.look(tmp_path, now=time.time() + 100).workers
    assert worker.state == "lost"


def test_what_is_finished_or_is_nothing(make_corpus, records, tmp_path, capsys):
    made = make_corpus(tmp_path, [records(9, 1), records(9, 2)])
    assert commands.main(["status", str(made.artifact.path), "--watch"]) == 0  # nothing to wait for
    [line, took] = capsys.readouterr().out.splitlines()
    assert "corpus, finished: 18 rows" in line and "in 2 shards" in line
    assert took.strip().startswith("took")
    assert commands.main(["status", str(tmp_path)]) == 1
    assert "holds no manifest.json" in capsys.readouterr().err


def _until(file) -> None:
    limit = time.monotonic() + 30
    while not file().exists():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_heartbeats_of_strangers_give_no_orders_to_the_terminal(tmp_path, capsys):
    inside = tmp_path / "unfinished"
    inside.mkdir()
    evil = "\x1b]0;owned\x07\x1b[2J\u202e\nshard 0 done"
    (inside / "plan.json").write_text(json.dumps({"kind": evil, "shards": 2, "config": {evil: 1}}))
    sign = {"shard": 0, "seen": time.time(), "every": 5, "host": evil, "process": 1, "worker": evil}
    sign |= {"phase": evil, "progress": {"done": 1, "unit": evil, "rate": 2.0}}
    (inside / "worker-00000-of-00002.json").write_text(json.dumps(sign))
    for command in ("status", "inspect"):
        assert commands.main([command, str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert r"\x1b]0;owned" in shown
        assert all(c.isprintable() or c == "\n" for c in shown)
        assert not any(line.startswith("shard 0 done") for line in shown.splitlines())


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "[" * 100_000])
def test_damaged_plans_are_named_and_damaged_heartbeats_passed_over(tmp_path, capsys, content):
    inside = tmp_path / "unfinished"
    inside.mkdir()
    (inside / "plan.json").write_text(content)
    for command in ("status", "inspect"):
        assert commands.main([command, str(tmp_path)]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert "plan.json" in line and f"delete {tmp_path} and run the command" in line
    (inside / "plan.json").write_text('{"kind": "corpus", "shards": 2, "config": {}}')
    (inside / "worker-00000-of-00002.json").write_text(content)
    assert commands.main(["status", str(tmp_path)]) == 0
    assert "0 done, 0 running, 0 failed, 2 waiting" in capsys.readouterr().out


@pytest.mark.parametrize(
    "sign",
    [
        {"seen": "x"},
        {"every": None},
        {"host": 7},
        {"progress": {"rate": "fast", "unit": "rows"}},
        {"progress": []},
        {"phase": 3},
        {"seen": float("inf")},
    ],
)
def test_damaged_heartbeats_are_passed_over(tmp_path, sign):
    Build(tmp_path, "scores", {}, {}, 3, pa.schema([("doc_id", pa.int64())]))
    inside = tmp_path / "unfinished"
    whole = {"shard": 1, "seen": 1.0, "every": 5.0, "host": "here", "process": 1}
    (inside / "worker-00001-of-00003.json").write_text(json.dumps(whole | sign))
    (inside / "odd-name.part").touch()
    (tmp_path / ".data-odd.tmp").touch()
    assert "0 done, 0 running" in "\n".join(status.lines(tmp_path))


@pytest.mark.parametrize("plan", [{"shards": "three"}, {"shards": 10**12}, {"config": 1}])
def test_a_damaged_plan_is_one_line(tmp_path, plan):
    (tmp_path / "unfinished").mkdir()
    whole = {"kind": "scores", "shards": 3, "config": {}}
    (tmp_path / "unfinished" / "plan.json").write_text(json.dumps(whole | plan))
    with pytest.raises(ArtifactError, match=r"plan\.json is damaged"):
        list(status.lines(tmp_path))
