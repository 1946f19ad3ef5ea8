"""The corpus of the study on real text (docs/study.md), as JSON lines.

    python benchmarks/study_corpus.py runs/study_corpus

writes into the directory, from the files under WINNOW_DATA:

    mixture/*.jsonl   what is pruned: C4, novels, film reviews and web pages with their
                      boilerplate, without exact duplicates; and planted in it near-duplicates
                      and damage
    good/*.jsonl      a textbook, news, speeches, Wikipedia: a target for some samplers, and what
                      the models are judged by; the study divides it
    c4/*.jsonl        C4 that is not in the mixture

Every document has `text`, `source` (its kind, such as "damaged: truncated") and `domain`.

Choices
- Documents are pieces of at most 2,000 characters, so that no kind rules by its length.
- A near-duplicate is a document of the mixture with a few words replaced, three copies of each, so
  that it is found by likeness and not by equality.
- Damage is that of pruning/scores/distilled/damage.py, of all kinds, at two strengths.
- Everything follows from the order of the files and one seed.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import xxhash

from pruning.scores.distilled.damage import KINDS, damaged

DATA = Path(os.environ.get("WINNOW_DATA", Path(__file__).parents[2] / "shared" / "data")) / "corpus"
LONGEST, SHORTEST = 2000, 200  # characters
SIZES = {"C4": 2700, "novels": 1200, "reviews": 1200, "web pages": 1200}
DUPLICATED, COPIES = 300, 3
DAMAGED, STRENGTHS = 1000, (0.5, 1.0)
HELD_OUT_C4 = 250
SEED = 0

Document = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsItIs)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    mixture, held_out = base()
    write(output / "c4", held_out)
    write(output / "good", list(good()))
    write(output / "mixture", mixture + list(near_duplicates(mixture)) + list(spoilt(mixture)))


_AsItIs = argparse.RawDescriptionHelpFormatter


def base() -> tuple[list[Document], list[Document]]:
    """The mixture before anything is planted, without exact duplicates, and C4 that is held out."""
    kinds = {"C4": c4(), "novels": novels(), "reviews": reviews(), "web pages": web_pages()}
    seen: set[int] = set()
    found: dict[str, list[Document]] = {}
    for kind, documents in kinds.items():
        wanted = SIZES[kind] + (HELD_OUT_C4 if kind == "C4" else 0)
        chosen: list[Document] = []
        for document in documents:
            digest = xxhash.xxh3_64_intdigest(
                " ".join(re.findall(r"\w+", document["text"].lower())).encode()
            )
            if digest not in seen and len(document["text"]) >= SHORTEST:
                seen.add(digest)
                chosen.append(document)
            if len(chosen) == wanted:
                break
        found[kind] = chosen
    held_out, found["C4"] = found["C4"][:HELD_OUT_C4], found["C4"][HELD_OUT_C4:]
    return [document for documents in found.values() for document in documents], held_out


def near_duplicates(mixture: list[Document]) -> Iterator[Document]:
    """Copies with one word in twenty replaced by another of the same document."""
    rng = np.random.default_rng([SEED, 1])
    for index in rng.permutation(len(mixture))[:DUPLICATED].tolist():
        words = mixture[index]["text"].split(" ")
        for _ in range(COPIES):
            copy = list(words)
            for place in rng.integers(len(words), size=max(1, len(words) // 20)).tolist():
                copy[place] = words[int(rng.integers(len(words)))]
            kind = f"near-duplicate of {mixture[index]['source']}"
            yield mixture[index] | {"text": " ".join(copy), "source": kind}


def spoilt(mixture: list[Document]) -> Iterator[Document]:
    """Damaged documents; the intact ones stay in the mixture, too."""
    rng = np.random.default_rng([SEED, 2])
    for number, index in enumerate(rng.permutation(len(mixture))[:DAMAGED].tolist()):
        kind, strength = list(KINDS)[number % len(KINDS)], STRENGTHS[number // len(KINDS) % 2]
        donor = mixture[int(rng.integers(len(mixture)))]["text"]
        text = damaged(mixture[index]["text"], kind, strength, SEED, index, donor)
        if text != mixture[index]["text"]:
            yield mixture[index] | {"text": text, "source": f"damaged: {kind.replace('_', ' ')}"}


# --------------------------------------------------------------------------------------------------
# Sources


def c4() -> Iterator[Document]:
    for row in json_lines("c4/c4_real_merged.jsonl.gz"):
        domain = urlsplit(row["url"] or "").hostname or "c4"
        yield {"text": row["text"][:LONGEST], "source": "C4", "domain": domain}


def novels() -> Iterator[Document]:
    """Pieces of every novel, in turn, so that no author rules."""
    texts = list(json_lines("books/english_novels_a.jsonl.gz"))
    for place in range(1, 200):
        for row in texts:
            if len(row["text"]) > (place + 1) * LONGEST:
                piece = row["text"][place * LONGEST :][:LONGEST].replace("\r\n", "\n")
                yield {"text": piece, "source": "novels", "domain": row["title"]}


def reviews() -> Iterator[Document]:
    for row in json_lines("imdb/aclImdb_train_unsup.jsonl.gz"):
        yield {"text": row["text"][:LONGEST], "source": "reviews", "domain": "imdb.com"}


def web_pages() -> Iterator[Document]:
    """All visible text of a page, menus and notices included; the page's beginning."""
    for row in json_lines("web_pages/html_cleaning_pages.jsonl.gz"):
        domain = urlsplit(row["url"] or "").hostname or row["dataset"]
        yield {"text": row["raw_text"][:LONGEST], "source": "web pages", "domain": domain}


def good() -> Iterator[Document]:
    for row in json_lines("books/openstax_sociology.jsonl.gz"):
        yield from pieces(row["text"], "textbook", "openstax.org")
    for row in json_lines("quality_human/onestopenglish.jsonl.gz"):
        if row["level"] == "advanced":
            yield from pieces(row["text"], "news", "onestopenglish.com")
    for name, kind in (("abc", "news"), ("state_union", "speeches"), ("inaugural", "speeches")):
        with zipfile.ZipFile(DATA / f"nltk/{name}.zip") as archive:
            for file in sorted(archive.namelist()):
                if file.endswith(".txt"):
                    text = archive.read(file).decode("utf-8", errors="replace")
                    yield from pieces(text[:400_000], kind, name)
    with gzip.open(DATA / "news/fnc1_competition_test_bodies.csv.gz", "rt") as file:
        for row in csv.DictReader(io.StringIO(file.read())):
            yield from pieces(row["articleBody"], "news", "fnc1")
    with gzip.open(DATA / "mixed/llamafactory_wiki_demo.txt.gz", "rt") as file:
        yield from pieces(file.read(), "Wikipedia", "wikipedia.org")


def pieces(text: str, source: str, domain: str) -> Iterator[Document]:
    """A text in pieces that end where a line does."""
    piece = ""
    for line in text.replace("\r\n", "\n").split("\n"):
        if piece and len(piece) + len(line) > LONGEST:
            yield {"text": piece[:LONGEST], "source": source, "domain": domain}
            piece = ""
        piece += line + "\n"
    if len(piece) >= SHORTEST:
        yield {"text": piece[:LONGEST], "source": source, "domain": domain}


def json_lines(file: str) -> Iterator[dict]:
    with gzip.open(DATA / file, "rt") as lines:
        for line in lines:
            yield json.loads(line)


def write(directory: Path, documents: list[Document], shards: int = 4) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng([SEED, 3]).permutation(len(documents))
    for shard in range(shards):
        with (directory / f"part-{shard}.jsonl").open("w") as file:
            for index in order[shard::shards].tolist():
                file.write(json.dumps(documents[index], ensure_ascii=False) + "\n")
    print(f"{directory}: {len(documents):,} documents")


if __name__ == "__main__":
    main()
