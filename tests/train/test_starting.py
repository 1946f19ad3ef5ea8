"""Starts of runs: from weights of other kinds or parts of them, in bfloat16, and failed starts."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train
from models import checkpoints, weights
from models.errors import ModelError
from models.model import Model
from models.optimizers import Adafactor, AdamW, Constant, Muon
from models.weights import huggingface
from pruning.cli import command
from pruning.store.manifest import ConfigurationChanged

STILL = AdamW(Constant(0.0))  # a run that changes nothing shows what it began with


def trained(output: Path, config) -> dict:
    return checkpoints.restore_params(output, Model(config).shapes())[1]


def assert_same(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def saved(tiny_run, tmp_path_factory):
    """A model's configuration, parameters, and directories of its weights by format."""
    path = tmp_path_factory.mktemp("weights")
    config = tiny_run("").model
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(7))
    weights.save(path / "winnow", model, params)
    huggingface.save(path / "huggingface", model, params)
    return config, params, path


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("form", ["winnow", "huggingface"])
def test_weights_of_either_form_are_gone_on_from(saved, tiny_run, tmp_path, form):
    config, params, path = saved
    start = {"model": None, "initial_weights": str(path / form), "optimizer": STILL, "steps": 1}
    train.train(tiny_run(tmp_path, **start, dropout=0.1))
    assert_same(trained(tmp_path, config), params)
    assert checkpoints.read_config(tmp_path)["dropout_rate"] == 0.1


@pytest.mark.usefixtures("on_one_device")
def test_what_is_fresh_is_drawn_and_the_rest_taken(saved, tiny_run, tmp_path):
    config, params, path = saved
    deeper = dataclasses.replace(config, num_decoder_layers=2)
    run = tiny_run(
        tmp_path,
        model=deeper,
        initial_weights=str(path / "winnow"),
        fresh=("decoder/layers/.*",),
        optimizer=STILL,
        steps=1,
        seed=3,
    )
    train.train(run)
    found = trained(tmp_path, deeper)
    drawn = jax.jit(Model(deeper).init)(jax.random.key(3))["decoder"]["layers"]
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    jax.tree.map(compare, found["decoder"].pop("layers"), drawn)
    expected = {**params, "decoder": {**params["decoder"]}}
    del expected["decoder"]["layers"]
    assert_same(found, expected)


def test_weights_that_do_not_fit_are_refused_by_name(saved, tiny_run, tmp_path):
    config, params, path = saved
    shapes = Model(dataclasses.replace(config, num_decoder_layers=2)).shapes()
    run = tiny_run(tmp_path, initial_weights=str(path / "winnow"))
    wrong = r"decoder/layers/mlp/wi_0/kernel: \(1, 32, 64\) in the weights, \(2, 32, 64\) in the"
    with pytest.raises(train.RunError, match=wrong):
        train.taken_over(run, shapes, params)
    bare = {"token_embedder": params["token_embedder"]}
    with pytest.raises(train.RunError, match="decoder_norm/scale: nothing in the weights"):
        train.taken_over(run, shapes, bare)
    misspelt = dataclasses.replace(run, fresh=("decodr/.*",))
    with pytest.raises(train.RunError, match="names no parameter"):
        train.taken_over(misspelt, Model(config).shapes(), params)
    with pytest.raises(ValueError, match=r"Train\.fresh"):
        tiny_run(tmp_path, fresh=("decoder/.*",))


@pytest.mark.usefixtures("on_one_device")
def test_a_corpus_of_a_larger_vocabulary_is_refused(tiny_run, reversals, tmp_path):
    data = reversals(ids=65)
    with pytest.raises(train.RunError, match="vocabulary of 65 ids, the model one of 64"):
        train.train(tiny_run(tmp_path, data=data))
    # Nothing was done, so that the corrected command runs.
    assert train.train(tiny_run(tmp_path))["steps"] == 6
    with pytest.raises(ConfigurationChanged, match="another configuration:\n  seed: 0 -> 1"):
        train.train(tiny_run(tmp_path, seed=1))


FULL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # no file may be larger
import train
from models.config import T5Config
from pruning.cli import command
sys.path.insert(0, "tests/train")
from conftest import TINY, Reversals

def main():
    train.train(train.TrainConfig(output=sys.argv[1], model=TINY, data=Reversals(), steps=6,
                                  checkpoint_every=1, log_every=1))
    return 0

sys.exit(command.exit_status(main))
"""


def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path):
    kept = "JAX_COMPILATION_CACHE_DIR"  # compiled programs could not be written, either
    environment = {name: value for name, value in os.environ.items() if name != kept}
    ran = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "run")],
        env=environment | {"JAX_NUM_CPU_DEVICES": "-1"},
        cwd=Path(train.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    said = [line for line in ran.stderr.splitlines() if not line.startswith("train: ")]
    assert len(said) == 1, ran.stderr
    assert said[0].startswith(
        f"error: cannot write a checkpoint to {tmp_path / 'run' / 'checkpoints'} (File too large)"
    )


def test_an_error_of_a_step_is_not_hidden_by_one_of_its_checkpoint(tmp_path, monkeypatch):
    def fail() -> None:
        raise OSError("a write in the background failed")

    opened = checkpoints.Checkpoints(tmp_path / "run")
    monkeypatch.setattr(opened._manager, "close", fail)
    with pytest.raises(ZeroDivisionError), opened:
        raise ZeroDivisionError
    with pytest.raises(checkpoints.CheckpointError, match="a write in the background"), opened:
        pass


def test_sigterm_before_the_first_step_ends_with_75_and_a_line(capsys):
    def work() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        return 0

    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert command.exit_status(work) == 75
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert capsys.readouterr().err == "terminated: the same command goes on where it stopped\n"


@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("optimizer", [Adafactor(min_dim_to_factor=16), AdamW(), Muon()])
def test_a_run_in_two_parts_ends_with_the_bits_of_one(tiny_run, tmp_path, optimizer):
    whole, parts = (tiny_run(tmp_path / name, optimizer=optimizer) for name in ("a", "b"))
    for run in (whole, dataclasses.replace(parts, steps=3), parts):
        result = train.train(run)
        assert result is not None and result["steps"] == run.steps
    assert_same(trained(tmp_path / "a", whole.model), trained(tmp_path / "b", whole.model))
    curves = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("a", "b")
    ]
    assert curves[0] == curves[1]
    assert len(set(curves[0])) > 3


def test_gradients_in_bfloat16_are_those_in_float32_rounded(reversals, tiny_run):
    """On one device: of kernels alone, once."""
    model = Model(dataclasses.replace(tiny_run("").model, dtype="bfloat16"))
    params = jax.jit(model.init)(jax.random.key(0))
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda gradients, state, params: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )
    found, batch = {}, reversals().batch(0)
    for dtype in ("float32", "bfloat16"):
        config = tiny_run("", gradient_dtype=dtype, microbatches=1)
        state = train.State(jnp.zeros((), jnp.int32), params, keep.init(params))
        step = jax.jit(train.make_train_step(config, model, keep))
        gradients = step(state, batch)[0].opt_state
        count = float(batch["decoder_loss_weights"].sum())
        found[dtype] = jax.tree.map(lambda g, count=count: g * count, gradients)

    def compare(path, exact, rounded):
        if path[-1].key == "kernel":
            exact = exact.astype(jnp.bfloat16).astype(jnp.float32)
        scale = jnp.abs(exact).max()
        np.testing.assert_allclose(rounded / scale, exact / scale, atol=1e-6, rtol=2**-7)

    jax.tree_util.tree_map_with_path(compare, found["float32"], found["bfloat16"])
    with pytest.raises(train.RunError, match=r"gradient_dtype 'bfloat16' requires"):
        train.make_train_step(config, Model(tiny_run("").model), keep)


BFLOAT16 = """
import dataclasses, json, sys, jax, jax.numpy as jnp, numpy as np
import train
from models.config import DecoderConfig, T5Config
from models.model import Model

small = {"vocab_size": 64, "d_model": 32, "d_ff": 64}
configs = {
    "t5": T5Config(**small, d_kv=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1),
    "decoder": DecoderConfig(**small, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8),
}
rng = np.random.default_rng(0)
inputs, targets = rng.integers(2, 64, (2, 4, 16)).astype(np.int32)
batch = {
    "encoder_input_tokens": inputs,
    "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    "decoder_target_tokens": targets,
    "decoder_loss_weights": np.ones((4, 16), np.float32),
}
found = {}
for family, tied, dtype in (
    (*kind, dtype)
    for kind in (("t5", True), ("decoder", True))
    for dtype in ("float32", "bfloat16")
):
    model = Model(dataclasses.replace(configs[family], tie_embeddings=tied, dtype=dtype))
    given = batch if family == "t5" else {k: v for k, v in batch.items() if "encoder" not in k}
    config = train.TrainConfig(output="", data=None, steps=3, model=model.config, clip_norm=1.0)
    optimizer = train.make_optimizer(config, model)
    params = model.init(jax.random.key(0))
    state = train.State(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = jax.jit(train.make_train_step(config, model, optimizer))
    curve = found[f"{family}, tied {tied}, {dtype}"] = []
    for _ in range(3):
        state, metrics = step(state, given)
        curve.append(float(metrics["loss"]))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_three_steps_in_bfloat16_on_a_cpu():
    """Follows float32 to within 1%; tied embeddings, too, whose gradient is a transposed one."""
    ran = subprocess.run(
        [sys.executable, "-c", BFLOAT16],
        cwd=Path(train.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == 4
    for name, curve in found.items():
        exact = found[name.replace("bfloat16", "float32")]
        np.testing.assert_allclose(curve, exact, rtol=0.01, err_msg=name)
        assert curve[2] < curve[0], name


_ODD = [
    "\n",
    "{}\n",
    "[]\n",
    "null\n",
    "7\n",
    "\0\n",
    "[" * 100_000 + "\n",
    '{"a":' * 50_000 + "\n",
]
_ODD_FILES = {
    "config.json": [
        '{"identity": {}',
        '{"train": 7, "identity": {}}',
        '{"train": {"steps": "x"}, "identity": {}}',
    ],
    "result.json": ['{"steps": null, "loss": 1}', '{"steps": 6}'],
    "metrics.jsonl": [
        '{"step": null, "kind": "train"}\n',
        '{"step": 6, "kind": 7}\n',
        '{"step": 6, "kind": "eval"}\n',
        '{"step": 6, "kind": "train", "loss": 1}\n',
        '{"step": 6, "kind": "train", "loss": 1, "tokens": "x", "target_tokens": 1, "flops": 1, '
        '"seconds": 1}\n',
        '{"step": 6, "kind": "train", "loss": 1, "tokens": 1e999, "target_tokens": 1, "flops": 1, '
        '"seconds": 1}\n',
        '{"step": 6, "kind": "train", "loss": 1, "tokens": %s, "target_tokens": 1, "flops": 1, '
        '"seconds": 1}\n' % ("9" * 400),
    ],
}


@pytest.mark.parametrize("name", _ODD_FILES)
def test_damaged_files_of_a_run_are_refused_in_one_line_that_names_them(tiny_run, tmp_path, name):
    config = tiny_run(tmp_path)
    for content in [*_ODD, *_ODD_FILES[name], None]:
        file = tmp_path / name
        if content is None:
            file.unlink()
            file.mkdir()
        else:
            file.write_text(content)
        with pytest.raises((train.RunError, ModelError)) as raised:
            if name == "metrics.jsonl":
                train.Metrics(config, 6)
            else:
                train.Claim(config, {})
        message = str(raised.value)
        assert str(file) in message and "\n" not in message
        assert any(word in message for word in ("delete", "copy", "remove"))


def test_a_run_without_its_metrics_says_which_checkpoint_to_remove(tiny_run, tmp_path):
    with pytest.raises(train.RunError, match=r"no line of step 6.*remove .*checkpoints/6 "):
        train.Metrics(tiny_run(tmp_path), 6)
