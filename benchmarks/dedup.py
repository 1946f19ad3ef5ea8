"""Near-duplicates by MinHash: accuracy on planted copies, speed beside datasketch, a million texts.

    python benchmarks/dedup.py            # needs datasketch for the first two parts
    python benchmarks/dedup.py --parts million --documents 1000000

Parts
- accuracy: documents of C4, some of them once more with 1 to 20% of their words replaced by words
  of other documents. Candidate pairs against the exact Jaccard similarity of all pairs, beside
  datasketch: by its own hash functions, and by its LSH over our signatures, whose pairs have to be
  the same.
- speed: CPU seconds on one thread from texts to candidate pairs.
- million: texts put together from 20 words of C4 at a time, a tenth of them copies, through the
  command, with the private memory of every process limited by the system.
- kills: the command killed after a random number of files and started again, with 1, 2 and 3
  processes: the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random as clock
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import xxhash
from scipy import sparse

from pruning.corpus.layout import FIXED, doc_ids
from pruning.corpus.vocabulary import Vocabulary
from pruning.scores.text.dedup import minhash
from pruning.scores.text.dedup.minhash import MinHash
from pruning.scores.text.hashing import batches
from pruning.store.artifact import load_artifact
from pruning.store.build import Build

DATA = Path(os.environ.get("WINNOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
SETTINGS = MinHash()
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
SHARD = 10_000  # documents
KILLS = 5  # of each run, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="accuracy,speed,million,kills")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--memory_gb", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    with gzip.open(DATA / "corpus/c4/c4_real_merged.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    parts = given.parts.split(",")
    if "accuracy" in parts:
        accuracy(texts)
    if "speed" in parts:
        speed(texts)
    with tempfile.TemporaryDirectory() as directory:
        if "million" in parts:
            million(Path(directory), texts, given.documents, given.memory_gb, given.workers)
        if "kills" in parts:
            kills(Path(directory), planted(texts)[0])


def planted(texts: list[str]) -> tuple[list[str], np.ndarray]:
    """Return texts and copies, and int64 [copies, 3]: original, copy, percent of changed words."""
    random = np.random.default_rng(0)
    words = np.asarray([word for text in texts for word in text.split(" ") if word])
    found, pairs = list(texts), []
    originals = random.permutation([i for i, t in enumerate(texts) if len(t.split()) >= 50])
    for number, original in enumerate(originals[: 200 * len(SHARES)].tolist()):
        share = SHARES[number % len(SHARES)]
        changed = texts[original].split(" ")
        places = random.permutation(len(changed))[: max(1, round(share * len(changed)))]
        for place in places.tolist():
            changed[place] = str(words[random.integers(len(words))])
        pairs.append((original, len(found), round(100 * share)))
        found.append(" ".join(changed))
    return found, np.asarray(pairs)


# --------------------------------------------------------------------------------------------------
# Ours and datasketch's


def signed(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return signatures uint32 [hashes, some], and the documents with an n-gram, int64 [some]."""
    parts, some = [], []
    first = 0
    for batch in batches(pa.array(texts, pa.large_string())):
        grams, offsets = minhash.shingles(batch, SETTINGS.n)
        filled = offsets[1:] > offsets[:-1]
        bounds = np.append(offsets[:-1][filled], offsets[-1])
        parts.append(minhash.signatures(grams, bounds, SETTINGS))
        some.append(first + np.flatnonzero(filled))
        first += len(batch)
    return np.concatenate(parts, axis=1), np.concatenate(some)


def candidates(least: np.ndarray, documents: np.ndarray) -> set[tuple[int, int]]:
    """Return pairs of documents with a band in common."""
    keys = minhash.band_keys(least, SETTINGS).ravel()
    nodes = np.tile(documents, SETTINGS.bands)
    order = np.lexsort((nodes, keys))
    keys, nodes = keys[order], nodes[order]
    pairs: set[tuple[int, int]] = set()
    step = 1
    while (same := keys[step:] == keys[:-step]).any():
        pairs.update(zip(nodes[:-step][same].tolist(), nodes[step:][same].tolist(), strict=True))
        step += 1
    return pairs


def python_ngrams(text: str) -> set[bytes]:
    words = re.findall(r"\w+", text.lower())
    n = SETTINGS.n
    return {" ".join(words[i : i + n]).encode() for i in range(len(words) - n + 1)}


def datasketch_signed(grams: list[set[bytes]]) -> list:
    from datasketch import MinHash as Theirs

    found = []
    for number, one in enumerate(grams):
        if one:
            made = Theirs(num_perm=SETTINGS.hashes)
            made.update_batch(one)
            found.append((number, made))
    return found


def as_theirs(signature: np.ndarray):
    """Return one of our signatures as datasketch's object."""
    from datasketch import MinHash as Theirs

    values = signature.astype(np.uint64)
    return Theirs(num_perm=SETTINGS.hashes, hashvalues=values, scheme="legacy")


def datasketch_candidates(documents: list) -> set[tuple[int, int]]:
    from datasketch import MinHashLSH

    lsh = MinHashLSH(num_perm=SETTINGS.hashes, params=(SETTINGS.bands, SETTINGS.rows))
    pairs = set()
    for number, made in documents:
        pairs.update((other, number) for other in lsh.query(made))
        lsh.insert(number, made)
    return pairs


def exact(texts: list[str], least: float) -> dict[tuple[int, int], float]:
    """Return all pairs with a Jaccard similarity of at least `least`: sets, all against all."""
    numbers: dict[bytes, int] = {}
    rows, columns = [], []
    for row, text in enumerate(texts):
        for gram in python_ngrams(text):
            rows.append(row)
            columns.append(numbers.setdefault(gram, len(numbers)))
    ones = np.ones(len(rows), np.int32)
    matrix = sparse.csr_matrix((ones, (rows, columns)), (len(texts), len(numbers)))
    sizes = np.asarray(matrix.sum(axis=1)).ravel()
    common = sparse.triu(matrix @ matrix.T, 1).tocoo()
    jaccard = common.data / (sizes[common.row] + sizes[common.col] - common.data)
    some = jaccard >= least
    pairs = zip(common.row[some].tolist(), common.col[some].tolist(), strict=True)
    return dict(zip(pairs, jaccard[some].tolist(), strict=True))


def accuracy(texts: list[str]) -> None:
    texts, copies = planted(texts)
    true = exact(texts, 0.05)
    least, some = signed(texts)
    ours = candidates(least, some)
    given = [(number, as_theirs(least[:, i])) for i, number in enumerate(some.tolist())]
    same = datasketch_candidates(given)
    theirs = datasketch_candidates(datasketch_signed([python_ngrams(text) for text in texts]))
    verified = {pair for pair in ours if true.get(pair, 0) >= 0.8}
    print(f"{len(texts):,} documents of C4, {len(copies):,} of them planted copies")
    print(f"datasketch's LSH over our signatures: {len(same)} pairs, ours {len(ours)}, "
          f"the same pairs: {same == ours}")  # fmt: skip
    print("\n| candidates | pairs | J >= | precision | recall |\n|---|---|---|---|---|")
    found = {"ours": ours, "datasketch": theirs, "ours, compared (min_jaccard 0.8)": verified}
    for name, pairs in found.items():
        for threshold in (0.7, 0.75, 0.8, 0.9):
            wanted = {pair for pair, value in true.items() if value >= threshold}
            right = len(pairs & wanted)
            print(f"| {name} | {len(pairs)} | {threshold} | {right / len(pairs):.3f} | "
                  f"{right / len(wanted):.3f} |")  # fmt: skip
    print(
        "\n| words changed | mean Jaccard | found | datasketch | expected |\n|---|---|---|---|---|"
    )
    for share in SHARES:
        pairs = [(a, b) for a, b, percent in copies.tolist() if percent == round(100 * share)]
        values = [true.get(pair, 0.0) for pair in pairs]
        print(f"| {share:.0%} | {np.mean(values):.3f} | {np.mean([p in ours for p in pairs]):.3f} "
              f"| {np.mean([p in theirs for p in pairs]):.3f} | "
              f"{np.mean([SETTINGS.probability(v) for v in values]):.3f} |")  # fmt: skip


def speed(texts: list[str]) -> None:
    signed(texts[:100])
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable, repeats: int = 3) -> object:
        for _ in range(repeats):
            started = time.process_time()
            result = work()
            seconds[name] = min(seconds.get(name, np.inf), time.process_time() - started)
        return result

    least, some = timed("signatures", lambda: signed(texts))  # type: ignore[misc]
    timed("candidates", lambda: candidates(least, some))
    grams = timed("datasketch n-grams", lambda: [python_ngrams(text) for text in texts], 1)
    made = timed("datasketch signatures", lambda: datasketch_signed(grams), 1)  # type: ignore
    timed("datasketch candidates", lambda: datasketch_candidates(made), 1)  # type: ignore
    ours = seconds["signatures"] + seconds["candidates"]
    theirs = sum(value for name, value in seconds.items() if "datasketch" in name)
    print(
        f"\n{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} MB, CPU seconds, one thread"
    )
    for name, value in seconds.items():
        print(f"{name:24} {value:7.3f}")
    print(f"ours {len(texts) / ours:,.0f} documents/s, datasketch {len(texts) / theirs:,.0f}: "
          f"{theirs / ours:.1f} times; without its n-grams "
          f"{(theirs - seconds['datasketch n-grams']) / ours:.1f} times")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The command


def write_corpus(path: Path, texts: Callable[[int], list[str]], shards: int) -> None:
    """Write a corpus without tokens."""
    vocabulary = Vocabulary("bytes", b"", 125)
    build = Build(
        path, "corpus", {"benchmark": "dedup"}, {}, shards, pa.schema(list(FIXED.items()))
    )
    for k in build.pending():
        some = texts(k)
        encoded = [text.encode() for text in some]
        hashes = [xxhash.xxh3_64_intdigest(text) for text in encoded]
        with build.shard(k) as shard:
            shard.write(
                {
                    "doc_id": doc_ids(k, np.arange(len(some))),
                    "text": some,
                    "tokens": [[]] * len(some),
                    "n_tokens": np.ones(len(some), np.int32),
                    "n_bytes": [len(text) for text in encoded],
                    "text_hash": np.asarray(hashes, np.uint64),
                },
                1024,
            )  # fmt: skip
    build.finish({"vocabulary": vocabulary.describe(), "metadata": []})


def command(corpus: Path, output: Path, workers: int, *more: str) -> list[str]:
    stage = [sys.executable, "-m", "pruning", "dedup", f"--gin.Dedup.corpus={corpus}"]
    return [*stage, f"--gin.Dedup.output={output}", f"--gin.Dedup.workers={workers}", *more]


def million(at: Path, texts: list[str], documents: int, memory_gb: float, workers: int) -> None:
    words = np.asarray([word for text in texts for word in text.split()])
    shards = -(-documents // SHARD)

    def of_shard(k: int) -> list[str]:
        """Nine new texts, then a copy of one of them with 3% of its words changed."""
        random = np.random.default_rng(k)
        made: list[str] = []
        for i in range(min(SHARD, documents - k * SHARD)):
            if i % 10 < 9:
                starts = random.integers(0, len(words) - 20, int(random.integers(5, 15)))
                made.append(" ".join(words[(starts[:, None] + np.arange(20)).ravel()]))
            else:
                copy = made[i - 1 - int(random.integers(9))].split()
                for place in random.permutation(len(copy))[: round(0.03 * len(copy))]:
                    copy[place] = str(words[random.integers(len(words))])
                made.append(" ".join(copy))
        return made

    write_corpus(at / "million", of_shard, shards)
    limit = int(memory_gb * 1e9)
    more = f"--gin.Dedup.memory_gb={memory_gb / 2}"
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command(at / "million", at / "twins", workers, more),
        check=True,
        stderr=subprocess.DEVNULL,
        # Private memory; mapped files do not count.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = load_artifact(at / "twins")
    rank = np.concatenate(
        [found.read(k, ["duplicate_rank"])["duplicate_rank"] for k in range(shards)]
    )
    copy = np.arange(len(rank)) % SHARD % 10 == 9
    n_bytes = sum(f.stat().st_size for f in (at / "million").glob("*.parquet"))
    print(
        f"\n{documents:,} documents, {n_bytes / 1e6:,.0f} MB of Parquet, {workers} process(es) of "
        f"{memory_gb} GB of private memory: {wall:.0f} s, {cpu:.0f} CPU s, "
        f"{documents / cpu:,.0f} documents per CPU second, "
        f"peak RSS {after.ru_maxrss / 1e6:.2f} GB"
    )
    print(f"of {copy.sum():,} planted copies {np.mean(rank[copy] > 0):.4f} dropped; of the others "
          f"{np.count_nonzero(rank[~copy] > 0)}")  # fmt: skip


def kills(at: Path, texts: list[str]) -> None:
    shards = 24
    write_corpus(at / "small", lambda k: texts[k::shards], shards)
    more = "--gin.Dedup.min_jaccard=0.8"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    digests = {}
    for workers in (1, 2, 3):
        output = at / f"whole{workers}"
        subprocess.run(command(at / "small", output, workers, more), check=True, **quiet)
        digests[f"{workers} process(es)"] = digest(output)
    for attempt in range(3):
        output, killed = at / f"killed{attempt}", 0
        while True:
            process = subprocess.Popen(
                command(at / "small", output, 1 + attempt, more), start_new_session=True, **quiet
            )
            files = output / "unfinished"
            more_files = len(list(files.glob("*.part"))) + clock.randint(1, 20)
            while process.poll() is None:
                if killed < KILLS and len(list(files.glob("*.part"))) >= more_files:
                    os.killpg(process.pid, 9)
                    killed += 1
                    process.wait()
                time.sleep(0.005)
            if process.returncode == 0:
                break
            assert process.returncode == -9, process.returncode
        digests[f"{1 + attempt} process(es), killed {killed} times"] = digest(output)
    print()
    for name, value in digests.items():
        print(f"{name:36} {value[:16]}")
    print("the same bytes:", len(set(digests.values())) == 1)


def digest(path: Path) -> str:
    hasher = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name != "measured.json":  # times
            hasher.update(file.name.encode() + file.read_bytes())
    return hasher.hexdigest()


if __name__ == "__main__":
    main()
