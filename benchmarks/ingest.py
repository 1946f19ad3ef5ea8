"""Ingest beside bare SentencePiece on the same text and the same core: how much the rest costs.

    python benchmarks/ingest.py --files ../shared/data/corpus/c4/c4_real_merged.jsonl.gz \
        --vocabulary ../shared/data/tokenizer/t5-base.spiece.model

Bare SentencePiece has the texts in memory and forgets the ids. Ingest unpacks and parses the files,
checks, hashes and writes. Both are timed in CPU seconds of one process, in turns. The input is read
`--copies` times, as so many shards, so that what is done once a run (the vocabulary, the plan)
counts as little as it does in a long one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pruning.corpus import ingest
from pruning.corpus.reader import load_corpus
from pruning.corpus.sources import JsonlSource
from pruning.corpus.sources.document import Document
from pruning.corpus.vocabulary import load_vocabulary


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", required=True, help="JSON lines, a file or a pattern")
    parser.add_argument("--vocabulary", required=True, help="a SentencePiece model")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()

    source = JsonlSource((given.files,))
    texts = [
        item.text
        for file in source.files()
        for item in source.read(file, (), lambda n_bytes: None)
        if isinstance(item, Document)
    ]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    vocabulary = load_vocabulary(given.vocabulary)
    vocabulary.encode_batch(texts[:10])  # loads the library

    bare, whole = [], []
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "input").mkdir()
        for copy in range(given.copies):
            for file in source.files():
                name = f"{copy}-{Path(file).name}"
                shutil.copy(file, Path(directory) / "input" / name)
        copies = JsonlSource((f"{directory}/input",))
        for repeat in range(given.repeats):
            bare.append(cpu_seconds(lambda: vocabulary.encode_batch(texts)))
            config = ingest.IngestConfig(
                copies, given.vocabulary, f"{directory}/{repeat}", workers=1
            )
            seconds = cpu_seconds(lambda config=config: ingest.run(config))
            whole.append(seconds / given.copies)
            finished = load_corpus(Path(directory) / str(repeat))
            assert finished.artifact.manifest.rows == given.copies * len(texts)
    ratio = statistics.median(b / w for b, w in zip(bare, whole, strict=True))
    print(f"{len(texts):,} documents, {megabytes:.1f} MB, medians of {given.repeats}, one core")
    for name, seconds in (("bare SentencePiece", bare), ("ingest", whole)):
        median = statistics.median(seconds)
        rate = f"{megabytes / median:5.2f} MB/s  {len(texts) / median:7,.0f} documents/s"
        print(f"  {name:20} {rate}")
    print(f"  ingest reaches {100 * ratio:.0f}% of bare SentencePiece")


if __name__ == "__main__":
    main()
