"""Winnow's own weights, training runs, the command line, and what loading takes of the host."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import checkpoints, partitioning, weights
from models.__main__ import main
from models.config import DecoderConfig, T5Config
from models.model import Model, stack_layers, unstack_layers
from models.published import NAMED
from models.weights import huggingface, safetensors_file, transfer, winnow

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = {
    "sentence_t5": T5Config(
        vocab_size=64, d_model=16, d_ff=32, num_heads=2, d_kv=8, num_encoder_layers=3,
        num_decoder_layers=0, tie_embeddings=True, sentence_head=12,
    ),
    "umt5": T5Config(
        vocab_size=64, d_model=16, d_ff=32, num_heads=2, d_kv=8, num_encoder_layers=3,
        num_decoder_layers=2, relpos_per_layer=True,
    ),
    "llama": DecoderConfig(
        vocab_size=64, d_model=16, d_ff=32, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=8,
        qkv_bias=True,
    ),
}  # fmt: skip


def random_params(model: Model):
    """Host arrays: NumPy's slices and stacks compile nothing."""
    random = np.random.default_rng(0)
    shapes = model.shapes()
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(np.float32), shapes)


def unstacked(params):
    return jax.jit(unstack_layers)(params)


def stacked(params):
    return jax.jit(stack_layers)(params)


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", TINY)
def test_winnow_weights_come_back(tmp_path, name):
    model = Model(TINY[name])
    params = random_params(model)
    weights.save(tmp_path / "one", model, params)
    loaded, loaded_params = weights.load(tmp_path / "one")
    assert loaded == model
    assert_same(loaded_params, params)
    # However the model was laid out, the file is the same, in one piece or several.
    unrolled = Model(dataclasses.replace(model.config, scan_layers=False))
    weights.save(tmp_path / "unrolled", unrolled, unstacked(params))
    files = [tmp_path / at / "model.safetensors" for at in ("one", "unrolled")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded, loaded_params = weights.load(tmp_path / "one", scan_layers=False)
    assert loaded == unrolled
    assert_same(stacked(loaded_params), params)
    winnow.save(tmp_path / "several", model, params, max_file_bytes=5_000)
    assert len(list((tmp_path / "several").glob("model-*"))) > 3
    assert_same(weights.load(tmp_path / "several")[1], params)


def test_bfloat16_stays_bfloat16(tmp_path):
    model = Model(TINY["umt5"])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(model))
    weights.save(tmp_path / "winnow", model, params)
    huggingface.save(tmp_path / "huggingface", model, params)
    for path in ("winnow", "huggingface"):
        assert_same(weights.load(tmp_path / path, dtype="bfloat16")[1], params)
        wide = weights.load(tmp_path / path)[1]
        assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))


@pytest.mark.parametrize("kind", ["winnow", "huggingface"])
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_sharded_is_unsharded(tmp_path, eight_devices, kind, axes):
    model = Model(TINY["llama"])
    params = random_params(model)
    save = {"winnow": weights.save, "huggingface": huggingface.save}[kind]
    save(tmp_path / "x", model, params)
    mesh = partitioning.make_mesh({"data": -1, **axes}, eight_devices)
    loaded, sharded = weights.load(tmp_path / "x", mesh=mesh)
    assert_same(sharded, params)
    wanted = partitioning.param_shardings(loaded, mesh)
    jax.tree.map(lambda x, s: np.testing.assert_(x.sharding == s), sharded, wanted)
    save(tmp_path / "y", loaded, sharded)
    files = [tmp_path / at / "model.safetensors" for at in ("x", "y")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_training_run_is_a_model(tmp_path, eight_devices, scan_layers):
    model = Model(dataclasses.replace(TINY["umt5"], scan_layers=scan_layers))
    params = random_params(model)
    checkpoints.write_config(tmp_path, model.config.to_dict())
    with checkpoints.Checkpoints(tmp_path) as run:
        run.save(3, jax.tree.map(jnp.zeros_like, params), {"count": jnp.zeros(())})
        run.save(7, params, {"count": jnp.ones(())})
    loaded, loaded_params = weights.load(tmp_path, scan_layers=scan_layers)
    assert loaded == model
    assert_same(loaded_params, params)
    mesh = partitioning.make_mesh({"data": -1, "fsdp": 2, "tensor": 4}, eight_devices)
    other, other_params = weights.load(
        tmp_path, mesh=mesh, scan_layers=not scan_layers, dtype="bfloat16"
    )
    assert other.config.scan_layers != scan_layers
    change = unstacked if scan_layers else stacked
    assert_same(other_params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), change(params)))
    wanted = partitioning.param_shardings(other, mesh)
    jax.tree.map(lambda x, s: np.testing.assert_(x.sharding == s), other_params, wanted)


def test_unfinished_and_foreign_directories(tmp_path):
    model = Model(TINY["umt5"])
    params = random_params(model)
    weights.save(tmp_path, model, params)
    with pytest.raises(FileExistsError, match="holds a model already"):
        weights.save(tmp_path, model, params)
    settings = tmp_path / "winnow_model.json"
    values = json.loads(settings.read_text().replace("d_kv", "d_kw"))
    settings.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"winnow_model\.json is damaged.* 'digests'"):
        weights.load(tmp_path)
    del values["digests"]
    settings.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"winnow_model\.json: unknown fields .*d_kw"):
        weights.load(tmp_path)
    settings.unlink()  # as after an interruption: it is written last
    with pytest.raises(FileNotFoundError, match="no model at"):
        weights.load(tmp_path)
    weights.save(tmp_path, model, params)
    with pytest.raises(ValueError, match="do not fit their configuration"):
        weights.save(tmp_path / "new", Model(TINY["llama"]), params)
    assert not list(tmp_path.glob("**/*.part"))


# --------------------------------------------------------------------------------------------------
# The command line


def test_convert_there_and_back(tmp_path, t5_vocabulary_file, capsys):
    """To Hugging Face and back: the same bytes. transformers reads the vocabulary with it."""
    model = Model(TINY["umt5"])
    params = random_params(model)
    weights.save(tmp_path / "a", model, params, vocabulary_file=t5_vocabulary_file)
    commands = [("a", "b", "huggingface"), ("b", "c", "winnow"), ("c", "d", "huggingface")]
    for source, to, kind in commands:
        paths = ["--from", str(tmp_path / source), "--to", str(tmp_path / to)]
        assert main(["convert", *paths, "--format", kind]) == 0
    for first, second in (("a", "c"), ("b", "d")):
        contents = [
            {file.name: file.read_bytes() for file in (tmp_path / at).iterdir() if file.is_file()}
            for at in (first, second)
        ]
        assert contents[0] == contents[1]
    assert (tmp_path / "d/spiece.model").read_bytes() == t5_vocabulary_file.read_bytes()
    transformers = pytest.importorskip("transformers", reason="reads the exported vocabulary")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "d")
    assert tokenizer("Hello world <extra_id_0>").input_ids == [8774, 296, 32099, 1]


def test_convert_keeps_the_stored_type_and_the_files_beside(tmp_path):
    model = Model(TINY["llama"])
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(model))
    huggingface.save(tmp_path / "a", model, params)
    (tmp_path / "a/tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "a/notes.txt").write_text("not copied")
    for dtype, to in ((None, "same"), ("float32", "wide")):
        options = ["--from", str(tmp_path / "a"), "--to", str(tmp_path / to)]
        options += ["--format", "huggingface", *(["--dtype", dtype] if dtype else [])]
        assert main(["convert", *options]) == 0
    names = {file.name for file in (tmp_path / "same").iterdir()}
    expected = {
        *("config.json", "generation_config.json", "tokenizer.json"),
        *("model.safetensors", "model.safetensors.digests"),
    }
    assert names == expected
    for name in ("model.safetensors", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    wide = safetensors_file.read_file(weights.epath.Path(tmp_path / "wide/model.safetensors"))
    assert {tensor.dtype for tensor in wide.values()} == {np.dtype(np.float32)}
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"


def test_inspect_shows_the_model(tmp_path, capsys):
    model = Model(TINY["llama"])
    weights.save(tmp_path, model, random_params(model))
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"{model.parameter_count():,} parameters" in shown.replace("\n", " ")
    assert "12 x 16 x 32" in shown  # the stack of wi_0
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "no model at" in capsys.readouterr().err


def test_help_is_instant_and_nothing_heavy_is_imported():
    started = time.process_time()
    code = (
        "import sys; sys.argv = ['models', '--help']\n"
        "try:\n    from models.__main__ import main; main()\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'numpy', 'rich', 'tensorstore'} & set(sys.modules), 'heavy'\n"
        "import models.weights.huggingface, models.weights.t5x, models.decoding\n"
        "heavy = {'tensorflow', 'torch', 'transformers', 'seqio', 'orbax', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True)
    assert time.process_time() - started < 1


# --------------------------------------------------------------------------------------------------
# Host memory

MEASURE = """
import os, sys, threading, tracemalloc
import jax, jax.numpy as jnp
from models import weights

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) * 1024 for l in status if l.startswith("RssAnon"))

path, scan_layers = sys.argv[1], sys.argv[2] == "True"
weights.load(sys.argv[3])  # the same code, small: its imports and its compilations are not counted
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
tracemalloc.start()
_, params = weights.load(path, scan_layers=scan_layers)
allocated = tracemalloc.get_traced_memory()[1]
done = True
thread.join()
leaves = jax.tree.leaves(params)
print(sum(x.nbytes for x in leaves), allocated, peak - before)
"""


# The largest tensor is a stack of MLP kernels, 25 MB: so small that the programs which put pieces
# in their places weigh as much. Of Flan-T5-base it is the vocabulary, 99 MB.
SMALL = T5Config(vocab_size=4096, d_model=512, d_kv=64, d_ff=3072, num_heads=8,
                 num_encoder_layers=4, num_decoder_layers=4)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "scan_layers", "config", "most"),
    [
        ("winnow", True, SMALL, 5),
        ("huggingface", True, SMALL, 5),
        ("t5x", True, SMALL, 5),
        ("t5x_scanned", True, SMALL, 5),
        ("t5x_scanned", False, SMALL, 5),  # what is kept as a stack, taken apart
        ("run", True, SMALL, 5),
        pytest.param("run", False, SMALL, 5, marks=pytest.mark.sweep),
        pytest.param("huggingface", True, NAMED["flan_t5_base"], 2, marks=pytest.mark.sweep),
        pytest.param("t5x", True, NAMED["flan_t5_base"], 2, marks=pytest.mark.sweep),
        pytest.param("run", True, NAMED["flan_t5_base"], 2, marks=pytest.mark.sweep),
    ],
)
def test_the_host_holds_little_beside_what_it_loads(tmp_path, kind, scan_layers, config, most):
    """Beside the devices' own memory, which on a CPU is the host's too and is subtracted."""
    tiny = dataclasses.replace(
        config, vocab_size=64, d_model=8, d_ff=16, num_heads=2, d_kv=4,
        num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    for name, shape in (("measured", config), ("tiny", tiny)):
        model = Model(shape)
        params = random_params(model)
        if kind == "winnow":
            weights.save(tmp_path / name, model, params)
        elif kind == "huggingface":
            huggingface.save(tmp_path / name, model, params)
        elif kind == "run":
            (tmp_path / name).mkdir()
            checkpoints.write_config(tmp_path / name, shape.to_dict())
            with checkpoints.Checkpoints(tmp_path / name) as run:
                run.save(1, params, {"count": jnp.zeros(())})
        else:
            write_t5x(tmp_path / name, params, scanned=kind == "t5x_scanned")
    del params
    paths = (tmp_path / "measured", str(scan_layers), tmp_path / "tiny")
    stack = config.num_encoder_layers * config.d_model * config.d_ff
    largest = 4 * max(stack, config.vocab_size * config.d_model)
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths], check=True, cwd=REPOSITORY, capture_output=True,
        text=True, env={"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    total, allocated, peak = map(int, found.stdout.split())
    print(f"{kind}: {total / largest:.1f} x largest in all, host {(peak - total) / largest:.2f} x")
    assert total > 6 * largest  # or nothing is shown
    assert allocated < 2 * largest
    assert peak - total < most * largest


def write_t5x(directory, params, *, scanned: bool) -> None:
    """A T5X checkpoint in TensorStore; see test_t5x for the layouts."""
    import flax.serialization
    import tensorstore

    flat = flax.traverse_util.flatten_dict(params if scanned else unstacked(params), sep="/")
    leaves = {}
    for name, value in flat.items():
        value = np.asarray(value)
        if "/layers/" in name:
            stack = name.partition("/")[0]
            name, value = name.replace("/layers/", f"/{stack}/"), np.moveaxis(value, 0, 1)
        chunks = [-(-value.shape[0] // 16), *value.shape[1:]]
        at = f"target.{name.replace('/', '.')}"
        metadata = {"compressor": None, "shape": value.shape, "chunks": chunks}
        kvstore = {"driver": "file", "path": at}
        spec = {"driver": "zarr", "dtype": "float32", "kvstore": kvstore, "metadata": metadata}
        leaves[f"target/{name}"] = tensorstore.Spec(spec).to_json()
        spec["kvstore"] = {"driver": "file", "path": str(directory / at)}
        tensorstore.open(spec, create=True).result().write(value).result()
    tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
    index = flax.serialization.msgpack_serialize({"version": 3, "optimizer": tree})
    (directory / "checkpoint").write_bytes(index)


# --------------------------------------------------------------------------------------------------
# Joint projections


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_a_tensor_are_those_of_a_reshape(tmp_path, groups, transposed):
    """Query, key and value of unequal widths side by side, in all or in each of several blocks."""
    random = np.random.default_rng(0)
    widths = (16, 8, 8)
    whole = random.normal(size=(6, sum(widths))).astype(np.float32)
    blocks = whole.reshape(6, groups, -1)
    cuts = np.cumsum([width // groups for width in widths])[:-1]
    expected = [part.reshape(6, -1) for part in np.split(blocks, cuts, axis=-1)]
    stored = whole.T if transposed else whole
    file = weights.epath.Path(tmp_path / "file")
    pending = safetensors_file.Pending(stored.shape, stored.dtype, lambda: stored)
    safetensors_file.write_file(file, {"x": pending})
    tensors = safetensors_file.read_file(file)
    params, sources = {}, {}
    for i, (start, value) in enumerate(zip((0, *cuts), expected, strict=True)):
        part = transfer.Part(int(start), sum(widths), groups)
        source = transfer.Source("x", transposed=transposed, part=part)
        assert source.stored_shape(value.shape) == stored.shape
        for columns in (slice(0, value.shape[1]), slice(1, 2), slice(3, 7)):
            block = np.zeros((2, columns.stop - columns.start), np.float32)
            source.fill(block, (slice(3, 5), columns), value.shape, tensors)
            np.testing.assert_array_equal(block, value[3:5, columns])
        params[f"p{i}"], sources[f"p{i}"] = value, source
    np.testing.assert_array_equal(transfer.pending(params, sources)["x"].fetch(), stored)
