"""What a run says of itself: evaluations, TensorBoard, the profiler, the progress line."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from models import checkpoints, flops
from pruning.store import progress

pytestmark = pytest.mark.usefixtures("on_one_device")


def lines(output: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture
def watched(tiny_run, reversals, tmp_path, monkeypatch, capsys):
    """A run with everything on; (its output, what it printed)."""
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    monkeypatch.setattr(progress, "_REDRAW_EVERY", 0.0)
    monkeypatch.setitem(flops.PEAK_FLOPS, "cpu", 1e9)

    config = tiny_run(
        tmp_path,
        steps=9,
        data=reversals(signals_at=6),
        eval_data={"c4": reversals(seed=1, num_batches=3), "good": reversals(seed=2)},
        eval_every=3,
        eval_batches=4,
        profile=(1, 2),
        tensorboard=True,
    )
    train.train(config)
    return tmp_path, capsys.readouterr().err, config


def test_a_run_that_is_watched(watched):
    """One run, for it has to be compiled."""
    output, said, config = watched
    each_set_is_evaluated_and_in_bits_per_byte(output, config)
    tensorboard_shows_what_the_lines_say(output)
    steps_are_profiled_as_set_and_as_asked(output)
    the_progress_line_has_speed_share_of_peak_and_time_left(output, said)


def each_set_is_evaluated_and_in_bits_per_byte(output, config):
    evaluations = lines(output, "eval")
    assert [(line["step"], line["name"]) for line in evaluations] == [
        (step, name) for step in (3, 6, 9) for name in ("c4", "good")
    ]
    for name, batches in (("c4", 3), ("good", 4)):
        targets = np.stack(
            [config.eval_data[name].batch(i)["decoder_target_tokens"] for i in range(batches)]
        )
        for line in evaluations:
            if line["name"] != name:
                continue
            assert line["target_tokens"] == (targets != 0).sum()
            bits = line["loss"] * line["target_tokens"] / math.log(2)
            assert line["bits_per_byte"] == pytest.approx(bits / (3 * (targets >= 32).sum()))
            assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def tensorboard_shows_what_the_lines_say(output):
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    shown = {}
    for file in (output / "tensorboard").iterdir():
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its checksum, the record, its checksum
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                shown[value.tag, event.step] = value.simple_value
    for line in lines(output, "train"):
        for name in ("loss", "learning_rate", "gradient_norm", "tokens"):
            assert shown[f"train/{name}", line["step"]] == pytest.approx(line[name], rel=1e-6)
    for line in lines(output, "eval"):
        for name in ("loss", "bits_per_byte", "perplexity"):
            tag = f"eval/{line['name']}/{name}"
            assert shown[tag, line["step"]] == pytest.approx(line[name], rel=1e-6)


def steps_are_profiled_as_set_and_as_asked(output):
    recorded = {
        file.relative_to(output / "profile").parts[0] for file in output.rglob("*.xplane.pb")
    }
    # Batches are made ahead of their steps: the signal came at one of the three before batch 6.
    assert "step_2" in recorded and recorded - {"step_2"} <= {"step_5", "step_6", "step_7"}
    assert len(recorded) == 2


def the_progress_line_has_speed_share_of_peak_and_time_left(output, said):
    last = [line for line in said.splitlines() if line.startswith("train:")][-2]
    for part in ("of 9 steps", "steps/s", " left", "loss ", "tokens per second", "share of peak"):
        assert part in last
    for line in lines(output, "train")[1:]:
        assert line["tokens_per_second"] > 0 and line["share_of_peak"] > 0


def test_tensorboard_comes_without_tensorflow():
    pytest.importorskip("tensorboardX")
    code = "import sys, tensorboardX; print('tensorflow' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_the_best_checkpoint_is_kept(tiny_run, reversals, tmp_path):
    """The evaluation set wants the opposite of what is trained on: the first is its best."""

    class Opposite(reversals):
        def batch(self, step):
            batch = super().batch(step)
            targets = batch["decoder_target_tokens"]
            batch["decoder_target_tokens"] = np.where(targets, 65 - targets, 0)
            return batch

    keep = checkpoints.Retention(last=1, best=1, metric="held out/loss")
    config = tiny_run(
        tmp_path,
        steps=24,
        data=reversals(rows=16),
        eval_data={"held out": Opposite(num_batches=2)},
        eval_every=4,
        checkpoint_every=4,
        keep=keep,
    )
    train.train(config)
    measured = {line["step"]: line["loss"] for line in lines(tmp_path, "eval")}
    best = min(measured, key=measured.__getitem__)
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {best, 24}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": checkpoints.Retention(best=1, metric="c4/loss")}, "'c4/loss' is not measured"),
        (
            {
                "keep": checkpoints.Retention(best=1, metric="c4/loss"),
                "eval_data": {"c4": None},
                "eval_every": 3,
                "checkpoint_every": 4,
            },
            "multiple of Train.eval_every",
        ),
    ],
)
def test_a_best_that_is_not_measured_is_refused(tiny_run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, **changes)
