"""Reads a finished study's artefacts into `Results`.

Choices
- The study's plan.json says where everything is; the artefacts say what it is.
- Documents of the pool are read once, without their text. Of a pool of more than `MOST_DOCUMENTS`,
  whole shards are taken, evenly spaced, and the report says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from evaluation import perplexity, record, shown
from evaluation.plan import FULL, PLAN, Cell
from evaluation.report.results import (
    Cost,
    Curve,
    Evaluation,
    Example,
    Pool,
    Results,
    Run,
    Sample,
    Sampler,
    Score,
)
from pruning import artefact, randomness
from pruning.artefact import Artefact
from pruning.corpus import Corpus
from pruning.selection import Selection, load_selection
from pruning.selection import scores as selection_scores
from pruning.selection.scores import Term
from pruning.stream import objectives
from pruning.stream.stream import StreamConfig

MOST_DOCUMENTS = 2_000_000
EXAMPLE_LENGTH = 1500  # characters
SAMPLE_BYTES = 24_000_000  # of text that can be browsed
SHADED = 2000  # documents whose tokens' values are shown


def read(study: epath.PathLike, documents: int = 2000) -> Results:
    """Reads a finished study.

    Args:
      study: its output directory.
      documents: how many can be browsed.

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
        _score(name, item, places["stages"], corpus, pool, shards)
        for name, item in config["scorers"].items()
    )
    costs = _costs(study, places)
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
            if not run["size"]
        },
        scores=scores,
        examples={score.name: _examples(score, corpus, pool) for score in scores},
        sample=_sample(corpus, pool, documents, _token_values(config["scorers"], places["stages"])),
        corpus=json.loads((corpus.path / artefact.MANIFEST).read_text()),
        costs=tuple(cost for name, cost in costs.items() if name.partition("/")[0] not in _CELLS),
        sampler_costs={
            run["sampler"]: _together(f"select/{_cell(run)}", costs, places["needs"])
            for run in places["runs"]
            if run["sampler"] != FULL and not run["size"]
        },
        training_cost=costs[f"train/{_cell(places['runs'][0])}"],
        sizes={name: item["title"] for name, item in config["sizes"].items()},
        tasks={name: item["title"] for name, item in config["tasks"].items()},
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
        size=places["size"],
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
        tasks={
            name: {task: float(found["score"]) for task, found in record.results(path).items()}
            for name, path in places["tasks"].items()
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
    stages: Mapping[str, str],
    corpus: Artefact,
    pool: Pool,
    shards: Sequence[int],
) -> Score:
    terms = [Term(value, weight, stage) for stage, value, weight in plan["terms"]]
    found = {term.scores: artefact.load(stages[term.scores], "scores") for term in terms}
    parts = []
    statuses: Counter[str] = Counter()
    for shard in shards:
        doc_ids = corpus.read(shard, ["doc_id"])["doc_id"].to_numpy()
        read = selection_scores.read(terms, found, shard, doc_ids)
        inside = np.isin(doc_ids, pool.doc_id)
        values = np.where(read.reason == selection_scores.OK, read.score, np.nan)
        parts.append(values[inside])
        statuses.update(read.reasons[code] for code in read.reason[inside].tolist())
    digests = [scores.digest for scores in found.values()]
    digest = digests[0] if len(digests) == 1 else artefact.digest_of(digests)
    return Score(name, plan["title"], plan["axis"], np.concatenate(parts), statuses, digest)


def _examples(score: Score, corpus: Artefact, pool: Pool, each: int = 2) -> tuple[Example, ...]:
    """Documents at each decile of a score, drawn by their hashes, in the order of the score."""
    rows = np.flatnonzero(~np.isnan(score.values))
    rows = rows[np.argsort(score.values[rows], kind="stable")]
    chosen: list[tuple[int, int]] = []
    for decile, members in enumerate(np.array_split(rows, 10)):
        drawn = members[np.argsort(randomness.hashed(0, pool.doc_id[members]))[:each]]
        in_order = drawn[np.argsort(score.values[drawn], kind="stable")]
        chosen += [(decile, int(row)) for row in in_order]
    texts = shown.documents(corpus, pool.doc_id[[row for _, row in chosen]])
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


def _token_values(scorers: Mapping[str, Any], stages: Mapping[str, str]) -> Artefact | None:
    """The first score set that holds a value for every token."""
    for plan in scorers.values():
        for stage, *_ in plan["terms"]:
            scores = artefact.load(stages[stage], "scores")
            if "token_nll" in scores.parquet(0).schema_arrow.names:
                return scores
    return None


def _sample(corpus: Artefact, pool: Pool, documents: int, token_values: Artefact | None) -> Sample:
    """Documents to browse, drawn by their hashes, in the order of the draw."""
    draws = randomness.hashed(1, pool.doc_id)
    rows = np.argsort(draws, kind="stable")[:documents]
    longest = min(EXAMPLE_LENGTH, max(SAMPLE_BYTES // max(len(rows), 1), 160))
    found = shown.documents(corpus, pool.doc_id[rows])
    documents_found = [found[int(doc_id)] for doc_id in pool.doc_id[rows]]
    return Sample(
        rows=rows,
        text=tuple(item["text"][:longest] for item in documents_found),
        cut=np.asarray([len(item["text"]) > longest for item in documents_found]),
        place=tuple(
            item.get("url") or str(domain or "")
            for item, domain in zip(documents_found, pool.domain[rows], strict=True)
        ),
        tokens=_tokens(Corpus(corpus), token_values, pool.doc_id[rows[:SHADED]]),
    )


def _tokens(
    corpus: Corpus, scores: Artefact | None, doc_ids: np.ndarray
) -> dict[int, tuple[list[str], np.ndarray]]:
    """Texts and values of the tokens, by the place of the document."""
    if scores is None:
        return {}
    found = {}
    for shard in np.unique(doc_ids >> 32).tolist():
        places = np.flatnonzero(doc_ids >> 32 == shard)
        rows = doc_ids[places] & 0xFFFFFFFF
        values = scores.read(shard, ["token_nll"])["token_nll"].take(pa.array(rows)).to_pylist()
        for place, tokens, nll in zip(
            places.tolist(), corpus.tokens_of(shard, rows), values, strict=True
        ):
            if nll:
                pieces = corpus.vocabulary.pieces(tokens[: len(nll)].tolist())
                found[place] = pieces, np.asarray(nll, np.float64)  # None becomes NaN
    return found


# Sorts of stages that belong to a cell.
_CELLS = ("select", "train", "perplexity", "fine_tuning", "tasks")
_SHARED = ("vocabulary", "corpus", "split")  # that every study needs


def _cell(run: Mapping[str, Any]) -> str:
    return Cell(run["sampler"], run["keep_rate"], run["seed"], run["size"]).name


def _costs(study: epath.Path, places: Mapping[str, Any]) -> dict[str, Cost]:
    """What every stage took, by its name; from its result, and from the scheduler's note of it."""
    costs = {}
    for name, result in places["made"].items():
        note_file = study / "stages" / f"{name}.json"
        note = json.loads(note_file.read_text()) if note_file.exists() else {}
        file, work = epath.Path(result), {}
        if file.name == artefact.MANIFEST and (file.parent / artefact.MEASURED).exists():
            measured = json.loads((file.parent / artefact.MEASURED).read_text())
            if "useful_flops" in measured:
                work = {"flops": measured["useful_flops"], "tokens": int(measured["model_tokens"])}
        elif file.exists() and file.suffix == ".json":
            trained = json.loads(file.read_text())
            work = {key: trained[key] for key in ("flops", "tokens") if key in trained}
        title = name.replace("/", ": ").replace("_", " ")
        costs[name] = Cost(title, note.get("cpu_seconds"), work.get("flops"), work.get("tokens"))
    return costs


def _together(stage: str, costs: Mapping[str, Cost], needs: Mapping[str, Sequence[str]]) -> Cost:
    """A stage's cost and that of all it needs, but for what every study needs."""
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name not in found and name.partition("/")[0] not in _SHARED:
            found.add(name)
            waiting += needs[name]
    parts = [costs[name] for name in sorted(found)]
    seconds = [part.cpu_seconds for part in parts]
    return Cost(
        stage,
        None if None in seconds else float(sum(seconds)),  # type: ignore[arg-type]
        float(sum(part.flops or 0.0 for part in parts)),
        sum(part.tokens or 0 for part in parts),
    )


def _judge_caveat(models: Mapping[str, str]) -> Iterator[str]:
    """How well a judge that was trained here answers, on examples from the pool.

    Its targets are the answer and EOS, which it always has right once it is trained at all.
    """
    file = epath.Path(models["judge"]) / "metrics.jsonl" if "judge" in models else None
    if file is None or not file.exists():
        return
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    exams = [line["accuracy"] for line in lines if line["kind"] == "eval"]
    if not exams:
        return
    right = max(2 * exams[-1] - 1, 0.0)
    verdict = "; do not read its selections as a verdict on Ask-LLM" if right < 0.6 else ""
    yield (
        f"Of documents that it had not seen, half of them damaged, the judge told {right:.0%} "
        f"rightly; guessing gives about half{verdict}."
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
