"""The stream: examples per second of one core, against tf.data, and the time to resume.

    python benchmarks/stream.py                              # needs nothing but the package
    python benchmarks/stream.py --documents 10_000_000       # the corpus of the resume, 1 GB

Seconds are CPU seconds of the process, so that other work on the machine matters little; the time
to resume is by the clock. The comparison is span corruption as T5's pipeline does it under seqio:
the same algorithm as one tf.data map per example, on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pruning.corpus.blocks import Blocks
from pruning.corpus.vocabulary import Vocabulary
from pruning.data.objectives import CausalLM, Objective, SpanCorruption
from pruning.data.stream import StreamConfig
from pruning.selection import select
from pruning.selection.config import SelectConfig
from pruning.selection.strategies import Random
from pruning.store.artifact import Artifact
from pruning.store.build import Build

VOCABULARY = Vocabulary("bytes", b"", 125)
BATCH = 128
STEP = 100_000  # at which a training is resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000, help="of the resumed corpus")
    parser.add_argument("--directory", type=Path, help="where to leave the corpora; else nowhere")
    parser.add_argument("--only_resume", action="store_true", help="leave the speeds out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = given.directory or Path(temporary)
        if not given.only_resume:
            _speeds(directory)
        many = _write(directory / f"many_{given.documents}", given.documents, 40)
        print(f"resume at step {STEP:,} of {given.documents:,} documents: {_resume(many)}")


def _speeds(directory: Path) -> None:
    print(f"span corruption alone:      {_corruption():8,.0f} examples/s")
    if (rate := _tensorflow()) is not None:
        print(f"span corruption in tf.data: {rate:8,.0f} examples/s")
    corpus = _write(directory / "web", 100_000, 430)  # C4's mean length
    for name, objective in (("span corruption", SpanCorruption()), ("causal LM", CausalLM())):
        for kept in (1.0, 0.2):
            print(f"stream, {name}, {kept:.0%} kept: {_stream(corpus, objective, kept)}")


def _corruption() -> float:
    chunks = np.random.default_rng(0).integers(3, 259, (BATCH, 568)).astype(np.uint16)
    objective = SpanCorruption()

    def batch(step: int) -> None:
        indices = np.arange(step * BATCH, (step + 1) * BATCH)
        objective.batch(objective.examples(chunks, 0, indices, VOCABULARY), 512, 114)

    return BATCH * _per_second(batch)


def _per_second(work, seconds: float = 5.0) -> float:
    """Calls per CPU second of the process."""
    work(0)
    started, calls = time.process_time(), 0
    while time.process_time() - started < seconds:
        calls += 1
        work(calls)
    return calls / (time.process_time() - started)


def _stream(corpus: Path, objective: Objective, kept: float) -> str:
    selection = None
    if kept < 1:
        selection = str(corpus.parent / f"{corpus.name}_{kept}")
        select.run(SelectConfig(str(corpus), selection, Random(), keep_tokens=kept))
    config = StreamConfig(str(corpus), BATCH, selection, objective)
    opened = config.open()
    rate = BATCH * _per_second(opened.batch, 10.0)
    return f"{rate:8,.0f} examples/s, reading, shuffling and padding included"


def _resume(corpus: Path) -> str:
    selection = str(corpus.parent / f"{corpus.name}_half")
    select.run(SelectConfig(str(corpus), selection, Random(), keep_tokens=0.5))
    read: list[int] = []
    original = Blocks.read
    config = StreamConfig(str(corpus), BATCH, selection)
    Blocks.read = lambda self, block: (read.append(block), original(self, block))[1]
    started = time.perf_counter()
    opened = config.open()
    resumed = opened.batch(STEP)
    seconds = time.perf_counter() - started
    Blocks.read = original
    blocks = len(opened.stream.blocks)
    epoch = STEP * BATCH / opened.stream.examples_per_epoch

    running = config.open()  # the uninterrupted run, as it comes to this step
    passed = [running.batch(step) for step in range(STEP - 20, STEP + 1)][-1]
    for hosts in (1, 2, 8):
        parts = [config.open(host, hosts).batch(STEP) for host in range(hosts)]
        for name, value in passed.items():
            together = np.concatenate([part[name] for part in parts])
            if not (np.array_equal(value, together) and np.array_equal(value, resumed[name])):
                raise AssertionError(f"{name} differs with {hosts} hosts")
    return (
        f"{seconds:.2f} s, {len(read)} of {blocks:,} blocks read (in epoch {epoch:.1f}); the same "
        "bits as in passing, for 1, 2 and 8 hosts"
    )


def _tensorflow() -> float | None:
    """Examples per CPU second of the same algorithm as a map over a tf.data dataset."""
    try:
        import tensorflow as tf
    except ImportError:
        return None
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)

    def parts(total, count):
        starts = tf.random.shuffle(tf.cast(tf.range(total - 1) < count - 1, tf.int32))
        return tf.math.segment_sum(tf.ones(total, tf.int32), tf.cumsum(tf.pad(starts, [[1, 0]])))

    def replaced(tokens, mask):
        follows = tf.pad(mask[:-1], [[1, 0]])
        first = tf.logical_and(mask, tf.logical_not(follows))
        sentinels = VOCABULARY.size - tf.cumsum(tf.cast(first, tokens.dtype))
        kept = tf.logical_not(tf.logical_and(mask, follows))
        return tf.pad(
            tf.boolean_mask(tf.where(first, sentinels, tokens), kept), [[0, 1]], constant_values=1
        )

    def corrupt(tokens):
        lengths = tf.reshape(tf.stack([parts(483, 28), parts(85, 28)], axis=1), [-1])
        starts = tf.math.unsorted_segment_sum(tf.ones(55, tf.int32), tf.cumsum(lengths)[:-1], 568)
        is_noise = tf.equal(tf.cumsum(starts) % 2, 1)
        return {
            "inputs": replaced(tokens, is_noise),
            "targets": replaced(tokens, tf.logical_not(is_noise)),
        }

    chunks = np.random.default_rng(0).integers(3, 259, (BATCH, 568)).astype(np.int32)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    dataset = tf.data.Dataset.from_tensor_slices(chunks).repeat().map(corrupt).batch(BATCH)
    iterator = iter(dataset.with_options(options).as_numpy_iterator())
    return BATCH * _per_second(lambda step: next(iterator))


def _write(path: Path, documents: int, mean_tokens: int) -> Path:
    """A synthetic corpus without text, in shards of 250,000 documents."""
    per_shard = min(documents, 250_000)
    shards = -(-documents // per_shard)
    columns = [("doc_id", pa.int64()), ("tokens", pa.list_(pa.uint16())), ("n_tokens", pa.int32())]
    build = Build(path, "corpus", {"documents": documents}, {}, shards, pa.schema(columns))
    for k in build.pending():
        rng = np.random.default_rng(k)
        rows = min(per_shard, documents - k * per_shard)
        with build.shard(k) as shard:
            for first in range(0, rows, 1024):
                count = min(1024, rows - first)
                lengths = np.exp(rng.normal(np.log(mean_tokens) - 0.5, 1.0, count)).astype(int) + 1
                ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                tokens = rng.integers(3, 259, ends[-1]).astype(np.uint16)
                ids = (np.int64(k) << 32) + np.arange(first, first + count)
                lists = pa.ListArray.from_arrays(ends, tokens)
                shard.write({"doc_id": ids, "tokens": lists, "n_tokens": lengths.astype(np.int32)})
                shard.tokens += int(ends[-1])
    made: Artifact = build.finish(
        {"vocabulary": VOCABULARY.describe(), "metadata": [], "documents": documents}
    )
    return Path(made.path)


if __name__ == "__main__":
    main()
