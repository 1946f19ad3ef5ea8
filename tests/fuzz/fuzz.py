"""A long run of the fuzzer: python tests/fuzz/fuzz.py TARGET [--seconds=3600]

With atheris (pip install atheris) inputs are guided by coverage; without it they are mutations of
the seeds. A finding is a traceback, more than 4 GiB of memory, or an input that takes over 10 s.
"""

from __future__ import annotations

import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))


def mutations(seeds: tuple[bytes, ...], rng: random.Random) -> Iterator[bytes]:
    """Yield endless mutations: bits, bytes, cuts, repetitions, splices, tokens of formats."""
    tokens = [
        b"[",
        b"{",
        b"null",
        b"-1",
        b"1e999",
        b"\xff" * 8,
        b"\0",
        b'"',
        b"9" * 400,
        b"\\u0000",
    ]
    while True:
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 6)):
            at = rng.randint(0, len(content))
            kind = rng.randrange(6)
            if kind == 0 and content:
                content[at - 1] ^= 1 << rng.randrange(8)
            elif kind == 1:
                content[at:at] = rng.randbytes(rng.randint(1, 8))
            elif kind == 2:
                del content[at : at + rng.randint(1, 16)]
            elif kind == 3:
                piece = content[at : at + rng.randint(1, 16)] or rng.choice(tokens)
                content[at:at] = piece * rng.choice((2, 50, 3000))
            elif kind == 4:
                content[at : at + rng.randint(0, 4)] = rng.choice(tokens)
            else:
                other = rng.choice(seeds)
                content[at:] = other[rng.randint(0, len(other)) :]
        yield bytes(content)


def main(arguments: list[str]) -> int:
    try:
        import atheris
    except ImportError:
        atheris, instrumented = None, contextlib.nullcontext()
    else:
        instrumented = atheris.instrument_imports(include=["models", "pruning", "targets"])
    with instrumented:
        from targets import TARGETS

    names = [name for name in arguments if not name.startswith("--")]
    seconds = next((float(a.partition("=")[2]) for a in arguments if "seconds=" in a), 3600.0)
    if len(names) != 1 or names[0] not in TARGETS:
        print(f"usage: fuzz.py TARGET [--seconds=N]; targets: {', '.join(TARGETS)}")
        return 2
    target = TARGETS[names[0]]

    def once(content: bytes) -> None:
        with contextlib.suppress(*target.errors):
            target.read(content)

    if atheris is None:
        rng, end = random.Random(0), time.monotonic() + seconds
        for content in mutations(target.seeds, rng):
            once(content)
            if time.monotonic() > end:
                break
        return 0
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(target.seeds):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        limits = [f"-max_total_time={seconds:.0f}", "-rss_limit_mb=4096", "-timeout=10"]
        atheris.Setup([sys.argv[0], *limits, "-max_len=100000", corpus], once)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
