"""The trainer in processes of its own: killed, stopped, resumed, on several meshes and hosts."""

import dataclasses
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import train
from models import checkpoints, runtime
from models.config import DecoderConfig, from_dict
from models.model import Model
from models.optimizers import Adafactor
from pruning.data.examples import ExamplesConfig

ROOT = Path(train.__file__).parent
VOCAB = 64
STEPS = 60
TIMING = ("seconds", "tokens_per_second")  # what may differ between two runs of the same work
# Steps for which runs are compared across meshes and processes; WINNOW_FULL=1: those of the docs.
FULL = os.environ.get("WINNOW_FULL") == "1"
COMPARED = 200 if FULL else 20

GIN = """
EXAMPLES = None
HELD_OUT = None
OUTPUT = None
CACHE = None
STEPS = 60

Train.output = %OUTPUT
Train.model = @T5Config()
Train.data = @Examples()
Train.eval_data = {'held out': @held_out/Examples()}
Train.eval_every = 20
Train.steps = %STEPS
Train.checkpoint_every = 8
Train.log_every = 1
Train.optimizer = @Adafactor()
Train.clip_norm = 1.0
Train.dropout = 0.1
Train.compilation_cache = %CACHE

Adafactor.min_dim_to_factor = 16

T5Config.vocab_size = 64
T5Config.d_model = 32
T5Config.d_ff = 64
T5Config.d_kv = 16
T5Config.num_heads = 2
T5Config.num_encoder_layers = 2
T5Config.num_decoder_layers = 2

Examples.path = %EXAMPLES
Examples.batch_size = 16
Examples.inputs_length = 16
Examples.targets_length = 8
held_out/Examples.path = %HELD_OUT
held_out/Examples.repeat = False
held_out/Examples.shuffle = False
"""


def write_examples(directory: Path, count: int, seed: int) -> None:
    """Targets are the first inputs in reverse order: something that can be learnt."""
    rng = np.random.default_rng(seed)
    inputs = [rng.integers(2, VOCAB, rng.integers(4, 16)).tolist() for _ in range(count)]
    targets = [given[: rng.integers(1, 4)][::-1] for given in inputs]
    directory.mkdir()
    half = count // 2
    for name, part in (("a", slice(half)), ("b", slice(half, None))):
        table = pa.table({"inputs": inputs[part], "targets": targets[part]})
        pq.write_table(table, directory / f"{name}.parquet")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workshop")
    write_examples(root / "examples", 200, seed=1)
    write_examples(root / "held_out", 25, seed=2)
    (root / "run.gin").write_text(GIN)
    return root


def command(workshop: Path, output: Path, *settings: str, flags: tuple[str, ...] = ()) -> list[str]:
    macros = {
        "EXAMPLES": workshop / "examples",
        "HELD_OUT": workshop / "held_out",
        "CACHE": workshop / "cache",
        "OUTPUT": output,
    }
    return [
        sys.executable,
        str(ROOT / "train.py"),
        f"--gin_file={workshop / 'run.gin'}",
        *(f"--gin.{name}={value}" for name, value in macros.items()),
        *(f"--gin.{setting}" for setting in settings),
        *flags,
    ]


def environment(devices: int = 1) -> dict[str, str]:
    return {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}


def run(workshop: Path, output: Path, *settings: str, devices: int = 1, expect: int = 0) -> str:
    finished = subprocess.run(
        command(workshop, output, *settings),
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == expect, finished.stderr
    return finished.stderr


def lines(output: Path, kind: str) -> list[dict]:
    text = (output / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMING}
        for line in found
        if line["kind"] == kind
    ]


def losses(output: Path) -> np.ndarray:
    steps = lines(output, "train")
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))  # each once
    return np.asarray([line["loss"] for line in steps])


def parameters(output: Path):
    model = Model(from_dict(checkpoints.read_config(output)))
    return checkpoints.restore_params(output, model.shapes())


def assert_same_run(left: Path, right: Path) -> None:
    """The same numbers to the last bit, in metrics, results and parameters."""
    for kind in ("train", "eval"):
        assert lines(left, kind) == lines(right, kind)
    results = [json.loads((run / "result.json").read_text()) for run in (left, right)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    (step, found), (other_step, other) = parameters(left), parameters(right)
    assert step == other_step
    jax.tree.map(np.testing.assert_array_equal, found, other)


@pytest.fixture(scope="module")
def undisturbed(workshop) -> Path:
    output = workshop / "undisturbed"
    run(workshop, output)
    return output


def wait_for_step(output: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    metrics = output / "metrics.jsonl"
    while time.monotonic() < deadline:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        assert process.poll() is None, "the process ended before it was to be disturbed"
        time.sleep(0.003)
    raise AssertionError(f"no step {step} in time")


def disturbed(workshop: Path, output: Path, step: int, how: signal.Signals, *settings: str) -> int:
    """Start or continue the run, send a signal at `step`; the exit status."""
    process = subprocess.Popen(
        command(workshop, output, *settings), env=environment(), stderr=subprocess.DEVNULL
    )
    wait_for_step(output, step, process)
    process.send_signal(how)
    return process.wait(timeout=120)


def test_the_task_is_learnt(undisturbed):
    curve = losses(undisturbed)
    assert len(curve) == STEPS
    assert curve[-10:].mean() < curve[:3].mean() - 0.5
    held_out = [line["loss"] for line in lines(undisturbed, "eval")]
    assert len(held_out) == STEPS // 20
    # 25 held-out examples, each seen once by every evaluation: targets and their ends.
    targets = pq.read_table(undisturbed.parent / "held_out").column("targets").to_pylist()
    tokens = sum(len(target) + 1 for target in targets)
    assert {line["target_tokens"] for line in lines(undisturbed, "eval")} == {tokens}


def test_killed_at_any_step_and_rerun_it_ends_with_the_same_bits(workshop, undisturbed):
    output = workshop / "killed"
    for step in (3, 17, 41):
        assert disturbed(workshop, output, step, signal.SIGKILL) == -signal.SIGKILL
    run(workshop, output)
    assert_same_run(output, undisturbed)


def test_on_sigterm_it_saves_and_asks_for_a_restart(workshop, undisturbed):
    output = workshop / "stopped"
    assert disturbed(workshop, output, 21, signal.SIGTERM) == runtime.RESTART == 75
    step, _ = parameters(output)
    assert 21 <= step < STEPS and not (output / "result.json").exists()
    assert lines(output, "train")[-1]["step"] == step
    said = run(workshop, output)
    assert f"continuing from step {step}" in said
    assert_same_run(output, undisturbed)


def test_a_truncated_checkpoint_costs_only_the_steps_since_the_one_before(workshop, undisturbed):
    output = workshop / "truncated"
    disturbed(workshop, output, 30, signal.SIGTERM)
    newest = parameters(output)[0]
    for file in (output / "checkpoints" / str(newest) / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    said = run(workshop, output)
    assert f"step {newest} is not whole" in said and "continuing from" in said
    assert_same_run(output, undisturbed)


def test_a_finished_run_redoes_nothing(workshop, undisturbed):
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    said = run(workshop, undisturbed)
    assert "is finished" in said
    after = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    before.pop(undisturbed / "config.json")
    after.pop(undisturbed / "config.json")
    assert after == before


def test_another_configuration_is_refused_by_name(workshop, undisturbed):
    said = run(workshop, undisturbed, "Train.seed=7", "Examples.batch_size=8", expect=1)
    assert "seed: 0 -> 7" in said and "data.batch_size: 16 -> 8" in said
    said = run(workshop, undisturbed, "STEPS=10", expect=1)
    assert "steps: 60 -> 10" in said


def test_a_finished_run_can_be_made_longer(workshop, undisturbed):
    short, output = workshop / "short", workshop / "longer"
    run(workshop, short, "STEPS=40")
    run(workshop, output, "STEPS=24")
    run(workshop, output, "STEPS=40")
    np.testing.assert_array_equal(losses(output), losses(undisturbed)[:40])
    np.testing.assert_array_equal(losses(short), losses(undisturbed)[:40])


@pytest.fixture(scope="module")
def alone(workshop, undisturbed) -> np.ndarray:
    """The loss curve that runs on other meshes are compared with."""
    if not FULL:
        return losses(undisturbed)[:COMPARED]
    run(workshop, workshop / "alone", f"STEPS={COMPARED}")
    return losses(workshop / "alone")


def assert_same_curve(output: Path, expected: np.ndarray) -> None:
    found = losses(output)
    print(f"{output.name}: off by {np.abs(found / expected - 1).max():.1e} in {len(found)} steps")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param("{'data': 8}", marks=pytest.mark.sweep),
        pytest.param("{'fsdp': 8}", marks=pytest.mark.sweep),
        pytest.param("{'tensor': 2}", marks=pytest.mark.sweep),
        "{'data': 2, 'fsdp': 2, 'tensor': 2}",
    ],
)
def test_the_loss_does_not_depend_on_the_mesh(workshop, alone, mesh):
    output = workshop / ("mesh" + "".join(c for c in mesh if c.isalnum()))
    run(workshop, output, f"Train.mesh={mesh}", f"STEPS={COMPARED}", devices=8)
    assert_same_curve(output, alone)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_splitting_the_length(workshop, alone):
    output = workshop / "length"
    settings = ("Train.mesh={'fsdp': 4, 'tensor': 2}", "Train.rules={'length': ('tensor',)}")
    run(workshop, output, *settings, f"STEPS={COMPARED}", devices=8)
    assert_same_curve(output, alone)


@pytest.mark.slow
def test_moving_to_another_mesh_in_the_middle(workshop, alone):
    output = workshop / "moved"
    half = f"STEPS={COMPARED // 2}"
    run(workshop, output, "Train.mesh={'fsdp': 4, 'tensor': 2}", half, devices=8)
    run(workshop, output, "Train.mesh={'data': 2}", f"STEPS={COMPARED}", devices=2)
    assert_same_curve(output, alone)


def test_two_processes_follow_one(workshop, alone):
    output = workshop / "two-processes"
    exits, errors = two_processes(workshop, output, f"STEPS={COMPARED}")
    assert exits == [0, 0], errors
    assert_same_curve(output, alone)


@pytest.mark.skipif(not FULL, reason="like the shorter one; WINNOW_FULL=1 runs it")
def test_killed_at_a_random_step_of_many_it_keeps_its_curve(workshop, alone):
    output = workshop / "killed-at-random"
    step, settings = random.randrange(5, COMPARED - 5), f"STEPS={COMPARED}"
    assert disturbed(workshop, output, step, signal.SIGKILL, settings) == -signal.SIGKILL
    run(workshop, output, settings)
    np.testing.assert_array_equal(losses(output), alone)


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_as_one(workshop, undisturbed):
    output = workshop / "two-stopped"
    exits, errors = two_processes(workshop, output, stop_at=12)
    assert exits == [75, 75], errors
    step = parameters(output)[0]
    run(workshop, output)
    assert losses(output)[:step].shape == (step,)
    np.testing.assert_allclose(losses(output)[:30], losses(undisturbed)[:30], rtol=1e-5)


def two_processes(workshop, output, *settings, stop_at=None) -> tuple[list[int], str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(2):
        flags = (f"--coordinator=localhost:{port}", "--processes=2", f"--process={index}")
        processes.append(
            subprocess.Popen(
                command(workshop, output, *settings, flags=flags),
                env=environment(1),
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    if stop_at is not None:
        wait_for_step(output, stop_at, processes[0])
        processes[1].send_signal(signal.SIGTERM)  # one is told; both stop
    errors = [process.communicate(timeout=240)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(errors)


# --------------------------------------------------------------------------------------------------
# In this process


@pytest.fixture
def examples_run(workshop, tiny_run):
    """Return `examples_run(output, **changes)`: a short run on the workshop's examples."""
    data = ExamplesConfig(
        str(workshop / "examples"), batch_size=16, inputs_length=16, targets_length=8
    )
    return functools.partial(tiny_run, data=data)


@pytest.mark.usefixtures("on_one_device")
def test_microbatches_and_chunks_change_nothing(examples_run, tmp_path):
    """Rows have unequal numbers of target tokens, so a mean of means would show here."""
    for name, changes in {
        "plain": {},
        "microbatches": {"microbatches": 2},
        "chunked": {"loss_chunk": 24},
    }.items():
        config = examples_run(tmp_path / name, label_smoothing=0.1, **changes)
        train.train(config)
    plain = losses(tmp_path / "plain")
    np.testing.assert_allclose(losses(tmp_path / "microbatches"), plain, rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "chunked"), plain, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Takes gradients for updates."""

    def build(self, axes):
        return optax.identity()


@pytest.mark.parametrize(("size", "norm"), [(0.1, 0.5), (10.0, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(tiny_run, tmp_path, size, norm):
    config = tiny_run(tmp_path, optimizer=Plain(), clip_norm=1.0)
    gradients = {"a": np.full((3, 4), size), "b": {"c": np.full(13, -size)}}  # 25 numbers
    optimizer = train.make_optimizer(config, Model(config.model))
    updates, _ = optimizer.update(gradients, optimizer.init(gradients))
    assert float(optax.global_norm(updates)) == pytest.approx(norm)
    jax.tree.map(
        lambda u, g: np.testing.assert_allclose(u / g, norm / 5 / size), updates, gradients
    )


@pytest.mark.usefixtures("on_one_device")
def test_a_decoder_only_model_trains_on_targets_alone(examples_run, workshop, tmp_path):
    data = ExamplesConfig(
        str(workshop / "examples"),
        batch_size=16,
        inputs_length=16,
        targets_length=8,
        layout="decoder_only",
    )
    model = DecoderConfig(
        vocab_size=VOCAB,
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
    )
    result = train.train(examples_run(tmp_path, data=data, model=model, steps=40))
    curve = losses(tmp_path)
    assert curve[-5:].mean() < curve[:2].mean() - 0.5
    targets = pq.read_table(workshop / "examples").column("targets").to_pylist()
    per_epoch = sum(len(target) + 1 for target in targets)
    seen = 40 * 16 / 200 * per_epoch
    assert result["target_tokens"] == pytest.approx(seen, rel=0.1)


@pytest.mark.parametrize("bad_at", [1, 4])
@pytest.mark.usefixtures("on_one_device")
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(examples_run, tmp_path, bad_at):
    @dataclasses.dataclass(frozen=True)
    class Poisoned:
        clean: ExamplesConfig

        def open(self, process_index, process_count):
            return PoisonedBatches(self.clean.open(process_index, process_count))

    @dataclasses.dataclass
    class PoisonedBatches:
        clean: object

        def batch(self, step):
            batch = self.clean.batch(step)
            if step == bad_at:  # a token that the vocabulary lacks
                batch["encoder_input_tokens"][0, 0] = VOCAB + 1
            return batch

    config = examples_run(tmp_path)
    config = dataclasses.replace(config, data=Poisoned(config.data), checkpoint_every=2, steps=9)
    with pytest.raises(train.RunError, match=rf"^step {bad_at + 1}: loss nan"):
        train.train(config)
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(1, bad_at + 1))
    if bad_at >= 2:
        assert parameters(tmp_path)[0] <= bad_at


@pytest.mark.usefixtures("on_one_device")
def test_a_spike_is_reported_with_its_step(examples_run, tmp_path, capsys):
    @dataclasses.dataclass(frozen=True)
    class Shuffled:
        clean: ExamplesConfig

        def open(self, process_index, process_count):
            return ShuffledBatches(self.clean.open(process_index, process_count))

    @dataclasses.dataclass
    class ShuffledBatches:
        clean: object

        def batch(self, step):
            batch = self.clean.batch(0)
            if step == 55:
                batch["decoder_target_tokens"] = VOCAB - 1 - batch["decoder_target_tokens"]
            return batch

    config = examples_run(tmp_path, steps=60)
    train.train(dataclasses.replace(config, data=Shuffled(config.data)))
    events = lines(tmp_path, "event")
    assert [line["step"] for line in events] == [56]
    assert "step 56: loss" in capsys.readouterr().err


@pytest.mark.usefixtures("on_one_device")
def test_fine_tuning_starts_from_a_finished_run(examples_run, undisturbed, tmp_path):
    config = examples_run(
        tmp_path, model=None, initial_weights=str(undisturbed), optimizer=Adafactor()
    )
    train.train(config)
    # It begins about where the other run ended (there with dropout), not where that run began.
    assert losses(tmp_path)[0] < losses(undisturbed)[-10:].max() < losses(undisturbed)[0]


@pytest.mark.usefixtures("on_one_device")
def test_the_same_model_from_scan_and_from_unrolled_layers(examples_run, tmp_path):
    for scan in (True, False):
        train.train(examples_run(tmp_path / str(scan), scan_layers=scan))
    np.testing.assert_allclose(losses(tmp_path / "True"), losses(tmp_path / "False"), rtol=2e-5)


@pytest.mark.usefixtures("on_one_device")
def test_the_compiler_gets_its_options(examples_run, tmp_path):
    config = examples_run(tmp_path, compiler_options={"xla_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        train.train(dataclasses.replace(config, seed=1))
    # That run did nothing, so that the directory is free for another configuration.
    train.train(dataclasses.replace(config, compiler_options={"xla_cpu_enable_fast_math": False}))
    assert len(losses(tmp_path)) == config.steps


def test_the_core_imports_without_other_frameworks():
    code = "import sys, train; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert not {"tensorflow", "seqio", "torch", "transformers", "gin"} & set(imported)
