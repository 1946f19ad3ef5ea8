"""Models and ids that do not belong together: every command refuses them and names both.

docs/tokenizers.md has the table of commands; a command that is missing there fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pytest
from etils import epath

import train
from evaluation import inference, perplexity
from evaluation.inference import InferenceConfig
from evaluation.perplexity import PerplexityConfig
from models import weights
from models.config import DecoderConfig, T5Config
from models.model import Model
from pruning.corpus import token_set
from pruning.corpus.reader import load_corpus
from pruning.corpus.token_set import TokenizeConfig
from pruning.corpus.tokenizers import Tokenizer, load_tokenizer
from pruning.corpus.vocabulary import VocabularyError
from pruning.data.examples import ExamplesConfig
from pruning.data.objectives import CausalLM
from pruning.data.stream import StreamConfig
from pruning.scores.distilled import encoder_student
from pruning.scores.distilled.encoder_student import DistillEncoderConfig
from pruning.scores.model import engine, loading
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

KINDS = ("sentencepiece", "json", "bytes")
_SCHEMA = pa.schema([("inputs", pa.list_(pa.uint16())), ("targets", pa.list_(pa.uint16()))])
TABLE = Path(__file__).resolve().parents[3] / "docs" / "tokenizers.md"


class Pair(NamedTuple):
    """A model, and text in the ids of another tokenizer.

    Attributes:
      model, bare: directories of its weights with its tokenizer, and without.
      corpus: a corpus with the other tokenizer.
      tokens: a token set of the corpus `own` with the other tokenizer.
      own: a corpus with the model's tokenizer.
      examples: examples for fine-tuning in the other's ids.
      teacher: scores of the corpus.
      given: the other tokenizer, as a setting takes it.
    """

    model: str
    bare: str
    corpus: str
    own: str
    tokens: str
    examples: str
    teacher: str
    given: str
    names: tuple[str, str]


SCORER = Likelihood("causal", 64, 16)
SMALL = {"row_length": 128, "batch_rows": 8, "dtype": "float32", "compilation_cache": None}


def score(pair: Pair, output: str, **settings) -> None:
    values = {"corpus": pair.corpus, "model": pair.model, "scorer": SCORER} | SMALL | settings
    engine.run(ScoreConfig(output=output, **values))


def measure(pair: Pair, output: str, **settings) -> None:
    perplexity.evaluate(PerplexityConfig(model=pair.model, output=output, **SMALL | settings))


def stream(corpus: str, tokens: str | None = None) -> StreamConfig:
    return StreamConfig(
        corpus, 8, objective=CausalLM(), input_length=32, target_length=32, tokens=tokens
    )


def start(pair: Pair, output: str, data, **settings) -> None:
    values = {"initial_weights": pair.model, "steps": 1, "compilation_cache": None} | settings
    train.train(train.TrainConfig(output=output, data=data, **values))


def teach(pair: Pair, output: str, **settings) -> None:
    values = {"corpus": pair.corpus, "teacher": pair.teacher, "model": pair.model} | settings
    encoder_student.run(DistillEncoderConfig(output=output, score="column:taste", **values))


ATTEMPTS: dict[str, Callable[[Pair, str], None]] = {
    "score, another tokenizer named": lambda p, out: score(p, out, tokenizer=p.given),
    "score, token set of another tokenizer": lambda p, out: score(
        p, out, corpus=p.own, tokens=p.tokens
    ),
    "score, token set of another corpus": lambda p, out: score(p, out, tokens=p.tokens),
    "score, model without a tokenizer": lambda p, out: score(p, out, model=p.bare),
    "perplexity, another tokenizer named": lambda p, out: measure(
        p, out, corpora={"set": p.corpus}, likelihood=SCORER, tokenizer=p.given
    ),
    "perplexity, objective on another's ids": lambda p, out: measure(
        p, out, corpora={}, batches={"set": stream(p.corpus)}
    ),
    "train, initial weights on another's corpus": lambda p, out: start(p, out, stream(p.corpus)),
    "train, initial weights on another's token set": lambda p, out: start(
        p, out, stream(p.own, p.tokens)
    ),
    "train, another's corpus for evaluation": lambda p, out: start(
        p, out, stream(p.own), eval_data={"held_out": stream(p.corpus)}
    ),
    "train, weights without a tokenizer": lambda p, out: start(
        p, out, stream(p.corpus), initial_weights=p.bare
    ),
    "fine-tuning on another's examples": lambda p, out: start(
        p, out, ExamplesConfig(p.examples, 8, 32, 32)
    ),
    "harness and tasks, another tokenizer named": lambda p, out: inference.load(
        InferenceConfig(p.model, vocabulary=p.given, compilation_cache=None)
    ),
    "harness and tasks, model without a tokenizer": lambda p, out: inference.load(
        InferenceConfig(p.bare, compilation_cache=None)
    ),
    "distill_encoder, another tokenizer named": lambda p, out: teach(p, out, tokenizer=p.given),
    "distill_encoder, model without a tokenizer": lambda p, out: teach(p, out, model=p.bare),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_corpus, records, small_vocabulary_file, tokenizer_of, artifacts):
    """For every kind of tokenizer: what `Pair` needs of it, in a directory."""
    root = tmp_path_factory.mktemp("wrong")
    paths = {
        "sentencepiece": str(small_vocabulary_file),
        "json": str(tokenizer_of("qwen")),
        "bytes": "bytes",
    }
    for kind, path in paths.items():
        tokenizer = load_tokenizer(path)
        make_corpus(root / kind, [records(30, 1)], vocabulary=path)
        model = Model(shape_of(kind, tokenizer))
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.shapes())
        for name in ("model", "bare"):
            weights.save(root / kind / name, model, params)
        for name, content in tokenizer.files().items():
            (root / kind / "model" / name).write_bytes(content)
    return root, paths, artifacts


def shape_of(kind: str, tokenizer: Tokenizer) -> T5Config | DecoderConfig:
    if kind == "json":
        return DecoderConfig(
            vocab_size=tokenizer.size, d_model=8, d_ff=8, num_layers=1, num_heads=1,
            num_kv_heads=1, head_dim=8, eos_id=tokenizer.eos_id,
        )  # fmt: skip
    return T5Config(
        vocab_size=tokenizer.size, d_model=8, d_ff=8, d_kv=8, num_heads=1, num_encoder_layers=1,
        num_decoder_layers=1,
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def pair(request, world, tmp_path_factory):
    """A model and artifacts of another tokenizer; made again when pytest returns to a kind."""
    root, paths, artifacts = world
    kind, other = request.param, KINDS[KINDS.index(request.param) - 1]
    own, corpus = str(root / kind / "corpus"), str(root / other / "corpus")
    made = epath.Path(tmp_path_factory.mktemp(f"{kind}_and_{other}"))
    tokens = str(made / "tokens")
    token_set.run(TokenizeConfig(own, paths[other], tokens, workers=1))
    theirs = load_tokenizer(paths[other])
    examples = made / "examples"
    build = Build(examples, "examples", {"of": other}, {}, 1, _SCHEMA)
    with build.shard(0) as shard:
        shard.write({"inputs": [[3, 4, 5]] * 8, "targets": [[6]] * 8})
    build.finish({"vocabulary": theirs.describe()})
    opened = load_corpus(corpus)
    teacher = made / "teacher"
    values = np.zeros(opened.documents(0), np.float32)
    artifacts.scores(teacher, opened.artifact, {"taste": [values]})
    named = tuple(load_tokenizer(paths[each]).digest[:12] for each in (kind, other))
    return Pair(
        str(root / kind / "model"), str(root / kind / "bare"), corpus, own, tokens, str(examples),
        str(teacher), paths[other], named,
    )  # fmt: skip


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_wrong_pairs_are_refused_by_name(attempt, pair, tmp_path):
    if attempt.startswith("distill_encoder") and "json" in pair.model:
        pytest.skip("a decoder-only model is no encoder student")
    with pytest.raises((VocabularyError, ArtifactError)) as caught:
        ATTEMPTS[attempt](pair, str(tmp_path / "out"))
    message = str(caught.value)
    assert "\n" not in message
    if "without a tokenizer" in attempt:
        assert pair.bare in message and "name the one that it was trained with" in message
    elif attempt == "score, token set of another corpus":
        assert pair.tokens in message and pair.own in message
    else:
        assert all(name in message for name in pair.names), message
        assert pair.model in message


def test_the_table_in_the_documentation_has_every_command():
    rows = re.findall(r"^\| ([^|]+?) \|", TABLE.read_text(), re.MULTILINE)
    assert set(ATTEMPTS) <= set(rows), sorted(set(ATTEMPTS) - set(rows))


def test_a_fine_tuned_run_has_the_tokenizer_that_its_weights_were_given(world, tmp_path):
    """And none, rather than a guess, where that was only said to be the examples' own."""
    root, _, _ = world
    for given, found in (("bytes", load_tokenizer("bytes")), ("corpus", None)):
        run = epath.Path(tmp_path) / given
        start_of = {"initial_weights": str(root / "bytes" / "bare"), "tokenizer": given}
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"train": start_of, "inputs": {}}))
        assert loading._of_run(run) == found
