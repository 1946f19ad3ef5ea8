"""Sentence-T5 against the same computation in PyTorch, packed and not."""

import jax
import numpy as np
import pytest

from models.config import T5Config
from models.model import Model

CONFIG = T5Config(
    vocab_size=150,
    d_model=32,
    d_ff=48,
    d_kv=16,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=0,
    activation="relu",
    gated=False,
    tie_embeddings=True,
    sentence_head=24,
)
LENGTHS = [140, 3, 57, 90]


def texts():
    random = np.random.default_rng(0)
    return [random.integers(2, 150, length) for length in LENGTHS]


def padded():
    tokens = np.zeros((len(LENGTHS), 150), np.int32)
    for row, text in enumerate(texts()):
        tokens[row, : len(text)] = text
    return tokens


@pytest.fixture(scope="module")
def params():
    return jax.jit(Model(CONFIG).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def embeddings(params):
    return jax.jit(lambda tokens: Model(CONFIG).bind(params).embed(tokens))(padded())


def test_equals_pytorch(params, embeddings):
    torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
    transformers = pytest.importorskip("transformers", reason="the reference is transformers")
    from models.weights import huggingface_names

    settings = transformers.T5Config(
        vocab_size=150, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2
    )
    settings._attn_implementation = "eager"
    encoder = transformers.T5EncoderModel(settings).eval()
    names = huggingface_names.sources(CONFIG, "t5")
    tensors = {}
    for name, source in names.items():
        value = params
        layer = None
        for key in name.split("/"):
            if key.startswith("layers_"):
                key, layer = "layers", int(key.removeprefix("layers_"))
            value = value[key]
        value = np.array(value if layer is None else value[layer])
        tensors[source.tensor] = torch.tensor(value.T.copy() if source.transposed else value)
    projection = tensors.pop(names["projection_layer/kernel"].tensor)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    encoder.load_state_dict(tensors)

    tokens = torch.tensor(padded()).long()
    mask = (tokens != 0).long()
    with torch.no_grad():
        states = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        real = mask[..., None].float()
        mean = (states * real).sum(1) / real.sum(1)
        expected = torch.nn.functional.normalize(mean @ projection.T, dim=-1)
    np.testing.assert_allclose(embeddings, expected.numpy(), rtol=0, atol=3e-6)


def test_has_unit_length(embeddings):
    assert embeddings.shape == (len(LENGTHS), 24)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1.0, rtol=1e-6)


def test_packed_equals_unpacked(params, embeddings):
    tokens = np.full((2, 200), 9, np.int32)  # what is not a segment does not count
    segment_ids = np.zeros((2, 200), np.int32)
    places = [(0, 0, 1), (0, 140, 2), (0, 143, 3), (1, 5, 1)]
    for text, (row, start, segment) in zip(texts(), places, strict=True):
        tokens[row, start : start + len(text)] = text
        segment_ids[row, start : start + len(text)] = segment
    embed = jax.jit(
        lambda tokens, ids: Model(CONFIG).bind(params).embed(tokens, ids, max_segments=4)
    )
    packed = embed(tokens, segment_ids)
    assert packed.shape == (2, 4, 24)
    got = [packed[row, segment - 1] for row, _, segment in places]
    np.testing.assert_allclose(np.stack(got), embeddings, rtol=0, atol=1e-5)
    assert (packed[0, 3] == 0).all()
    assert (packed[1, 1:] == 0).all()


def test_encoder_alone_has_no_decoder():
    assert set(Model(CONFIG).shapes()) == {"token_embedder", "encoder", "projection_layer"}
