"""Every document tokenized twice, by this package and by transformers: how many differ.

    export WINNOW_DATA=../shared/data PYTHONPATH=.
    python benchmarks/tokenizers_exact.py
    python benchmarks/tokenizers_exact.py --tokenizers Qwen/Qwen3-8B

The text is all of C4 and of the multilingual text in WINNOW_DATA, and hostile strings: special
tokens spelled out, NUL, 1 MB without a space. By default the tokenizers are in the style of
published ones (tests/pruning/tokenizer_styles.py), trained on a part of C4, and the SentencePiece
and byte vocabularies of T5's family. The special tokens in a document are text on both sides
(`split_special_tokens`). It ends with status 1 where a document differs. SentencePiece and the
tokenizers library may cut differently where two cuts have the same score; such texts are counted
apart.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import sentencepiece
import transformers

from pruning.corpus.tokenizers import load_tokenizer
from tests.pruning import tokenizer_styles

PART = 2000  # characters of a document of running text
MEGABYTE = 1_000_000
C4 = ("c4_real_merged", "llamafactory_c4_demo", "llmshearing_c4-rp1", "llmshearing_c4-rp2")
RUNNING = ("exllamav2_multilingual", "exllamav2_c4")
HOSTILE = [
    "<|im_end|> <|eot_id|><s>[INST] <eos> </s> <|end|> [SEP] <|endoftext|> <unk><pad> <bos>",
    "zero\0byte and \x01 control \x7f",
    "  leading and trailing \n\n",
    "",
    " ",
    "\n\n\n\t \r\n",
    "ﷺ e\u0301 漢字 🙂\u200d🙂 \u202eright to left \ufeff \ufffd \U0010ffff",
    "x" * MEGABYTE,
    "0123456789" * (MEGABYTE // 10),
    "".join(chr(0x4E00 + i % 20_000) for i in range(MEGABYTE // 3)),
    "".join(chr(97 + i * i % 26) for i in range(MEGABYTE)),
]

Encode = Callable[[Sequence[str]], list[list[int]]]


def documents(data: Path) -> list[str]:
    """Return the texts of C4's files, and running text cut into parts."""
    texts: list[str] = []
    for name in C4:
        with gzip.open(data / f"corpus/c4/{name}.jsonl.gz", "rt") as file:
            texts += [json.loads(line)["text"] for line in file]
    for name in RUNNING:
        with gzip.open(data / f"corpus/mixed/{name}.utf8.gz", "rt") as file:
            whole = file.read()
        texts += [whole[i : i + PART] for i in range(0, len(whole), PART)]
    return texts


def of_transformers(path: str) -> Encode:
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    return lambda texts: theirs(
        list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
    )["input_ids"]


def compare(
    name: str,
    ours: Encode,
    theirs: Encode,
    texts: Sequence[str],
    score: Callable[[Sequence[int]], float] | None = None,
) -> int:
    """Return the number of texts with different ids, and print the first.

    `score` of ids tells which cuts SentencePiece holds equally likely.
    """
    started = time.perf_counter()
    different, equal, tokens = 0, 0, 0
    for start in range(0, len(texts), 500):
        part = texts[start : start + 500]
        for text, a, b in zip(part, ours(part), theirs(part), strict=True):
            tokens += len(a)
            if a != b and score is not None and abs(score(a) - score(b)) < 1e-3:
                equal += 1
            elif a != b:
                different += 1
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
                if different == 1:
                    print(f"  {text[:60]!r}: {len(a)} and {len(b)} ids, first other: {at}")
    seconds = time.perf_counter() - started
    print(
        f"{name:10} {len(texts):,} texts {tokens:,} tokens {seconds:.0f} s: {different} differ",
        end="",
    )
    print(f", {equal} in equally likely cuts" if equal else "", flush=True)
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizers", nargs="*", help="directories or hub names")
    parser.add_argument("--limit", type=int, help="number of documents")
    given = parser.parse_args()
    data = Path(os.environ["WINNOW_DATA"])
    texts = documents(data)[: given.limit]
    total = 0
    with tempfile.TemporaryDirectory() as directory:
        paths = {path: path for path in given.tokenizers or ()}
        if given.tokenizers is None:
            for style in tokenizer_styles.STYLES:
                made = tokenizer_styles.save(style, Path(directory) / style, texts[:1000], 8000)
                paths[style] = str(made)
        for name, path in paths.items():
            ours = load_tokenizer(path).encode_batch
            total += compare(name, ours, of_transformers(path), [*texts, *HOSTILE])
        if given.tokenizers is None:
            spiece = str(data / "tokenizer/t5-base.spiece.model")
            theirs = transformers.ByT5Tokenizer()

            def ids(texts: Sequence[str]) -> list[list[int]]:
                return [theirs.convert_tokens_to_ids(theirs._tokenize(text)) for text in texts]

            total += compare("byt5", load_tokenizer("bytes").encode_batch, ids, [*texts, *HOSTILE])
            pieces = sentencepiece.SentencePieceProcessor(model_file=spiece)
            total += compare(
                "t5",
                load_tokenizer(spiece).encode_batch,
                of_transformers(_t5_directory(spiece, Path(directory))),
                texts,
                lambda ids: sum(map(pieces.GetScore, ids)),
            )
    print(f"{total} texts of {len(texts) + len(HOSTILE):,} differ, over all tokenizers")
    sys.exit(1 if total else 0)


def _t5_directory(spiece: str, directory: Path) -> str:
    target = directory / "t5"
    target.mkdir()
    (target / "spiece.model").write_bytes(Path(spiece).read_bytes())
    (target / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    return str(target)


if __name__ == "__main__":
    main()
