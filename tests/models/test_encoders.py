"""Encoders and classification heads: the states and logits of transformers, packed or not.

BERT, RoBERTa, XLM-R, ModernBERT and DeBERTa v2 and v3, and the heads that transformers puts on
these, on T5 and on decoders, at tiny size with every parameter drawn anew. The reference computes
in float64.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import partitioning, weights
from models.model import Model, stack_layers
from models.weights import huggingface

torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

VOCAB, EOS, LENGTHS = 101, 2, (70, 41, 3)
LARGEST_ERROR = 2e-6  # of the largest logit; on AMD 1e-6, Intel CPUs with AMX add otherwise
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 80, "pad_token_id": 0,
    "eos_token_id": EOS, "initializer_range": 0.1,
}  # fmt: skip
ROBERTA = BASE | {"pad_token_id": 1, "type_vocab_size": 1}
MODERN = BASE | {
    "num_hidden_layers": 3,
    "local_attention": 16,
    "cls_token_id": 3,
    "sep_token_id": 4,
    "bos_token_id": 3,
}
DEBERTA3 = BASE | {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": "p2c|c2p", "position_biased_input": False,
    "layer_norm_eps": 1e-7,
}  # fmt: skip
DEBERTA_OTHER = BASE | {
    "relative_attention": True, "max_relative_positions": 20, "pos_att_type": ["c2p"],
    "type_vocab_size": 2, "embedding_size": 24,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": EOS, "decoder_start_token_id": 0,
}  # fmt: skip
DECODER = BASE | {"num_key_value_heads": 2, "bos_token_id": 3}
MANY = {"num_labels": 5}
ONE = {"num_labels": 1}
CASES = {  # name: (class, settings, the type it is written as)
    "bert_mlm": ("BertForMaskedLM", BASE, "bert"),
    "bert_classes": ("BertForSequenceClassification", BASE | MANY, "bert"),
    "roberta_classes": ("RobertaForSequenceClassification", ROBERTA | MANY, "roberta"),
    "xlmr_regression": ("XLMRobertaForSequenceClassification", ROBERTA | ONE, "roberta"),
    "modernbert_classes": (
        "ModernBertForSequenceClassification",
        MODERN | MANY | {"classifier_pooling": "mean", "norm_bias": True, "attention_bias": True,
                         "mlp_bias": True, "classifier_bias": True},
        "modernbert",
    ),
    "modernbert_regression": ("ModernBertForSequenceClassification", MODERN | ONE, "modernbert"),
    "deberta_v3_regression": ("DebertaV2ForSequenceClassification", DEBERTA3 | ONE, "deberta-v2"),
    "deberta_other": ("DebertaV2ForSequenceClassification", DEBERTA_OTHER | MANY, "deberta-v2"),
    "t5_classes": ("T5ForSequenceClassification", T5 | MANY, "t5"),
    "llama_regression": ("LlamaForSequenceClassification", DECODER | ONE, "llama"),
    "qwen3_classes": ("Qwen3ForSequenceClassification", DECODER | MANY | {"head_dim": 8}, "qwen3"),
}  # fmt: skip


def texts() -> list[np.ndarray]:
    """Return texts of different lengths, each with one EOS, at its end."""
    random = np.random.default_rng(1)
    return [np.append(random.integers(5, VOCAB, n - 1), EOS).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Its name, what transformers computes for each text, and the directory it wrote."""
    kind, settings, _ = CASES[request.param]
    torch.manual_seed(3)  # no logit is small by cancellation
    settings = json.loads(json.dumps(settings))
    config = getattr(transformers, kind.split("For")[0].removesuffix("Model") + "Config")
    config = config(**settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return request.param, expected(model), directory


@pytest.fixture(scope="module")
def loaded(case):
    """The model and its parameters, loaded once for the tests of a case."""
    return weights.load(case[2])


def expected(model) -> list[np.ndarray]:
    """Return states [length, d_model] or logits [classes] of each text alone, in float64."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.double().state_dict())
    for module in double.modules():  # rotary frequencies are computed in float32
        module.double()
    base = double if not hasattr(double, "cls") else double.bert
    with torch.no_grad():
        answers = [base(torch.tensor(text[None]).long()) for text in texts()]
    return [getattr(a, "logits", getattr(a, "last_hidden_state", None))[0].numpy() for a in answers]


def ours(model: Model, params, tokens, segment_ids, segments: int) -> np.ndarray:
    """Return logits [rows, segments, classes], or states [rows, length, d_model] without a head."""

    def call(params):
        module = model.bind(params)
        if model.config.head is None:
            return module.encode(tokens, segment_ids)
        return module.pool(tokens, segment_ids, max_segments=segments)

    return np.asarray(jax.jit(call)(params))


def assert_near(found, wanted) -> None:
    largest = max(np.abs(w).max() for w in wanted)
    error = max(np.abs(f - w).max() for f, w in zip(found, wanted, strict=True)) / largest
    print(f"error {error:.2e} of the largest")
    assert error < LARGEST_ERROR, error


def packed() -> tuple[np.ndarray, np.ndarray, list[tuple[int, slice]]]:
    """Return two rows of tokens, segment ids, and where each text is."""
    tokens = np.full((2, 80), 9, np.int32)  # what is in no segment does not count
    segment_ids = np.zeros((2, 80), np.int32)
    places = [(0, slice(0, 70)), (1, slice(5, 46)), (1, slice(46, 49))]
    for text, segment, (row, at) in zip(texts(), (1, 1, 2), places, strict=True):
        tokens[row, at], segment_ids[row, at] = text, segment
    return tokens, segment_ids, places


def of_packed(model: Model, found: np.ndarray) -> list[np.ndarray]:
    _, _, places = packed()
    if model.config.head is None:
        return [found[row, at] for row, at in places]
    return [found[0, 0], found[1, 0], found[1, 1]]


def test_packed_rows_give_what_transformers_gives_for_each_text(case, loaded):
    name, wanted, directory = case
    unrolled = name.endswith("classes")
    model, params = weights.load(directory, scan_layers=False) if unrolled else loaded
    tokens, segment_ids, _ = packed()
    found = ours(model, params, tokens, segment_ids, 2)
    assert_near(of_packed(model, found), wanted)


def test_padded_rows_give_the_same(case, loaded):
    wanted = case[1]
    model, params = loaded
    tokens = np.full((len(LENGTHS), 72), model.config.pad_id, np.int32)
    for row, text in enumerate(texts()):
        tokens[row, : len(text)] = text
    found = ours(model, params, tokens, None, 1)
    if model.config.head is None:
        assert_near([f[:n] for f, n in zip(found, LENGTHS, strict=True)], wanted)
    else:
        assert_near(found[:, 0], wanted)


def test_sharded_equals_unsharded(case, eight_devices):
    name, wanted, directory = case
    if name not in ("bert_classes", "modernbert_classes", "deberta_v3_regression", "t5_classes"):
        pytest.skip("one head of each kind of attention")
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    mesh = partitioning.make_mesh(axes, eight_devices)
    model, params = weights.load(directory, mesh=mesh)
    tokens, segment_ids, _ = packed()
    rows = jax.device_put(
        {"tokens": np.tile(tokens, (2, 1)), "ids": np.tile(segment_ids, (2, 1))},
        partitioning.batch_sharding(mesh),
    )
    with partitioning.use(mesh):
        found = ours(model, params, rows["tokens"], rows["ids"], 2)
    assert_near(of_packed(model, found), wanted)


def test_transformers_reads_what_is_written(case, loaded, tmp_path):
    name, wanted, _ = case
    model, params = loaded
    huggingface.save(tmp_path / "ours", model, params)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["model_type"] == CASES[name][2]
    again, info = getattr(transformers, settings["architectures"][0]).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    missing = [key for key in info["missing_keys"] if "pooler" not in key]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_near(expected(again.eval()), wanted)

    back, back_params = weights.load(tmp_path / "ours")
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, back_params, params)
    weights.save(tmp_path / "winnow", model, params)
    same, unrolled = weights.load(tmp_path / "winnow", scan_layers=False)
    assert same.config == dataclasses.replace(model.config, scan_layers=False)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(stack_layers)(unrolled), params)


def test_bfloat16_stays_near_float32(case):
    name, wanted, directory = case
    if name not in ("bert_classes", "modernbert_classes", "deberta_v3_regression"):
        pytest.skip("one head of each kind of attention")
    model, params = weights.load(directory, dtype="bfloat16")
    model = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    tokens, segment_ids, _ = packed()
    found = of_packed(model, ours(model, params, tokens, segment_ids, 2))
    difference = np.linalg.norm(np.stack(found) - np.stack(wanted)) / np.linalg.norm(wanted)
    assert found[0].dtype == jnp.float32
    assert difference < 0.05, difference
