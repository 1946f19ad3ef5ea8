"""T5Gemma as judge: Ask-LLM and likelihood equal transformers', computed from text."""

from __future__ import annotations

import numpy as np
import pytest

from pruning.scores.model import engine
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood

torch = pytest.importorskip("torch", reason="compares with Hugging Face in PyTorch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

QUESTION = "Text:\n{document}\n\nIs it about a river? Answer yes or no:"


@pytest.fixture(scope="module")
def judge(tokenizer_of, tmp_path_factory):
    """Directory, model and tokenizer of a tiny random T5Gemma as transformers saves it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_of("gemma"))
    part = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 24,
        "initializer_range": 0.1,
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")},
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config = transformers.T5GemmaConfig(encoder=dict(part), decoder=dict(part))
    config._attn_implementation = "eager"
    model = transformers.T5GemmaForConditionalGeneration(config).eval()
    path = tmp_path_factory.mktemp("t5gemma")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def log_probabilities(model, source: list[int], target: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([source]),
            attention_mask=torch.ones((1, len(source)), dtype=torch.long),
            decoder_input_ids=torch.tensor([target]),
        ).logits[0]
    return torch.log_softmax(logits.double(), -1).numpy()


def test_scores_equal_those_of_transformers(judge, make_corpus, english_texts, tmp_path):
    path, model, tokenizer = judge
    texts = english_texts[:6]
    corpus = make_corpus(tmp_path / "texts", [[{"text": text} for text in texts]])
    settings = {"model": str(path), "corpus": str(corpus.artifact.path), "dtype": "float32",
                "batch_rows": 8, "row_length": 512, "compilation_cache": None}  # fmt: skip
    asked = AskLLM(QUESTION, ("y",), ("n",), max_tokens=400)
    scores = engine.run(ScoreConfig(output=str(tmp_path / "asked"), scorer=asked, **settings))
    causal = Likelihood("causal", window=400)
    nll = engine.run(ScoreConfig(output=str(tmp_path / "nll"), scorer=causal, **settings))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in "yn")
    for i, text in enumerate(texts):
        prompt = tokenizer(QUESTION.replace("{document}", text)).input_ids
        first = log_probabilities(model, prompt, [bos])[0]
        for name, token in (("ask_llm_yes", yes), ("ask_llm_no", no)):
            assert scores.read(0)[name][i].as_py() == pytest.approx(first[token], rel=1e-5)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found = log_probabilities(model, [eos], [bos, *ids[:-1]])
        wanted = -found[np.arange(len(ids)), ids].sum()
        assert nll.read(0)["nll"][i].as_py() == pytest.approx(wanted, rel=1e-5)
        assert nll.read(0)["n_scored_tokens"][i].as_py() == len(ids)
