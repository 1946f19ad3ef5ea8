"""Trials of what surrounds a command: full disks, jumping clocks, hostile names and contents."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pipeline
from trials import Kind, Outcome, Result, Workshop, ends, files_of, jumping, of_makers, run_here

from pruning.corpus.reader import load_corpus
from pruning.store.artifact import load_artifact

# --------------------------------------------------------------------------------------------------
# Full disks


def full_disk(workshop: Workshop, rng: random.Random, name: str, mounts: bool) -> Result:
    """Run a command on a disk that is too small, and again when there is room.

    Args:
      mounts: a small file system is mounted, where this is allowed; else no file may grow beyond a
        size.
    """
    place = workshop.root / name
    sizes = [file.stat().st_size for file in files_of(place)]
    shutil.rmtree(place)
    mounted = mounts and _can_mount(workshop.root.parent)
    limit = rng.randint(1, max(sizes))
    disk = _small_disk(place, rng.randint(4096, sum(sizes))) if mounted else _short_files(limit)
    fault = "full disk" if mounted else "files too large for the disk"
    try:
        with disk as widen:
            ended = workshop.run(name)
            if ended.status is None or ended.words.count("\n"):
                return fault, name, Outcome.TRACEBACK, ended.words
            widen()
            outcome, words = ends(workshop, name)
            if ended.status and outcome is Outcome.IDENTICAL:
                outcome = Outcome.REPAIRED
            return fault, name, outcome, f"{ended.words}\n{words}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _short_files(limit: int) -> Iterator:
    """Let no file of this process grow beyond a size: the system refuses to write further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def widen() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield widen
    finally:
        widen()


@contextlib.contextmanager
def _small_disk(place: Path, size: int) -> Iterator:
    """Mount a file system of a size, which can be made larger."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "winnow", str(place)]
    subprocess.run(mount, check=True)
    try:
        yield (
            lambda: (
                subprocess.run(["mount", "-o", "remount,size=256m", str(place)], check=True)
                and None
            )
        )
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _can_mount(directory: Path) -> bool:
    if os.geteuid():
        return False
    place = directory / "mount"
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4096", "winnow", str(place)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


# --------------------------------------------------------------------------------------------------
# Clocks


_CLOCKS = ("killed", "at once", "alone")


def clocks(workshop: Workshop, rng: random.Random, name: str, kind: str) -> Result:
    """Run commands whose clocks jump, over files of other times: killed, at once, or alone."""
    if kind == "killed":
        workshop.run_killed(name, rng)
    elif kind == "at once":
        shutil.rmtree(workshop.root / name)
        workers = [
            workshop.start(name, rng.uniform(0, 0.2), jumps=rng.randrange(1 << 30))
            for _ in range(2)
        ]
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            words = f"exit status {[worker.exitcode for worker in workers]}"
            return "clock jumps, at once", name, Outcome.UNREPAIRED, words
    else:
        shutil.rmtree(workshop.root / name)
    for file in files_of(workshop.root):
        if rng.random() < 0.5:
            when = time.time() + rng.uniform(-1, 1) * 1e8
            os.utime(file, (when, when))
    true = time.time
    time.time = jumping(rng.randrange(1 << 30))
    try:
        outcome, words = ends(workshop, name)
    finally:
        time.time = true
    return f"clock jumps, {kind}", name, outcome, words


# --------------------------------------------------------------------------------------------------
# Names

_PIECES = (
    *("a b", "[0]", "{x}", "*", "?", "'", '"', ",", "=", "%", "%41", "#", "~", "$HOME", "\\"),
    *("(", ")", "\x1b[31m", "\n", "é", "名", "\U0001f600", "-", "--x", ".", "@b", ":", ";", "&"),
    *("|", "\t", "none"),
)


def hostile_names(workshop: Workshop, rng: random.Random, name: str) -> Result:
    """Run a command in a directory with an odd name: it gives the same data, or one line."""
    odd = "".join(rng.choices(_PIECES, k=rng.randint(1, 4)))
    root = workshop.root.parent / f"odd{odd}"
    shutil.copytree(workshop.root, root)
    shutil.rmtree(root / name)
    stage = workshop.stages[name]
    try:
        ended = run_here(lambda: stage.run(root))
        if ended.status is None or ended.words.count("\n"):
            return "odd names", name, Outcome.TRACEBACK, f"{odd!r}: {ended.words}"
        if ended.status:
            return "odd names", name, Outcome.UNREPAIRED, f"{odd!r}: {ended.words}"
        same = _data(root / name) == _data(workshop.root / name)
        return "odd names", name, Outcome.IDENTICAL if same else Outcome.WRONG, repr(odd)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _data(directory: Path) -> dict[str, object]:
    """Return the files of an artifact; of the manifest its digest, which covers no paths."""
    found: dict[str, object] = dict(pipeline.content(directory))
    if "manifest.json" in found:
        found["manifest.json"] = load_artifact(directory).digest
    return found


# --------------------------------------------------------------------------------------------------
# Contents

_NASTY = (
    b"",
    b"not JSON",
    b"null",
    b"[]",
    b"{}",
    b'{"text": null}',
    b'{"text": 7}',
    b'{"text": ["a"]}',
    b'{"text": ""}',
    b'{"text": "   \\n\\t"}',
    b'{"text": "\\u0000\\u0001\\u001b[31mred\\u001b[0m"}',
    b'{"text": "\\ud800 half a pair"}',
    b'{"text": "a", "text": "b"}',
    b'{"text": "cut',
    b'{"text": "\xff\xfe"}',
    b"\xef\xbb\xbf" + b'{"text": "after a mark"}',
    b'{"text": "' + b"\xe4\xb8\xad\xe6\x96\x87" * 50 + b'"}',
    b'{"text": "' + b"word " * 20_000 + b'"}',
    b'{"text": "x", "url": {"a": {"b": []}}}',
    b'{"text": "x", "url": "' + b"u" * 70_000 + b'"}',
    b'{"text": "x", "url": "\\u001b]0;title\\u0007"}',
    b'{"text": "x", "url": NaN}',
    b'{"text": 1e999}',
    b'{"text": "deep", "meta": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"text": "\\u200b\\u200b"}',
    b'{"text": "carriage"}\r',
    b"\0" * 100,
)


def hostile_contents(workshop: Workshop, rng: random.Random) -> Result:
    """Ingest a file with nasty lines, and score it: every line is counted, good ones are kept."""
    root, name = workshop.root, "corpus"
    good = [f"a plain line number {rng.randrange(1000)}" for _ in range(rng.randint(1, 30))]
    lines = [json.dumps({"text": text}).encode() for text in good]
    bad = rng.choices(_NASTY, k=rng.randint(1, 20))
    mixed = [*lines, *bad]
    rng.shuffle(mixed)
    file = root / "nasty.jsonl"
    file.write_bytes(b"\n".join(mixed) + rng.choice((b"", b"\n", b"\r\n")))
    for made in ("corpus", "entropy"):
        shutil.rmtree(root / made)
    config = pipeline.ingested(
        root,
        source=pipeline.JsonlSource((str(file),)),
        max_bad_fraction=1.0,
        max_lost_fraction=1.0,
    )
    try:
        ended = run_here(lambda: pipeline.ingest.run(config) and None)
        if ended.status is None or ended.words.count("\n"):
            return "hostile contents", name, Outcome.TRACEBACK, ended.words
        if ended.status:
            return "hostile contents", name, Outcome.UNREPAIRED, ended.words
        corpus = load_corpus(root / "corpus")
        counts = corpus.artifact.manifest.counts
        texts = corpus.columns(0, ["text"])["text"].to_pylist()
        kept = [text for text in texts if text in set(good)]
        order = [json.loads(line)["text"] for line in mixed if line in set(lines)]
        whole = counts["rows"] == counts["documents"] + sum(counts["dropped"].values())
        if kept != order or not whole or counts["documents"] != len(texts):
            return "hostile contents", name, Outcome.WRONG, f"{counts} {len(order)} {len(kept)}"
        ended = workshop.run("entropy")
        if ended.status is None or ended.words.count("\n"):
            return "hostile contents", "entropy", Outcome.TRACEBACK, ended.words
        if ended.status:
            return "hostile contents", "entropy", Outcome.UNREPAIRED, ended.words
        if load_artifact(root / "entropy").manifest.rows != len(texts):
            return "hostile contents", "entropy", Outcome.WRONG, "rows"
        return "hostile contents", name, Outcome.IDENTICAL, ""
    finally:
        file.unlink()


TRIALS = {
    full_disk: Kind(0.06, of_makers((False, True))),
    clocks: Kind(
        0.05,
        lambda workshop: [
            case for case in of_makers(_CLOCKS)(workshop) if case != ("weights", "at once")
        ],
    ),
    hostile_names: Kind(0.04, of_makers()),
    hostile_contents: Kind(0.02, lambda _: [()]),
}
