"""A report on score sets: agreement, dependence on length, and examples at each decile.

    python -m evaluation scores --gin_file=configs/evaluate/scores.gin --gin.CORPUS=runs/c4/corpus

For score columns of one corpus the report shows rank agreement (Kendall's tau-b, Spearman's rho,
overlap of the top) between every pair and with the document's length, histograms by source and by
what a selection kept, examples at every decile, and of judges what they answered. With labels it
shows how well each score tells the good documents.

    scores/index.html       the page; needs no network, runs no script
    scores/report.json      everything in it, the examples included
    scores/agreement.csv    a row per pair
    scores/deciles.csv      a row per score and decile
    scores/labels.csv       a row per score, where there are labels

Choices
- Documents are sampled by their hashes. The sample does not depend on the number of shards, and
  memory does not grow with the corpus.
- Scores have the sign with which the sampler keeps the highest first ("-nll_mean"), so "top" means
  the same for all.
- Length is a column like the others: a score that correlates with length is not quality alone.
- Texts come from the web and are hostile: Jinja escapes all of them, the page's policy forbids
  scripts and requests, control characters are shown as marks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from evaluation.report import document_text, histograms, labels, templates
from evaluation.report.judge_answers import Answers
from evaluation.statistics import rank_agreement
from evaluation.statistics.rank_agreement import Agreement
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import load_selection
from pruning.scores.terms import CORPUS, SCORED, Combination, Term, read_scores
from pruning.store import progress, randomness
from pruning.store.artifact import Artifact, load_artifact, require_input
from pruning.store.atomic import write_text
from pruning.store.manifest import ArtifactError
from pruning.store.randomness import Stream

NAME = "ScoreReport"
LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class ScoreReportConfig:
    """Settings of `scores`.

    Attributes:
      corpus: directory of the corpus.
      scores: name -> directory of a score set of it.
      values: name -> what is looked at, named as for `select` ("ask_llm", "column:quality"); with a
        minus in front where the lower value is the better one ("-nll_mean"). The names are those of
        `scores`; two values of one score set need its directory under two names, and columns of the
        corpus ("corpus:score") none.
      output: directory of the report.
      within: a selection; other documents are left out.
      label: the name in `values` of what counts as the truth; the others are compared with it.
      label_from: a document is good from this value of the label on.
      selection: a selection; histograms tell what it kept from what it dropped.
      source_column: of the corpus; histograms tell its most frequent values apart.
      top: share of the documents that counts as the top.
      max_documents: more than these are sampled.
      examples: documents shown of every decile.
      example_length: characters shown of each.
      seed: of the sample and the examples.
    """

    corpus: str
    scores: Mapping[str, str]
    values: Mapping[str, str]
    output: str
    within: str | None = None
    label: str | None = None
    label_from: float | None = None
    selection: str | None = None
    source_column: str = "source"
    top: float = 0.2
    max_documents: int = 100_000
    examples: int = 2
    example_length: int = 700
    seed: int = 0

    def __post_init__(self) -> None:
        terms = {name: term_of(name, value) for name, value in self.values.items()}
        stored = {name for name, term in terms.items() if term.source != CORPUS}
        if set(self.scores) != stored or not self.values:
            raise ValueError(
                "scores and values name the same things, one or more, but for columns of the "
                f"corpus: {sorted(self.scores)} and {sorted(stored)}."
            )
        for name in (LENGTH, labels.RANDOM):
            if name in self.values:
                raise ValueError(f"{name!r} is a column of the report: name the score otherwise.")
        if (self.label is None) != (self.label_from is None):
            raise ValueError("label and label_from go together.")
        if self.label is not None and self.label not in self.values:
            raise ValueError(f"label is one of the names in values, not {self.label!r}.")
        if not 0 < self.top < 1 or self.max_documents < 10:
            raise ValueError("top is a share below 1, and max_documents 10 or more.")


CONFIGURABLES: dict[str, type] = {NAME: ScoreReportConfig}


def run(config: ScoreReportConfig) -> list[str]:
    """Write the report and return its path.

    Raises:
      ArtifactError: a score set belongs to another corpus, or lacks a column.
      ScoreError: a value has no such name.
    """
    found = Found.read(config)
    table = rank_agreement.compare(
        found.columns, found.doc_ids, config.top, config.max_documents, config.seed
    )
    described = describe(config, found, table)
    output = epath.Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    tables = {"agreement": _pairs(table), "deciles": _decile_rows(described)}
    if described["labels"]:
        tables["labels"] = labels.rows(described["labels"]["scores"])
    for name, rows in tables.items():
        write_text(output / f"{name}.csv", document_text.table(rows))
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    write_text(output / "report.json", text)
    write_text(output / "index.html", _page(described, table))
    return [str(output / "index.html")]


# --------------------------------------------------------------------------------------------------
# The scores


@dataclasses.dataclass(frozen=True)
class Found:
    """A sample of documents with their scores.

    Attributes:
      doc_ids: int64 [documents].
      columns: name -> float64 [documents], higher is better, NaN where there is none; the last is
        the document's length in tokens.
      kept: bool [documents], those of the selection; None without one.
      source: strings [documents], of the source column; None where the corpus has none.
      statuses: name -> how many of the sample are "ok", or why not.
      answers: what judges answered.
      inputs: what was read.
      of: documents that the sample is of.
    """

    corpus: Corpus
    doc_ids: np.ndarray
    columns: Mapping[str, np.ndarray]
    kept: np.ndarray | None
    source: np.ndarray | None
    statuses: Mapping[str, Counter[str]]
    answers: Answers
    inputs: Mapping[str, Artifact]
    of: int

    @classmethod
    def read(cls, config: ScoreReportConfig) -> Found:
        corpus = load_corpus(config.corpus)
        sets = {name: load_artifact(path, "scores") for name, path in config.scores.items()}
        for score_set in sets.values():
            require_input(score_set, "corpus", corpus.artifact)
        within = load_selection(config.within, corpus.artifact) if config.within else None
        selection = load_selection(config.selection, corpus.artifact) if config.selection else None
        source = [config.source_column] if config.source_column in corpus.metadata else []
        documents = corpus.artifact.manifest.rows if within is None else within.documents
        if documents == 0:
            raise ArtifactError(f"{config.within or config.corpus} has no documents.")
        terms = {name: term_of(name, value) for name, value in config.values.items()}
        share = 1.05 * config.max_documents / documents
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*terms, LENGTH, "doc_id")}
        kept, sources = [np.zeros(0, bool)], [np.zeros(0, object)]
        statuses: dict[str, Counter[str]] = {name: Counter() for name in terms}
        answers = Answers(sets)
        with progress.track("read scores", corpus.num_shards, "shards") as task:
            for shard in range(corpus.num_shards):
                table = corpus.columns(shard, ["doc_id", "n_tokens", *source])
                ids = table["doc_id"].to_numpy()
                chosen = randomness.uniform(Stream.SCORE_PAGE_SAMPLE, config.seed, ids) < share
                if within is not None:
                    chosen &= within.mask(shard, len(ids))
                parts["doc_id"].append(ids[chosen])
                if selection is not None:
                    kept.append(selection.mask(shard, len(ids))[chosen])
                if source:
                    sources.append(np.asarray(table[source[0]].fill_null("").to_pylist())[chosen])
                parts[LENGTH].append(table["n_tokens"].to_numpy()[chosen].astype(np.float64))
                for name, term in terms.items():
                    one = {name: sets[name]} if name in sets else {}
                    read = read_scores(Combination((term,)), corpus.artifact, one, shard, ids)
                    score = np.where(read.reason == SCORED, read.score, np.nan)
                    parts[name].append(score[chosen])
                    codes = read.reason[chosen].tolist()
                    statuses[name].update(read.reasons[code] for code in codes)
                answers.add(corpus.artifact, shard, ids, chosen)
                task.advance()
        joined = {name: np.concatenate(part) for name, part in parts.items()}
        inputs = {"corpus": corpus.artifact, **sets}
        if within is not None:
            inputs["within"] = within.artifact
        if selection is not None:
            inputs["selection"] = selection.artifact
        doc_ids = joined.pop("doc_id")
        return cls(
            corpus,
            doc_ids,
            joined,
            None if selection is None else np.concatenate(kept),
            np.concatenate(sources).astype(str) if source else None,
            statuses,
            answers,
            inputs,
            documents,
        )


def term_of(name: str, value: str) -> Term:
    """Return the term of a value such as "-nll_mean" in the score set of this name."""
    return Term(value.removeprefix("-"), -1.0 if value.startswith("-") else 1.0, name)


def describe(config: ScoreReportConfig, found: Found, table: Agreement) -> dict[str, Any]:
    """Return the report as JSON values."""
    place = {name: i for i, name in enumerate(table.names)}
    members = histograms.groups(found.kept, found.source, found.columns[LENGTH])
    compared = None
    if config.label is not None and config.label_from is not None:
        compared = {
            "label": config.label,
            "value": config.values[config.label],
            "good_from": config.label_from,
            "scores": labels.compare(
                found.columns, config.label, config.label_from, LENGTH, found.doc_ids, config.seed
            ),
        }
    scores: list[dict[str, Any]] = []
    for name, value in config.values.items():
        values = found.columns[name]
        i, j = place[name], place[LENGTH]
        scores.append(
            {
                "name": name,
                "value": value,
                "statuses": dict(sorted(found.statuses[name].items())),
                "length": {
                    "kendall": _number(table.kendall[i, j]),
                    "spearman": _number(table.spearman[i, j]),
                },
                "histogram": histograms.histogram(values, members),
                "probability": _as_probability(value, values, members),
                "deciles": deciles(
                    values, found.columns[LENGTH], found.doc_ids, config.examples, config.seed
                ),
            }
        )
    wanted = {e for score in scores for decile in score["deciles"] for e in decile["examples"]}
    documents = document_text.documents(found.corpus.artifact, np.asarray(sorted(wanted), np.int64))
    texts = {doc_id: document["text"] for doc_id, document in documents.items()}
    lengths = dict(zip(found.doc_ids.tolist(), found.columns[LENGTH].tolist(), strict=True))
    for score in scores:
        known = dict(
            zip(found.doc_ids.tolist(), found.columns[score["name"]].tolist(), strict=True)
        )
        for decile in score["deciles"]:
            decile["examples"] = [
                {
                    "doc_id": doc_id,
                    "score": known[doc_id],
                    "n_tokens": int(lengths[doc_id]),
                    "text": texts[doc_id][: config.example_length],
                    "cut": len(texts[doc_id]) > config.example_length,
                }
                for doc_id in decile["examples"]
            ]
    return {
        "documents": len(found.doc_ids),
        "of": found.of,
        "top": config.top,
        "chance_overlap": table.chance_overlap,
        "agreement": {
            "names": list(table.names),
            **{
                name: [[_number(value) for value in row] for row in matrix]
                for name, matrix in _matrices(table).items()
            },
            "documents": table.documents.tolist(),
        },
        "labels": compared,
        "answers": found.answers.described(found.doc_ids, config.top, config.seed),
        "scores": scores,
        "inputs": {name: one.as_input() for name, one in found.inputs.items()},
    }


def _as_probability(
    value: str, values: np.ndarray, members: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """Return the name and the histogram of the probability of a score; None if it has none."""
    sign = -1.0 if value.startswith("-") else 1.0
    probability = histograms.PROBABILITIES.get(value.removeprefix("-"))
    if probability is None:
        return None
    found = histograms.histogram(probability.of(sign * values), members, (0.0, 1.0))
    return {"name": probability.name, **found}


def deciles(
    values: np.ndarray, lengths: np.ndarray, doc_ids: np.ndarray, examples: int, seed: int
) -> list[dict[str, Any]]:
    """Return ten parts of the documents by score, the lowest first.

    Args:
      values: float64 [documents], NaN where there is none.
      lengths: [documents], in tokens.
      doc_ids: int64 [documents].
      examples: ids to name of each, drawn by their hashes and in the order of their score.

    Returns:
      Per decile: lowest and highest score, documents, mean length, ids.
    """
    rows = np.flatnonzero(~np.isnan(values))
    rows = rows[np.argsort(values[rows], kind="stable")]
    found = []
    for number, members in enumerate(np.array_split(rows, 10)):
        drawn = members[
            np.argsort(randomness.hashed(Stream.SCORE_PAGE_EXAMPLE, seed, doc_ids[members]))[
                :examples
            ]
        ]
        drawn = drawn[np.argsort(values[drawn], kind="stable")]
        found.append(
            {
                "decile": number + 1,
                "documents": len(members),
                "low": _number(values[members].min(initial=np.inf)),
                "high": _number(values[members].max(initial=-np.inf)),
                "mean_tokens": _number(lengths[members].mean() if len(members) else np.nan),
                "examples": doc_ids[drawn].tolist(),
            }
        )
    return found


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# --------------------------------------------------------------------------------------------------
# Tables and page


def _matrices(table: Agreement) -> dict[str, np.ndarray]:
    return {"kendall": table.kendall, "spearman": table.spearman, "overlap": table.overlap}


def _pairs(table: Agreement) -> Iterable[Sequence[Any]]:
    yield "a", "b", "documents", "kendall_tau_b", "spearman", "top_overlap"
    for i, a in enumerate(table.names):
        for j in range(i + 1, len(table.names)):
            agreed = (matrix[i, j] for matrix in _matrices(table).values())
            yield a, table.names[j], table.documents[i, j], *agreed


def _decile_rows(described: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    names = ("decile", "documents", "low", "high", "mean_tokens")
    yield ("score", *names)
    for score in described["scores"]:
        for decile in score["deciles"]:
            yield (score["name"], *(decile[name] for name in names))


def _page(described: Mapping[str, Any], table: Agreement) -> str:
    filters: dict[str, Any] = {
        "number": lambda value: "–" if value is None else f"{value:.3f}".replace("-", "−"),
        "short": lambda value: "–" if value is None else f"{value:.2f}".replace("-", "−"),
        "share": lambda value: "–" if value is None else f"{value:.1%}",
        "shade": _shade,
        "bars": _bars,
        "by_kind": _by_kind,
        "interval": _interval,
    }
    panels = [
        ("Kendall's tau-b", described["agreement"]["kendall"]),
        ("Spearman's rho", described["agreement"]["spearman"]),
        (f"Overlap of the top {table.share:.0%} (Jaccard)", described["agreement"]["overlap"]),
    ]
    return templates.render("score_report.html", filters, report=described, panels=panels)


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    value, low, high = (f"{found[name]:.2f}".replace("-", "−") for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _by_kind(groups: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Divide groups of documents by what they tell apart: the selection, sources, lengths."""

    def kind(group: Mapping[str, Any]) -> str:
        first, separator, _ = group["name"].partition(": ")
        return first if separator else ""

    return [list(members) for _, members in itertools.groupby(groups, kind)]


def _bars(counts: Sequence[int], highest: int | None = None) -> list[dict[str, float]]:
    """Return bars of a histogram for a drawing of width and height 100: x, width, y, height.

    Args:
      highest: the count of a bar of full height; None for that of the highest.
    """
    highest, width = highest or max(max(counts, default=0), 1), 100 / max(len(counts), 1)
    return [
        {
            "x": round(width * i, 3),
            "width": round(0.9 * width, 3),
            "y": round(100 - 100 * count / highest, 2),
            "height": round(100 * count / highest, 2),
        }
        for i, count in enumerate(counts)
    ]


def _shade(value: float | None) -> str:
    """Return the background of a table cell, by the value's distance from 0."""
    if value is None:
        return ""
    colour = "var(--more)" if value > 0 else "var(--less)"
    return f"background: color-mix(in srgb, {colour} {min(abs(value), 1):.0%}, transparent)"
