"""Tokenizers by the hub name of their model."""

from __future__ import annotations

import shutil

import pytest

from models.errors import ModelNotFound
from pruning.corpus.tokenizers import VocabularyError, load_tokenizer


def test_a_hub_name_stands_for_the_tokenizer_of_the_model(tmp_path, tokenizer_of, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--a-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(tokenizer_of("qwen"), repository / "snapshots" / ("0" * 40))
    found = load_tokenizer("somebody/a-model")
    assert found.digest == load_tokenizer(str(tokenizer_of("qwen"))).digest
    assert found.encode("some words") == load_tokenizer("somebody/a-model@main").encode(
        "some words"
    )
    with pytest.raises(ModelNotFound, match="'somebody/another' is no directory here"):
        load_tokenizer("somebody/another")
    with pytest.raises(VocabularyError, match=r"mine/t5\.model does not exist"):
        load_tokenizer("mine/t5.model")
