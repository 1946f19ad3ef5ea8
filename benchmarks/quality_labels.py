"""The quality score beside labels that it was not taught by: AUC, with length and random.

    WINNOW_DATA=../shared/data PYTHONPATH=. python benchmarks/quality_labels.py

Learns the model of configs/score/quality.gin and compares `quality`, its parts, length and a random
score with labels of other kinds, by people and by others. A source that taught a part is marked;
in its row `quality` leaves that part out, and the part's own figure is out of fold. Half of the
documents of a graded source are good: those above the median grade.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pruning.cli import configuration
from pruning.scores.distilled.damage import KINDS, damaged
from pruning.scores.intervals import auc, auc_interval
from pruning.scores.text import hashing, quality
from pruning.scores.text.quality import PARTS

DATA = Path(os.environ.get("WINNOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
CORPUS = DATA / "corpus"
MOST = 1500  # documents of a source

GOOD_FORMATS = {0, 2, 7, 10, 11, 22}  # academic, creative, knowledge, news, nonfiction, tutorial
BAD_FORMATS = {1, 12, 16, 18, 19}  # listing, about an organization, product, advertising, data


class Labels(NamedTuple):
    """Documents and their labels.

    Attributes:
      name: what is good about the good ones, and who says so.
      texts, good: documents, and whether they are good, bool [documents].
      taught: the part of `quality` that was taught by this source, if any.
    """

    name: str
    texts: list[str]
    good: np.ndarray
    taught: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bindings = [
        f"DATA = '{CORPUS}'",
        "CORPUS = ''",
        "OUTPUT = ''",
        f"Quality.folds = {options.folds}",
        f"Quality.seed = {options.seed}",
    ]
    config = configuration.build(
        quality.NAME, quality.CONFIGURABLES, ["configs/score/quality.gin"], bindings
    )
    model, summary = quality.learn(config)
    print(json.dumps(summary, indent=1))
    columns = ("quality", *PARTS, "random")
    print(f"| labels | documents | {' | '.join(columns)} |\n{'|---' * (len(columns) + 2)}|")
    for labels in sources():
        column = pa.array(labels.texts, pa.large_string())
        parts = np.concatenate([model.parts(batch) for batch in hashing.batches(column)])
        known = np.isfinite(parts).all(axis=1)
        parts, good = parts[known], labels.good[known]
        weights = np.array(model.weights)
        if labels.taught:
            weights[PARTS.index(labels.taught)] = 0.0
        scaled = np.clip((parts - model.mean) / model.spread, -3, 3)
        total = auc_interval((scaled @ weights)[good], (scaled @ weights)[~good])
        assert total is not None
        cells = [f"**{total.value:.2f}** [{total.low:.2f}, {total.high:.2f}]"]
        for i, name in enumerate(PARTS):
            mark = "*" if name == labels.taught else ""
            cells.append(f"{auc(parts[good, i], parts[~good, i]):.2f}{mark}")
        draw = np.random.default_rng(0).random(len(good))
        cells.append(f"{auc(draw[good], draw[~good]):.2f}")
        print(f"| {labels.name} | {len(good):,} | {' | '.join(cells)} |", flush=True)


def sources() -> Iterator[Labels]:
    """Yield every source of labels."""
    texts, share = [], []
    for part in ("train", "dev", "test"):
        file = CORPUS / "quality_human" / f"turku_line_quality_en_{part}.json.gz"
        for document in json.loads(gzip.decompress(file.read_bytes())):
            lengths = np.array([len(line) for line in document["text"]], float)
            main = np.array([str(label) == "1" for label in document["labels"]])
            texts.append("\n".join(document["text"]))
            share.append(lengths[main].sum() / max(lengths.sum(), 1))
    yield graded("share of main text, lines labeled by people", texts, share)
    pages = sample(records("web_pages/html_cleaning_pages.jsonl.gz"))
    pages = [page for page in pages if page["gold_text"] and page["raw_text"].strip()]
    half = len(pages) // 2
    texts = [page["gold_text"] for page in pages[:half]]
    texts += [page["raw_text"] for page in pages[half : 2 * half]]
    good = np.repeat([True, False], half)
    yield Labels("main text marked by people against other whole pages", texts, good, "main_text")
    levels = records("quality_human/onestopenglish.jsonl.gz")
    levels = [one for one in levels if one["level"].lower()[:3] in ("adv", "ele")]
    good = np.array([one["level"].lower().startswith("adv") for one in levels])
    yield Labels("original news against texts rewritten for learners", texts_of(levels), good)
    rubric = records("web/scored/customdclm_llm_rubric.jsonl.gz")
    rubric = [one for one in rubric if one["category"] in ("blogs", "news")]
    grades = [one["scores"]["overall_pretraining_utility"] for one in rubric]
    yield graded("utility for pretraining by a large model, C4", texts_of(rubric), grades)
    scored = records("web/scored/fineweb_edu_classifier_english.jsonl.gz")
    grades = [float(one["score"]) for one in scored]
    yield graded("FineWeb-Edu score, FineWeb", texts_of(scored), grades, "educational")
    dolma = records("web/scored/dolma_quality_classifiers.jsonl.gz")
    name = "fineweb_edu_classifier_score"
    grade = [[each[name] for each in one["classifiers"].values() if name in each] for one in dolma]
    some = [i for i, found in enumerate(grade) if found]
    yield graded(
        "FineWeb-Edu score, lower-cased passages", [dolma[i]["text"] for i in some],
        [max(grade[i]) for i in some],
    )  # fmt: skip
    pages = records("web/scored/weborganizer_examples.jsonl.gz")
    pages = [one for one in pages if float(one["format_confidence"]) > 0.7]
    kinds = GOOD_FORMATS | BAD_FORMATS
    pages = sample([one for one in pages if int(one["format_id"]) in kinds])
    good = np.array([int(one["format_id"]) in GOOD_FORMATS for one in pages])
    yield Labels("articles against listings, products and advertising", texts_of(pages), good)
    crawl = texts_of(records("web/dolma_cc_2019-30.jsonl.gz"))
    linked = texts_of(records("web/mimir_openwebtext2.jsonl.gz"))[: len(crawl)]
    good = np.repeat([True, False], [len(linked), len(crawl)])
    name = "pages that people link to against pages of a crawl"
    yield Labels(name, [*linked, *crawl], good, "edited")
    web = texts_of(sample(records("web/mimir_pile_cc.jsonl.gz")))[:600]
    kinds = tuple(KINDS)
    bad = [
        damaged(text, kinds[i % len(kinds)], 0.5, 0, i, web[i - 1]) for i, text in enumerate(web)
    ]
    rows = np.arange(600) < 300
    texts = [text if row else poor for text, poor, row in zip(web, bad, rows, strict=True)]
    yield Labels("intact against damaged documents, strength 0.5", texts, rows)


def graded(name: str, texts: list[str], grades: Any, taught: str | None = None) -> Labels:
    """Return labels from grades: good above the median."""
    grades = np.asarray(grades, float)
    good = grades > np.median(grades)
    return Labels(name, texts, good if good.mean() > 0.2 else grades >= np.median(grades), taught)


def records(file: str) -> list[dict[str, Any]]:
    with gzip.open(CORPUS / file, "rt") as lines:
        return [json.loads(line) for line in lines]


def sample(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = np.random.default_rng(0).permutation(len(rows))[:MOST]
    return [rows[i] for i in order]


def texts_of(rows: list[dict[str, Any]]) -> list[str]:
    return [row["text"] for row in rows]


if __name__ == "__main__":
    main()
