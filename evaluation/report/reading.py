"""Reads a finished study's artefacts into `Results`.

Choices
- The study's plan.json says where everything is; the artefacts say what it is.
- Documents of the pool are read once, without their text. Of a pool of more than `MOST_DOCUMENTS`,
  whole shards are taken, evenly spaced, and the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from etils import epath

from evaluation import perplexity
from evaluation.plan import FULL, PLAN
from evaluation.report.results import (
    Cost,
    Curve,
    Evaluation,
    Example,
    Pool,
    Results,
    Run,
    Sampler,
    Score,
)
from pruning import artefact, randomness
from pruning.artefact import Artefact
from pruning.selection import Selection, load_selection
from pruning.selection import scores as selection_scores
from pruning.selection.scores import Term
from pruning.stream import objectives
from pruning.stream.stream import StreamConfig

MOST_DOCUMENTS = 2_000_000
EXAMPLE_LENGTH = 1500  # characters


def read(study: epath.PathLike) -> Results:
    """Reads a finished study.

    Args:
      study: its output directory.

    Raises:
      ArtefactError, FileNotFoundError: something of it is missing or unfinished.
    """
    study = epath.Path(study)
    places = json.loads((study / PLAN).read_text())
    config = places["study"]
    corpus = artefact.load(places["corpus"], "corpus")
    pool_selection = load_selection(places["pool"], corpus)
    shards = _shards(pool_selection)
    pool = _pool(corpus, pool_selection, shards)
    runs = tuple(_run(run, pool_selection, places["evaluations"]) for run in places["runs"])
    scores = tuple(
        _score(name, config["scorers"][name], item, corpus, pool, shards)
        for name, item in places["scores"].items()
    )
    return Results(
        title=config["title"],
        description=config["description"],
        caveats=(*config["caveats"], *_judge_caveat(places["models"])),
        evaluations=tuple(
            Evaluation(
                name,
                item["title"],
                item["rule"],
                len(runs[0].losses[name].doc_id),
                int(runs[0].losses[name].tokens.sum()),
                round(float(runs[0].losses[name].n_bytes.sum())),
            )
            for name, item in config["evaluations"].items()
        ),
        samplers=(
            Sampler(FULL, "Full data", "Every document of the pool.", None),
            *(
                Sampler(name, item["title"], item["rule"], item["scorer"])
                for name, item in config["samplers"].items()
            ),
        ),
        runs=runs,
        pool=pool,
        pool_shards=(len(shards), corpus.num_shards),
        kept={
            (run["sampler"], run["keep_rate"], run["seed"]): _kept(run, corpus, pool, shards)
            for run in places["runs"]
        },
        scores=scores,
        examples={score.name: _examples(score, corpus, pool) for score in scores},
        corpus=json.loads((corpus.path / artefact.MANIFEST).read_text()),
        costs=_costs(places, config, runs),
        configuration=config,
        provenance=tuple(_provenance(places["made"])),
        commands=tuple(places["commands"]),
    )


def _shards(pool: Selection) -> list[int]:
    """The corpus shards whose documents are shown: all, or evenly spaced ones."""
    count = pool.num_shards
    if pool.documents <= MOST_DOCUMENTS:
        return list(range(count))
    shown = max(1, count * MOST_DOCUMENTS // pool.documents)
    return np.unique(np.linspace(0, count - 1, shown).astype(int)).tolist()


def _pool(corpus: Artefact, selection: Selection, shards: Sequence[int]) -> Pool:
    names = corpus.parquet(0).schema_arrow.names
    strings = ("source", "domain")
    columns: dict[str, list] = {name: [] for name in ("doc_id", "n_tokens", *strings)}
    for shard in shards:
        present = [name for name in columns if name in names]
        table = corpus.read(shard, present).take(pa.array(selection.rows(shard)))
        for name, parts in columns.items():
            column = table[name].to_pylist() if name in present else [None] * table.num_rows
            parts.append(np.asarray(column, object if name in strings else np.int64))
    return Pool(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _kept(
    run: Mapping[str, Any], corpus: Artefact, pool: Pool, shards: Sequence[int]
) -> np.ndarray:
    selection = load_selection(run["selection"], corpus)
    return np.isin(pool.doc_id, np.concatenate([selection.doc_ids(shard) for shard in shards]))


def _run(
    places: Mapping[str, Any], pool: Selection, evaluations: Mapping[str, Mapping[str, str]]
) -> Run:
    train, perplexities = epath.Path(places["train"]), epath.Path(places["perplexity"])
    selection = artefact.load(places["selection"], "selection").manifest
    result = json.loads((train / "result.json").read_text())
    data = json.loads((train / "config.json").read_text())["train"]["data"]
    curves: dict[str, list[tuple[int, float]]] = {}
    for text in (train / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "eval":
            curves.setdefault(line["name"], []).append((line["step"], line["loss"]))
    return Run(
        sampler=places["sampler"],
        keep_rate=places["keep_rate"],
        seed=places["seed"],
        documents=selection.rows,
        tokens=selection.tokens,
        share_kept=selection.tokens / pool.tokens,
        epochs=_epochs(data, result["steps"]),
        steps=result["steps"],
        parameters=result["parameters"],
        seconds=result["seconds"],
        flops=result["flops"],
        losses={
            name: perplexity.read(
                artefact.load(perplexities / name, "scores"),
                artefact.load(item["corpus"], "corpus"),
            )
            for name, item in evaluations.items()
        },
        curves={
            name: Curve(*(np.asarray(column) for column in zip(*points, strict=True)))
            for name, points in curves.items()
        },
    )


def _epochs(data: Mapping[str, Any], steps: int) -> float:
    """How often a stream was gone through; its configuration as config.json has it."""
    settings = {name: value for name, value in data.items() if name != "class"}
    objective = dict(settings["objective"])
    settings["objective"] = objectives.CONFIGURABLES[objective.pop("class")](**objective)
    stream = StreamConfig(**settings).stream()
    return steps * data["batch_size"] / stream.examples_per_epoch


def _score(
    name: str,
    plan: Mapping[str, Any],
    places: Mapping[str, str],
    corpus: Artefact,
    pool: Pool,
    shards: Sequence[int],
) -> Score:
    found = artefact.load(places["path"], "scores")
    terms = (Term(plan["value"], plan["weight"]),)
    parts = []
    for shard in shards:
        doc_ids = corpus.read(shard, ["doc_id"])["doc_id"].to_numpy()
        read = selection_scores.read(terms, {"scores": found}, shard, doc_ids)
        values = np.where(read.reason == selection_scores.OK, read.score, np.nan)
        parts.append(values[np.isin(doc_ids, pool.doc_id)])
    return Score(
        name,
        plan["title"],
        plan["axis"],
        np.concatenate(parts),
        found.manifest.counts,
        found.digest,
    )


def _examples(score: Score, corpus: Artefact, pool: Pool, each: int = 2) -> tuple[Example, ...]:
    """Documents at each decile of a score, drawn by their hashes, in the order of the score."""
    rows = np.flatnonzero(~np.isnan(score.values))
    rows = rows[np.argsort(score.values[rows], kind="stable")]
    chosen: list[tuple[int, int]] = []
    for decile, members in enumerate(np.array_split(rows, 10)):
        drawn = members[np.argsort(randomness.hashed(0, pool.doc_id[members]))[:each]]
        in_order = drawn[np.argsort(score.values[drawn], kind="stable")]
        chosen += [(decile, int(row)) for row in in_order]
    texts = _texts(corpus, pool.doc_id[[row for _, row in chosen]])
    return tuple(
        Example(
            decile=decile,
            score=float(score.values[row]),
            n_tokens=int(pool.n_tokens[row]),
            source=pool.source[row] or "",
            domain=pool.domain[row] or "",
            url=texts[int(pool.doc_id[row])].get("url") or "",
            text=texts[int(pool.doc_id[row])]["text"][:EXAMPLE_LENGTH],
            cut=len(texts[int(pool.doc_id[row])]["text"]) > EXAMPLE_LENGTH,
        )
        for decile, row in chosen
    )


def _texts(corpus: Artefact, doc_ids: np.ndarray) -> dict[int, dict[str, str]]:
    """Text and address of some documents, by doc_id; reads the row groups that hold them."""
    found: dict[int, dict[str, str]] = {}
    for shard in np.unique(doc_ids >> 32).tolist():
        wanted = doc_ids[doc_ids >> 32 == shard]
        with corpus.parquet(shard) as file:
            columns = [
                name for name in ("doc_id", "text", "url") if name in file.schema_arrow.names
            ]
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            for group in np.unique(
                np.searchsorted(ends, wanted & 0xFFFFFFFF, side="right")
            ).tolist():
                table = file.read_row_group(group, columns=columns)
                mask = pc.is_in(table["doc_id"], pa.array(wanted))
                found |= {row["doc_id"]: row for row in table.filter(mask).to_pylist()}
    return found


def _costs(
    places: Mapping[str, Any], config: Mapping[str, Any], runs: Sequence[Run]
) -> tuple[Cost, ...]:
    costs = []
    for name, path in places["models"].items():
        file = epath.Path(path) / "result.json"
        if file.exists():
            result = json.loads(file.read_text())
            title = {"scoring": "Training the scoring model", "judge": "Fine-tuning the judge"}[
                name
            ]
            costs.append(Cost(title, result["seconds"], result["flops"], result["tokens"]))
    for name, item in places["scores"].items():
        measured = json.loads((epath.Path(item["path"]) / artefact.MEASURED).read_text())
        title = f"Scoring by {config['scorers'][name]['title']}"
        flops, tokens = measured["useful_flops"], int(measured["model_tokens"])
        costs.append(Cost(title, measured["seconds"], flops, tokens))
    return tuple(costs)


def _judge_caveat(models: Mapping[str, str]) -> Iterator[str]:
    """How well a judge that was trained here answered, at the end of its training.

    Its targets are the answer and EOS, which it always has right once it is trained at all.
    """
    file = epath.Path(models["judge"]) / "metrics.jsonl" if "judge" in models else None
    if file is None or not file.exists():
        return
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    last = [line["accuracy"] for line in lines if line["kind"] == "train"][-5:]
    right = max(2 * float(np.mean(last)) - 1, 0.0)
    verdict = "; do not read its selections as a verdict on Ask-LLM" if right < 0.6 else ""
    yield (
        f"At the end of its training the judge gave {right:.0%} of its own examples the right "
        f"answer, where guessing gives about half{verdict}."
    )


def _provenance(made: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Name, kind, digest and place of what the stages have made; {stage: its result file}."""
    for name, file in made.items():
        directory, _, last = file.rpartition("/")
        if last == artefact.MANIFEST:
            manifest = artefact.load(directory).manifest
            yield {
                "name": name,
                "kind": manifest.kind,
                "digest": manifest.digest,
                "path": directory,
            }
            continue
        result = json.loads(epath.Path(file).read_text())
        if "config_digest" in result:
            digest = result["config_digest"]
            yield {"name": name, "kind": "training run", "digest": digest, "path": directory}
