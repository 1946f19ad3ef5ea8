"""Scores of judges with their own tokenizers, beside transformers computed from text.

    export WINNOW_DATA=../shared/data PYTHONPATH=.
    python benchmarks/own_tokenizers.py
    python benchmarks/own_tokenizers.py --judges phi mistral --documents 50

Tiny random models of several families, with tokenizers in the style of published ones
(tests/pruning/tokenizer_styles.py) trained on C4 and multilingual text, are saved by transformers.
"mt5-spm" is as published, with a SentencePiece file only. `score` computes the causal NLL (not of
T5s), and P(yes) and P(no) of Ask-LLM with and without chat template, in float32, from a corpus in
another vocabulary. transformers computes them from the texts, document by document. Printed are, by
judge and score, the number of values, the largest relative difference, and the number of documents
with other counts of tokens. Nothing is truncated. It ends with status 1 where a difference exceeds
1e-5 or a count differs.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers

from pruning.corpus import ingest
from pruning.corpus.ingest import IngestConfig
from pruning.corpus.reader import load_corpus
from pruning.corpus.sources import JsonlSource
from pruning.scores.model import engine
from pruning.scores.model.ask_llm import PROMPT, AskLLM
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.likelihood import Likelihood
from tests.pruning import tokenizer_styles

LIMIT = 1e-5  # relative
LONGEST = 3072  # tokens of a prompt, more than any has
JUDGES = {  # name: style of the tokenizer, family, settings
    "llama": ("llama3", "Llama", {}),
    "qwen": ("qwen", "Qwen3", {"head_dim": 16}),
    "gemma": ("gemma", "Gemma2", {"head_dim": 12, "sliding_window": 64}),
    "gpt2": ("gpt2", "GPT2", None),
    "olmo2": ("gpt2", "Olmo2", {}),
    "phi": ("phi", "Phi3", {"pad_token_id": 0}),
    "mistral": ("mistral", "Mistral", {"sliding_window": 64}),
}
T5S = {  # name: family, sentinels as pieces, saved by transformers
    "mt5": ("MT5", True, True),
    "mt5-spm": ("MT5", True, False),
    "umt5": ("UMT5", False, True),
    "byt5": ("T5", False, True),
}
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.15,  # logits of some size, so that an error shows
}
T5_SHAPE = {
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "initializer_factor": 1.0,
}
GPT2 = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": LONGEST,
    "initializer_range": 0.15,
}


def documents(data: Path) -> tuple[list[str], list[str]]:
    """Return text to train tokenizers on, and short documents, seven of ten from C4."""
    with gzip.open(data / "corpus/c4/c4_real_merged.jsonl.gz", "rt") as file:
        c4 = [json.loads(line)["text"] for line in file]
    with gzip.open(data / "corpus/mixed/exllamav2_multilingual.utf8.gz", "rt") as file:
        lines = [line.strip() for line in file if len(line) > 30]
    english = iter([text for text in c4[2000:] if 40 < len(text) < 1100])
    other = iter([line[:700] for line in lines])
    texts = [next(english if i % 10 < 7 else other) for i in range(600)]
    return c4[:1200] + lines[:300] + ["yes", "no", " yes no"] * 400, texts


def make(name: str, texts: list[str], path: Path) -> None:
    """Save a judge as transformers does."""
    style, family, settings = JUDGES[name]
    tokenizer_styles.save(style, path, texts, 3000)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    given = GPT2 if settings is None else SHAPE | settings
    shape = getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **ids | given)
    torch.manual_seed(0)
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    getattr(transformers, family + head)(shape).save_pretrained(path)


def make_t5(name: str, texts: list[str], path: Path) -> None:
    """Save an encoder-decoder of T5's family with a vocabulary of its own."""
    family, pieces, saved = T5S[name]
    path.mkdir()
    if name == "byt5":
        tokenizer = transformers.ByT5Tokenizer()
    else:
        file = path / "spiece.model"
        file.write_bytes(_sentencepiece(texts, pieces))
        # As published; 300 sentinels behind the pieces for umT5.
        described = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0 if pieces else 300}
        (path / "tokenizer_config.json").write_text(json.dumps(described))
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    if saved:
        tokenizer.save_pretrained(path)
        (path / "spiece.model").unlink(missing_ok=True)
    config = getattr(transformers, f"{family}Config")
    shape = config(vocab_size=len(tokenizer), decoder_start_token_id=0, **T5_SHAPE)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(shape)
    with torch.no_grad():  # logits of some size, so that an error shows
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(path)


def _sentencepiece(texts: list[str], sentinels: bool) -> bytes:
    """Return a Unigram model of 3,000 pieces, with 100 sentinels among them or none."""
    names = [f"<extra_id_{i}>" for i in reversed(range(100))] if sentinels else []
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()]),
        model_writer=trained, vocab_size=3000, user_defined_symbols=names,
        character_coverage=0.9995, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        max_sentence_length=100_000, minloglevel=2,
    )  # fmt: skip
    return trained.getvalue()


def scores(corpus: Path, model: Path, output: Path, scorer: Any) -> dict[str, list[float]]:
    made = engine.run(
        ScoreConfig(
            corpus=str(corpus), output=str(output), scorer=scorer, model=str(model),
            row_length=LONGEST, batch_rows=2, dtype="float32", max_unknown=1.0,
            compilation_cache=None,
        )
    )  # fmt: skip
    return made.read(0).to_pydict()


class Reference:
    """A judge in PyTorch, asked with texts."""

    def __init__(self, path: Path, encoder: bool):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        kind = "AutoModelForSeq2SeqLM" if encoder else "AutoModelForCausalLM"
        model = getattr(transformers, kind).from_pretrained(path, dtype=torch.float32)
        self.model, self.encoder = model.eval(), encoder
        bos = self.tokenizer.bos_token_id
        self.start = self.tokenizer.eos_token_id if bos is None else bos

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            start = {"decoder_input_ids": torch.tensor([[0]])} if self.encoder else {}
            logits = self.model(torch.tensor([ids]), **start).logits[0].double()
        return torch.log_softmax(logits, -1).numpy()

    def nll(self, text: str) -> tuple[float, int]:
        """Return the NLL of a text in nats, and its number of tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        table = self.log_probabilities([self.start, *ids[:-1]])
        return -float(table[np.arange(len(ids)), ids].sum()), len(ids)

    def answers(self, text: str, chat: bool) -> list[float]:
        """Return log P(yes) and log P(no)."""
        prompt = PROMPT.replace("{document}", text)
        if chat:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True, enable_thinking=False, tokenize=False,
            )  # fmt: skip
        last = self.log_probabilities(self.tokenizer(prompt, add_special_tokens=not chat).input_ids)
        words = (self.tokenizer(word, add_special_tokens=False).input_ids for word in ("yes", "no"))
        return [float(last[-1, ids[0]]) for ids in words]


def compare(name: str, corpus: Path, texts: list[str], work: Path) -> bool:
    """Print a judge's rows of the table; return whether all is equal."""
    path = work / name
    reference = Reference(path, name in T5S)
    equal = True
    if name not in T5S:
        found = scores(corpus, path, work / f"{name}-nll", Likelihood("causal", LONGEST, 128))
        expected = [reference.nll(text) for text in texts]
        counts = sum(a != n for a, (_, n) in zip(found["n_scored_tokens"], expected, strict=True))
        worst = _worst(found["nll"], [nll for nll, _ in expected])
        print(f"{name:8} {'NLL':12} {len(texts):7} {worst:12.1e} {counts:8}", flush=True)
        equal = worst <= LIMIT and counts == 0
    for chat in (False, True) if reference.tokenizer.chat_template else (False,):
        first = {"yes": ("y",), "no": ("n",)} if name == "byt5" else {}  # tokens of the answers
        scorer = AskLLM(max_tokens=LONGEST, chat=chat, **first)
        found = scores(corpus, path, work / f"{name}-ask-{chat}", scorer)
        columns = np.stack([found["ask_llm_yes"], found["ask_llm_no"]], 1)
        worst = _worst(columns, [reference.answers(text, chat) for text in texts])
        what = "P, chat" if chat else "P"
        print(f"{name:8} {what:12} {columns.size:7} {worst:12.1e}", flush=True)
        equal &= worst <= LIMIT
    return equal


def _worst(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(np.asarray(found) / np.asarray(expected) - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = [*JUDGES, *T5S]
    parser.add_argument("--judges", nargs="*", choices=names, default=names)
    parser.add_argument("--documents", type=int, default=300)
    given = parser.parse_args()
    data = Path(os.environ["WINNOW_DATA"])
    training, texts = documents(data)
    texts = texts[: given.documents]
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (work / "texts.jsonl").write_text(lines)
        vocabulary = str(data / "tokenizer/t5-base.spiece.model")
        source = JsonlSource((str(work / "texts.jsonl"),))
        ingest.run(IngestConfig(source, vocabulary, str(work / "corpus"), workers=1))
        stored = load_corpus(work / "corpus").columns(0, ["text"])["text"].to_pylist()
        print(f"{'judge':8} {'score':12} {'values':>7} {'difference':>12} {'lengths':>8}")
        equal = True
        for name in given.judges:
            (make_t5 if name in T5S else make)(name, training, work / name)
            equal &= compare(name, work / "corpus", stored, work)
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
