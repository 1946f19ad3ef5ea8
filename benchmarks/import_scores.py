"""Import of scores: seconds and peak memory of a million rows joined by url.

    python benchmarks/import_scores.py --documents 1_000_000 --directory /tmp/import_scores

Writes a synthetic corpus (ids, lengths, urls; no text) and the same scores as Parquet, JSON lines
and CSV, in another order and with a tenth of strangers, then runs each import in a process of its
own. Memory is the largest of any process; with one worker all happens in one.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pruning.corpus.layout import doc_ids
from pruning.scores.imported import join
from pruning.scores.imported.join import ImportConfig
from pruning.store.build import Build

PER_SHARD = 125_000
KINDS = ("parquet", "csv", "jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/import_scores"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        _import(given.directory, given.child, given.workers)
        return
    _write(given.directory, given.documents)
    print(f"{given.documents:,} documents, {os.cpu_count()} cores, {given.workers} workers")
    for kind in KINDS:
        command = [sys.executable, __file__, "--directory", str(given.directory)]
        command += ["--child", kind, "--workers", str(given.workers)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(result.stderr)
        found = json.loads(result.stdout.splitlines()[-1])
        print(
            f"{kind:8} {found['seconds']:6.1f} s, {found['gib']:.2f} GiB; "
            f"{found['rows']['matched']:,} rows matched, "
            f"{found['rows']['without_document']:,} without a document"
        )


def _write(directory: Path, documents: int) -> None:
    """Write the corpus and the files, unless they are there."""
    shards = -(-documents // PER_SHARD)
    schema = pa.schema([("doc_id", pa.int64()), ("n_tokens", pa.int32()), ("url", pa.string())])
    build = Build(directory / "corpus", "corpus", {"documents": documents}, {}, shards, schema)
    for shard in build.pending():
        count = min(PER_SHARD, documents - shard * PER_SHARD)
        with build.shard(shard) as writer:
            writer.write(
                {
                    "doc_id": doc_ids(shard, np.arange(count)),
                    "n_tokens": np.full(count, 400, np.int32),
                    "url": [_url(shard * PER_SHARD + i) for i in range(count)],
                }
            )
    build.finish({"metadata": ["url"]})
    if (directory / "scores.jsonl").exists():
        return
    order = np.random.default_rng(0).permutation(documents)
    order[: documents // 10] += documents  # no document has these
    table = pa.table({"url": list(map(_url, order.tolist())), "score": order % 1000 / 7})
    pq.write_table(table, directory / "scores.parquet")
    pacsv.write_csv(table, directory / "scores.csv")
    with (directory / "scores.jsonl").open("w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in table.to_pylist())


def _url(number: int) -> str:
    return f"https://www.example-{number % 9973}.org/articles/2024/{number:012d}.html"


def _import(directory: Path, kind: str, workers: int) -> None:
    output = directory / f"imported_{kind}"
    shutil.rmtree(output, ignore_errors=True)
    config = ImportConfig(
        str(directory / "corpus"),
        str(output),
        (str(directory / f"scores.{kind}"),),
        ("score",),
        workers=workers,
    )
    started = time.perf_counter()
    scores = join.run(config)
    seconds = time.perf_counter() - started
    peaks = [
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    result = {
        "seconds": seconds,
        "gib": max(peaks) / (1 << 20),
        "rows": scores.manifest.summary["rows"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
