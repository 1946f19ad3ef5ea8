"""Published classifiers and sentence-transformers directories: the numbers of transformers.

Tiny random models with tokenizers trained here, from text to score sets through the engine.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from pruning.scores import vectors
from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.scorer import ScoreError
from pruning.scores.model.sequence_classifier import SequenceClassifier

torch = pytest.importorskip("torch", reason="compares with Hugging Face in PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

LONGEST = 24  # tokens, special ones included; most documents are longer
SHAPE = {
    "vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(english_texts):
    return [*english_texts[:9], f"{english_texts[9]} <|end_of_text|> [SEP] {english_texts[10]}"]


@pytest.fixture(scope="module")
def corpus(make_corpus, texts, tmp_path_factory):
    """A corpus in a vocabulary that is none of the models'."""
    rows = [{"text": text} for text in texts]
    return make_corpus(tmp_path_factory.mktemp("texts"), [rows[:4], [*rows[4:]]])


def saved(kind: str, directory, tokenizer, **settings):
    """Save a random model of transformers with a tokenizer; return it."""
    torch.manual_seed(3)
    family = kind.split("For")[0].removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**SHAPE | settings)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    return model


def inputs(tokenizer_directory, text: str, longest: int = LONGEST):
    """Return what transformers feeds a model, with special tokens of a document as text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)
    ids = tokenizer(
        text, truncation=True, max_length=longest, split_special_tokens=True
    )["input_ids"]  # fmt: skip
    return torch.tensor([ids])


def scored(corpus, path, output, scorer, **settings):
    scores = engine.run(
        ScoreConfig(
            corpus=str(corpus.artifact.path), output=str(output), scorer=scorer, model=str(path),
            row_length=64, batch_rows=8, dtype="float32", compilation_cache=None, **settings,
        )
    )  # fmt: skip
    shards = []
    for rows in map(scores.read, range(2)):
        if "embedding" in rows.column_names:
            lists = vectors.as_lists(rows["embedding"], rows.schema.field("embedding"))
            rows = rows.set_column(rows.schema.names.index("embedding"), "embedding", lists)
        shards.append(rows)
    found = {
        name: np.array([x for rows in shards for x in rows[name].to_pylist()])
        for name in shards[0].column_names
    }
    assert set(found["status"]) == {"ok"}
    return scores, found


@pytest.mark.parametrize("family", ["Bert", "DebertaV2"])
def test_a_regression_gives_its_value(family, corpus, texts, tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("bert")
    settings = {"relative_attention": True, "pos_att_type": "c2p|p2c", "share_att_key": True,
                "position_buckets": 8} if family == "DebertaV2" else {}  # fmt: skip
    kind = f"{family}ForSequenceClassification"
    model = saved(kind, tmp_path / "model", tokenizer, num_labels=1, **settings)
    scores, found = scored(corpus, tmp_path / "model", tmp_path / "s", SequenceClassifier(LONGEST))
    with torch.no_grad():
        wanted = np.array([model(inputs(tokenizer, text)).logits[0, 0].item() for text in texts])
    np.testing.assert_allclose(found["value"], wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())
    plain = transformers.AutoTokenizer.from_pretrained(tokenizer)
    lengths = [len(plain(t, add_special_tokens=False, split_special_tokens=True)["input_ids"])
               for t in texts]  # fmt: skip
    np.testing.assert_array_equal(found["n_tokens"], lengths)
    cut = np.maximum(np.array(lengths) - (LONGEST - 2), 0)
    np.testing.assert_array_equal(found["truncated_tokens"], cut)
    assert scores.manifest.counts["truncated"]["documents"] == np.sum(cut > 0) > 0


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_classes_give_log_probabilities_and_an_expected_value(
    problem, corpus, texts, tokenizer_of, tmp_path
):
    tokenizer = tokenizer_of("llama3")  # BOS before a text, nothing after it
    model = saved(
        "LlamaForSequenceClassification", tmp_path / "model", tokenizer, vocab_size=900,
        num_key_value_heads=2, num_labels=3, problem_type=problem,
        id2label={0: "poor", 1: "<b>", 2: "good"},
        label2id={"poor": 0, "<b>": 1, "good": 2}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    one = problem.startswith("single")
    scorer = SequenceClassifier(LONGEST, values=(0.0, 1.0, 5.0) if one else None)
    scores, found = scored(corpus, tmp_path / "model", tmp_path / "s", scorer)
    with torch.no_grad():
        logits = torch.cat([model(inputs(tokenizer, text)).logits for text in texts]).double()
    wanted = torch.log_softmax(logits, -1) if one else torch.nn.functional.logsigmoid(logits)
    for i in range(3):
        np.testing.assert_allclose(found[f"class_{i}"], wanted[:, i].numpy(), rtol=0, atol=6e-6)
    assert scores.manifest.summary["labels"] == ["poor", "<b>", "good"]
    if one:
        expected = wanted.exp().numpy() @ [0.0, 1.0, 5.0]
        np.testing.assert_allclose(found["expected"], expected, rtol=0, atol=1e-5)
        with pytest.raises(ScoreError, match="2 values, and the model has 3 classes"):
            scored(
                corpus, tmp_path / "model", tmp_path / "t", SequenceClassifier(values=(0.0, 1.0))
            )
    else:
        assert "expected" not in found


def test_a_head_of_its_own_is_described_beside_the_model(corpus, texts, tokenizer_of, tmp_path):
    """An encoder under another prefix, with a linear layer at its first token, as published."""
    from safetensors.torch import load_file, save_file

    from models.errors import ModelError
    from models.weights import huggingface, load, save

    tokenizer, directory = tokenizer_of("bert"), tmp_path / "model"
    model = saved("BertModel", directory, tokenizer)
    torch.manual_seed(5)
    linear = torch.nn.Linear(32, 2)
    tensors = load_file(directory / "model.safetensors")
    tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    save_file(
        {"fc.weight": linear.weight.data, "fc.bias": linear.bias.data},
        directory / "quality.safetensors",
    )
    described = {"pooling": "first", "prefix": "backbone.", "file": "quality.safetensors",
                 "layers": [{"tensor": "fc"}], "labels": ["low", "high"]}  # fmt: skip
    (directory / "head.json").write_text(json.dumps(described))
    _, found = scored(corpus, directory, tmp_path / "s", SequenceClassifier(LONGEST))
    with torch.no_grad():
        wanted = torch.cat(
            [linear(model(inputs(tokenizer, t)).last_hidden_state[:, 0]).double() for t in texts]
        ).log_softmax(-1)
    np.testing.assert_allclose(found["class_1"], wanted[:, 1].numpy(), rtol=0, atol=6e-6)
    loaded, params = load(directory)
    save(tmp_path / "ours", loaded, params)
    assert load(tmp_path / "ours")[0] == loaded
    with pytest.raises(ModelError, match="no 'bert' of transformers can have the head"):
        huggingface.save(tmp_path / "theirs", loaded, params)
    (directory / "head.json").write_text(json.dumps(described | {"layers": [{"tensor": "fd"}]}))
    with pytest.raises(ModelError, match=r"head\.json: there is no tensor fd\.weight"):
        load(directory)


def sentence_transformer(directory, tokenizer, pooling: str, dense: bool, **files):
    """Write what sentence-transformers writes, by hand; return the encoder and its dense layer."""
    from safetensors.torch import save_file

    model = saved("BertModel", directory, tokenizer)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False,
                    f"pooling_mode_{pooling}": True, "include_prompt": True})
    )  # fmt: skip
    linear = torch.nn.Identity()
    if dense:
        torch.manual_seed(4)
        linear = torch.nn.Sequential(torch.nn.Linear(32, 20), torch.nn.Tanh())
        (directory / "2_Dense").mkdir()
        save_file(
            {f"linear.{name}": tensor for name, tensor in linear[0].state_dict().items()},
            directory / "2_Dense" / "model.safetensors",
        )
        (directory / "2_Dense" / "config.json").write_text(
            json.dumps({"in_features": 32, "out_features": 20, "bias": True,
                        "activation_function": "torch.nn.modules.activation.Tanh"})
        )  # fmt: skip
        modules.append(("2_Dense", "Dense"))
    modules.append(("9_Normalize", "Normalize"))
    listed = [{"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
              for i, (path, kind) in enumerate(modules)]  # fmt: skip
    (directory / "modules.json").write_text(json.dumps(listed))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return model, linear


POOLINGS = {
    "mean_tokens": lambda states: states.mean(0),
    "cls_token": lambda states: states[0],
    "max_tokens": lambda states: states.max(0).values,
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("pooling, dense", [
    ("mean_tokens", False), ("cls_token", True), ("max_tokens", False), ("lasttoken", True),
])  # fmt: skip
def test_sentence_transformers_directories_are_used_as_they_are(
    pooling, dense, corpus, texts, tokenizer_of, tmp_path
):
    tokenizer, directory = tokenizer_of("bert"), tmp_path / "model"
    prompts = {"prompts": {"query": "find: ", "document": "The text, "},
               "default_prompt_name": "document" if dense else None}  # fmt: skip
    model, linear = sentence_transformer(
        directory, tokenizer, pooling, dense, config_sentence_transformers=prompts,
        sentence_bert_config={"max_seq_length": 30, "do_lower_case": False},
    )  # fmt: skip
    scorer = (
        Embedding(store="float32") if dense else Embedding(store="float32", prompt_name="query")
    )
    scores, found = scored(corpus, directory, tmp_path / "s", scorer)
    prompt = "The text, " if dense else "find: "
    wanted = []
    for text in texts:
        with torch.no_grad():
            states = model(inputs(tokenizer, prompt + text, 30)).last_hidden_state[0]
            wanted.append(torch.nn.functional.normalize(linear(POOLINGS[pooling](states)), dim=0))
    np.testing.assert_allclose(found["embedding"], torch.stack(wanted).numpy(), rtol=0, atol=3e-6)
    assert scores.manifest.summary["prompt"] == prompt
    assert scores.manifest.config["scorer"]["max_tokens"] == 30


def test_what_is_written_is_read_again(tokenizer_of, tmp_path):
    from models.weights import huggingface, load

    directory = tmp_path / "model"
    prompts = {"prompts": {"document": "The text, "}, "default_prompt_name": "document"}
    sentence_transformer(
        directory, tokenizer_of("bert"), "cls_token", True, config_sentence_transformers=prompts,
        sentence_bert_config={"max_seq_length": 30, "do_lower_case": True},
    )  # fmt: skip
    model, params = load(directory)
    assert model.config.head.max_tokens == 30
    assert model.config.head.lower_case
    assert model.config.head.prompt == "The text, "
    huggingface.save(tmp_path / "again", model, params)
    again, same = load(tmp_path / "again")
    assert again == model
    for path in ("modules.json", "2_Dense/model.safetensors", "1_Pooling/config.json"):
        assert (tmp_path / "again" / path).exists()
    np.testing.assert_array_equal(
        same["head"]["dense_0"]["linear"]["kernel"], params["head"]["dense_0"]["linear"]["kernel"]
    )


def test_models_and_scorers_that_do_not_go_together_are_named():
    from models.config import EncoderConfig, Head, HeadLayer
    from models.model import Model

    shape = {"vocab_size": 90, "d_model": 32, "d_ff": 48, "num_heads": 4, "num_layers": 1}
    head = Head(kind="values", pooling="first", layers=(HeadLayer(size=1),), labels=("grade",))
    classifier = Model(EncoderConfig(**shape, head=head))
    with pytest.raises(ScoreError, match="is a classifier"):
        Embedding().prepare(classifier, None)
    with pytest.raises(ScoreError, match="no classification head"):
        SequenceClassifier().prepare(Model(EncoderConfig(**shape)), None)
    with pytest.raises(ScoreError, match=r"needs its tokenizer\.json"):
        SequenceClassifier().prepare(classifier, None)
    with pytest.raises(ScoreError, match="of another kind"):
        SequenceClassifier(values=(1.0,)).prepare(classifier, None)
    for scorer in (AskLLM(), Likelihood("causal", 64, 8)):
        with pytest.raises(ScoreError, match="a head in place of them"):
            scorer.prepare(classifier, None)
        with pytest.raises(ScoreError, match="an encoder only"):
            scorer.prepare(Model(EncoderConfig(**shape)), None)
