"""Selection over hundreds of millions of scores: seconds and peak memory.

    python benchmarks/selection_scale.py --documents 364_000_000 --directory /tmp/selection_scale

Writes a synthetic corpus (ids, lengths, domains; no text) and score set of that size once, then
runs each strategy in a process of its own, from Parquet to a finished selection. C4 has 364 million
documents in 1,024 shards. CPU seconds are of all threads; on a machine that does other work, they
are what can be compared.

The numbers of a shard are those of one of 16, a little moved: drawing them anew takes longer than
all selections. Scores take 7 bytes a document on disk, lengths and domains 6.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from pruning.corpus.layout import encoding_of
from pruning.selection import select
from pruning.selection.config import Quotas, SelectConfig
from pruning.selection.strategies import InverseFrequency, InversePropensity, Random, Top
from pruning.store import parallel, randomness
from pruning.store.artifact import Artifact
from pruning.store.build import Build, encoding_of_numbers
from pruning.store.randomness import Stream

PER_SHARD = 355_469
DOMAINS = 64

RUNS = {
    "random": {"strategy": Random(), "scores": None, "score": None},
    "top": {"strategy": Top()},
    "inverse propensity": {"strategy": InversePropensity(), "score": "column:density"},
    "inverse frequency": {"strategy": InverseFrequency()},
    "quotas, 64 domains": {"strategy": Top(), "quotas": Quotas()},
    "top, streamed": {"strategy": Top(), "in_memory": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/selection_scale"))
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _select(given.directory, given.child)
        return
    started = time.perf_counter()
    _write(given.directory, given.documents)
    seconds = time.perf_counter() - started
    print(
        f"{given.documents:,} documents, {os.cpu_count()} cores; written in {seconds:.0f} s",
        flush=True,
    )
    for name in given.only or RUNS:
        command = [sys.executable, __file__, "--directory", str(given.directory), "--child", name]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(result.stderr)
        found = json.loads(result.stdout.splitlines()[-1])
        print(
            f"{name:20} {found['seconds']:7.1f} s, {found['cpu_seconds']:7.1f} CPU s "
            f"({1e9 * found['cpu_seconds'] / given.documents:4.0f} ns a document), "
            f"{found['gib']:5.2f} GiB; kept {found['share']:.4f} of the tokens, ESS {found['ess']}",
            flush=True,
        )


def _write(directory: Path, documents: int) -> None:
    shards = -(-documents // PER_SHARD)
    rows = [min(PER_SHARD, documents - k * PER_SHARD) for k in range(shards)]
    columns = [("doc_id", pa.int64()), ("n_tokens", pa.int32()), ("domain", pa.string())]
    config = {"documents": documents}
    schema = pa.schema(columns)
    encoding = encoding_of(schema)
    corpus = Build(directory / "corpus", "corpus", config, {}, shards, schema, encoding)
    work = functools.partial(_write_corpus_shard, corpus, rows)
    parallel.run_shards(work, corpus.pending(), 0, lambda *_: None)
    opened = corpus.finish({"metadata": ["domain"]})
    word = pa.dictionary(pa.int32(), pa.string())
    columns = [("doc_id", pa.int64()), ("status", word)]
    columns += [("nll", pa.float32()), ("n_scored_tokens", pa.int32()), ("density", pa.float32())]
    inputs = {"corpus": opened}
    schema = pa.schema(columns)
    encoding = encoding_of_numbers(schema)
    scores = Build(directory / "scores", "scores", config, inputs, shards, schema, encoding)
    work = functools.partial(_write_score_shard, scores, rows)
    parallel.run_shards(work, scores.pending(), 0, lambda *_: None)
    scores.finish()


@functools.cache
def _lengths_and_sites(k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(k)
    lengths = np.exp(rng.normal(5.6, 1.0, PER_SHARD)).astype(np.int32) + 1
    return lengths, np.minimum(rng.zipf(1.5, PER_SHARD) - 1, DOMAINS - 1)


@functools.cache
def _scores(k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([1, k])
    return rng.normal(900, 200, PER_SHARD), rng.gamma(50.0, 0.02, PER_SHARD)


def _write_corpus_shard(corpus: Build, rows: list[int], k: int, report: parallel.Report) -> None:
    lengths, sites = (values[: rows[k]] for values in _lengths_and_sites(k % 16))
    names = pa.array([f"site-{i:02}.example.org" for i in range(DOMAINS)])
    with corpus.shard(k) as shard:
        ids = (np.int64(k) << 32) + np.arange(rows[k])
        values = {"doc_id": ids, "n_tokens": lengths, "domain": names.take(pa.array(sites))}
        shard.write(values, 1024)  # the row groups of a corpus
        shard.tokens = int(lengths.sum(dtype=np.int64))


def _write_score_shard(scores: Build, rows: list[int], k: int, report: parallel.Report) -> None:
    nll, density = (values[: rows[k]] * (1 + 1e-5 * k) for values in _scores(k % 16))
    ids = (np.int64(k) << 32) + np.arange(rows[k])
    status = np.where(randomness.uniform(Stream.EXPERIMENT, 0, ids) < 0.01, 1, 0).astype(np.int32)
    with scores.shard(k) as shard:
        statuses = pa.DictionaryArray.from_arrays(pa.array(status), ["ok", "too_long"])
        values = {"doc_id": ids, "status": statuses}
        values["nll"] = nll.astype(np.float32)
        values["n_scored_tokens"] = np.full(rows[k], 300, np.int32)
        values["density"] = density.astype(np.float32)
        shard.write(values, 1 << 16)


def _select(directory: Path, name: str) -> None:
    output = directory / "selection"
    subprocess.run(["rm", "-rf", str(output)], check=True)
    settings = {"scores": str(directory / "scores"), "score": "nll_mean"} | RUNS[name]
    config = SelectConfig(str(directory / "corpus"), str(output), keep_tokens=0.2, **settings)
    started = time.perf_counter()
    made: Artifact = select.run(config)
    seconds = time.perf_counter() - started
    used = resource.getrusage(resource.RUSAGE_SELF)
    summary = made.manifest.summary
    weights = summary["weights"] or {"ess_share": None}
    found = {
        "seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "gib": used.ru_maxrss / 2**20,
        "share": summary["share"]["tokens"],
        "ess": weights["ess_share"],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
