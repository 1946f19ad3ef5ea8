"""Models of the Hugging Face hub that the documentation names, tiny and untrained, in its cache.

With `HF_HOME` set to the directory and `HF_HUB_OFFLINE=1`, `google/flan-t5-xl` is found as if it
had been downloaded: with the files, the layout and the tokenizer of its family.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.pruning import tokenizer_styles

_REVISION = "0" * 40


def write(home: Path, spiece: Path, texts: Sequence[str]) -> None:
    """Write all models below `home`, with T5's vocabulary and tokenizers trained on the texts."""
    for size in ("small", "base", "large", "xl", "xxl"):
        _t5(_snapshot(home, f"google/flan-t5-{size}"), spiece)
        _t5(_snapshot(home, f"google/t5-v1_1-{size}"), spiece)
    _sentence_t5(_snapshot(home, "sentence-transformers/sentence-t5-base"), spiece)
    _mini_lm(_snapshot(home, "sentence-transformers/all-MiniLM-L6-v2"), texts)
    for name in ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-8B"):
        _qwen(_snapshot(home, name), texts)
    _edu_classifier(_snapshot(home, "HuggingFaceFW/fineweb-edu-classifier"), texts)


def write_t5(home: Path, name: str, spiece: Path) -> None:
    """Write one T5 below `home`."""
    _t5(_snapshot(home, name), spiece)


def _snapshot(home: Path, name: str) -> Path:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_REVISION)
    directory = repository / "snapshots" / _REVISION
    directory.mkdir(parents=True)
    return directory


def _t5_config(**settings):
    import transformers

    return transformers.T5Config(
        vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
        **settings,
    )  # fmt: skip


def _t5(directory: Path, spiece: Path) -> None:
    import transformers

    transformers.T5ForConditionalGeneration(_t5_config()).save_pretrained(directory)
    shutil.copy(spiece, directory / "spiece.model")


def _sentence_t5(directory: Path, spiece: Path) -> None:
    import safetensors.numpy
    import torch
    import transformers

    transformers.T5EncoderModel(_t5_config()).save_pretrained(directory)
    shutil.copy(spiece, directory / "spiece.model")
    _modules(directory, "Transformer", "Pooling", "Dense")
    dense = {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    (directory / "2_Dense/config.json").write_text(json.dumps(dense))
    kernel = torch.nn.Linear(32, 24, bias=False).weight.detach().numpy()
    file = directory / "2_Dense/model.safetensors"
    safetensors.numpy.save_file({"linear.weight": kernel}, file)


def _modules(directory: Path, *kinds: str) -> None:
    """Write the list of modules of a sentence-transformers model, which pools by the mean."""
    places = ["", *(f"{place}_{kind}" for place, kind in enumerate(kinds[1:], 1))]
    modules = [
        {"path": at, "type": f"sentence_transformers.models.{kind}"}
        for at, kind in zip(places, kinds, strict=True)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    for name in places[1:]:
        (directory / name).mkdir()
    pooling = {"pooling_mode_mean_tokens": True}
    (directory / "1_Pooling/config.json").write_text(json.dumps(pooling))


def _mini_lm(directory: Path, texts: Sequence[str]) -> None:
    import transformers

    transformers.BertModel(_bert_config(directory, texts)).save_pretrained(directory)
    _modules(directory, "Transformer", "Pooling", "Normalize")


def _bert_config(directory: Path, texts: Sequence[str], **settings):
    import transformers

    tokenizer_styles.save("bert", directory, texts)
    return transformers.BertConfig(
        vocab_size=len(transformers.AutoTokenizer.from_pretrained(directory)), hidden_size=32,
        intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=512, **settings,
    )  # fmt: skip


def _qwen(directory: Path, texts: Sequence[str]) -> None:
    import transformers

    tokenizer_styles.save("qwen", directory, texts)
    size = len(transformers.AutoTokenizer.from_pretrained(directory))
    config = transformers.Qwen2Config(
        vocab_size=size, bos_token_id=None, eos_token_id=0, hidden_size=32,
        intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32768,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(directory)


def _edu_classifier(directory: Path, texts: Sequence[str]) -> None:
    import transformers

    config = _bert_config(directory, texts, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(directory)
