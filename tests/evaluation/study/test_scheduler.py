"""The scheduler on real processes: order, resuming, failure, and death in every direction."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.study.scheduler import Scheduler, StageFailed
from evaluation.study.stages import Stage, StageDirectory, StudyError
from pruning.store import watch

# Waits, then writes what it has read: the result tells whether the inputs were there.
WORK = """
import sys, time
from pathlib import Path
out, seconds, *needs = sys.argv[1:]
with open(Path(out).parent / "started", "a") as log: log.write(Path(out).stem + "\\n")
time.sleep(float(seconds))
text = "".join(Path(need).read_text() for need in needs) + Path(out).stem
Path(out + ".tmp").write_text(text)
Path(out + ".tmp").rename(out)
"""


def work(directory: Path, name: str, needs: str = "", seconds: float = 0.0, **fields) -> Stage:
    def result(name):
        return str(directory / f"{name}.txt")

    argv = ("python", "-c", WORK, result(name), str(seconds), *map(result, needs))
    return Stage(name, argv, result(name), tuple(needs), **fields)


def diamond(directory: Path, seconds: float = 0.0) -> list[Stage]:
    return [
        work(directory, "d", "bc", seconds),
        work(directory, "c", "a", seconds),
        work(directory, "b", "a", seconds),
        work(directory, "a", "", seconds),
    ]


def started(directory: Path) -> list[str]:
    return (directory / "started").read_text().split()


def test_every_stage_runs_once_after_its_needs(tmp_path):
    records = StageDirectory(tmp_path / "stages")
    ran = Scheduler(diamond(tmp_path), records, workers=2).run(say=lambda line: None)
    assert (tmp_path / "d.txt").read_text() == "abacd"
    assert sorted(ran) == sorted(started(tmp_path)) == list("abcd")
    note = records.read(diamond(tmp_path)[0])
    assert note.seconds > 0 and note.peak_bytes > 1e6

    again = Scheduler(diamond(tmp_path), records, workers=2)
    assert again.unfinished == [] and again.share_done() == 1
    assert again.run(say=lambda line: None) == []
    assert len(started(tmp_path)) == 4


def test_a_lost_result_is_made_again_and_spares_the_rest(tmp_path):
    records = StageDirectory(tmp_path / "stages")
    Scheduler(diamond(tmp_path), records).run(say=lambda line: None)
    (tmp_path / "b.txt").unlink()
    # b comes out the same, so d, which needs it, still holds.
    assert Scheduler(diamond(tmp_path), records).run(say=lambda line: None) == ["b"]


def test_workers_and_slots_bound_what_runs_at_once(tmp_path, monkeypatch):
    stages = [work(tmp_path, name, seconds=0.3, cost=1) for name in "abc"]
    stages.append(work(tmp_path, "w", seconds=0.3, slots=2))
    seen = []

    def show(scheduler):
        seen.append(sorted(item.stage.name for item in scheduler.running))

    monkeypatch.setattr("evaluation.study.scheduler._SHOW_EVERY", 0.0)
    Scheduler(stages, StageDirectory(tmp_path / "s"), workers=2).run(show, lambda line: None)
    assert max(map(len, seen)) == 2
    assert all(running == ["w"] for running in seen if "w" in running)
    assert ["w"] in seen


def test_a_failure_shows_the_log_and_lets_the_running_finish(tmp_path):
    bad = Stage(
        "train/bad",
        ("python", "-c", "print('loss 7'); raise SystemExit('no such model')"),
        str(tmp_path / "bad.txt"),
    )
    long = work(tmp_path, "a", seconds=5.0, cost=9)
    with pytest.raises(StageFailed) as failure:
        Scheduler([long, bad, work(tmp_path, "z", "a")], StageDirectory(tmp_path / "s"), 2).run(
            say=lambda line: None
        )
    message = str(failure.value)
    assert "train/bad failed with exit status 1" in message
    assert "loss 7" in message and "no such model" in message
    assert str(tmp_path / "s" / "train" / "bad.log") in message
    assert (tmp_path / "a.txt").exists(), "what ran was allowed to finish"
    assert not (tmp_path / "z.txt").exists(), "nothing new was started"


def test_success_without_a_result_is_a_failure(tmp_path):
    stage = Stage("empty", ("true",), str(tmp_path / "nothing"))
    with pytest.raises(StageFailed, match=r"left no .*nothing"):
        Scheduler([stage], StageDirectory(tmp_path / "s")).run(say=lambda line: None)


def test_the_live_page_tells_states_of_stages(tmp_path):
    """As `status --serve` reads them, from the directory alone."""
    good, records = work(tmp_path, "a"), StageDirectory(tmp_path / "stages")
    fails = "import pathlib; pathlib.Path('{0}').exists() or exit('no <model>'); open('{1}', 'w')"
    program = fails.format(tmp_path / "model", tmp_path / "bad.txt")
    bad = Stage("train/bad", ("python", "-c", program), str(tmp_path / "bad.txt"))
    stages = [good, bad, work(tmp_path, "z", "a", cost=3)]

    def states() -> dict[str, str]:
        study = next(item for item in watch.find(tmp_path) if isinstance(item, watch.Study))
        assert ("no <model>" in study.stages[1].message) == (study.stages[1].state == "failed")
        return {stage.name: stage.state for stage in study.stages}

    records.write_list(stages, 1)
    assert set(states().values()) == {"waiting"}
    with pytest.raises(StageFailed):
        Scheduler([good, bad], records).run(say=lambda line: None)
    assert states() == {"a": "finished", "train/bad": "failed", "z": "waiting"}
    (tmp_path / "model").touch()
    Scheduler(stages, records).run(say=lambda line: None)
    assert set(states().values()) == {"finished"}


def test_a_stage_that_was_stopped_from_outside_is_started_again(tmp_path):
    code = """
import sys
from pathlib import Path
tries = Path(sys.argv[1] + ".tries")
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
if len(tries.read_text()) < 3: sys.exit(75)
Path(sys.argv[1]).write_text("done")
"""
    result = str(tmp_path / "r")
    stage = Stage("train", ("python", "-c", code, result), result)
    Scheduler([stage], StageDirectory(tmp_path / "s")).run(say=lambda line: None)
    assert (tmp_path / "r.tries").read_text() == "xxx"


def test_time_left_corrects_the_hints(tmp_path):
    stages = [
        work(tmp_path, "a", cost=0.001),
        work(tmp_path, "b", "a", cost=0.002),
    ]
    scheduler = Scheduler(stages, StageDirectory(tmp_path / "s"))
    assert scheduler.seconds_left() == pytest.approx(0.003)
    scheduler.run(say=lambda line: None)
    (tmp_path / "b.txt").unlink()
    later = Scheduler(stages, StageDirectory(tmp_path / "s"))
    taken = later.records.read(later.stages[0]).seconds
    assert later.seconds_left() == pytest.approx(2 * taken)
    assert later.share_done() == pytest.approx(1 / 3)


def test_stages_divided_among_processes(tmp_path):
    """Each runs its own, over one directory; what has to wait for others waits."""

    def process(*only: str) -> Scheduler:
        return Scheduler(diamond(tmp_path), StageDirectory(tmp_path / "s"), 2, only=only)

    quiet = {"say": lambda line: None}
    later = process("[cd]")
    assert later.run(**quiet) == [] and [stage.name for stage in later.left] == ["c", "d"]
    first = process("a", "b")
    assert first.run(**quiet) == ["a", "b"] and not first.left
    assert process("[cd]").run(**quiet) == ["c", "d"]
    assert (tmp_path / "d.txt").read_text() == "abacd"
    assert not process("*").left and started(tmp_path) == list("abcd")
    with pytest.raises(StudyError, match="no stage matches 'train"):
        process("train/*")


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_scheduler import diamond
from evaluation.study.scheduler import Scheduler
from evaluation.study.stages import StageDirectory
directory = Path({directory!r})
try:
    Scheduler(diamond(directory, 1.5), StageDirectory(directory / "stages"), workers=2).run()
except KeyboardInterrupt:
    sys.exit(130)
"""


def parent_in_the_middle(directory: Path) -> tuple[subprocess.Popen, list[int]]:
    """A scheduler process, and its children, at the time when two of them run."""
    code = PARENT.format(tests=str(Path(__file__).parent), directory=str(directory))
    root = Path(__file__).parents[3]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if (directory / "a.txt").exists() and len(children) == 2:
            return process, [int(child) for child in children]
        time.sleep(0.02)
    raise AssertionError("the scheduler did not get to its second row")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children with their parent")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_children_end_with_the_parent_and_a_rerun_finishes(tmp_path, how):
    process, children = parent_in_the_middle(tmp_path)
    os.kill(process.pid, how)
    code = process.wait(30)
    assert code == (-signal.SIGKILL if how == signal.SIGKILL else 130)
    deadline = time.monotonic() + 5
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))

    before = len(started(tmp_path))
    Scheduler(diamond(tmp_path, 1.5), StageDirectory(tmp_path / "stages"), 2).run(
        say=lambda line: None
    )
    assert (tmp_path / "d.txt").read_text() == "abacd", "the same result as without the kill"
    assert started(tmp_path)[before:].count("a") == 0, "what was finished is not done again"


def test_until_runs_what_a_stage_needs_and_no_more(tmp_path):
    records = StageDirectory(tmp_path / "stages")
    scheduler = Scheduler(diamond(tmp_path), records, until=["b"])
    assert scheduler.run(say=lambda line: None) == ["a", "b"] == started(tmp_path)
    assert Scheduler(diamond(tmp_path), records, until=["d"], only=["c"]).left[0].name == "c"
    with pytest.raises(StudyError, match="no stage matches 'e'"):
        Scheduler(diamond(tmp_path), records, until=["e"])
