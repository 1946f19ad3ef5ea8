"""Tokenizers in the style of published ones, trained on a text and saved by transformers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")

CHATML = (
    "{%- if messages[0]['role'] == 'system' %}<|im_start|>system\n{{ messages[0]['content'] }}"
    "<|im_end|>\n{%- endif %}"
    "{%- for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>\n{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
TEMPLATES = {
    "llama3": (
        "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + "
        "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{%- endif %}"
    ),
    "qwen": CHATML,
    "gemma": (
        "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + "
        "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{{ '[INST]' + m['content'] + '[/INST]' }}"
        "{% endfor %}"
    ),
    "phi": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
SPECIAL = {
    "gpt2": {"bos": "<|endoftext|>", "eos": "<|endoftext|>"},
    "llama3": {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
    "qwen": {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
    "gemma": {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"},
    "mistral": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "phi": {"bos": "<s>", "eos": "<|end|>", "unk": "<unk>"},
    "bert": {"pad": "[PAD]", "unk": "[UNK]"},
}
_FURTHER = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>"],
    "qwen": ["<|im_start|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "mistral": ["[INST]", "[/INST]"],
    "phi": ["<|user|>", "<|assistant|>", "<|system|>"],
    "bert": ["[CLS]", "[SEP]"],
}
STYLES = tuple(SPECIAL)


def save(style: str, directory: Path, texts: Iterable[str], size: int = 1200) -> Path:
    """Train a tokenizer in the style of a published one and save it as transformers does."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([*SPECIAL[style].values(), *_FURTHER.get(style, [])]))
    if style in ("gpt2", "llama3", "qwen"):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        pattern = {"gpt2": _GPT2, "llama3": _LLAMA3, "qwen": _QWEN2}[style]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        if style == "qwen":
            tokenizer.normalizer = normalizers.NFC()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    elif style == "bert":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    else:  # SentencePiece's BPE with byte fallback, as Gemma, Mistral and Phi-3 have it
        tokenizer = tokenizers.Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        )
        if style == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        else:
            scheme = "first" if style == "mistral" else "always"
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        bytes_ = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=size + 256, special_tokens=[*special, *bytes_], show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    if style == "phi":  # they take the white space after them
        further = [tokenizers.AddedToken(name, rstrip=True) for name in _FURTHER[style]]
        tokenizer.add_special_tokens(further)
    if style in ("llama3", "gemma", "mistral"):
        bos = SPECIAL[style]["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    if style == "bert":
        ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ends
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_bytes_as_text(tokenizer),
        **{f"{role}_token": token for role, token in SPECIAL[style].items()},
    )
    fast.chat_template = TEMPLATES.get(style)
    directory.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(directory)
    return directory


def _bytes_as_text(tokenizer):
    """The tokenizer with its byte pieces <0x00> as plain pieces, not special tokens."""
    import json

    import tokenizers

    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return tokenizers.Tokenizer.from_str(json.dumps(content))
