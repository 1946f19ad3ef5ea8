"""A report on score sets: do they agree, how much of them is length, what lies at each decile?

    python -m evaluation scores --gin_file=configs/evaluate/scores.gin --gin.CORPUS=runs/c4/corpus

Of any score columns of one corpus: rank agreement (Kendall's tau-b, Spearman's rho, overlap of the
top) between every pair and with the document's length, and documents at every decile.

    scores/index.html       to be read; needs no network, runs no script
    scores/report.json      everything in it, the examples included
    scores/agreement.csv    a row per pair
    scores/deciles.csv      a row per score and decile

Choices
- A sample of documents, by their hashes: the same whatever the number of shards, and memory that
  does not grow with the corpus.
- Scores are turned so that higher is what the sampler keeps first ("-nll_mean"): the top means the
  same for all of them.
- Length is a column like the others: what correlates with it is not quality alone.
- Texts come from the web and are hostile: Jinja escapes all of them, the page's policy forbids
  scripts and requests, control characters are shown as marks.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from evaluation import agreement, shown
from evaluation.agreement import Agreement
from pruning import artefact, progress, randomness
from pruning.artefact import Artefact, ArtefactError
from pruning.corpus import Corpus, load_corpus
from pruning.selection import load_selection
from pruning.selection import scores as selection_scores
from pruning.selection.scores import Term

NAME = "ScoreReport"
LENGTH = "length"

_SAMPLE, _EXAMPLES = 5, 6  # streams of random numbers
_HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class ScoreReportConfig:
    """Settings of `scores`.

    Attributes:
      corpus: directory of the corpus.
      scores: name -> directory of a score set of it.
      values: name -> what is looked at, named as for `select` ("ask_llm", "column:quality"); with a
        minus in front where the lower value is the better one ("-nll_mean"). The names are those of
        `scores`; two values of one score set need its directory under two names.
      output: directory of the report.
      within: a selection; other documents are left out.
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
    top: float = 0.2
    max_documents: int = 100_000
    examples: int = 2
    example_length: int = 700
    seed: int = 0

    def __post_init__(self) -> None:
        if set(self.scores) != set(self.values) or not self.scores:
            raise ValueError(
                f"scores and values name the same things, one or more: {sorted(self.scores)} and "
                f"{sorted(self.values)}."
            )
        if LENGTH in self.scores:
            raise ValueError(f"{LENGTH!r} is the document's length: name the score otherwise.")
        if not 0 < self.top < 1 or self.max_documents < 10:
            raise ValueError("top is a share below 1, and max_documents 10 or more.")


CONFIGURABLES: dict[str, type] = {NAME: ScoreReportConfig}


def run(config: ScoreReportConfig) -> list[str]:
    """Writes the report, and says where it is.

    Raises:
      ArtefactError: a score set belongs to another corpus, or lacks a column.
      ScoreError: a value has no such name.
    """
    found = Found.read(config)
    table = agreement.compare(
        found.columns, found.doc_ids, config.top, config.max_documents, config.seed
    )
    described = describe(config, found, table)
    output = epath.Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in (("agreement", _pairs(table)), ("deciles", _decile_rows(described))):
        artefact.write_text(output / f"{name}.csv", shown.table(rows))
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    artefact.write_text(output / "report.json", text)
    artefact.write_text(output / "index.html", _page(described, table))
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
      statuses: name -> how many of the sample are "ok", or why not.
      inputs: what was read.
      of: documents that the sample is of.
    """

    corpus: Corpus
    doc_ids: np.ndarray
    columns: Mapping[str, np.ndarray]
    statuses: Mapping[str, Counter[str]]
    inputs: Mapping[str, Artefact]
    of: int

    @classmethod
    def read(cls, config: ScoreReportConfig) -> Found:
        corpus = load_corpus(config.corpus)
        sets = {name: artefact.load(path, "scores") for name, path in config.scores.items()}
        for score_set in sets.values():
            artefact.require_input(score_set, "corpus", corpus.artefact)
        within = load_selection(config.within, corpus.artefact) if config.within else None
        documents = corpus.artefact.manifest.rows if within is None else within.documents
        if documents == 0:
            raise ArtefactError(f"{config.within or config.corpus} has no documents.")
        terms = {name: term_of(name, value) for name, value in config.values.items()}
        share = 1.05 * config.max_documents / documents
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*terms, LENGTH, "doc_id")}
        statuses: dict[str, Counter[str]] = {name: Counter() for name in terms}
        with progress.track("read scores", corpus.num_shards, "shards") as task:
            for shard in range(corpus.num_shards):
                table = corpus.columns(shard, ["doc_id", "n_tokens"])
                ids = table["doc_id"].to_numpy()
                chosen = randomness.uniform(config.seed, ids, _SAMPLE) < share
                if within is not None:
                    chosen &= within.mask(shard, len(ids))
                parts["doc_id"].append(ids[chosen])
                parts[LENGTH].append(table["n_tokens"].to_numpy()[chosen].astype(np.float64))
                for name, term in terms.items():
                    one = {name: sets[name]}
                    read = selection_scores.read((term,), one, shard, ids)
                    score = np.where(read.reason == selection_scores.OK, read.score, np.nan)
                    parts[name].append(score[chosen])
                    codes = read.reason[chosen].tolist()
                    statuses[name].update(read.reasons[code] for code in codes)
                task.advance()
        joined = {name: np.concatenate(part) for name, part in parts.items()}
        inputs = {"corpus": corpus.artefact, **sets}
        if within is not None:
            inputs["within"] = within.artefact
        doc_ids = joined.pop("doc_id")
        return cls(corpus, doc_ids, joined, statuses, inputs, documents)


def term_of(name: str, value: str) -> Term:
    """ "-nll_mean" as the summand of a score, from the score set of this name."""
    return Term(value.removeprefix("-"), -1.0 if value.startswith("-") else 1.0, name)


def describe(config: ScoreReportConfig, found: Found, table: Agreement) -> dict[str, Any]:
    """The report as JSON values."""
    place = {name: i for i, name in enumerate(table.names)}
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
                "deciles": deciles(
                    values, found.columns[LENGTH], found.doc_ids, config.examples, config.seed
                ),
            }
        )
    wanted = {e for score in scores for decile in score["deciles"] for e in decile["examples"]}
    documents = shown.documents(found.corpus.artefact, np.asarray(sorted(wanted), np.int64))
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
        "scores": scores,
        "inputs": {name: one.as_input() for name, one in found.inputs.items()},
    }


def deciles(
    values: np.ndarray, lengths: np.ndarray, doc_ids: np.ndarray, examples: int, seed: int
) -> list[dict[str, Any]]:
    """Ten parts of the documents by score, the lowest first.

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
        drawn = members[np.argsort(randomness.hashed(seed, doc_ids[members], _EXAMPLES))[:examples]]
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
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    filters: dict[str, Any] = {
        "count": lambda number: f"{number:,}",
        "number": lambda value: "–" if value is None else f"{value:.3f}".replace("-", "−"),
        "short": lambda value: "–" if value is None else f"{value:.2f}".replace("-", "−"),
        "shade": _shade,
        "printable": shown.printable,
    }
    environment.filters |= filters
    panels = [
        ("Kendall's tau-b", described["agreement"]["kendall"]),
        ("Spearman's rho", described["agreement"]["spearman"]),
        (f"Overlap of the top {table.share:.0%} (Jaccard)", described["agreement"]["overlap"]),
    ]
    style = (_HERE / "report" / "page.css").read_text(encoding="utf-8")
    template = environment.get_template("score_report.html")
    return template.render(report=described, panels=panels, style=style)


def _shade(value: float | None) -> str:
    """The background of a cell, by how far the value is from 0."""
    if value is None:
        return ""
    colour = "var(--more)" if value > 0 else "var(--less)"
    return f"background: color-mix(in srgb, {colour} {min(abs(value), 1):.0%}, transparent)"
