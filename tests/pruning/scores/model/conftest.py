"""A plain T5 in NumPy, to compare scores with: one document, no packing, no padding, float64.

And a scorer without a model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from models.config import T5Config
from models.packing import Side, Windows
from pruning.scores.model.scorer import Documents, Prepared, Scores
from pruning.scores.score_set import Column


@dataclasses.dataclass(frozen=True)
class PlainT5:
    """T5 v1.1 (gated GELU, untied logits), written down once more and as plainly as possible."""

    config: T5Config
    params: Any

    def encode(self, tokens) -> np.ndarray:
        """ids [n] -> [n, d_model]."""
        encoder = self.params["encoder"]
        x = _float64(self.params["token_embedder"]["embedding"])[np.asarray(tokens)]
        bias = self._bias(encoder, len(tokens), bidirectional=True)
        for layer in self._layers(encoder):
            y = _norm(x, layer["pre_attention_layer_norm"])
            x = x + self._attention(layer["attention"], y, y, bias)
            x = x + _mlp(_norm(x, layer["pre_mlp_layer_norm"]), layer["mlp"])
        return _norm(x, encoder["encoder_norm"])

    def decode(self, encoded: np.ndarray, inputs) -> np.ndarray:
        """Decoder input ids [m] -> log-probabilities [m, vocab]."""
        decoder = self.params["decoder"]
        x = _float64(self.params["token_embedder"]["embedding"])[np.asarray(inputs)]
        bias = self._bias(decoder, len(inputs), bidirectional=False)
        bias = np.where(np.tri(len(inputs), dtype=bool), bias, -np.inf)
        for layer in self._layers(decoder):
            y = _norm(x, layer["pre_self_attention_layer_norm"])
            x = x + self._attention(layer["self_attention"], y, y, bias)
            y = _norm(x, layer["pre_cross_attention_layer_norm"])
            x = x + self._attention(layer["encoder_decoder_attention"], y, encoded, 0.0)
            x = x + _mlp(_norm(x, layer["pre_mlp_layer_norm"]), layer["mlp"])
        logits = _norm(x, decoder["decoder_norm"]) @ _float64(decoder["logits_dense"]["kernel"])
        top = logits.max(axis=-1, keepdims=True)
        return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))

    def _layers(self, stack):
        import jax

        count = len(jax.tree.leaves(stack["layers"])[0])
        return [jax.tree.map(lambda leaf, i=i: leaf[i], stack["layers"]) for i in range(count)]

    def _attention(self, params, x, source, bias) -> np.ndarray:
        heads = self.config.num_heads

        def split(y):
            return y.reshape(len(y), heads, -1).swapaxes(0, 1)  # [heads, length, d_kv]

        query, key, value = (
            split(given @ _float64(params[name]["kernel"]))
            for name, given in (("query", x), ("key", source), ("value", source))
        )
        scores = query @ key.swapaxes(1, 2) + bias
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        joined = (weights @ value).swapaxes(0, 1).reshape(len(x), -1)
        return joined @ _float64(params["out"]["kernel"])

    def _bias(self, stack, length: int, bidirectional: bool) -> np.ndarray:
        """[heads, length, length]."""
        table = _float64(stack["relpos_bias"]["rel_embedding"])
        distances = range(-length + 1, length)
        buckets = np.array([_bucket(d, bidirectional, self.config) for d in distances])
        key_minus_query = np.arange(length)[None] - np.arange(length)[:, None]
        return table[:, buckets[key_minus_query + length - 1]]


def _bucket(relative: int, bidirectional: bool, config: T5Config) -> int:
    buckets, first = config.relpos_buckets, 0
    if bidirectional:
        buckets //= 2
        first = buckets if relative > 0 else 0
        distance = abs(relative)
    else:
        distance = max(-relative, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    share = np.log(distance / exact) / np.log(config.relpos_max_distance / exact)
    return first + min(exact + int(share * (buckets - exact) + 1e-6), buckets - 1)


def _float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def _norm(x, params) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * _float64(params["scale"])


def _mlp(x, params) -> np.ndarray:
    gate = x @ _float64(params["wi_0"]["kernel"])
    gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return (gate * (x @ _float64(params["wi_1"]["kernel"]))) @ _float64(params["wo"]["kernel"])


TINY = T5Config(
    vocab_size=384,
    d_model=32,
    d_kv=16,
    d_ff=48,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=2,
)


class Tiny(NamedTuple):
    """A model, its parameters, and the same as a PlainT5."""

    model: Any
    params: Any
    plain: PlainT5

    def __repr__(self) -> str:  # hypothesis prints arguments
        return "Tiny"


@pytest.fixture(scope="session")
def tiny_t5() -> Tiny:
    """For the vocabulary of bytes: 259 ids, and sentinels from 383 down."""
    import jax

    from models.model import Model

    model = Model(TINY)
    params = jax.jit(model.init)(jax.random.key(7))
    # Larger kernels than at the start of training, so that every score depends on every token.
    params = jax.tree.map(lambda leaf: leaf * 1.5, params)
    return Tiny(model, params, PlainT5(TINY, params))


# --------------------------------------------------------------------------------------------------
# A corpus and a model on disk


@pytest.fixture(scope="session")
def build_corpus():
    return _build_corpus


def _build_corpus(path, shards: list[list[list[int]]]) -> None:
    """A corpus in the vocabulary of bytes from documents' ids, shard by shard."""
    import pyarrow as pa

    from pruning.corpus.layout import KIND, schema_of
    from pruning.corpus.vocabulary import Vocabulary
    from pruning.store.build import Build

    vocabulary = Vocabulary("bytes", b"", 125)
    schema = schema_of(vocabulary, [])
    build = Build(path, KIND, {"made": "for a test"}, {}, len(shards), schema)
    for number, documents in enumerate(shards):
        with build.shard(number) as shard:
            lengths = np.array([len(ids) for ids in documents], np.int32)
            table = pa.table(
                [
                    (number << 32) + np.arange(len(documents)),
                    pa.array([""] * len(documents), pa.large_string()),
                    pa.array(documents, schema.field("tokens").type),
                    lengths,
                    lengths,
                    np.zeros(len(documents), np.uint64),
                ],
                schema=schema,
            )
            shard.write(table, row_group_size=7)
            shard.tokens = int(lengths.sum())
    build.finish({"vocabulary": vocabulary.describe(), "metadata": []})


@pytest.fixture(scope="session")
def random_shards() -> list[list[list[int]]]:
    """Three shards, one empty: lengths from none to twenty windows of 24, most of them short."""
    rng = np.random.default_rng(11)

    def document() -> list[int]:
        short, longer, long = rng.integers((3, 3, 40), (40, 40, 280))
        n = int(rng.choice([0, 1, 2, short, longer, long]))
        return rng.integers(3, 259, n).tolist()

    return [[document() for _ in range(count)] for count in (23, 0, 40)]


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory, random_shards):
    path = tmp_path_factory.mktemp("corpus") / "corpus"
    _build_corpus(path, random_shards)
    return path


@pytest.fixture(scope="session")
def model_path(tmp_path_factory, tiny_t5):
    from models import weights

    path = tmp_path_factory.mktemp("model") / "model"
    weights.save(path, tiny_t5.model, tiny_t5.params)
    return path


@pytest.fixture
def summing() -> Callable[..., Prepared]:
    """A scorer that needs no model: the "answer" at a position is the token itself.

    It fails on documents that hold the token `poison`.
    """

    def prepare(poison: int = -1) -> Prepared:
        def windows(documents: Documents) -> Windows:
            if np.any(documents.tokens == poison):
                raise ValueError("there is poison in it")
            some = np.flatnonzero(documents.lengths)
            kept = documents.take(some)
            return Windows(some, (Side("decoder", kept.offsets, {"tokens": kept.tokens}),))

        def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
            owner = np.repeat(windows.document, windows.sides[0].lengths)
            return Scores({"sum": np.bincount(owner, answers, minlength=len(documents))})

        return Prepared(
            "summing", {"sum": Column(pa.float64(), "sum of ids")}, ("decoder",), (300,), (),
            windows, None, finish,
        )  # fmt: skip

    return prepare


@pytest.fixture(scope="session")
def tiny_judge(tokenizer_of, tmp_path_factory) -> Callable[[str], tuple[str, Path, Any, Any]]:
    """Style -> (style, directory, model, tokenizer): a random model, saved by transformers."""
    import torch
    import transformers

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    models = {
        "llama3": (transformers.LlamaConfig, transformers.LlamaForCausalLM, shape),
        "qwen": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, shape),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, shape | {"head_dim": 8}),
        # Every token sees 24 tokens.
        "mistral": (
            transformers.MistralConfig,
            transformers.MistralForCausalLM,
            shape | {"sliding_window": 24},
        ),
        "gpt2": (
            transformers.GPT2Config,
            transformers.GPT2LMHeadModel,
            {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048},
        ),
    }

    @functools.cache
    def make(style: str) -> tuple[str, Path, Any, Any]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of(style))
        ids = {name: getattr(tokenizer, name) for name in _SPECIAL_IDS}
        config, model_class, settings = models[style]
        torch.manual_seed(0)
        model = model_class(config(**settings, **ids, vocab_size=len(tokenizer) + 300))
        with torch.no_grad():  # logits of some size, so that an error shows
            for parameter in model.parameters():
                parameter.mul_(3.0)
        path = tmp_path_factory.mktemp("judges") / style
        model.eval().save_pretrained(path)
        tokenizer.save_pretrained(path)
        return style, path, model, tokenizer

    return make


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
