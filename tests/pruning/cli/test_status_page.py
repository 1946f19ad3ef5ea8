"""The live page of running work: what it shows, to whom, and that nothing in it takes effect."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pruning.cli import main as commands
from pruning.cli import status_page, status_server
from pruning.store import heartbeat, watch
from pruning.store.build import Build

REPOSITORY = Path(__file__).resolve().parents[3]
HOSTILE = '<script>alert("x")</script>\x1b[2J\u202e&'


def write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def lines(file: Path, found: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in found) + '{"step": 9, "ki')


@pytest.fixture
def work(tmp_path) -> Path:
    """A study with a failed stage, a run and a half-finished artifact, with hostile names."""
    root = tmp_path / f"runs {HOSTILE.replace('/', '')}"
    study = root / "study"
    names = ["score/one", "train/two", "train/<b>three", "select/four", "../../outside"]
    stages = [{"name": name, "seconds": 10.0} for name in names]
    write(study / "stages" / "stages.json", {"workers": 2, "stages": stages})
    write(study / "stages" / "score" / "one.json", {"seconds": 20.0})
    told = {"name": "train", "done": 30, "total": 40, "unit": "steps", "rate": 2.0}
    told |= {"seconds_left": 5.0, "fields": {"loss": 3.25}}
    write(study / "stages" / "train" / "two.progress", told)
    write(study / "stages" / "train" / "<b>three.failed", {"message": f"row 7: {HOSTILE}"})
    run = study / "train" / HOSTILE.replace("/", "")
    train = [
        {
            "step": step,
            "kind": "train",
            "loss": 9 - step / 10,
            "tokens": step * 100,
            "seconds": step,
        }
        for step in range(1, 31)
    ]
    evaluation = {"step": 30, "kind": "eval", "name": f"held{HOSTILE}", "loss": 6.5}
    lines(run / "metrics.jsonl", [*train, evaluation, {"step": "x"}])
    write(run / "config.json", {"train": {"steps": 40}})
    schema = pa.schema([("doc_id", pa.int64())])
    build = Build(root / "scores", "numbers", {}, {}, 4, schema)
    with build.shard(0) as writer:
        writer.write({"doc_id": [0, 1, 2]})
    file = heartbeat.file_of(root / "scores" / "unfinished", 1, 4)
    sign = {"shard": 1, "seen": time.time(), "every": 5.0, "host": HOSTILE, "process": 7}
    write(Path(file), sign | {"error": f"cannot read {HOSTILE}"})
    done = Build(root / "done", "numbers", {}, {}, 1, schema)
    with done.shard(0) as writer:
        writer.write({"doc_id": [0]})
    done.finish()
    return root


def test_work_below_a_directory_is_found(work):
    found = list(watch.find(work))
    study = next(item for item in found if isinstance(item, watch.Study))
    states = {stage.name: stage.state for stage in study.stages}
    assert states == {
        "score/one": "finished",
        "train/two": "running",
        "train/<b>three": "failed",
        "select/four": "waiting",
    }
    # A stage took twice its estimate: 5 s as reported, and 2 x 10 s, on two workers.
    assert study.seconds_left == pytest.approx((5.0 + 20.0) / 2)
    run = next(item for item in found if isinstance(item, watch.Run))
    assert (run.step, run.steps, run.tokens, len(run.losses)) == (30, 40, 3000, 30)
    assert run.seconds_left == pytest.approx(10.0) and not run.finished
    artifacts = {Path(a.path).name: a for a in found if isinstance(a, watch.Artifact)}
    state = artifacts["scores"].unfinished
    assert (state.done, state.num_shards, len(state.of("failed"))) == (1, 4, 1)
    assert artifacts["done"].unfinished is None and "finished" in artifacts["done"].lines[0]


def test_hostile_names_have_no_effect_on_the_page(work):
    page = status_page.rendered([str(work)])
    tags = set(re.findall(r"<\s*/?([a-z0-9!]+)", page, re.IGNORECASE))
    assert "script" not in tags and "b" not in tags and "b>three" not in tags
    assert "&lt;script&gt;alert(&quot;x&quot;)" in page
    assert "\x1b" not in page and "\u202e" not in page
    assert not re.search(r"(src|href)\s*=|url\(|@import", page)
    assert page.count("<title>") == 2  # of the page, and of the curve
    for words in ("1 failed", "loss", "3.25", "30 of 40", "about 12 s left", "of 4 shards"):
        assert words in page


@pytest.mark.parametrize("content", ["[]", "{", '{"stages": 3}', '{"stages": [1]}', "\x00"])
def test_damaged_files_are_passed_over(tmp_path, content):
    for name in ("stages/stages.json", "metrics.jsonl", "config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "manifest.json").write_text(content)
    page = status_page.rendered([str(tmp_path)])
    assert "</html>" in page and "damaged" in page


def sign(**more: object) -> str:
    found = {"shard": 1, "seen": 1.0, "every": 5.0, "host": "here", "process": 1}
    return json.dumps(found | more)


@pytest.mark.parametrize(
    "name, content",
    [
        ("metrics.jsonl", b"\xff\n"),
        ("metrics.jsonl", b'{"kind": "train", "loss": 1, "step": %s}\n' % (b"9" * 400)),
        ("stages/stages.json", b'{"stages": [{"name": "a\\u0000b"}, {"name": "\\ud800"}]}'),
        ("unfinished/worker-00001-of-00003.json", sign(seen=int("9" * 400)).encode()),
        ("unfinished/worker-00001-of-00003.json", sign(progress=None).encode()),
        (
            "unfinished/data-00001.json",
            b'{"ended": 2, "shard": {"file": "data-00001-of-3", "rows": 1, "tokens": 1}}',
        ),
        ("manifest.json", b"{"),
    ],
)
def test_an_odd_file_hides_no_other_work(tmp_path, name, content):
    odd = tmp_path / "odd"
    Build(odd, "numbers", {}, {}, 3, pa.schema([("doc_id", pa.int64())]))
    (odd / name).parent.mkdir(exist_ok=True)
    (odd / name).write_bytes(content)
    for below in ("odd/below", "other"):
        step = {"kind": "train", "step": 1, "loss": 2.0, "tokens": 3}
        lines(tmp_path / below / "metrics.jsonl", [step])
    found = list(watch.find(tmp_path))
    paths = {item.path for item in found if isinstance(item, watch.Run)}
    assert paths == {str(odd / "below"), str(tmp_path / "other")}
    assert "</html>" in status_page.rendered([str(tmp_path)])
    problems = [item.message for item in found if isinstance(item, watch.Problem)]
    assert len(problems) == (content in (b"\xff\n", b"{"))


def test_pipes_are_not_read(tmp_path):
    Build(tmp_path, "numbers", {}, {}, 3, pa.schema([("doc_id", pa.int64())]))
    (tmp_path / "stages").mkdir()
    for name in ("metrics.jsonl", "stages/stages.json", "unfinished/worker-00001-of-00003.json"):
        os.mkfifo(tmp_path / name)
    assert [type(item) for item in watch.find(tmp_path)] == [watch.Artifact]


def test_metrics_are_parsed_again_only_after_a_change(tmp_path, monkeypatch):
    step = {"kind": "train", "step": 1, "loss": 2.0, "tokens": 3}
    lines(tmp_path / "metrics.jsonl", [step])
    [first] = watch.find(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(watch, "_logged", None)
        (tmp_path / "result.json").touch()
        [second] = watch.find(tmp_path)
    assert second.finished and second.losses == first.losses
    lines(tmp_path / "metrics.jsonl", [step, step | {"step": 2}])
    [third] = watch.find(tmp_path)
    assert third.step == 2


def test_a_stage_that_runs_again_is_not_finished_and_a_silent_one_is_lost(tmp_path):
    records = tmp_path / "stages"
    names = [{"name": name, "seconds": 10.0} for name in ("a", "b")]
    write(records / "stages.json", {"stages": names})
    for name in ("a", "b"):
        write(records / f"{name}.json", {"seconds": 20.0})

    def study(now: float | None = None) -> watch.Study:
        [found] = watch.find(tmp_path, now)
        return found

    def state(now: float | None = None) -> str:
        return study(now).stages[1].state

    assert state() == "finished"
    write(records / "b.failed", {"message": "no"})
    assert state() == "failed"
    write(records / "b.progress", {"seconds_left": 5.0})
    assert state() == "running" and study().seconds_left == 5.0
    later = time.time() + 9213
    assert state(later) == "lost" and study(later).seconds_left is None
    page = status_page.rendered([str(tmp_path)], later)
    assert "1 lost" in page and "command again" in page and "left</p>" not in page


def test_titles_and_names_of_several_directories(tmp_path):
    assert "<title>nothing yet: " in status_page.rendered([str(tmp_path)])
    roots = [tmp_path / "ra", tmp_path / "rb"]
    for root in roots:
        step = {"kind": "train", "step": 1, "loss": 2.0, "tokens": 3}
        lines(root / "tiny" / "metrics.jsonl", [step])
    page = status_page.rendered(list(map(str, roots)))
    assert all(f'<th scope="row">{root}/tiny</th>' in page for root in roots)
    assert '<th scope="row">tiny</th>' in status_page.rendered([str(roots[0])])


def test_a_page_that_cannot_be_made_is_an_error_of_the_server(capsys):
    def page() -> bytes:
        raise KeyError("odd\x1b[2J")

    handler = status_server._handler(page, any_host=False)
    with status_server._Server(("127.0.0.1", 0), handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"http://127.0.0.1:{made.server_port}/", timeout=20)
        made.shutdown()
    error.value.close()
    assert error.value.code == 500
    shown = capsys.readouterr().err
    assert "KeyError" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    "options, message",
    [
        (["--address=8000"], "need --serve"),
        (["--public"], "need --serve"),
        (["--serve", "--watch"], "leave out --watch"),
    ],
)
def test_options_without_effect_are_refused(tmp_path, options, message):
    with pytest.raises(SystemExit, match=message):
        commands.main(["status", str(tmp_path), *options])


@pytest.fixture(params=[[], ["--public"]])
def server(work, request) -> Iterator[tuple[subprocess.Popen, str]]:
    """On this machine's own address, which is guarded even where other machines are let in."""
    command = [sys.executable, "-m", "pruning", "status", "--serve", str(work), "--address=0"]
    command += request.param
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, env=os.environ, text=True
    ) as process:
        address = process.stdout.readline().split()[0]
        yield process, address
        process.kill()


def test_it_is_served_to_this_machine_until_ctrl_c(server):
    process, address = server
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        page = answer.read().decode()
    assert "1 failed" in page and "<script" not in page

    def status_of(request: urllib.request.Request) -> int:
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=20)
        error.value.close()
        return error.value.code

    assert status_of(urllib.request.Request(address, headers={"Host": "evil.example"})) == 403
    assert status_of(urllib.request.Request(address + "etc/passwd")) == 404
    assert status_of(urllib.request.Request(address, data=b"x", method="POST")) == 501
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--address=0.0.0.0:0"], "can be reached by other machines"),
        (["--address=example.org:80"], "give --public as well"),
        (["--address=x"], "is not an address"),
    ],
)
def test_other_addresses_are_refused(tmp_path, capsys, arguments, message):
    assert commands.main(["status", "--serve", str(tmp_path), *arguments]) == 1
    assert message in capsys.readouterr().err
