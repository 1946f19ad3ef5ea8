"""The decoder-only model computes what transformers computes in PyTorch: logits and gradients.

GPT-2, Llama (with and without scaled rotary positions), Mistral, Qwen 2 and 3, OLMo 2 and Gemma 1
to 3, at tiny size with every parameter drawn anew, on rows longer than any window.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import weights
from models.losses import cross_entropy
from models.model import Model, stack_layers
from models.weights import huggingface_names

torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

ROWS, LENGTH, VOCAB = 2, 90, 211
BASE = {
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
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WINDOWED = BASE | {"sliding_window": 20}
VARIANTS = {
    "gpt2": ("GPT2", GPT2),
    "llama": ("Llama", BASE | {"tie_word_embeddings": False}),
    "llama3": ("Llama", BASE | {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama_biased": ("Llama", BASE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", WINDOWED | {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2", BASE | {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", BASE | {"tie_word_embeddings": False}),
    # Heads of another size than hidden_size / num_attention_heads are not OLMo 2's.
    "olmo2": ("Olmo2", BASE | {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma": ("Gemma", BASE),
    "gemma2": (
        "Gemma2",
        WINDOWED
        | {
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        WINDOWED
        | {
            "query_pre_attn_scalar": 24,
            "rope_parameters": GEMMA3_ROPE,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
}
LARGEST_ERROR = 4e-6  # of the largest logit: both sides round, and each is off by up to 2e-6


def reference(kind: str, settings: dict):
    """A transformers model whose every parameter is random: biases and norms too."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**settings)
    config._attn_implementation = "eager"
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model = getattr(transformers, kind + head)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
            elif name.endswith("bias"):
                parameter.normal_()
    return model


def ours(model, directory, scan_layers: bool = True) -> tuple[Model, dict]:
    model.save_pretrained(directory)
    return weights.load(directory, scan_layers=scan_layers)


def batch() -> dict:
    """Rows of different lengths, padded at the end, as a decoder-only batch."""
    tokens = np.random.default_rng(1).integers(3, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    weights = np.ones((ROWS, LENGTH), np.float32)
    weights[1, 60:] = 0
    return {
        "decoder_input_tokens": tokens[:, :-1] * (np.arange(LENGTH) < [[LENGTH], [61]]),
        "decoder_target_tokens": tokens[:, 1:],
        "decoder_loss_weights": weights,
    }


@pytest.mark.parametrize(
    ("variant", "scan_layers"),
    [
        *((variant, True) for variant in VARIANTS),
        ("gemma3", False),  # two kinds of layers
        pytest.param("gpt2", False, marks=pytest.mark.sweep),
    ],
)
def test_variant_equals_transformers(variant, scan_layers, tmp_path):
    torch_model = reference(*VARIANTS[variant])
    model, params = ours(torch_model, tmp_path, scan_layers)
    examples = batch()
    real = examples["decoder_loss_weights"] > 0

    def loss_of(params):
        logits = model.bind(params)(examples)
        loss, weight, _ = cross_entropy(
            logits, examples["decoder_target_tokens"], examples["decoder_loss_weights"]
        )
        return loss / weight, logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)

    tokens = torch.tensor(examples["decoder_input_tokens"]).long()
    expected = torch_model(input_ids=tokens, attention_mask=(tokens != 0).long()).logits
    expected_logits = expected.detach().numpy()
    error = np.abs(logits - expected_logits)[real].max() / np.abs(expected_logits[real]).max()
    assert error < LARGEST_ERROR, error

    targets = torch.tensor(examples["decoder_target_tokens"]).long()
    chosen = torch.tensor(real)
    torch.nn.functional.cross_entropy(expected[chosen], targets[chosen]).backward()
    assert_same_gradients(model, gradient, torch_model)


def assert_same_gradients(model: Model, gradient, torch_model, tolerance: float = 2e-5):
    expected = {name: value.grad.numpy() for name, value in torch_model.named_parameters()}
    kind = torch_model.config.model_type
    unrolled = {}
    for name, source in huggingface_names.sources(model.config, kind).items():
        value = expected[source.tensor]
        if source.part is not None:  # of GPT-2's joint projection, which is not transposed
            width = source.part.total // 3
            value = value[..., source.part.start : source.part.start + width]
        node = unrolled
        *path, last = name.split("/")
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value.T if source.transposed else value
    wanted_tree = stack_layers(unrolled) if model.config.scan_layers else unrolled
    flat, tree = jax.tree_util.tree_flatten_with_path(wanted_tree)
    assert tree == jax.tree.structure(gradient)
    flat, gradient = jax.device_get((flat, gradient))  # NumPy compiles nothing
    largest = max(np.abs(wanted).max() for _, wanted in flat)
    for (path, wanted), got in zip(flat, jax.tree.leaves(gradient), strict=True):
        # NOTE: some gradients vanish but for rounding: a key's bias shifts all scores of a query.
        scale = max(np.abs(wanted).max(), 1e-3 * largest)
        error = np.abs(got - wanted).max() / scale
        assert error < tolerance, (jax.tree_util.keystr(path), float(error))


def test_bfloat16_stays_near_float32(tmp_path):
    model, params = ours(reference(*VARIANTS["llama"]), tmp_path)
    examples = batch()
    exact = jax.jit(lambda p: model.bind(p)(examples))(params)
    rounded = Model(dataclasses.replace(model.config, dtype="bfloat16"))
    logits = jax.jit(lambda p: rounded.bind(p)(examples))(params)
    assert logits.dtype == jnp.float32
    difference = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert difference < 1e-2, difference
