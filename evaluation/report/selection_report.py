"""A page on selections side by side: overlap, and what each kept by domain, source and length.

    winnow selections --corpus=runs/c4/corpus --selections="('runs/c4/top', 'runs/c4/random')"

    selections/index.html       the page; needs no network, runs no script
    selections/report.json      everything in it
    selections/overlap.csv      a row per combination of selections
    selections/pairs.csv        a row per pair
    selections/retention.csv    a row per group and selection

Choices
- All documents are counted, none is sampled. Memory does not grow with the corpus.
- Shown values of a column are the most frequent of a sample of shards; the others are one group.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from evaluation.report import charts, document_text, overlap, overlap_picture, templates
from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.store import progress
from pruning.store.artifact import Artifact
from pruning.store.atomic import write_text

NAME = "SelectionReport"

_SAMPLED_SHARDS = 32
_NONE = "(none)"
_COLORS = ("#2f7fc4", "#cf6a1a", "#1f9a78", "#c2417c", "#8a63c9", "#b08a00", "#4fa9d8", "#7a5c46")


@dataclasses.dataclass(frozen=True)
class SelectionReportConfig:
    """Settings of `selections`.

    Attributes:
      corpus: directory of the corpus.
      selections: directories of selections of it, or name -> directory; at most 20.
      output: directory of the report.
      within: a selection; other documents are left out.
      by: columns of the corpus by whose values documents are grouped; those that the corpus lacks
        are left out.
      groups: number of values shown of a column.
      combinations: number of combinations of selections shown.
    """

    corpus: str
    selections: Mapping[str, str] | tuple[str, ...]
    output: str
    within: str | None = None
    by: tuple[str, ...] = ("source", "domain")
    groups: int = 20
    combinations: int = 24

    def __post_init__(self) -> None:
        if not 0 < len(self.selections) <= overlap.MOST:
            raise ValueError(f"selections are 1 to {overlap.MOST}, not {len(self.selections)}.")
        if min(self.groups, self.combinations) < 1:
            raise ValueError("groups and combinations must be at least 1.")
        self.named()

    def named(self) -> dict[str, str]:
        """Return name -> directory; without names, as many last parts as tell them apart."""
        if isinstance(self.selections, Mapping):
            return dict(self.selections)
        parts = [path.rstrip("/").split("/") for path in self.selections]
        for depth in range(1, max(map(len, parts)) + 1):
            names = ["/".join(part[-depth:]) for part in parts]
            if len(set(names)) == len(names):
                return dict(zip(names, self.selections, strict=True))
        raise ValueError("selections: a directory is given twice.")


CONFIGURABLES: dict[str, type] = {NAME: SelectionReportConfig}


def run(config: SelectionReportConfig) -> list[str]:
    """Write the report and return its path.

    Raises:
      ArtifactError: a selection was made from another corpus.
    """
    corpus = load_corpus(config.corpus)
    chosen = {name: load_selection(p, corpus.artifact) for name, p in config.named().items()}
    within = load_selection(config.within, corpus.artifact) if config.within else None
    described = describe(config, corpus, chosen, within)
    output = epath.Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "overlap": _combination_rows(described),
        "pairs": _pair_rows(described),
        "retention": _retention_rows(described),
    }.items():
        write_text(output / f"{name}.csv", document_text.table(rows))
    text = json.dumps(described, indent=1, ensure_ascii=False) + "\n"
    write_text(output / "report.json", text)
    write_text(output / "index.html", _page(described, output))
    return [str(output / "index.html")]


def describe(
    config: SelectionReportConfig,
    corpus: Corpus,
    chosen: Mapping[str, Selection],
    within: Selection | None,
) -> dict[str, Any]:
    """Return the report as JSON values."""
    names = list(chosen)
    found = overlap.Patterns(names)
    columns = [column for column in config.by if column in corpus.metadata]
    values = {column: _frequent(corpus, column, config.groups) for column in columns}
    lengths = overlap.Groups(overlap.length_names(), len(names))
    groups = {
        column: overlap.Groups([*shown, "all others"], len(names))
        for column, shown in values.items()
    }
    with progress.track("compare selections", corpus.num_shards, "shards") as task:
        for shard in range(corpus.num_shards):
            table = corpus.columns(shard, ["n_tokens", *columns])
            inside = np.ones(len(table), bool)
            if within is not None:
                inside = within.mask(shard, len(table))
            masks = [one.mask(shard, len(table))[inside] for one in chosen.values()]
            n_tokens = table["n_tokens"].to_numpy()[inside]
            found.add(overlap.patterns(masks), n_tokens)
            lengths.add(np.digitize(n_tokens, overlap.LENGTHS) - 1, masks, n_tokens)
            for column in columns:
                groups[column].add(_places(table[column], values[column])[inside], masks, n_tokens)
            task.advance()
    combinations = found.intersections(config.combinations)
    shown_documents = sum(item["documents"] for item in combinations)
    kept = found.kept()
    for i, item in enumerate(kept):
        item["alone"] = found.documents[1 << i]
    inputs: dict[str, Artifact] = {"corpus": corpus.artifact}
    inputs |= {f"selection {name}": one.artifact for name, one in chosen.items()}
    if within is not None:
        inputs["within"] = within.artifact
    grouped = [{"title": "length in tokens", "rows": lengths.rows()}]
    grouped += ({"title": column, "rows": groups[column].rows()} for column in columns)
    return {
        "documents": found.documents.total(),
        "tokens": found.tokens.total(),
        "selections": kept,
        "combinations": combinations,
        "further": len(set(found.documents) - {0}) - (len(combinations) - 1),
        "further_documents": found.documents.total() - shown_documents,
        "pairs": found.pairs(),
        "groups": [group for group in grouped if len(group["rows"]) > 1],
        "inputs": {name: one.as_input() for name, one in inputs.items()},
    }


def _frequent(corpus: Corpus, column: str, most: int) -> list[str]:
    """Return the most frequent values of a column in a sample of shards, in descending order."""
    shards = np.linspace(0, corpus.num_shards - 1, min(corpus.num_shards, _SAMPLED_SHARDS))
    counts: Counter[str] = Counter()
    for shard in np.unique(shards.astype(int)).tolist():
        values = corpus.columns(shard, [column])[column].fill_null(_NONE)
        for item in values.value_counts().to_pylist():
            counts[item["values"]] += item["counts"]
    return [name for name, _ in sorted(counts.items(), key=lambda x: (-x[1], x[0]))[:most]]


def _places(values: pa.ChunkedArray, shown: Sequence[str]) -> np.ndarray:
    """Return the index of each value in `shown`, int64; its length for any other."""
    import pyarrow.compute as pc

    found = pc.index_in(values.fill_null(_NONE), pa.array(shown, pa.string()))
    return found.fill_null(len(shown)).to_numpy().astype(np.int64)


# --------------------------------------------------------------------------------------------------
# Tables and page


def _combination_rows(described: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    yield "kept_by", "documents", "tokens"
    for item in described["combinations"]:
        yield " & ".join(item["names"]), item["documents"], item["tokens"]


def _pair_rows(described: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    yield "a", "b", "documents_of_both", "jaccard", "jaccard_by_chance"
    names = [item["name"] for item in described["selections"]]
    for i, j in itertools.combinations(range(len(names)), 2):
        pair = described["pairs"][i][j]
        yield names[i], names[j], pair["both"], pair["jaccard"], pair["chance"]


def _retention_rows(described: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    yield "by", "group", "documents", "tokens", "selection", "share", "token_share"
    for group in described["groups"]:
        for row in group["rows"]:
            shares = zip(described["selections"], row["shares"], row["token_shares"], strict=True)
            for item, share, token_share in shares:
                place = group["title"], row["name"], row["documents"], row["tokens"]
                yield (*place, item["name"], share, token_share)


def _page(described: Mapping[str, Any], output: epath.Path) -> str:
    filters: dict[str, Any] = {
        "percent": lambda value: f"{value:.1%}",
        "share": lambda value: "–" if value is None else f"{value:.2f}",
        "pair_shade": _pair_shade,
        "ratio_shade": _ratio_shade,
    }
    charted = [dict(group, chart=None) for group in described["groups"]]
    if charted and charted[0]["title"].startswith("length"):
        charted[0] |= _length_chart(described, charted[0]["rows"], output)
    return templates.render(
        "selection_report.html",
        filters,
        report={**described, "groups": charted},
        picture=overlap_picture.drawn(described["selections"], described["combinations"]),
    )


def _length_chart(
    described: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], output: epath.Path
) -> dict[str, str]:
    """Return a chart of the shares kept by length, and its caption."""

    def paint(axes: Any) -> None:
        for i, item in enumerate(described["selections"]):
            values = [row["shares"][i] for row in rows]
            color, line = _COLORS[i % len(_COLORS)], ("-", "--", ":")[i // len(_COLORS)]
            name = document_text.printable(item["name"]).replace("$", r"\$")
            name = f" {name}" if name.startswith("_") else name  # else it would be left out
            axes.plot(range(len(rows)), values, line, marker="o", ms=3, color=color, label=name)
        axes.set_xticks(range(len(rows)), [row["name"].partition(" ")[0] for row in rows])
        axes.set_xlabel("tokens of a document, from")
        axes.set_ylabel("share kept")
        axes.set_ylim(0, None)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    caption = "Share of the documents of each length that was kept."
    chart = charts.draw("kept_by_length", caption, output, paint, height=2.9, width=6.4)
    return {"chart": chart.svg, "caption": caption}


def _pair_shade(pair: Mapping[str, float | None]) -> str:
    """Return the background of a pair's cell, by its distance from the overlap by chance."""
    if pair["jaccard"] is None or pair["chance"] is None:
        return ""
    color = "var(--more)" if pair["jaccard"] > pair["chance"] else "var(--less)"
    return f"--hue: {color}; --shade: {abs(pair['jaccard'] - pair['chance']):.0%}"


def _ratio_shade(shares: tuple[float, float]) -> str:
    """Return the background of a cell, by the ratio of a group's share to that of all documents."""
    share, overall = shares
    if not overall:
        return ""
    ratio = np.log2(max(share / overall, 1e-3))
    color = "var(--more)" if ratio > 0 else "var(--less)"
    return f"--hue: {color}; --shade: {min(abs(ratio) / 2, 1) * 55:.0f}%"
