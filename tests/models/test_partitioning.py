"""Meshes, rules and shardings: every array where the table says, and nothing lost on the way."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from models import partitioning
from models.compiler_options import (
    BY_PLATFORM,
    DECODER_ONLY_SCORING,
    compiler_options,
    scoring_options,
)
from models.config import DecoderConfig, T5Config
from models.model import Model
from models.optimizers import Adafactor, state_axes
from models.published import NAMED

T5 = T5Config(
    vocab_size=96,
    d_model=32,
    d_ff=64,
    d_kv=8,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
DECODER = DecoderConfig(
    vocab_size=96, d_model=32, d_ff=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
)


@pytest.fixture
def mesh(eight_devices):
    return partitioning.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, eight_devices)


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        (None, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_meshes_take_all_devices(eight_devices, axes, sizes):
    mesh = partitioning.make_mesh(axes, eight_devices)
    assert tuple(mesh.shape.values()) == sizes
    assert tuple(mesh.shape) == ("data", "fsdp", "tensor")
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in eight_devices)
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 3}, {"data": 2, "fsdp": 2}, {"data": -1, "fsdp": -1}, {"data": 0}, {"rows": 2}],
)
def test_meshes_that_do_not_fit_are_refused(eight_devices, axes):
    with pytest.raises(ValueError, match=r"does not fill 8 devices|unknown mesh axes"):
        partitioning.make_mesh(axes, eight_devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is laid out by."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"

    @property
    def process_index(self) -> int:
        return self.slice_index


def test_only_data_goes_across_slices():
    chips = [Chip(i, i % 2) for i in range(16)]  # in whatever order the devices come
    mesh = partitioning.make_mesh({"data": -1, "fsdp": 2, "tensor": 2}, chips)
    assert mesh.devices.shape == (4, 2, 2)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(16))
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    np.testing.assert_array_equal(slices, np.repeat([0, 1], 8).reshape(4, 2, 2))
    with pytest.raises(partitioning.MeshError, match="multiple of the 2 slices"):
        partitioning.make_mesh({"data": 1, "fsdp": 16}, chips)


def test_lengths_take_what_is_left(mesh):
    rules = partitioning.override(partitioning.RULES, partitioning.SEQUENCE)

    def spec(*axes):
        return partitioning.sharding_of(axes, mesh, rules).spec

    rows = ("data", "fsdp")
    assert spec("batch", "length", "embed") == PartitionSpec(rows, "tensor")
    assert spec("batch", "length", "mlp") == PartitionSpec(rows, None, "tensor")
    assert spec("batch", "length", "heads", None) == PartitionSpec(rows, None, "tensor")
    assert spec("embed", "mlp") == PartitionSpec("fsdp", "tensor")
    for changes in ({"lenght": ("tensor",)}, {"length": ("sequence",)}, {"batch": ("data",)}):
        with pytest.raises(ValueError, match=r"no rule for|the mesh has no axes"):
            partitioning.override(partitioning.RULES, changes)


def test_logical_axes_become_mesh_axes(mesh):
    def spec(*axes, shape=None):
        return partitioning.sharding_of(axes, mesh, shape=shape).spec

    assert spec("embed", "mlp") == PartitionSpec("fsdp", "tensor")
    assert spec("layers", "heads", "embed") == PartitionSpec(None, "tensor", "fsdp")
    assert spec("batch", "length", "embed") == PartitionSpec(("data", "fsdp"))
    assert spec("batch", None, "mlp") == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert spec() == PartitionSpec()
    with pytest.raises(ValueError, match="no rule for the logical axis 'colour'"):
        spec("colour")


def test_a_dimension_that_does_not_divide_stays_whole_and_is_reported_once(mesh, caplog):
    for _ in range(3):
        found = partitioning.sharding_of(("vocab", "embed"), mesh, shape=(31, 64)).spec
        assert found == PartitionSpec(None, "fsdp")
    assert caplog.text.count("axis vocab of size 31 stays whole") == 1


@pytest.mark.parametrize("config", [T5, DECODER])
def test_every_matrix_is_split_over_fsdp_and_tensor(mesh, config):
    """The guard against a constraint lost in silence."""
    model = Model(config)
    shardings = partitioning.param_shardings(model, mesh)
    shapes = model.shapes()
    for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]:
        name = jax.tree_util.keystr(path)
        if any(part in name for part in ("norm", "relpos", "scale")):
            assert sharding.spec == PartitionSpec(), name
        else:
            assert set(sharding.spec) - {None} == {"fsdp", "tensor"}, name
    held = sum(
        np.prod(sharding.shard_shape(shape.shape))
        for sharding, shape in zip(jax.tree.leaves(shardings), jax.tree.leaves(shapes), strict=True)
    )
    assert held < 0.3 * model.parameter_count()  # a quarter, and the vectors


def test_optimizer_state_lies_with_its_parameters(mesh):
    model = Model(T5)
    params, axes = model.shapes(), model.logical_axes()
    state = jax.eval_shape(Adafactor(min_dim_to_factor=1000).build(axes).init, params)
    found = partitioning.shardings(state, state_axes(state, params, axes), mesh)
    expected = partitioning.param_shardings(model, mesh)
    slots = jax.tree.map(lambda _, slot: slot["v"], expected, found.slots)
    assert slots == expected


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize(
    "config",
    [pytest.param(T5, marks=pytest.mark.sweep), DECODER],  # test_sharding.py has T5's
)
def test_sharded_logits_equal_unsharded_ones(eight_devices, config, axes):
    model = Model(config)
    rng = np.random.default_rng(0)
    batch = {
        "decoder_input_tokens": rng.integers(2, 96, (8, 12)).astype(np.int32),
        "encoder_input_tokens": rng.integers(2, 96, (8, 16)).astype(np.int32),
    }
    initial = jax.jit(model.init)(jax.random.key(0))

    def forward(params, batch):
        return model.bind(params)(batch)

    expected = jax.jit(forward)(initial, batch)
    mesh = partitioning.make_mesh(axes, eight_devices)
    with partitioning.use(mesh):
        shardings = partitioning.param_shardings(model, mesh)
        params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
        found = jax.jit(forward)(params, partitioning.global_batch(batch, mesh))
    jax.tree.map(np.testing.assert_array_equal, params, initial)  # the same draw on every mesh
    np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.abs(expected).max()))


def test_batches_are_put_together_in_row_order(mesh):
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    assert partitioning.batch_reader(mesh) == (0, 1)
    placed = partitioning.global_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, rows)
    assert placed.sharding == partitioning.batch_sharding(mesh)
    assert placed.addressable_shards[0].data.shape == (2, 3)  # data x fsdp = 4 parts
    with pytest.raises(ValueError, match="6 rows does not divide over 4 devices"):
        partitioning.global_batch({"tokens": rows[:6]}, mesh)


def test_constrain_is_nothing_without_a_mesh_and_pins_within_one(mesh):
    x = jnp.ones((8, 4, 32))
    f = jax.jit(lambda x: partitioning.constrain(2 * x, ("batch", "length", "mlp")))
    assert len(f(x).sharding.device_set) == 1
    with partitioning.use(mesh):
        assert f(x).sharding.spec == PartitionSpec(("data", "fsdp"), None, "tensor")
    with partitioning.use(mesh, {**partitioning.RULES, "mlp": ()}):  # other rules: traced anew
        assert f(x).sharding.spec == PartitionSpec(("data", "fsdp"))
    assert len(f(x).sharding.device_set) == 1


def test_options_of_the_compiler_are_those_of_gpus_and_the_given(eight_devices):
    mesh = partitioning.make_mesh({"data": 8}, eight_devices)
    given = {"xla_cpu_enable_fast_math": False}
    assert compiler_options(mesh, given) == given
    gpu = types.SimpleNamespace(platform="gpu")
    gpus = types.SimpleNamespace(size=2, devices=np.array([gpu, gpu]))
    assert compiler_options(gpus, given) == given | BY_PLATFORM["gpu"]
    for name, value in BY_PLATFORM["gpu"].items():  # what a user gives comes first
        assert compiler_options(gpus, {name: not value})[name] is (not value)
    alone = types.SimpleNamespace(size=1, devices=np.array([gpu]))
    assert compiler_options(alone, {}) == {}


@pytest.mark.parametrize(
    ("kind", "model", "changes", "expected"),
    [
        ("TPU v6 lite", "qwen3_0_6b", {}, DECODER_ONLY_SCORING),
        ("TPU v6 lite", "qwen3_0_6b", {"scan_layers": False}, {}),
        ("TPU v6 lite", "t5_small", {}, {}),
        ("TPU v3", "qwen3_0_6b", {}, {}),  # 16 MiB of memory on the chip
        ("cpu", "qwen3_0_6b", {}, {}),
    ],
)
def test_options_of_scoring_are_those_of_decoders_on_tpus(kind, model, changes, expected):
    chip = types.SimpleNamespace(platform=kind.partition(" ")[0].lower(), device_kind=kind)
    config = dataclasses.replace(NAMED[model], **changes)
    for size in (1, 2):
        mesh = types.SimpleNamespace(size=size, devices=np.array([chip]))
        assert scoring_options(mesh, config, {}) == expected
        given = {"xla_tpu_scoped_vmem_limit_kib": 32_768}
        assert scoring_options(mesh, config, given) == expected | given
