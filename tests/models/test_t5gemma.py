"""T5Gemma computes what transformers computes in PyTorch, packed or not, cached and sharded."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from models import decoding, weights
from models.config import T5GemmaConfig, from_dict
from models.flops import forward_flops, traced_flops
from models.model import Model, unstack_layers
from models.weights import huggingface

torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

VOCAB = 211
PART = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.1,
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 4.0,
}
WIDER = PART | {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 64,
    "head_dim": 8,
    "sliding_window": 7,
}
VARIANTS = {
    "equal": (PART, PART, True),
    "untied": (PART, PART, False),
    "unequal": (WIDER, PART, True),
}
LARGEST_ERROR = 2e-6  # of the largest logit; on AMD 1e-6, Intel CPUs with AMX add otherwise


def reference(encoder: dict, decoder: dict, tied: bool):
    """A transformers model whose every parameter is random, norms too."""
    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(
        encoder=dict(encoder), decoder=dict(decoder), vocab_size=VOCAB, tie_word_embeddings=tied
    )
    config._attn_implementation = "eager"
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-0.3, 0.3)
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory):
    """The reference, our model and its parameters."""
    theirs = reference(*VARIANTS[request.param])
    path = tmp_path_factory.mktemp("t5gemma")
    theirs.save_pretrained(path)
    model, params = weights.load(path)
    return theirs, model, params


def rows(lengths, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, VOCAB, n).astype(np.int32) for n in lengths]


def expected(model, source, target) -> np.ndarray:
    """Return float64 logits [target, vocab]."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(copy.deepcopy(model).double().state_dict())
    for module in double.modules():  # rotary frequencies are computed in float32
        module.double()
    return logits_of(double, source, target)


def error_of(found, wanted) -> float:
    """Return the largest error relative to the largest logit.

    That of transformers itself, in float32, is above 1e-6 on some CPUs.
    """
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def logits_of(model, source, target) -> np.ndarray:
    with torch.no_grad():
        return (
            model(
                input_ids=torch.tensor(source[None]).long(),
                attention_mask=torch.ones((1, len(source)), dtype=torch.long),
                decoder_input_ids=torch.tensor(target[None]).long(),
            )
            .logits[0]
            .numpy()
        )


def packed(parts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """One row with all parts and padding, and its segment ids."""
    tokens, segments = np.zeros((2, 1, length), np.int32)
    at = 0
    for number, part in enumerate(parts, 1):
        tokens[0, at : at + len(part)], segments[0, at : at + len(part)] = part, number
        at += len(part)
    return tokens, segments


SOURCES, TARGETS = rows((70, 33, 1), 1), rows((41, 52, 3), 2)


# Layers are unrolled alike whatever the sizes: one case, in which encoder and decoder differ.
UNROLLED = [
    pytest.param(name, False, marks=[] if name == "unequal" else pytest.mark.sweep)
    for name in VARIANTS
]


@pytest.mark.parametrize(
    ("both", "scan_layers"), [*((name, True) for name in VARIANTS), *UNROLLED], indirect=["both"]
)
def test_logits_equal_those_of_transformers(both, scan_layers):
    theirs, model, params = both
    if not scan_layers:
        params = jax.jit(unstack_layers)(params)
    model = Model(dataclasses.replace(model.config, scan_layers=scan_layers))
    tokens, segments = packed(SOURCES, 120)
    targets, target_segments = packed(TARGETS, 110)
    batch = {
        "encoder_input_tokens": tokens,
        "encoder_segment_ids": segments,
        "decoder_input_tokens": targets,
        "decoder_segment_ids": target_segments,
    }
    call = jax.jit(lambda params, batch: model.bind(params)(batch))
    found = call(params, batch)[0]
    at = 0
    for source, target in zip(SOURCES, TARGETS, strict=True):
        wanted = expected(theirs, source, target)
        own = error_of(logits_of(theirs, source, target), wanted)
        assert error_of(found[at : at + len(target)], wanted) < max(LARGEST_ERROR, 2 * own)
        at += len(target)
    alone = {"encoder_input_tokens": SOURCES[0][None], "decoder_input_tokens": TARGETS[0][None]}
    wanted = expected(theirs, SOURCES[0], TARGETS[0])
    own = error_of(logits_of(theirs, SOURCES[0], TARGETS[0]), wanted)
    assert error_of(call(params, alone)[0], wanted) < max(LARGEST_ERROR, 2 * own)


def test_cached_decoding_equals_transformers(both):
    theirs, model, params = both
    tokens = np.zeros((2, 40), np.int32)
    lengths = np.array([40, 13])
    for row, part in enumerate(rows(lengths, 3)):
        tokens[row, : len(part)] = part
    made = decoding.generate(model, params, tokens, lengths=lengths, max_new_tokens=30)
    with torch.no_grad():
        wanted = theirs.generate(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(np.arange(40) < lengths[:, None]).long(),
            max_new_tokens=30,
            do_sample=False,
            decoder_start_token_id=2,
        ).numpy()[:, 1:]
    found = np.asarray(made.tokens)[:, : wanted.shape[1]]
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


def test_the_directory_that_is_written_is_read_alike(both, tmp_path):
    theirs, model, params = both
    huggingface.save(tmp_path / "again", model, params)
    read = transformers.T5GemmaForConditionalGeneration.from_pretrained(
        tmp_path / "again", attn_implementation="eager"
    ).eval()
    wanted = expected(theirs, SOURCES[0], TARGETS[0])
    np.testing.assert_array_equal(expected(read, SOURCES[0], TARGETS[0]), wanted)
    loaded, _ = weights.load(tmp_path / "again")
    assert loaded == model
    config = model.config
    assert isinstance(config, T5GemmaConfig) and from_dict(config.to_dict()) == config


def test_flops_are_those_of_the_program(both):
    _, model, params = both
    batch = {
        "encoder_input_tokens": np.ones((2, 64), np.int32),
        "decoder_input_tokens": np.ones((2, 16), np.int32),
    }
    program = jax.jit(lambda p: model.bind(p)(batch)).trace(params).jaxpr
    shapes = {name: value.shape for name, value in batch.items()}
    assert traced_flops(program) == pytest.approx(forward_flops(model.config, shapes))
