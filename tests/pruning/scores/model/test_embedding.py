"""Embeddings: a document's vector is that of its own tokens, whatever else stood in the row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pruning.corpus.reader import load_corpus
from pruning.scores import vectors
from pruning.scores.model import engine
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.scorer import ScoreError


@pytest.fixture(scope="module")
def sentence_t5(tmp_path_factory, tiny_t5):
    """(its directory, Model, parameters)."""
    import jax

    from models import weights
    from models.model import Model

    shape = dataclasses.replace(tiny_t5.model.config, num_decoder_layers=0, sentence_head=20)
    model = Model(shape)
    params = jax.jit(model.init)(jax.random.key(5))
    path = tmp_path_factory.mktemp("sentence") / "model"
    weights.save(path, model, params)
    return path, model, params


@pytest.mark.parametrize("store, error", [("float32", 1e-5), ("float16", 5e-4)])
def test_embeddings_are_those_of_single_documents(
    sentence_t5, corpus_path, tmp_path, random_shards, store, error
):
    import jax

    path, model, params = sentence_t5
    scores = engine.run(
        ScoreConfig(
            corpus=str(corpus_path),
            output=str(tmp_path / "embedding"),
            scorer=Embedding(max_tokens=32, store=store),
            model=str(path),
            tokenizer="corpus",
            row_length=64,
            batch_rows=8,
            dtype="float32",
            compilation_cache=None,
        )
    )
    embed = jax.jit(lambda params, ids: model.bind(params).embed(ids))
    for shard in range(load_corpus(corpus_path).num_shards):
        rows = scores.read(shard)
        if not rows.num_rows:
            continue
        alone = np.zeros((rows.num_rows, 32), np.int32)
        for i, tokens in enumerate(random_shards[shard]):
            kept = tokens[:31]
            alone[i, : len(kept) + 1] = [*kept, 1]
        expected = np.asarray(embed(params, alone))
        lists = vectors.as_lists(rows["embedding"], rows.schema.field("embedding"))
        rows = rows.set_column(rows.schema.names.index("embedding"), "embedding", lists)
        for i, (row, tokens) in enumerate(zip(rows.to_pylist(), random_shards[shard], strict=True)):
            if not tokens:
                assert row["status"] == "empty"
                assert np.isnan(row["embedding"]).all()
                assert row["truncated_tokens"] is None
                continue
            assert row["truncated_tokens"] == max(len(tokens) - 31, 0)
            assert len(row["embedding"]) == 20
            np.testing.assert_allclose(row["embedding"], expected[i], atol=error)
            assert np.linalg.norm(row["embedding"]) == pytest.approx(1, abs=10 * error)


def test_a_model_without_a_sentence_head_gives_the_mean_of_its_encoder(tiny_t5):
    import jax

    prepared = Embedding().prepare(tiny_t5.model, None)
    assert prepared.summary["sentence_head"] is False
    assert "mean encoder output" in prepared.columns["embedding"].meaning
    tokens = np.array([[5, 6, 7, 1, 0, 0], [9, 1, 0, 0, 0, 0]], np.int32)

    def both(params):
        module = tiny_t5.model.bind(params)
        return module.embed(tokens), module.encode(tokens)

    embedded, encoded = jax.jit(both)(tiny_t5.params)
    for row, length in enumerate((4, 2)):
        mean = np.asarray(encoded[row, :length], np.float64).mean(axis=0)
        np.testing.assert_allclose(embedded[row], mean / np.linalg.norm(mean), atol=3e-6)


def test_a_model_without_an_encoder_is_refused():
    from models.model import Model
    from models.published import NAMED

    decoder = next(config for config in NAMED.values() if not config.has_encoder)
    with pytest.raises(ScoreError, match="no encoder"):
        Embedding().prepare(Model(decoder), None)
