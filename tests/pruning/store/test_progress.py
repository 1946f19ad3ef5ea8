"""Progress: rates without the start-up, plain lines in logs, a file for a parent process."""

from __future__ import annotations

import json
import re
import time

import pytest

from pruning.store import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_leaves_out_start_up_and_what_was_found_done(clock, capsys):
    with progress.track("score", total=1000, unit="documents", initial=400) as task:
        clock[0] = 60.0  # compilation
        task.advance(100)
        clock[0] = 70.0
        task.advance(100, loss=2.5)
        assert task.rate == pytest.approx(10.0)
        assert task.seconds_left == pytest.approx(40.0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "score: 600 of 1,000 documents (60%), 10 documents/s, 40 s left, loss 2.5; took 1 min 10 s"
    )


def test_a_log_gets_a_line_every_few_seconds(clock, capsys):
    with progress.track("train", total=None, unit="steps") as task:
        for step in range(100):
            clock[0] = float(step)
            task.advance()
    assert 8 <= len(capsys.readouterr().err.splitlines()) <= 12


def test_a_parent_process_reads_a_file(clock, monkeypatch, tmp_path):
    monkeypatch.setenv("WINNOW_PROGRESS_FILE", str(tmp_path / "p.json"))
    with progress.track("train", total=10, unit="steps") as task:
        clock[0] = 1.0
        task.advance(3, loss=1.25)
        state = json.loads((tmp_path / "p.json").read_text())
    assert (state["done"], state["total"], state["fields"]) == (3, 10, {"loss": 1.25})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.2, "8 s"), (200, "3 min 20 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def _next_message(capsys) -> str:
    """Return what is printed next, within ten seconds."""
    for _ in range(200):
        time.sleep(0.05)
        if message := capsys.readouterr().err:
            return message
    return ""


def test_what_takes_long_is_announced_and_what_does_not_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_ANNOUNCED_AFTER", 0.05)
    with progress.Phase("loading a model"):
        assert _next_message(capsys) == "loading a model ...\n"
    assert re.fullmatch(r"loading a model: took \d+ s\n", capsys.readouterr().err)
    with progress.track("rank", 2, "shards") as task:
        assert _next_message(capsys) == "rank: 0 of 2 shards (0%)\n"
        task.advance()
    monkeypatch.setattr(progress, "_ANNOUNCED_AFTER", 30)
    with progress.Phase("loading a model"):
        pass
    assert "loading" not in capsys.readouterr().err
    with pytest.raises(KeyError), progress.track("rank", 2, "shards") as task:
        raise KeyError
    assert not task._timer.is_alive() or task._timer.finished.is_set()
