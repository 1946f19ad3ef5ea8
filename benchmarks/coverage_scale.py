"""Bytes and time per document of k-means, SemDeDup and density, at growing numbers of documents.

    python benchmarks/coverage_scale.py --documents 100000,200000,400000 --memory_gb 2

Random unit vectors of 768 float16 on disk, around centers, so that clusters have about 500 members.
First how fast a core reads them, as lists as earlier versions did, and as stored now; then SemDeDup
beside brute force. Then each stage runs as a command whose private memory is limited by the system.
Bytes are those that the process read from and wrote to files (/proc/PID/io), with files read
without memory mapping, so that all are counted.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pruning.corpus.layout import doc_ids
from pruning.corpus.reader import load_corpus
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores import score_set, vectors
from pruning.scores.score_set import Column
from pruning.scores.space import kmeans, semdedup
from pruning.scores.space.embeddings import Embeddings, local_mesh
from pruning.scores.space.kmeans import KMeansConfig
from pruning.scores.space.semdedup import SemDeDupConfig
from pruning.store.artifact import load_artifact
from pruning.store.build import Build

SHARD = 25_000  # documents
WIDTH = 768

# A command that reports what it read and wrote when it ends.
_RUN = """
import resource
import sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # private memory, not mapped files
import pyarrow.parquet as pq
opened = pq.ParquetFile.__init__
def unmapped(self, *given, **named):
    named["memory_map"] = False
    opened(self, *given, **named)
pq.ParquetFile.__init__ = unmapped
from pruning.cli.main import main
status = main(sys.argv[1:])
io = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
memory = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
print("io", io["rchar"], io["wchar"], memory["VmHWM"].split()[0])
sys.exit(status)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", default="100000,200000,400000")
    parser.add_argument("--memory_gb", type=float, default=2.0)
    parser.add_argument("--group_gb", type=float, default=0.2, help="SemDeDup.memory_gb")
    given = parser.parse_args()
    reading(50_000)
    brute_force(20_000, given.group_gb)
    print(f"{WIDTH} float16: {2 * WIDTH} bytes a vector; at most {given.memory_gb} GB of memory")
    print("| documents | stage | bytes read | bytes written | CPU ms | seconds | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for documents in map(int, given.documents.split(",")):
        with tempfile.TemporaryDirectory() as directory:
            at = Path(directory)
            write(at, documents)
            clusters = max(documents // 500, 2)
            inputs = {"corpus": "corpus", "embeddings": "embeddings"}
            run(at, given.memory_gb, documents, "kmeans", "KMeans", **inputs, clusters=clusters,
                points_per_cluster=20, iterations=5, output="clusters")  # fmt: skip
            run(at, given.memory_gb, documents, "semdedup", "SemDeDup", **inputs,
                clusters="clusters", memory_gb=given.group_gb, output="twins")  # fmt: skip
            run(at, given.memory_gb, documents, "density", "Density", **inputs, output="density")


def reading(documents: int) -> None:
    """Print vectors per CPU second, read on one thread from files in memory."""
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        write(at, documents)
        corpus = load_corpus(at / "corpus")
        now = Embeddings.open(str(at / "embeddings"), "embedding", corpus.artifact)
        table = now.artifact.read(0)
        lists = vectors.as_lists(table["embedding"], table.schema.field("embedding"))
        settings = {"row_group_size": 8192, "use_dictionary": False}
        for name in ("zstd", "none"):
            pq.write_table(pa.table({"x": lists}), at / name, compression=name, **settings)

        def read_lists(name: str) -> int:
            count = 0
            for batch in pq.ParquetFile(at / name).iter_batches(1 << 15, use_threads=False):
                count += len(batch.column(0).flatten().to_numpy(zero_copy_only=False)) // WIDTH
            return count

        def stored() -> int:
            return sum(len(rows) for k in range(corpus.num_shards) for rows, _ in now.stored(k))

        def tiles() -> int:
            mesh, count = local_mesh(), 0
            for k in range(corpus.num_shards):
                for rows, made, _ in now.tiles(k, mesh):
                    made.block_until_ready()
                    count += len(rows)
            return count

        runs: dict[str, Callable[[], int]] = {
            "lists, zstd": lambda: read_lists("zstd"),
            "lists, not compressed": lambda: read_lists("none"),
            "as stored": stored,
            "as stored, to tiles of length 1 on the CPU as device": tiles,
        }
        for name, work in runs.items():
            work()
            best = 0.0
            for _ in range(3):
                started = time.process_time()
                best = max(best, work() / (time.process_time() - started))
            print(f"{name}: {best:,.0f} vectors per CPU second")


def write(at: Path, documents: int) -> None:
    """Write a corpus without text, and embeddings of it."""
    shards = -(-documents // SHARD)
    vocabulary = Vocabulary("bytes", b"", 125)
    schema = pa.schema([("doc_id", pa.int64()), ("n_tokens", pa.int32())])
    corpus = Build(at / "corpus", "corpus", {"benchmark": 1}, {}, shards, schema)
    sizes = [min(SHARD, documents - k * SHARD) for k in range(shards)]
    for k, size in enumerate(sizes):
        with corpus.shard(k) as shard:
            ids = doc_ids(k, np.arange(size))
            shard.write({"doc_id": ids, "n_tokens": np.ones(size, np.int32)}, 1024)
    corpus.finish({"vocabulary": vocabulary.describe(), "metadata": []})
    opened = load_corpus(at / "corpus")
    columns = {"embedding": Column(pa.list_(pa.float16(), WIDTH), "random")}
    build = score_set.begin(str(at / "embeddings"), {}, {}, opened, columns)
    centers = np.random.default_rng(0).standard_normal((documents // 500, WIDTH), np.float32)
    for k, size in enumerate(sizes):
        random = np.random.default_rng(k + 1)
        vectors = random.standard_normal((size, WIDTH), np.float32) * 0.5
        vectors += centers[random.integers(0, len(centers), size)]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        status = np.zeros(size, np.int8)
        values = {"embedding": vectors.astype(np.float16)}
        score_set.write(build, k, opened, columns, status, values)
    score_set.finish(build, "random", columns)


def brute_force(documents: int, group_gb: float) -> None:
    """Compare SemDeDup with NumPy in float64, all earlier documents of each cluster."""
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        write(at, documents)
        inputs = {"corpus": str(at / "corpus"), "embeddings": str(at / "embeddings")}
        kmeans.run(KMeansConfig(**inputs, output=str(at / "clusters"), clusters=40, iterations=3))
        made = semdedup.run(
            SemDeDupConfig(
                **inputs,
                clusters=str(at / "clusters"),
                output=str(at / "twins"),
                keep="closest",
                chains=True,
                memory_gb=group_gb / 10,
            )
        )
        assert made is not None
        corpus = load_corpus(at / "corpus")
        embeddings = Embeddings.open(inputs["embeddings"], "embedding", corpus.artifact)
        x = np.concatenate([found for _, found in embeddings.stored(0)]).astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        table = load_artifact(at / "clusters").read(0)
        cluster, rank = (table[n].to_numpy() for n in ("cluster", "centroid_similarity"))
        expected = np.full(documents, -1.0)
        for k in np.unique(cluster):
            order = np.flatnonzero(cluster == k)
            order = order[np.argsort(-rank[order], kind="stable")]
            cosines = np.tril(x[order] @ x[order].T + 2, -1) - 2
            expected[order] = np.maximum(cosines.max(axis=1), -1)
        found = made.read(0)["twin_similarity"].to_numpy()
        ties = documents - len(np.unique(np.stack([cluster, rank], 1), axis=0))
        print(
            f"SemDeDup of {documents:,} documents beside brute force in float64: the largest "
            f"difference is {np.abs(found - expected).max():.1e}, with {ties} ties in the order"
        )


def run(at: Path, limit_gb: float, documents: int, stage: str, name: str, **settings) -> None:
    """Run a stage and print what it took, per document."""
    limit = str(int(limit_gb * 1e9))
    values = [f"--gin.{name}.{key}={value}" for key, value in settings.items()]
    if stage == "density":
        values += ["--gin.Density.race=@Race()", "--gin.Race.rows=200"]  # a sketch of 32 MB
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, limit, stage, *values],
        cwd=at,
        # Arrow's own allocator reserves a gigabyte that it does not use.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "ARROW_DEFAULT_MEMORY_POOL": "system"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{stage} failed: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    read, written, peak = (int(word) for word in done.stdout.splitlines()[-1].split()[1:])
    print(
        f"| {documents:,} | {stage} | {read / documents:,.0f} | {written / documents:,.0f} | "
        f"{1000 * cpu / documents:.2f} | {time.perf_counter() - started:.0f} | {peak / 1e6:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
