"""Checkpoints: what is saved comes back bit for bit on any mesh; damaged ones are passed over."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import checkpoints as ckpt
from models import optimizers, partitioning

REPOSITORY = Path(__file__).resolve().parents[2]
AXES = {"layer": {"w": ("layers", "embed", "mlp"), "scale": ("layers", "embed")}, "e": ("vocab",)}


def make_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "layer": {
            "w": jax.random.normal(keys[0], (2, 128, 136)),
            "scale": jax.random.normal(keys[1], (2, 128)),
        },
        "e": jax.random.normal(keys[2], (24,)),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizers.Adafactor().build(AXES))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return params, opt_state


def shapes_of(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def save_steps(run, steps, retention=None, metrics=None):
    with ckpt.Checkpoints(run, retention or ckpt.Retention(last=3)) as checkpoints:
        for step in steps:
            checkpoints.save(step, *make_state(step), metrics and {"loss": metrics[step]})


def damage_largest_file(item: Path, how) -> None:
    """Change the largest of the files that hold arrays (Orbax keeps them in directories "d")."""
    file = max(item.rglob("d/*"), key=lambda f: f.stat().st_size)
    file.write_bytes(how(file.read_bytes()))


def flip_one_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_state_comes_back_bit_for_bit(tmp_path):
    save_steps(tmp_path, [7])
    params, opt_state = make_state(7)
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(shapes_of(params), shapes_of(opt_state))
    assert restored is not None and restored[0] == 7
    assert_same_bits(restored[1:], (params, opt_state))
    step, alone = ckpt.restore_params(tmp_path, shapes_of(params))
    assert step == 7
    assert_same_bits(alone, params)


def test_parts_make_up_the_fingerprint():
    """However an array is cut, on the host and across the layers of a stack."""
    params, _ = make_state(3)
    params["large"] = jax.random.normal(jax.random.key(9), (3, 700, 900))  # over one cached band
    expected = ckpt.fingerprints({"params": params})["params"]
    sums = []
    for leaf in map(np.asarray, jax.tree.leaves(params)):
        cuts = [sorted({0, n // 3, n // 2, n}) for n in leaf.shape]
        total = 0
        for starts in np.ndindex(*(len(c) - 1 for c in cuts)):
            begin = [c[i] for c, i in zip(cuts, starts, strict=True)]
            part = leaf[tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, starts, strict=True))]
            total += ckpt.fingerprint_part(part, begin)
        sums.append(total % 2**32)
    assert ckpt._combined(sums) == expected


def test_an_empty_run_has_nothing_to_restore(tmp_path):
    params, opt_state = make_state()
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(shapes_of(params), shapes_of(opt_state)) is None
    with pytest.raises(ckpt.NoCheckpoint, match="not a training run"):
        ckpt.restore_params(tmp_path / "elsewhere", shapes_of(params))


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    params, opt_state = make_state()
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, opt_state)
        for _ in range(20):
            params, opt_state = overwrite((params, opt_state))
    _, restored = ckpt.restore_params(tmp_path, shapes_of(params))
    assert_same_bits(restored, make_state()[0])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(
            lambda step: damage_largest_file(step / "params", flip_one_bit), id="one flipped bit"
        ),
        pytest.param(
            lambda step: damage_largest_file(step / "params", lambda content: content[:1000]),
            id="truncated parameters",
        ),
        pytest.param(
            lambda step: damage_largest_file(
                step / "opt_state", lambda content: content[: len(content) // 2]
            ),
            id="truncated optimizer state",
        ),
        pytest.param(lambda step: shutil.rmtree(step / "params"), id="no parameters"),
        pytest.param(lambda step: shutil.rmtree(step / "facts"), id="no facts"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, caplog, damage):
    save_steps(tmp_path, [10, 20])
    damage(tmp_path / ckpt.DIRECTORY / "20")
    params, opt_state = make_state(10)
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(shapes_of(params), shapes_of(opt_state))
        assert restored is not None and restored[0] == 10
        assert_same_bits(restored[1:], (params, opt_state))
        assert "step 20 is not whole" in caplog.text
        # Training reaches step 20 again: the damaged checkpoint is replaced.
        checkpoints.save(20, *make_state(20))
    assert ckpt.restore_params(tmp_path, shapes_of(params))[0] == 20


def test_when_no_checkpoint_is_whole_the_error_names_them_all(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in ("1", "2"):
        damage_largest_file(tmp_path / ckpt.DIRECTORY / step / "params", lambda content: b"")
    with pytest.raises(ckpt.NoCheckpoint, match=r"(?s)step 2.*step 1"):
        ckpt.restore_params(tmp_path, shapes_of(make_state()[0]))


def test_an_unfinished_save_is_no_checkpoint_and_is_cleared(tmp_path):
    save_steps(tmp_path, [1])
    left = tmp_path / ckpt.DIRECTORY / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / ckpt.DIRECTORY / "1", left)
    assert ckpt.restore_params(tmp_path, shapes_of(make_state()[0]))[0] == 1
    assert left.exists()  # readers delete nothing
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        checkpoints.save(2, *make_state(2))
    assert ckpt.restore_params(tmp_path, shapes_of(make_state()[0]))[0] == 2
    assert not left.exists()


def test_retention_keeps_the_last_the_regular_and_the_best(tmp_path):
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: 6.0, 7: 7.0}
    retention = ckpt.Retention(last=2, every=3, best=1, metric="loss")
    save_steps(tmp_path, losses, retention, losses)
    with ckpt.Checkpoints(tmp_path, retention) as checkpoints:
        assert checkpoints.steps() == [2, 3, 6, 7]
    assert ckpt.restore_params(tmp_path, shapes_of(make_state()[0]), step=2)[0] == 2
    with pytest.raises(ckpt.NoCheckpoint, match="no step 4"):
        ckpt.restore_params(tmp_path, shapes_of(make_state()[0]), step=4)


@pytest.mark.parametrize("axes", [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 2}])
def test_restores_onto_another_mesh(tmp_path, eight_devices, axes):
    params, opt_state = make_state(3)
    mesh = partitioning.make_mesh(axes)
    placed = jax.device_put(params, partitioning.shardings(params, AXES, mesh))
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, placed, opt_state)
    other = partitioning.make_mesh({"data": 1, "tensor": 2}, devices=jax.devices()[:2])
    shardings = partitioning.shardings(params, AXES, other)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
    )
    _, restored = ckpt.restore_params(tmp_path, shapes)
    assert_same_bits(restored, params)
    assert restored["layer"]["w"].sharding == shardings["layer"]["w"]


def test_fingerprints_see_every_bit_and_no_mesh(eight_devices):
    params, _ = make_state()
    expected = ckpt.fingerprints({"params": params})
    mesh = partitioning.make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(params, partitioning.shardings(params, AXES, mesh))
    assert ckpt.fingerprints({"params": placed}) == expected
    w = params["layer"]["w"]
    one_bit = jnp.nextafter(w[1, 3, 5], jnp.float32(9.0))
    for changed in (w.at[1, 3, 5].set(one_bit), w[::-1], w[:, ::-1], w[:, :, ::-1]):
        other = {**params, "layer": {**params["layer"], "w": changed}}
        assert ckpt.fingerprints({"params": other}) != expected


def test_config_file_round_trip(tmp_path):
    ckpt.write_config(tmp_path, {"family": "t5", "d_model": 64})
    assert ckpt.read_config(tmp_path) == {"family": "t5", "d_model": 64}
    assert [p.name for p in tmp_path.iterdir()] == [ckpt.MODEL_FILE]


def test_any_checkpoint_of_a_run_is_a_model(tmp_path):
    from models import weights
    from models.config import T5Config
    from models.model import Model

    config = T5Config(
        vocab_size=16, d_model=4, d_kv=2, d_ff=4, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip
    run = tmp_path / "run"
    with ckpt.Checkpoints(run, ckpt.Retention(last=3)) as checkpoints:
        for step in (20, 100):
            filled = jax.tree.map(lambda x: np.full(x.shape, step, x.dtype), Model(config).shapes())  # noqa: B023
            params = jax.tree.map(jax.numpy.asarray, filled)
            checkpoints.save(step, params, {"count": jax.numpy.zeros(())})
    ckpt.write_config(run, config.to_dict())
    for path, step in ((run, 100), (f"{run}@20", 20), (f"{run}@100", 100)):
        _, params = weights.load(path)
        assert {float(leaf.max()) for leaf in jax.tree.leaves(params)} == {step}
    with pytest.raises(ckpt.NoCheckpoint, match="no step 50"):
        weights.load(f"{run}@50")


FILL = """
import resource, signal, sys
import jax, numpy as np
from models import checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
random = np.random.default_rng(0)
try:
    with checkpoints.Checkpoints(sys.argv[1]) as run:
        for step, rows in ((1, 10), (2, 10_000), (3, 10)):
            if step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            params = {"a": jax.numpy.asarray(random.normal(size=(rows, 100)))}
            run.save(step, params, {"m": params["a"]})
except checkpoints.CheckpointError as error:
    sys.exit(f"error: {error}")
"""


def test_a_disk_that_refuses_a_checkpoint_is_one_line(tmp_path):
    """A limit of the size of files stands for a full disk. The earlier checkpoint stays whole."""
    found = subprocess.run(
        [sys.executable, "-c", FILL, tmp_path], cwd=REPOSITORY, capture_output=True, text=True,
        env=dict(os.environ) | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1, found.stderr
    expected = f"error: cannot write a checkpoint to {tmp_path / ckpt.DIRECTORY} (File too large)"
    assert found.stderr.startswith(expected)
    with ckpt.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


def test_an_error_of_training_is_not_replaced_by_one_of_writing(tmp_path, monkeypatch):
    with pytest.raises(ZeroDivisionError), ckpt.Checkpoints(tmp_path) as checkpoints:

        def close():
            raise OSError("disk gone")

        monkeypatch.setattr(checkpoints._manager, "close", close)
        raise ZeroDivisionError
    checkpoints = ckpt.Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoints._manager, "close", close)
    with pytest.raises(ckpt.CheckpointError, match="disk gone"), checkpoints:
        pass


def test_the_interpreters_hook_for_errors_is_restored(tmp_path):
    """A chain of hooks of former contexts would end in endless recursion."""
    hook = sys.unraisablehook
    for _ in range(2):
        with ckpt.Checkpoints(tmp_path) as checkpoints:
            assert sys.unraisablehook is not hook
            checkpoints.steps()
        assert sys.unraisablehook is hook
    assert not any(
        getattr(kept, "__qualname__", "").startswith("_Without")
        for name in ("absl", "asyncio")
        for kept in logging.getLogger(name).filters
    )
