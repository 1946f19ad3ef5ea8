"""Cascades over a corpus whose documents a judge has all scored: promises kept, questions asked.

    python benchmarks/cascade_text.py --corpus=runs/web --judged=runs/web_judge --tokens=64
    python benchmarks/cascade_text.py --corpus=runs/legal --score=corpus:score

The judge's scores are looked up. In each seed another sample teaches the n-gram student, which is
fitted in the run, another sample certifies, and the cascade's selection is compared with the
judge's own. Floors are cascades whose cheap score is the length of the document, or random.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections import Counter

import numpy as np
from scipy import stats

from pruning.corpus.reader import load_corpus
from pruning.scores.content import content_hashes
from pruning.scores.distilled.ngram_student import DistillConfig, cross_fitted, features
from pruning.scores.score_set import KIND
from pruning.scores.text.linear import Bags
from pruning.scores.text.pieces import Pieces
from pruning.scores.text.texts import Texts
from pruning.selection.cascade.decide import Cascade, Population, Promise
from pruning.selection.cascade.documents import Documents
from pruning.selection.cascade.labels import normal_scores
from pruning.store import randomness
from pruning.store.artifact import load_artifact
from pruning.store.randomness import Stream

KEPT = (0.1, 0.2, 0.5)


def read(documents: Documents, pieces: Pieces) -> tuple[Bags, np.ndarray]:
    """Return the features and the content hashes of all documents."""
    bags, hashes = [], []
    for shard in range(documents.corpus.num_shards):
        rows = documents.ids[documents.starts[shard] : documents.starts[shard + 1]] & 0xFFFF_FFFF
        for batch in Texts(documents.corpus).read(shard, rows, pieces):
            bags.append(pieces.bags(pieces.ngrams(batch)))
            hashes.append(content_hashes(batch, pieces.first))
    return Bags.join(bags), np.concatenate(hashes)


def student(
    config: DistillConfig,
    pieces: Pieces,
    bags: Bags,
    hashes: np.ndarray,
    known: np.ndarray,
    target: np.ndarray,
) -> tuple[np.ndarray, str, float]:
    """Return out-of-fold predictions of every document, as `distill` makes them.

    Also returns what was chosen, and the CPU seconds of the predictions, features not included.
    """
    rows = np.flatnonzero(known)
    learned = normal_scores(target[rows])
    model, l2 = cross_fitted(config, pieces, bags.take(rows), learned, hashes[rows])
    assert isinstance(model.features, Pieces)
    few, began = bags.below(model.features.size), time.process_time()
    found = model(few, model.folds.of(hashes))
    choice = f"l2 {l2:g}, {model.features.places} places"
    return found, choice, time.process_time() - began


def places_of(cheap: np.ndarray, ties: np.ndarray) -> np.ndarray:
    places = np.empty(len(cheap), np.int64)
    places[np.lexsort((ties, cheap))] = np.arange(len(cheap))
    return places


def recall(cheap: np.ndarray, judge: np.ndarray, share: float) -> float:
    """Return the share of the judge's best documents that the cheap score has among its best."""
    best = max(round(share * len(judge)), 1)
    return len(np.intersect1d(np.argsort(-cheap)[:best], np.argsort(-judge)[:best])) / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--judged", help="a score set; without one, --score is corpus:NAME")
    parser.add_argument("--score", default="ask_llm")
    parser.add_argument("--target", help="what the student learns, if not --score")
    parser.add_argument("--tokens", type=int, help="tokens of a document that the judge reads")
    parser.add_argument("--prompt", type=int, default=0, help="tokens of the judge's prompt")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--share", type=float, default=0.95)
    parser.add_argument("--teach", type=float, default=0.05)
    parser.add_argument("--l2", type=float, nargs="+", default=DistillConfig.l2)
    parser.add_argument("--places", type=int, default=DistillConfig.places)
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()

    started = time.process_time()
    corpus = load_corpus(arguments.corpus)
    judged = None if arguments.judged is None else load_artifact(arguments.judged, KIND)
    documents = Documents.of(corpus, None, judged)
    judge = documents.read(judged, arguments.score)
    target = documents.read(judged, arguments.target or arguments.score)
    distill = DistillConfig(
        "", "", "-", tokens=arguments.tokens, l2=tuple(arguments.l2), places=arguments.places
    )
    pieces = features(distill, arguments.tokens)
    began = time.process_time()
    bags, hashes = read(documents, pieces)
    scoring = time.process_time() - began
    asks = arguments.prompt + np.minimum(documents.n_tokens, arguments.tokens or 1 << 30)
    n, some = len(documents), np.isfinite(judge)
    print(
        f"{n:,} documents, {some.sum():,} with a score, {time.process_time() - started:.0f} s CPU"
    )
    budget = round(arguments.keep * documents.pool["documents"])
    rows: dict[str, list[tuple[float, ...]]] = {"student": [], "length": [], "random": []}
    predicting, quality, choices = 0.0, [], Counter[str]()
    for seed in range(arguments.seeds):
        ties = randomness.hashed(Stream.SELECTION_TIE, seed, documents.ids)
        order = np.lexsort((ties, np.where(some, judge, -np.inf)))[::-1][:budget]
        own = np.zeros(n, bool)
        own[order] = True
        drawn = randomness.uniform(Stream.CASCADE_TEACH, seed, documents.ids) < arguments.teach
        taught, choice, predicting = student(
            dataclasses.replace(distill, seed=seed),
            pieces,
            bags,
            hashes,
            drawn & np.isfinite(target),
            target,
        )
        choices[choice] += 1
        cheap = {
            "student": taught,
            "length": documents.n_tokens.astype(np.float64),
            "random": randomness.uniform(Stream.EXPERIMENT, seed, documents.ids),
        }
        held = some & ~drawn
        quality.append(
            (
                stats.spearmanr(cheap["student"][held], judge[held]).statistic,
                *(recall(cheap["student"][held], judge[held], share) for share in KEPT),
            )
        )
        for name, score in cheap.items():
            population = Population(
                documents.ids, places_of(score, ties), np.ones(n, np.int64), ties
            )
            cascade = Cascade(
                population, Promise(budget, arguments.share), lambda _, rows: judge[rows], seed
            )
            cascade.learned("teach", drawn, arguments.teach)
            predicted = cascade.make_plan().asked + drawn.sum()
            predicted = n if cascade.asks_everything else predicted
            outcome = cascade.settle()
            rows[name].append(
                (
                    float((own & outcome.kept).sum() / own.sum()),
                    outcome.certified,
                    float(outcome.answered.mean()),
                    predicted / n,
                    float(asks[outcome.answered].sum() / asks.sum()),
                )
            )
    rho, *recalls = np.mean(quality, axis=0)
    shown = ", ".join(f"{share:.0%}: {r:.3f}" for share, r in zip(KEPT, recalls, strict=True))
    print(
        f"student: Spearman {rho:.3f}, recall at {shown}; {arguments.teach:.0%} taught; "
        f"chosen: {dict(choices)}; {n / (scoring + predicting):,.0f} documents per CPU second"
    )
    print("| cheap score | seeds | broken | shared, mean | least | certified | asked | predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in rows.items():
        shared, certified, asked, predicted, cost = np.array(found).T
        print(
            f"| {name} | {len(found)} | {np.sum(shared < arguments.share - 1e-12)} | "
            f"{shared.mean():.3f} | {shared.min():.3f} | {certified.mean():.3f} | "
            f"{asked.mean():.3f} ({cost.mean():.3f} of the judge's tokens) | "
            f"{predicted.mean():.3f} |"
        )
    print(f"{time.process_time() - started:.0f} s CPU in all")


if __name__ == "__main__":
    main()
