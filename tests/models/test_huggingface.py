"""Hugging Face directories: in, the model that PyTorch computes; out, what transformers loads.

References: transformers for the models, the safetensors package for the file format.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from models import weights
from models.config import DecoderConfig, RopeScaling, T5Config
from models.model import Model, stack_layers
from models.published import NAMED
from models.weights import huggingface, huggingface_config, safetensors_file
from models.weights.safetensors_file import Pending

torch = pytest.importorskip("torch", reason="the reference is transformers in PyTorch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4,
}  # fmt: skip
LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 12}
GPT2 = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
UNTIED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {  # name: class, configuration
    "t5_v1_0": ("T5ForConditionalGeneration", T5),
    "t5_v1_1": ("T5ForConditionalGeneration", T5 | UNTIED),
    "t5_v1_1_tied": ("T5ForConditionalGeneration", T5 | UNTIED),  # as transformers 5 makes it anew
    "byt5": ("T5ForConditionalGeneration", T5 | UNTIED | {"vocab_size": 384, "num_layers": 6}),
    "mt5": ("MT5ForConditionalGeneration", T5 | UNTIED),
    "umt5": ("UMT5ForConditionalGeneration", T5 | UNTIED),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama3": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3_ROPE, "mlp_bias": True}),
    "llama_tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", GEMMA),
    "gemma3": ("Gemma3ForCausalLM", GEMMA | {"sliding_window_pattern": 3}),
}
SOURCE = np.random.default_rng(0).integers(2, 96, (2, 20)).astype(np.int32)
SOURCE[1, 15:] = 0
TARGET = np.random.default_rng(1).integers(2, 96, (2, 11)).astype(np.int32)
TARGET[:, 0] = 0


def reference(name: str):
    """A transformers model with random parameters, none of them equal to its initial value."""
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**settings)).eval()
    if settings.get("tie_word_embeddings") is False and not name.endswith("_tied"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
        _untie(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def _untie(model) -> None:
    # NOTE: transformers 5 says of every T5 that it is tied, and scales umT5's logits for it.
    model.config.tie_word_embeddings = False


def torch_logits(model) -> np.ndarray:
    with torch.no_grad():
        if not model.config.is_encoder_decoder:
            return model(torch.tensor(TARGET)).logits.numpy()
        return model(
            input_ids=torch.tensor(SOURCE),
            attention_mask=torch.tensor(SOURCE != 0).long(),
            decoder_input_ids=torch.tensor(TARGET),
        ).logits.numpy()


def logits(model: Model, params) -> np.ndarray:
    batch = {"encoder_input_tokens": SOURCE, "decoder_input_tokens": TARGET}
    return np.asarray(jax.jit(lambda params: model.bind(params)(batch))(params))


def assert_same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", MODELS)
def test_in_and_out_and_in_again(tmp_path, name):
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)

    model, params = weights.load(tmp_path / "theirs")
    # A parameter in the wrong place shows at 1e-1; how exact the numerics are is tested elsewhere.
    assert np.abs(logits(model, params) - expected).max() < 1e-5 * np.abs(expected).max()

    huggingface.save(tmp_path / "ours", model, params)
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if not model.config.tie_embeddings:
        _untie(again)
    # The parameters are the same to the bit; PyTorch's own kernels are not, from call to call.
    for parameter, original in zip(again.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, original)
    found = torch_logits(again.eval())
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()

    back, back_params = weights.load(tmp_path / "ours")
    assert back == model
    assert_same(back_params, params)
    huggingface.save(tmp_path / "again", back, back_params)
    written = [(tmp_path / at / "model.safetensors").read_bytes() for at in ("ours", "again")]
    assert written[0] == written[1]

    unrolled, unrolled_params = weights.load(tmp_path / "ours", scan_layers=False)
    assert not unrolled.config.scan_layers
    assert_same(jax.jit(stack_layers)(unrolled_params), params)


@pytest.mark.parametrize("name", ["t5_v1_1", "gpt2", "llama"])
def test_several_files(tmp_path, name):
    """As transformers splits them, and as we do: no file is larger than asked, nothing is lost."""
    theirs = reference(name)
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    model, params = weights.load(tmp_path / "one")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    assert_same(weights.load(tmp_path / "theirs")[1], params)
    huggingface.save(tmp_path / "ours", model, params, max_file_bytes=20_000)
    files = list((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(files) > 2
    for file in files:
        sizes = [value.nbytes for value in safetensors.numpy.load_file(file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for parameter, original in zip(again.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, original)
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"{files[0].name} is missing"):
        weights.load(tmp_path / "ours")


def test_sentence_t5_embeds_as_pytorch_computes(tmp_path):
    """The layout of sentence-transformers: encoder, mean over real tokens, dense, unit length."""
    torch.manual_seed(0)
    encoder = transformers.T5EncoderModel(transformers.T5Config(**T5)).eval()
    dense = torch.nn.Linear(32, 24, bias=False)
    path = tmp_path / "theirs"
    encoder.save_pretrained(path)
    (path / "1_Pooling").mkdir()
    (path / "2_Dense").mkdir()
    modules = [
        {"path": at, "type": f"sentence_transformers.models.{kind}"}
        for at, kind in {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense"}.items()
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    identity = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    (path / "2_Dense/config.json").write_text(json.dumps(identity))
    kernel = dense.weight.detach().numpy()
    safetensors.numpy.save_file({"linear.weight": kernel}, path / "2_Dense/model.safetensors")

    mask = torch.tensor(SOURCE != 0)[..., None].float()
    with torch.no_grad():
        hidden = encoder(torch.tensor(SOURCE), attention_mask=torch.tensor(SOURCE != 0).long())[0]
        pooled = dense((hidden * mask).sum(1) / mask.sum(1))
        expected = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    model, params = weights.load(path)
    assert (model.config.sentence_head, model.config.num_decoder_layers) == (24, 0)
    embed = jax.jit(lambda params: model.bind(params).embed(SOURCE))
    np.testing.assert_allclose(embed(params), expected, atol=3e-6)

    huggingface.save(tmp_path / "ours", model, params)
    back, back_params = weights.load(tmp_path / "ours")
    assert back == model
    assert_same(back_params, params)
    again = transformers.T5EncoderModel.from_pretrained(tmp_path / "ours")
    for parameter, original in zip(again.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(parameter, original)
    written = safetensors.numpy.load_file(tmp_path / "ours/2_Dense/model.safetensors")
    np.testing.assert_array_equal(written["linear.weight"], kernel)

    (path / "2_Dense/model.safetensors").rename(path / "2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles are not read"):
        weights.load(path)


def test_a_whole_t5_gives_its_encoder(tmp_path):
    """A directory that says T5EncoderModel may hold the decoder as well."""
    theirs = reference("t5_v1_1")
    theirs.save_pretrained(tmp_path)
    rewrite(tmp_path, architectures=["T5EncoderModel"])
    model, params = weights.load(tmp_path)
    assert model.config.num_decoder_layers == 0
    assert params.keys() == {"token_embedder", "encoder"}


# --------------------------------------------------------------------------------------------------
# Tokenizers

SENTENCES = [
    "A  small\tvocabulary opens everywhere, with  odd spaces and a tail ",
    "Naïve café: ﬁne ½ ① ｆｕｌｌ width, “quotes” — and 東京, which is unknown.",
    "",
]
FAMILY = ("t5_v1_0", "t5_v1_1", "mt5", "umt5")


def export_with_vocabulary(directory, name: str, vocabulary):
    kind, settings = MODELS[name]
    config = getattr(transformers, kind).config_class(**settings)
    model = Model(huggingface_config.from_json(config.to_dict()))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), model.shapes())
    huggingface.save(directory, model, params, vocabulary_file=vocabulary)
    return transformers.AutoTokenizer.from_pretrained(directory)


def assert_tokenizes_as(tokenizer, sentencepiece_model, sentinels: int):
    for sentence in SENTENCES:
        expected = [*sentencepiece_model.encode(sentence), 1]
        assert tokenizer(sentence).input_ids == expected, sentence
    size = sentencepiece_model.get_piece_size()
    assert tokenizer("<extra_id_0>").input_ids == [size + sentinels - 1, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.unk_token_id == sentencepiece_model.unk_id()


@pytest.mark.parametrize("name", FAMILY)
def test_transformers_opens_the_exported_vocabulary(tmp_path, name, small_vocabulary):
    import sentencepiece

    tokenizer = export_with_vocabulary(tmp_path, name, small_vocabulary)
    model = sentencepiece.SentencePieceProcessor(model_file=str(small_vocabulary))
    assert_tokenizes_as(tokenizer, model, 100)


@pytest.mark.parametrize("name", ["t5_v1_1", "umt5"])
def test_transformers_opens_the_real_vocabulary(tmp_path, name, t5_vocabulary_file):
    import sentencepiece

    tokenizer = export_with_vocabulary(tmp_path, name, t5_vocabulary_file)
    model = sentencepiece.SentencePieceProcessor(model_file=str(t5_vocabulary_file))
    assert_tokenizes_as(tokenizer, model, 100)
    assert tokenizer("Hello world <extra_id_0>").input_ids == [8774, 296, 32099, 1]
    assert tokenizer.decode(tokenizer("Studies have shown").input_ids[:-1]) == "Studies have shown"


def test_transformers_opens_byt5(tmp_path):
    tokenizer = export_with_vocabulary(tmp_path, "byt5", None)
    assert tokenizer("Hé").input_ids == [75, 198, 172, 1]
    assert tokenizer("<extra_id_0>").input_ids == [258 + 1, 1]


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory):
    """A unigram model as T5's are: pad 0, end 1, unknown 2, T5's normalization."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    text = [line for file in [__file__, huggingface.__file__] for line in open(file)]  # noqa: PTH123, SIM115
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(prefix), vocab_size=300, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


# --------------------------------------------------------------------------------------------------
# Tying


def rewrite(path, *, drop=(), add=None, **settings) -> None:
    """Change a directory's tensors and settings."""
    tensors = safetensors.numpy.load_file(path / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if name not in drop} | (add or {})
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    old = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(old | settings))


def test_an_untied_model_is_written_as_untied(tmp_path):
    model = Model(T5Config(vocab_size=64, d_model=16, d_ff=32, num_heads=2, d_kv=8,
                           num_encoder_layers=1, num_decoder_layers=1))  # fmt: skip
    huggingface.save(tmp_path, model, jax.jit(model.init)(jax.random.key(0)))
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in safetensors_file.read_directory(epath.Path(tmp_path))


def test_copies_of_a_tied_embedding_are_redundant(tmp_path):
    """As in pytorch_model.bin files that were converted as they were."""
    reference("t5_v1_0").save_pretrained(tmp_path)
    model, params = weights.load(tmp_path)
    shared = safetensors.numpy.load_file(tmp_path / "model.safetensors")["shared.weight"]
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(tmp_path, add=dict.fromkeys(copies, shared) | {unused: np.ones((32, 4), np.float32)})
    again, again_params = weights.load(tmp_path)
    assert again == model
    assert_same(again_params, params)
    rewrite(tmp_path, drop=["shared.weight"])
    assert_same(weights.load(tmp_path)[1], params)


def test_heads_that_differ_from_tied_embeddings(tmp_path):
    head = np.ones((96, 32), np.float32)
    reference("t5_v1_0").save_pretrained(tmp_path / "t5")
    rewrite(tmp_path / "t5", add={"lm_head.weight": head})
    with pytest.raises(ValueError, match="releases of transformers disagree"):
        weights.load(tmp_path / "t5")
    rewrite(tmp_path / "t5", tie_word_embeddings=False)
    rewrite(tmp_path / "t5", scale_decoder_outputs=False)
    assert not weights.load(tmp_path / "t5")[0].config.tie_embeddings
    reference("qwen3").save_pretrained(tmp_path / "qwen3")
    rewrite(tmp_path / "qwen3", add={"lm_head.weight": head})
    model, params = weights.load(tmp_path / "qwen3")
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(params["decoder"]["logits_dense"]["kernel"], head.T)


# --------------------------------------------------------------------------------------------------
# What does not fit


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    reference("t5_v1_1").save_pretrained(tmp_path)
    moved = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    rewrite(tmp_path, drop=[moved], add={"encoder.block.2.layer.0.q": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=moved) as error:
        weights.load(tmp_path)
    assert f"missing: {moved};" in str(error.value)
    assert "unexpected: encoder.block.2.layer.0.q" in str(error.value)


def test_wrong_shapes_are_named(tmp_path):
    reference("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, add={"model.norm.weight": np.ones(31, np.float32)})
    with pytest.raises(ValueError, match=r"norm\.weight has shape \[31\], the model wants \[32\]"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"model_type": "bart"}, "model_type 'bart' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic' is not"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"hidden_act": "mish"}, "'mish' is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"intermediate_size": None}, "config.json: the field 'intermediate_size' is missing"),
    ],
)
def test_unsupported_settings_are_named(tmp_path, settings, complaint):
    reference("llama").save_pretrained(tmp_path)
    rewrite(tmp_path, **settings)
    with pytest.raises(ValueError, match=complaint):
        weights.load(tmp_path)


def test_no_pickles(tmp_path):
    reference("t5_v1_0").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.bin .*pickles are not read.*save_pretrained"):
        weights.load(tmp_path)


def test_a_hub_name_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="'nobody/no-such-model' is no directory here"):
        weights.load("nobody/no-such-model")
    with pytest.raises(FileNotFoundError, match="no model at"):
        weights.load("/no/such/directory/at/all")


def test_a_model_is_never_overwritten(tmp_path):
    reference("gpt2").save_pretrained(tmp_path / "theirs")
    model, params = weights.load(tmp_path / "theirs")
    with pytest.raises(FileExistsError, match="holds a model already"):
        huggingface.save(tmp_path / "theirs", model, params)


def test_shapes_that_transformers_lacks_are_refused():
    odd = dataclasses.replace(NAMED["gpt2"], d_ff=100, num_kv_heads=4)
    with pytest.raises(ValueError, match="no 'gpt2' of transformers can have"):
        huggingface_config.to_json(odd)


# --------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_configurations_survive_config_json(name):
    config = NAMED[name]
    settings = huggingface_config.to_json(config)
    assert settings == json.loads(json.dumps(settings))
    read = huggingface_config.from_json(settings)
    assert dataclasses.replace(read, **huggingface_config._not_in_json(config)) == config


def test_published_configurations():
    """config.json as the hub has it: fields left out mean what transformers takes them for."""
    flan = huggingface_config.from_json(
        {"architectures": ["T5ForConditionalGeneration"], "d_ff": 5120, "d_kv": 64, "d_model": 2048,
         "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
         "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
         "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 32,
         "num_layers": 24, "pad_token_id": 0, "relative_attention_num_buckets": 32,
         "tie_word_embeddings": False, "vocab_size": 32128}
    )  # fmt: skip
    assert dataclasses.replace(flan, dropout_rate=0.0) == NAMED["flan_t5_xl"]
    gpt2 = huggingface_config.from_json(
        {"activation_function": "gelu_new", "attn_pdrop": 0.1, "bos_token_id": 50256,
         "eos_token_id": 50256, "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024,
         "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
         "vocab_size": 50257}
    )  # fmt: skip
    expected = dataclasses.replace(NAMED["gpt2"], dropout_rate=0.1, pad_id=50256)
    assert gpt2 == expected
    llama = huggingface_config.from_json(
        {"attention_bias": False, "bos_token_id": 128000, "eos_token_id": [128001, 128008],
         "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
         "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
         "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
         "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
         "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256}
    )  # fmt: skip
    assert llama == DecoderConfig(
        vocab_size=128256, d_model=2048, d_ff=8192, num_layers=16, num_heads=32, num_kv_heads=8,
        head_dim=64, max_length=131072, rope_theta=500_000.0, norm_epsilon=1e-5,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0), tie_embeddings=True, bos_id=128000,
        eos_id=128001, pad_id=128001,
    )  # fmt: skip
    gemma = huggingface_config.from_json(
        {"attn_logit_softcapping": None, "eos_token_id": [1, 106], "final_logit_softcapping": None,
         "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
         "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
         "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
         "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
         "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
         "sliding_window_pattern": 6, "vocab_size": 262144}
    )  # fmt: skip
    assert (gemma.window, gemma.global_every, gemma.local_rope_theta) == (512, 6, 10_000)
    assert (gemma.attention_softcap, gemma.logit_softcap) == (None, None)
    assert gemma.tie_embeddings
    assert gemma.embedding_scale == 1152**0.5


# --------------------------------------------------------------------------------------------------
# The file format


def test_files_are_those_of_the_safetensors_package(tmp_path):
    random = np.random.default_rng(0)
    arrays = {
        "b.10": random.normal(size=(3, 5)).astype(np.float32),
        "b.9": random.normal(size=(7,)).astype(np.float16),
        "scalar": np.array(3.5),
        "empty": np.zeros((0, 4), np.float32),
        "integers": random.integers(0, 9, (2, 2, 2)).astype(np.int64),
        "half": random.normal(size=(4, 4)).astype(jnp.bfloat16),
    }
    ours, theirs = epath.Path(tmp_path / "ours"), epath.Path(tmp_path / "theirs")
    pending = {k: Pending(v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()}
    safetensors_file.write_file(ours, pending)
    for name, value in safetensors.numpy.load_file(ours).items():
        assert value.dtype == arrays[name].dtype
        np.testing.assert_array_equal(value, arrays[name])
    safetensors.numpy.save_file(arrays, theirs)
    for name, tensor in safetensors_file.read_file(theirs).items():
        out = np.empty(tensor.shape, tensor.dtype)
        tensor.copy_to(out, tuple(slice(0, n) for n in tensor.shape))
        np.testing.assert_array_equal(out, arrays[name])
        assert out.dtype == arrays[name].dtype


def test_any_range_is_read_into_any_view(tmp_path, monkeypatch):
    """Bands, transposed targets and casts do not show."""
    array = np.random.default_rng(0).normal(size=(37, 11, 5)).astype(np.float32)
    safetensors.numpy.save_file({"x": array}, tmp_path / "file")
    tensor = safetensors_file.read_file(epath.Path(tmp_path / "file"))["x"]
    monkeypatch.setattr("models.weights.stored.BAND_BYTES", 3 * 11 * 5 * 4)
    for index in [
        (slice(0, 37), slice(0, 11), slice(0, 5)),
        (slice(5, 29), slice(2, 7), slice(1, 2)),
        (slice(36, 37), slice(0, 11), slice(4, 5)),
    ]:
        expected = array[index]
        out = np.empty(expected.shape[::-1], jnp.bfloat16)
        tensor.copy_to(out.T, index)
        np.testing.assert_array_equal(out.T, expected.astype(jnp.bfloat16))


def test_damaged_files_are_reported(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.ones((8, 8), np.float32)}, path)
    whole = path.read_bytes()
    for cut in (4, 20, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            safetensors_file.read_file(epath.Path(path))
    path.write_bytes((5).to_bytes(8, "little") + b"{nope")
    with pytest.raises(ValueError, match="not JSON"):
        safetensors_file.read_file(epath.Path(path))
