"""Decoder families beside Llama's: the logits of transformers, in one pass and with a cache.

OLMo 2 and 3, SmolLM3, Phi-3 and 4, GPT-NeoX (Pythia), Granite, mixtures of experts, and YaRN's
rotary positions, at tiny size with every parameter drawn anew. The reference computes in float64.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import weights
from models.decoding import generate
from models.errors import ModelError
from models.model import stack_layers
from models.weights import huggingface, huggingface_config

torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

ROWS, LENGTH, VOCAB, STEPS = 2, 70, 101, 9
LENGTHS = np.array([LENGTH, 41])
# Of the largest logit. NOTE: transformers computes YaRN's frequencies in float32, this package in
# float64; the angles of late positions show the difference.
# Of the largest logit. On AMD half as much; Intel CPUs with AMX add in another order.
LARGEST_ERROR, LARGEST_YARN_ERROR = 2e-6, 3e-6
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "initializer_range": 0.1,
}  # fmt: skip
FOUR_LAYERS = {"num_hidden_layers": 4}  # where layers differ
YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
NEOX = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
NEOX_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25}
PHI4_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
OLMO3_ROPE = {
    "full_attention": YARN | {"attention_factor": 1.2},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GRANITE = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}  # fmt: skip
QWEN_MOE = BASE | {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES = {  # name: (class, settings, the type it is written as)
    "olmo2": ("Olmo2", BASE, "olmo2"),
    "olmo3": ("Olmo3", BASE | FOUR_LAYERS | {"sliding_window": 20}, "olmo3"),
    "olmo3_yarn": (
        "Olmo3",
        BASE | FOUR_LAYERS | {"sliding_window": 20, "rope_parameters": OLMO3_ROPE},
        "olmo3",
    ),
    "smollm3": ("SmolLM3", BASE | FOUR_LAYERS | {"no_rope_layer_interval": 2}, "smollm3"),
    "smollm3_untied": (
        "SmolLM3", BASE | FOUR_LAYERS | {"tie_word_embeddings": False}, "smollm3",
    ),
    "phi3": ("Phi3", BASE | {"sliding_window": 20}, "mistral"),
    "phi4": ("Phi3", BASE | {"rope_parameters": PHI4_ROPE, "tie_word_embeddings": True}, "phi3"),
    "granite": ("Granite", BASE | GRANITE, "granite"),
    "granite_tied": ("Granite", BASE | GRANITE | {"tie_word_embeddings": True}, "granite"),
    "pythia": ("GPTNeoX", NEOX | {"rope_parameters": NEOX_ROPE}, "gpt_neox"),
    "gpt_neox": (
        "GPTNeoX",
        NEOX | {"rope_parameters": NEOX_ROPE, "use_parallel_residual": False,
                "hidden_act": "gelu_fast", "attention_bias": False},
        "gpt_neox",
    ),
    "mixtral": ("Mixtral", BASE | {"num_local_experts": 4}, "mixtral"),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"head_dim": 16, "norm_topk_prob": True}, "qwen3_moe"),
    "qwen2_moe": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 40}, "qwen2_moe"),
    "olmoe": ("Olmoe", BASE | {"num_experts": 4, "num_experts_per_tok": 3}, "olmoe"),
    "llama_yarn": ("Llama", BASE | {"rope_parameters": YARN}, "llama"),
    "qwen3_yarn": (
        "Qwen3",
        BASE | {"head_dim": 16, "rope_parameters": YARN
                | {"truncate": False, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16.0}},
        "qwen3",
    ),
}  # fmt: skip

# Not decoded here: what distinguishes these from families above concerns one pass alike.
DECODED = [name for name in FAMILIES if name not in ("qwen2_moe", "olmoe")]

# One of each kind of stack: layers that differ, blocks of two norms, experts. That the stacked and
# unrolled parameters of all families are the same is tested where they are written and read.
UNROLLED = ("olmo3_yarn", "smollm3", "pythia", "qwen2_moe")

# The loop over steps knows no family: each family's steps are compared by their logits.
GREEDY = ("olmo3_yarn", "smollm3", "granite_tied", "pythia", "mixtral")


def some(chosen, names):
    """Return the parameters of a test: all names, of which those not chosen are a sweep."""
    sweep = pytest.mark.sweep
    return [name if name in chosen else pytest.param(name, marks=sweep) for name in names]


def reference(name: str):
    """Return a transformers model of float32 numbers, random in every parameter, as float64."""
    kind, settings, _ = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**json.loads(json.dumps(settings)))
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tokens() -> np.ndarray:
    """Return rows of different lengths, padded at the end."""
    drawn = np.random.default_rng(1).integers(3, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    return np.where(np.arange(LENGTH) < LENGTHS[:, None], drawn, 0)


def expected_logits(model, rows: np.ndarray) -> np.ndarray:
    model.config._experts_implementation = "eager"  # grouped products have no float64
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.double().state_dict())
    for module in double.modules():  # rotary frequencies are computed in float32
        module.double()
    with torch.no_grad():  # without a mask: padding is trailing, and the model is causal
        return double(torch.tensor(rows).long()).logits.numpy()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Its name, the model of transformers, and the directory that transformers wrote."""
    directory = tmp_path_factory.mktemp(request.param)
    model = reference(request.param)
    model.save_pretrained(directory)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens()).long()).logits.numpy()
    OWN_ERROR[request.param] = error_of(theirs, expected_logits(model, tokens()))
    return request.param, model, directory


# Error of transformers itself in float32: on some CPUs it is above 1e-6, as ours then is.
OWN_ERROR: dict[str, float] = {}


def error_of(found, expected) -> float:
    """Return the largest error relative to the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_near(found, expected, name: str) -> None:
    error = error_of(found, expected)
    own = OWN_ERROR.get(name, 0.0)
    print(f"error {error:.2e} of the largest logit, transformers in float32 {own:.2e}")
    limit = LARGEST_YARN_ERROR if "yarn" in name else LARGEST_ERROR
    assert error < max(limit, 2 * own), error


@pytest.fixture(scope="module")
def loaded(family):
    """The model and its parameters, loaded once for the tests of a family."""
    return weights.load(family[2])


def test_logits_are_those_of_transformers(family, loaded):
    assert_logits_of_transformers(family, *loaded)


@pytest.mark.parametrize("family", some(UNROLLED, FAMILIES), indirect=True)
def test_unrolled_logits_are_those_of_transformers(family):
    assert_logits_of_transformers(family, *weights.load(family[2], scan_layers=False))


def assert_logits_of_transformers(family, model, params) -> None:
    name, theirs, _ = family
    rows = tokens()
    logits = jax.jit(lambda p: model.bind(p)({"decoder_input_tokens": rows}))(params)
    real = rows != 0
    assert_near(np.asarray(logits)[real], expected_logits(theirs, rows)[real], name)


def test_packed_rows_are_those_of_separate_texts(family, loaded):
    """Positions restart with each segment, also in layers that have none."""
    name, theirs, _ = family
    model, params = loaded
    rows = tokens()
    packed = np.concatenate([rows[1, : LENGTHS[1]], rows[0, :20]])[None]
    segment_ids = np.repeat([1, 2], [LENGTHS[1], 20])[None].astype(np.int32)
    batch = {"decoder_input_tokens": packed, "decoder_segment_ids": segment_ids}
    logits = np.asarray(jax.jit(lambda p: model.bind(p)(batch))(params))[0]
    first = expected_logits(theirs, rows[1:, : LENGTHS[1]])[0]
    second = expected_logits(theirs, rows[:1, :20])[0]
    assert_near(logits, np.concatenate([first, second]), name)


@pytest.mark.parametrize("family", DECODED, indirect=True)
def test_cached_logits_are_those_of_transformers(family, loaded):
    """Rows of different lengths are continued by given tokens, one by one."""
    name, theirs, _ = family
    model, params = loaded
    rows = tokens()
    forced = np.random.default_rng(2).integers(3, VOCAB, (ROWS, STEPS)).astype(np.int32)

    def decode(params):
        module = model.bind(params)
        decoding = module.start_decoding(rows, jnp.asarray(LENGTHS), beams=1, steps=STEPS)

        def extend(cache, given):
            logits, cache = decoding.step(*given, cache)
            return cache, logits

        given = jnp.concatenate([decoding.start[:, None], forced[:, :-1]], axis=1).T
        _, found = jax.lax.scan(extend, decoding.cache, (given, jnp.arange(STEPS)))
        return found.swapaxes(0, 1)

    found = np.asarray(jax.jit(decode)(params))
    for row, length in enumerate(LENGTHS):
        whole = np.concatenate([rows[row, :length], forced[row]])[None]
        wanted = expected_logits(theirs, whole)[0, length - 1 : length - 1 + STEPS]
        assert_near(found[row], wanted, name)


@pytest.mark.parametrize("family", some(GREEDY, DECODED), indirect=True)
def test_greedy_texts_are_those_of_transformers(family, loaded):
    _, theirs, _ = family
    model, params = loaded
    prompt = tokens()[:, :30]
    found = generate(model, params, prompt, max_new_tokens=STEPS, eos_ids=(VOCAB - 1,))
    theirs.generation_config.eos_token_id = VOCAB - 1
    with torch.no_grad():
        written = theirs.float().generate(
            torch.tensor(prompt).long(), do_sample=False, max_new_tokens=STEPS,
            attention_mask=torch.ones(prompt.shape).long(),
        )  # fmt: skip
    wanted = written.numpy()[:, prompt.shape[1] :]
    np.testing.assert_array_equal(np.asarray(found.tokens)[:, : wanted.shape[1]], wanted)


def test_transformers_reads_what_is_written(family, loaded, tmp_path):
    name, theirs, _ = family
    model, params = loaded
    huggingface.save(tmp_path / "ours", model, params)
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["model_type"] == FAMILIES[name][2]
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rows = tokens()
    real = rows != 0
    assert_near(expected_logits(again, rows)[real], expected_logits(theirs, rows)[real], name)

    back, back_params = weights.load(tmp_path / "ours")
    assert back == model
    jax.tree.map(np.testing.assert_array_equal, back_params, params)
    _, unrolled = weights.load(tmp_path / "ours", scan_layers=False)
    jax.tree.map(np.testing.assert_array_equal, stack_layers(unrolled), params)


@pytest.mark.parametrize("newer", [False, True], ids=["published names", "newer names"])
def test_the_language_model_of_gemma_3_is_read_from_a_model_of_text_and_images(tmp_path, newer):
    text = {name: value for name, value in BASE.items() if name != "initializer_range"}
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=text | {"head_dim": 8, "sliding_window": 20, "_sliding_window_pattern": 2},
            vision_config={
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
            },
            mm_tokens_per_image=4,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    if newer:
        file = tmp_path / "model.safetensors"
        tensors = safetensors.numpy.load_file(file)
        newer_names = {
            name.replace("language_model.model.", "model.language_model."): tensor
            for name, tensor in tensors.items()
        }
        safetensors.numpy.save_file(newer_names, file)
    model, params = weights.load(tmp_path)
    rows = tokens()
    logits = jax.jit(lambda p: model.bind(p)({"decoder_input_tokens": rows}))(params)
    real = rows != 0
    assert_near(np.asarray(logits)[real], expected_logits(theirs, rows)[real], "gemma3")


def test_the_text_settings_of_published_gemma_3_are_completed():
    """Those of gemma-3-4b-it say nothing of heads and vocabulary."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }  # fmt: skip
    config = huggingface_config.from_json({"model_type": "gemma3", "text_config": text})
    theirs = transformers.Gemma3Config(text_config=text).text_config
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (
        theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim, theirs.vocab_size
    )  # fmt: skip
    assert config.tie_embeddings and config.window == 1024 and config.global_every == 6


def test_what_a_family_does_not_support_is_named():
    common = {"model_type": "smollm3", **BASE}
    with pytest.raises(ModelError, match="NoPE layers that is not every n-th"):
        huggingface_config.from_json(common | {"no_rope_layers": [1, 0, 0, 1]})
    longrope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    with pytest.raises(ModelError, match="'longrope' is not supported; supported are default"):
        huggingface_config.from_json({"model_type": "phi3", **BASE, "rope_scaling": longrope})
    partial = {"model_type": "llama", **BASE, "partial_rotary_factor": 0.5}
    with pytest.raises(ModelError, match="partial_rotary_factor is not supported for 'llama'"):
        huggingface_config.from_json(partial)
