"""T5X checkpoints, written here as T5X publishes them, load as the model that PyTorch computes.

The names, shapes and layouts are spelled out below from T5X and its published checkpoints, not
taken from the code under test. The reference for the logits is transformers.
"""

import functools
import shutil

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from models import partitioning, weights
from models.model import Model, stack_layers
from models.published import NAMED
from models.weights import flax_msgpack, t5x, transfer

torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

HEADS, D_KV = 4, 8
TINY = {
    "vocab_size": 96, "d_model": 32, "d_kv": D_KV, "d_ff": 48, "num_layers": 3,
    "num_decoder_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0,
}  # fmt: skip
VARIANTS = {
    "v1_0": ("T5", {"feed_forward_proj": "relu"}),
    "v1_1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    # As T5X's scanning network trains them: every layer has a relative bias of its own.
    "v1_0_own": ("UMT5", {"feed_forward_proj": "relu"}),
}
LAYOUTS = ("numbered", "numbered_split", "scanned", "scanned_split")


def tied(variant: str) -> bool:
    return variant.startswith("v1_0")


@functools.cache
def reference(variant: str):
    """A transformers model with random parameters, none of them equal to its initial value."""
    kind, settings = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY, **settings)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    if not tied(variant):
        # NOTE: transformers 5 ties these whatever their configuration says, and scales umT5's
        # logits.
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def published(model, variant: str, layout: str = "numbered") -> dict[str, np.ndarray]:
    """The model's parameters under `target/`, as T5X names and shapes them."""
    theirs = {name: value.numpy() for name, value in model.state_dict().items()}
    target = {"token_embedder/embedding": theirs["shared.weight"]}
    if not tied(variant):
        target["decoder/logits_dense/kernel"] = theirs["lm_head.weight"].T
    wi = ["wi"] if tied(variant) else ["wi_0", "wi_1"]
    own_tables = variant in ("umt5", "v1_0_own")
    scanned = layout.startswith("scanned")  # T5X scans with a bias table in each layer
    for stack, count in (("encoder", TINY["num_layers"]), ("decoder", TINY["num_decoder_layers"])):
        attentions = {"attention": (0, "SelfAttention")}
        norms = {"pre_attention_layer_norm": 0, "pre_mlp_layer_norm": 1}
        if stack == "decoder":
            attentions = {
                "self_attention": (0, "SelfAttention"),
                "encoder_decoder_attention": (1, "EncDecAttention"),
            }
            norms = {
                "pre_self_attention_layer_norm": 0,
                "pre_cross_attention_layer_norm": 1,
                "pre_mlp_layer_norm": 2,
            }
        layers = []
        for i in range(count):
            at, layer = f"{stack}.block.{i}.layer", {}
            for name, (j, block) in attentions.items():
                for part in ("query", "key", "value", "out"):
                    kernel = theirs[f"{at}.{j}.{block}.{part[0]}.weight"].T
                    if layout.endswith("_split"):
                        apart = (HEADS, D_KV)
                        shape = (*apart, -1) if part == "out" else (-1, *apart)
                        kernel = kernel.reshape(shape)
                    layer[f"{name}/{part}/kernel"] = kernel
            for name in (*wi, "wo"):
                dense = f"{at}.{len(attentions)}.DenseReluDense.{name}.weight"
                layer[f"mlp/{name}/kernel"] = theirs[dense].T
            for name, j in norms.items():
                layer[f"{name}/scale"] = theirs[f"{at}.{j}.layer_norm.weight"]
            if own_tables or scanned:
                holder = at if own_tables else f"{stack}.block.0.layer"
                table = theirs[f"{holder}.0.SelfAttention.relative_attention_bias.weight"].T
                layer["relpos_bias/rel_embedding"] = table
            layers.append(layer)
        if not (own_tables or scanned):
            table = theirs[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            target[f"{stack}/relpos_bias/rel_embedding"] = table.T
        target[f"{stack}/{stack}_norm/scale"] = theirs[f"{stack}.final_layer_norm.weight"]
        for name in layers[0]:
            if scanned:
                stacked = np.stack([layer[name] for layer in layers], axis=1)
                target[f"{stack}/{stack}/{name}"] = stacked
            else:
                for i, layer in enumerate(layers):
                    target[f"{stack}/layers_{i}/{name}"] = layer[name]
    return {name: np.ascontiguousarray(value) for name, value in target.items()}


def with_optimizer(target: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint: `target/...`, and Adafactor's slots under `state/`."""
    arrays = {f"target/{name}": value for name, value in target.items()}
    for name, value in target.items():
        slot, vector = f"state/param_states/{name}", np.zeros(1, np.float32)
        arrays |= {f"{slot}/m": vector, f"{slot}/v": np.square(value)}
        arrays |= {f"{slot}/v_row": vector, f"{slot}/v_col": vector}
    return arrays


def write_tensorstore(directory, arrays: dict[str, np.ndarray], step: int = 1_000_000):
    """What T5X writes: a zarr array for each matrix, vectors within the index, the index."""
    checkpoint = directory / f"checkpoint_{step}"
    leaves = {}
    for name, value in arrays.items():
        if value.ndim < 2:
            leaves[name] = value
            continue
        chunks = [max(1, value.shape[0] // 2), *value.shape[1:]]
        metadata = {"compressor": {"id": "gzip"}, "shape": value.shape, "chunks": chunks}
        kvstore = {"driver": "file", "path": name.replace("/", ".")}
        dtype = jnp.dtype(value.dtype).name
        spec = {"driver": "zarr", "dtype": dtype, "kvstore": kvstore, "metadata": metadata}
        leaves[name] = tensorstore.Spec(spec).to_json()
        here = {"driver": "file", "path": str(checkpoint / kvstore["path"])}
        tensorstore.open(spec | {"kvstore": here}, create=True).result().write(value).result()
    (checkpoint / "checkpoint").write_bytes(_index(leaves, step))
    return checkpoint


def _index(leaves: dict, step: int) -> bytes:
    leaves = {**leaves, "state/step": np.int32(step)}
    tree = flax.traverse_util.unflatten_dict(leaves, sep="/")
    return flax.serialization.msgpack_serialize({"version": 3, "optimizer": tree})


BATCH = {
    "encoder_input_tokens": np.random.default_rng(0).integers(2, 96, (2, 21)).astype(np.int32),
    "decoder_input_tokens": np.random.default_rng(1).integers(2, 96, (2, 9)).astype(np.int32),
}
BATCH["encoder_input_tokens"][1, 15:] = 0
BATCH["decoder_input_tokens"][:, 0] = 0


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Model, params):
    """Compiled once for the layouts of a variant that are read as the same model."""
    return model.bind(params)(BATCH)


def relative_error(model: Model, params, torch_model) -> float:
    inputs = torch.tensor(BATCH["encoder_input_tokens"])
    with torch.no_grad():
        expected = torch_model(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.tensor(BATCH["decoder_input_tokens"]),
        ).logits.numpy()
    found = np.asarray(logits(model, params))
    return np.abs(found - expected).max() / np.abs(expected).max()


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_pytorch(tmp_path, variant, layout):
    torch_model = reference(variant)
    arrays = with_optimizer(published(torch_model, variant, layout))
    checkpoint = write_tensorstore(tmp_path, arrays)
    model, params = weights.load(checkpoint)
    assert relative_error(model, params, torch_model) < 4e-6
    unrolled, unrolled_params = weights.load(checkpoint, scan_layers=False)
    assert not unrolled.config.scan_layers
    assert_same(jax.jit(stack_layers)(unrolled_params), params)


def test_published_layouts_hold_the_same_model(tmp_path):
    torch_model = reference("umt5")
    loaded = [
        weights.load(write_tensorstore(tmp_path / layout, published_arrays))
        for layout in LAYOUTS
        for published_arrays in [with_optimizer(published(torch_model, "umt5", layout))]
    ]
    for model, params in loaded[1:]:
        assert model == loaded[0][0]
        assert_same(params, loaded[0][1])


def test_the_old_single_file_holds_the_same_model(tmp_path, monkeypatch):
    arrays = with_optimizer(published(reference("v1_1"), "v1_1"))
    _, expected = weights.load(write_tensorstore(tmp_path / "directory", arrays))
    (tmp_path / "checkpoint_7").write_bytes(_index(arrays, 7))
    _, params = weights.load(tmp_path / "checkpoint_7")
    assert_same(params, expected)
    # Flax cuts what is larger than a limit into chunks; here nearly everything.
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    (tmp_path / "checkpoint_8").write_bytes(_index(arrays, 8))
    assert len(flax_msgpack.read_file(tmp_path / "checkpoint_8")["optimizer"]["target"]) == 3
    _, params = weights.load(tmp_path / "checkpoint_8")
    assert_same(params, expected)


def test_the_configuration_is_inferred_from_the_shapes(tmp_path):
    for variant in VARIANTS:
        torch_model = reference(variant)
        layout = "scanned" if variant == "umt5" else "numbered"
        arrays = with_optimizer(published(torch_model, variant, layout))
        config = t5x.read(write_tensorstore(tmp_path / variant, arrays)).config
        assert (config.d_model, config.d_kv, config.num_heads, config.d_ff) == (32, 8, 4, 48)
        assert (config.num_encoder_layers, config.num_decoder_layers) == (3, 2)
        assert (config.vocab_size, config.relpos_buckets) == (96, 32)
        assert config.gated == (not tied(variant))
        assert config.activation == ("relu" if tied(variant) else "gelu")
        assert config.tie_embeddings == tied(variant)
        assert config.relpos_per_layer == (variant in ("umt5", "v1_0_own"))


def test_optimizer_slots_are_counted_and_never_read(tmp_path):
    target = published(reference("v1_1"), "v1_1")
    checkpoint = write_tensorstore(tmp_path, with_optimizer(target))
    for slot in checkpoint.glob("state.*"):
        shutil.rmtree(slot)
    stored = t5x.read(checkpoint)
    assert stored.notes == {"step": 1_000_000, "optimizer slots, not loaded": 4 * len(target)}
    assert stored.tensors.keys() == target.keys()
    weights.load(checkpoint)


def test_the_newest_checkpoint_of_a_run_is_found(tmp_path):
    arrays = {f"target/{k}": v for k, v in published(reference("v1_0"), "v1_0").items()}
    for step in (900, 1000):
        write_tensorstore(tmp_path, arrays, step)
    assert t5x.read(tmp_path).notes["step"] == 1000


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda t: t.pop("encoder/layers_1/mlp/wo/kernel"),
            "missing: encoder/layers_1/mlp/wo/kern",
        ),
        (
            lambda t: t.update({"decoder/layers_0/extra/kernel": np.ones((2, 2), np.float32)}),
            "unexpected: decoder/layers_0/extra/kernel",
        ),
        (
            # A converter once did this with every decoder layer, and nobody saw it.
            lambda t: t.update(
                {"encoder/layers_9/mlp/wo/kernel": t.pop("decoder/layers_0/mlp/wo/kernel")}
            ),
            r"missing: decoder/layers_0/mlp/wo/kernel",
        ),
        (
            lambda t: t.update({"encoder/layers_0/mlp/wo/kernel": np.ones((48, 31), np.float32)}),
            r"encoder/layers_0/mlp/wo/kernel has shape \[48, 31\], the model wants \[48, 32\]",
        ),
        (
            lambda t: t.update({"encoder/layers_0/mlp/wo/kernel": np.ones((48, 32), np.int32)}),
            "encoder/layers_0/mlp/wo/kernel holds int32",
        ),
        (lambda t: t.pop("token_embedder/embedding"), "no target/token_embedder/embedding"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, complaint):
    target = published(reference("v1_0"), "v1_0")
    change(target)
    checkpoint = write_tensorstore(tmp_path, with_optimizer(target))
    with pytest.raises(ValueError, match=complaint):
        weights.load(checkpoint)


def test_a_missing_piece_is_an_error_and_not_zeros(tmp_path):
    checkpoint = write_tensorstore(tmp_path, with_optimizer(published(reference("v1_0"), "v1_0")))
    (checkpoint / "target.token_embedder.embedding" / "0.0").unlink()
    with pytest.raises(ValueError, match=r"target\.token_embedder\.embedding/0\.0"):
        weights.load(checkpoint)


def test_an_index_of_another_checkpoint_is_an_error(tmp_path):
    arrays = with_optimizer(published(reference("v1_0"), "v1_0"))
    checkpoint = write_tensorstore(tmp_path, arrays)
    arrays["target/encoder/layers_0/mlp/wo/kernel"] = np.ones((48, 64), np.float32)
    other = write_tensorstore(tmp_path / "other", arrays)
    name = "target.encoder.layers_0.mlp.wo.kernel"
    shutil.rmtree(checkpoint / name)
    shutil.copytree(other / name, checkpoint / name)
    with pytest.raises(ValueError, match="mixes two checkpoints"):
        weights.load(checkpoint)


def test_other_kinds_of_checkpoint_are_refused_by_name(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000"\n')
    with pytest.raises(ValueError, match="TensorFlow checkpoint"):
        weights.load(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"\xc1not msgpack")
    with pytest.raises(ValueError, match="not a Flax msgpack file"):
        weights.load(tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / "_METADATA")
    with pytest.raises(ValueError, match="_METADATA is not JSON"):
        weights.load(tmp_path)
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(ValueError, match="not Orbax's index of a tree"):
        weights.load(tmp_path)


# --------------------------------------------------------------------------------------------------
# T5X through Orbax

ORBAX = ("database", "directories", "placeholders")


def write_orbax(directory, arrays: dict[str, np.ndarray], kind: str, step: int = 1_000_000):
    """What T5X writes through Orbax: the tree of its train state, as the item "state"."""
    import orbax.checkpoint as ocp

    tree = flax.traverse_util.unflatten_dict({**arrays, "state/step": np.int32(step)}, sep="/")
    checkpoint = directory / f"checkpoint_{step}"
    state = checkpoint / "state"
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=kind == "database")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(state, tree)
    if kind == "placeholders":  # as before Orbax had _METADATA: small arrays lie in the index
        leaves = {name: f"PLACEHOLDER://{name.replace('/', '.')}" for name in arrays}
        leaves |= {name: value for name, value in arrays.items() if value.ndim < 2}
        leaves |= {"state/step": "PLACEHOLDER://state.step", "flax_mutables": None}
        index = flax.traverse_util.unflatten_dict(leaves, sep="/")
        (state / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(index))
        for name in ("_METADATA", *(k.replace("/", ".") for k, v in arrays.items() if v.ndim < 2)):
            path = state / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
    return checkpoint


@pytest.mark.parametrize(("variant", "layout"), [("v1_1", "numbered"), ("umt5", "scanned_split")])
def test_written_through_orbax_it_is_the_same_model(tmp_path, variant, layout):
    target = published(reference(variant), variant, layout)
    arrays = with_optimizer(target)
    model, params = weights.load(write_tensorstore(tmp_path / "t5x", arrays))
    for kind in ORBAX:
        write_orbax(tmp_path / kind, arrays, kind)
        stored = t5x.read(tmp_path / kind)
        assert stored.notes == {"step": 1_000_000, "optimizer slots, not loaded": 4 * len(target)}
        again, again_params = weights.load(tmp_path / kind)
        assert again == model
        assert_same(again_params, params)
        _, unrolled = weights.load(tmp_path / kind, scan_layers=False)
        assert_same(jax.jit(stack_layers)(unrolled), params)


def test_what_orbax_lost_is_an_error_and_not_zeros(tmp_path):
    arrays = with_optimizer(published(reference("v1_1"), "v1_1"))
    whole = write_orbax(tmp_path / "whole", arrays, "directories") / "state"
    shutil.rmtree(whole / "target.encoder.layers_1.mlp.wo.kernel")
    with pytest.raises(ValueError, match=r"lacks the array of target/encoder/layers_1/mlp/wo/ker"):
        weights.load(whole.parent)
    part = write_orbax(tmp_path / "part", arrays, "directories") / "state"
    (part / "target.encoder.layers_1.mlp.wo.kernel" / "0.0").unlink()
    with pytest.raises(ValueError, match=r"layers_1\.mlp\.wo\.kernel/0\.0"):
        weights.load(part.parent)
    database = write_orbax(tmp_path / "database", arrays, "database") / "state"
    for file in (database / "d").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="lacks the array of"):
        weights.load(database.parent)


@pytest.mark.parametrize("layout", ["numbered_split", "scanned", "scanned_split"])
@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"tensor": 8}])
def test_sharded_is_unsharded(tmp_path, eight_devices, layout, axes):
    """Also where a shard begins inside a head: 4 heads over 8 devices."""
    arrays = with_optimizer(published(reference("umt5"), "umt5", layout))
    checkpoint = write_tensorstore(tmp_path, arrays)
    mesh = partitioning.make_mesh({"data": -1, **axes}, eight_devices)
    scan_layers = layout != "scanned"  # and a scanned one taken apart
    model, expected = weights.load(checkpoint, scan_layers=scan_layers)
    _, params = weights.load(checkpoint, mesh=mesh, scan_layers=scan_layers)
    assert_same(params, expected)
    wanted = transfer.flatten(partitioning.param_shardings(model, mesh))
    for name, array in transfer.flatten(params).items():
        assert array.sharding.is_equivalent_to(wanted[name], array.ndim), name
    embedding = params["token_embedder"]["embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // 8


def test_bfloat16_in_and_out_of_the_file(tmp_path):
    arrays = with_optimizer(published(reference("v1_1"), "v1_1"))
    checkpoint = write_tensorstore(tmp_path / "float32", arrays)
    _, full = weights.load(checkpoint)
    _, half = weights.load(checkpoint, dtype="bfloat16")
    assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), full))
    short = {k: v.astype(jnp.bfloat16) for k, v in arrays.items()}
    _, widened = weights.load(write_tensorstore(tmp_path / "bfloat16", short))
    assert_same(widened, jax.tree.map(lambda x: x.astype(jnp.float32), half))


def test_a_dual_encoder_is_a_sentence_encoder(tmp_path):
    """T5X's retrieval models keep the embedding inside the encoder, and have no decoder."""
    target = published(reference("v1_0"), "v1_0")
    encoder = {name: value for name, value in target.items() if name.startswith("encoder/")}
    encoder["encoder/token_embedder/embedding"] = target["token_embedder/embedding"]
    projection = np.random.default_rng(0).normal(size=(32, 24)).astype(np.float32)
    encoder["projection_layer/kernel"] = projection
    model, params = weights.load(write_tensorstore(tmp_path, with_optimizer(encoder)))
    assert (model.config.sentence_head, model.config.num_decoder_layers) == (24, 0)
    np.testing.assert_array_equal(params["projection_layer"]["kernel"], projection)
    embedded = jax.jit(lambda p: model.bind(p).embed(BATCH["encoder_input_tokens"]))(params)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, rtol=1e-6)


def test_every_named_t5_has_the_published_number_of_parameters():
    """The numbers that transformers counts in the published models."""
    published_counts = {"t5_small": 60_506_624, "t5_base": 222_903_552, "t5_v1_1_base": 247_577_856}
    for name, count in published_counts.items():
        assert Model(NAMED[name]).parameter_count() == count
