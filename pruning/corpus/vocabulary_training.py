"""Training of a SentencePiece vocabulary like T5's, on a sample of a source.

    python -m pruning vocabulary --gin_file=configs/ingest/vocabulary.gin

The result is an artifact: vocabulary.model, and its pieces as a table.

Choices
- Unigram model, NFKC normalization and the special ids of T5: pad 0, EOS 1, unknown 2, no BOS.
  The sentinels are not in the file: `Vocabulary` appends them.
- The sample is random documents, not the head of a file: files are taken in a hashed order until
  `_READ_FACTOR` times the sample was seen, and of what was seen the documents with the smallest
  hashes are kept.
- Words that must be single pieces (the answers of Ask-LLM) are trained on often enough to become
  so. As "user-defined symbols" they would also be cut out of longer words: yes|terday.
- The number of threads is fixed: SentencePiece adds up their sums in turn, so another number would
  give another vocabulary.
"""

from __future__ import annotations

import dataclasses
import heapq
import io
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pruning.corpus import sources
from pruning.corpus.sources.document import Reject, Source, SourceError
from pruning.corpus.sources.identity import identify
from pruning.corpus.vocabulary import EOS_ID, FILE, PAD_ID, UNKNOWN_ID, Vocabulary
from pruning.store import late, progress
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build
from pruning.store.manifest import Counts, config_of
from pruning.store.randomness import Stream, hashed

KIND = "vocabulary"
NAME = "TrainVocabulary"

_READ_FACTOR = 4
_THREADS = 4
_WORD_EVERY = 10_000  # characters of text, for words that must be single pieces
_SCHEMA = pa.schema([("id", pa.int32()), ("piece", pa.string()), ("score", pa.float32())])


@dataclasses.dataclass(frozen=True)
class TrainVocabularyConfig:
    """Settings of `vocabulary`.

    Attributes:
      source: as for ingest: @JsonlSource(), @PythonDocsSource(), ...
      output: directory of the vocabulary; `Ingest.vocabulary` takes it.
      size: pieces, the special ones included and the sentinels not (T5: 32,000).
      sample_bytes: how much text to train on.
      character_coverage: share of the characters that get a piece of their own (T5's is 0.9995).
      words: that must be single pieces, such as the answers of Ask-LLM.
      seed: of the sample.
    """

    source: Source
    output: str
    size: int = 32_000
    sample_bytes: int = 50_000_000
    character_coverage: float = 0.9995
    words: tuple[str, ...] = ("yes", "no")
    seed: int = 0


CONFIGURABLES: dict[str, type] = {NAME: TrainVocabularyConfig, **sources.CONFIGURABLES}


@late.stage
def run(config: TrainVocabularyConfig) -> Artifact:
    """Sample the source and train.

    Raises:
      SourceError: there is too little text for `size` pieces.
    """
    source: Source = config.source
    files = source.files()
    identity, sizes = identify(source, [(file,) for file in files])
    settings = {k: v for k, v in config_of(config).items() if k not in ("source", "output")}
    build = Build(config.output, KIND, settings | identity, {}, 1, _SCHEMA)
    if build.finished:
        return load_artifact(build.path, KIND)
    with build.shard(0) as writer:
        started = time.perf_counter()
        sampled, writer.counts = sample(source, files, sizes, config)
        read = time.perf_counter()
        model = train(sampled, config.size, config.character_coverage, config.words)
        writer.measured = {
            "reading_seconds": read - started,
            "training_seconds": time.perf_counter() - read,
        }
        writer.write(_pieces(model))
    build.write_file(FILE, model)
    vocabulary = build.finish({"vocabulary": Vocabulary("sentencepiece", model).describe()})
    assert vocabulary is not None  # it has one shard
    return vocabulary


def sample(
    source: Source, files: list[str], sizes: list[int], config: TrainVocabularyConfig
) -> tuple[list[str], Counts]:
    """Return random documents of about `sample_bytes` in all, in a random order."""
    kept: list[tuple[int, str]] = []  # a heap: (-hash, text), so that the largest hash goes first
    kept_bytes = seen_bytes = seen = malformed = 0
    order = np.argsort(hashed(Stream.VOCABULARY_FILE, config.seed, np.arange(len(files))))
    with progress.track("sample", sum(sizes) >> 20, "MiB of input") as task:
        for index in order:
            keys = _Keys(config.seed, int(index))
            row = 0
            for item in source.read(files[index], (), lambda n_bytes: None):
                if isinstance(item, Reject):
                    malformed += item.malformed * item.rows
                    row += item.rows
                    continue
                key = keys.of(row)
                row += 1
                n_bytes = len(item.text.encode("utf-8", "replace"))
                seen += 1
                seen_bytes += n_bytes
                kept_bytes += n_bytes
                heapq.heappush(kept, (-key, item.text))
                while kept_bytes > config.sample_bytes and len(kept) > 1:
                    kept_bytes -= len(heapq.heappop(kept)[1].encode("utf-8", "replace"))
            task.advance(sizes[index] >> 20, documents=seen)
            if seen_bytes >= _READ_FACTOR * config.sample_bytes:
                break
    counts = {"seen": seen, "sampled": len(kept), "bytes": kept_bytes, "malformed": malformed}
    return [text for _, text in sorted(kept, reverse=True)], counts


class _Keys:
    """64 random bits for every row of a file, drawn for a block of rows at a time."""

    def __init__(self, seed: int, file: int):
        self._seed, self._file = seed, file
        self._block = -1
        self._drawn: list[int] = []

    def of(self, row: int) -> int:
        if row >> 10 != self._block:
            self._block = row >> 10
            rows = (self._file << 32) + np.arange(self._block << 10, (self._block + 1) << 10)
            self._drawn = hashed(Stream.VOCABULARY_DOCUMENT, self._seed, rows).tolist()
        return self._drawn[row & 1023]


def train(
    texts: Sequence[str],
    size: int,
    character_coverage: float = 0.9995,
    words: Sequence[str] = (),
) -> bytes:
    """Train a SentencePiece model with T5's special ids and return it serialized.

    Args:
      texts: documents; every line of them is a sentence to the trainer.
      size: pieces in all, the special ones included.
      words: that must be single pieces.

    Raises:
      SourceError: SentencePiece cannot find so many pieces in these texts.
      VocabularyError: one of the words did not become a single piece.
    """
    import sentencepiece

    often = sum(map(len, texts)) // _WORD_EVERY + 1
    # NOTE: a candidate must begin two different words of the text, however often one of them comes;
    # hence the marks.
    emphasised = (word + mark for word in words for mark in ("", ".", ",") for _ in range(often))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(
                (line for text in texts for line in text.splitlines() if line), emphasised
            ),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            character_coverage=character_coverage,
            max_sentence_length=1 << 16,
            num_threads=_THREADS,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise SourceError(
            f"SentencePiece cannot train {size:,} pieces on this text ({error}): give it more "
            "text, or set TrainVocabulary.size lower."
        ) from error
    trained = Vocabulary("sentencepiece", model.getvalue())
    for word in words:
        trained.token(word)  # raises if it is several
    return trained.model


def _pieces(model: bytes) -> dict[str, list[Any]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    ids = range(processor.GetPieceSize())
    return {
        "id": list(ids),
        "piece": [processor.IdToPiece(i) for i in ids],
        "score": [processor.GetScore(i) for i in ids],
    }
