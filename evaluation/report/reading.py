"""Reader of a finished study's artifacts.

Choices
- plan.json holds the paths of all artifacts; everything else is read from the artifacts.
- Documents of the pool are read once, without their text. Of a pool of more than `MOST_DOCUMENTS`,
  whole shards are taken, evenly spaced, and the report says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from evaluation import perplexity, results_directory
from evaluation.report import document_text, floors
from evaluation.report.results import (
    Cascaded,
    Cost,
    Curve,
    Evaluation,
    Example,
    PoolDocuments,
    Results,
    Run,
    Sample,
    Sampler,
    Score,
)
from evaluation.study import trained_judge
from evaluation.study.plan import FULL, PLAN, PlannedRun
from models import json_file
from pruning.corpus.layout import rows_of, shards_of
from pruning.corpus.reader import Corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.data import objectives
from pruning.data.stream import StreamConfig
from pruning.scores.terms import CORPUS, SCORED, Combination, Term, read_scores
from pruning.selection.cascade import report as cascade_report
from pruning.store import randomness
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.manifest import MANIFEST, MEASURED, ArtifactError, digest_of

MOST_DOCUMENTS = 2_000_000
EXAMPLE_LENGTH = 1500  # characters
SAMPLE_BYTES = 24_000_000  # of text that can be browsed
SHADED = 2000  # documents whose tokens' values are shown


def read(study: epath.PathLike, documents: int = 2000) -> Results:
    """Read a finished study.

    Args:
      study: its output directory.
      documents: how many can be browsed.

    Raises:
      ArtifactError, FileNotFoundError: a part of the study is missing or unfinished.
    """
    study = epath.Path(study)
    if not (study / PLAN).exists():
        raise ArtifactError(
            f"{study} holds no study: give the output of `study` (it has no {PLAN})."
        )
    wanted = ("study", "corpus", "pool", "evaluations", "runs", "stages", "models", "made")
    places = _object(study / PLAN, *wanted)
    config = places["study"]
    corpus = load_artifact(places["corpus"], "corpus")
    pool_selection = load_selection(places["pool"], corpus)
    shards = _shards(pool_selection)
    pool = _pool(corpus, pool_selection, shards)
    ngrams = floors.fit(Corpus(corpus), pool_selection)
    unigram_surprisal = floors.surprisal(ngrams[1], Corpus(corpus), pool_selection, shards)
    pool = dataclasses.replace(pool, surprisal=unigram_surprisal)
    runs = tuple(_run(run, pool_selection, places["evaluations"]) for run in places["runs"])
    scores = tuple(
        _score(name, item, places["stages"], corpus, pool, shards)
        for name, item in config["scorers"].items()
    )
    costs = _costs(study, places)
    return Results(
        title=config["title"],
        description=config["description"],
        caveats=(*config["caveats"], *_caveats(places["models"].get("judge"))),
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
        floors={
            name: floors.evaluate(
                ngrams,
                load_artifact(epath.Path(places["runs"][0]["perplexity"]) / name, "scores"),
                Corpus(load_artifact(item["corpus"], "corpus")),
            )
            for name, item in places["evaluations"].items()
        },
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
        corpus=_object(corpus.path / MANIFEST),
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
        cascades=tuple(
            _cascade(name, places["stages"][name])
            for name, item in config["stages"].items()
            if item["command"] == "cascade"
        ),
        provenance=tuple(_provenance(places["made"])),
        commands=tuple(places["commands"]),
    )


def _shards(pool: Selection) -> list[int]:
    """Return the corpus shards whose documents are shown: all, or evenly spaced ones."""
    count = pool.num_shards
    if pool.documents <= MOST_DOCUMENTS:
        return list(range(count))
    shown = max(1, count * MOST_DOCUMENTS // pool.documents)
    return np.unique(np.linspace(0, count - 1, shown).astype(int)).tolist()


def _pool(corpus: Artifact, selection: Selection, shards: Sequence[int]) -> PoolDocuments:
    names = corpus.parquet(0).schema_arrow.names
    strings = ("source", "domain")
    columns: dict[str, list] = {name: [] for name in ("doc_id", "n_tokens", *strings)}
    for shard in shards:
        present = [name for name in columns if name in names]
        table = corpus.read(shard, present).take(pa.array(selection.rows(shard)))
        for name, parts in columns.items():
            column = table[name].to_pylist() if name in present else [None] * table.num_rows
            parts.append(np.asarray(column, object if name in strings else np.int64))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return PoolDocuments(**joined, surprisal=np.full(len(joined["doc_id"]), np.nan))


def _kept(
    run: Mapping[str, Any], corpus: Artifact, pool: PoolDocuments, shards: Sequence[int]
) -> np.ndarray:
    selection = load_selection(run["selection"], corpus)
    return np.isin(pool.doc_id, np.concatenate([selection.doc_ids(shard) for shard in shards]))


def _object(file: epath.Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file of the study, which must have these keys."""
    again = "delete it and run the study again, which makes it anew"
    return json_file.read_object(file, keys=keys, mend=again)


def _run(
    places: Mapping[str, Any], pool: Selection, evaluations: Mapping[str, Mapping[str, str]]
) -> Run:
    train, perplexities = epath.Path(places["train"]), epath.Path(places["perplexity"])
    selection = load_artifact(places["selection"], "selection").manifest
    result = _object(train / "result.json", "loss")
    data = _object(train / "config.json", "train")["train"]["data"]
    curves: dict[str, list[tuple[int, float]]] = {}
    for text in (train / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "eval":
            curves.setdefault(line["name"], []).append((line["step"], line["loss"]))
    task_results = {
        name: results_directory.read_results(path) for name, path in places["tasks"].items()
    }
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
                load_artifact(perplexities / name, "scores"),
                load_artifact(item["corpus"], "corpus"),
            )
            for name, item in evaluations.items()
        },
        curves={
            name: Curve(*(np.asarray(column) for column in zip(*points, strict=True)))
            for name, points in curves.items()
        },
        tasks={
            name: {task: float(one["score"]) for task, one in found.items()}
            for name, found in task_results.items()
        },
        answers={
            name: {
                task: float(one["answer_log_likelihood"])
                for task, one in found.items()
                if "answer_log_likelihood" in one
            }
            for name, found in task_results.items()
        },
    )


def _epochs(data: Mapping[str, Any], steps: int) -> float:
    """Return the epochs of a stream, from its configuration in config.json."""
    settings = {name: value for name, value in data.items() if name != "class"}
    objective = dict(settings["objective"])
    settings["objective"] = objectives.CONFIGURABLES[objective.pop("class")](**objective)
    stream = StreamConfig(**settings).stream()
    return steps * data["batch_size"] / stream.examples_per_epoch


def _score(
    name: str,
    plan: Mapping[str, Any],
    stages: Mapping[str, str],
    corpus: Artifact,
    pool: PoolDocuments,
    shards: Sequence[int],
) -> Score:
    terms = [Term(value, weight, stage) for stage, value, weight in plan["terms"]]
    names = [term.scores for term in terms if term.source != CORPUS]
    found = {name: load_artifact(stages[name], "scores") for name in names}
    parts = []
    statuses: Counter[str] = Counter()
    for shard in shards:
        doc_ids = corpus.read(shard, ["doc_id"])["doc_id"].to_numpy()
        read = read_scores(Combination(tuple(terms)), corpus, found, shard, doc_ids)
        inside = np.isin(doc_ids, pool.doc_id)
        values = np.where(read.reason == SCORED, read.score, np.nan)
        parts.append(values[inside])
        statuses.update(read.reasons[code] for code in read.reason[inside].tolist())
    digests = [scores.digest for scores in found.values()]
    if any(term.source == CORPUS for term in terms):
        digests.append(corpus.digest)
    digest = digests[0] if len(digests) == 1 else digest_of(digests)
    return Score(name, plan["title"], plan["axis"], np.concatenate(parts), statuses, digest)


def _examples(
    score: Score, corpus: Artifact, pool: PoolDocuments, each: int = 2
) -> tuple[Example, ...]:
    """Draw documents at each decile of a score by their hashes, in ascending order of score."""
    rows = np.flatnonzero(~np.isnan(score.values))
    rows = rows[np.argsort(score.values[rows], kind="stable")]
    chosen: list[tuple[int, int]] = []
    for decile, members in enumerate(np.array_split(rows, 10)):
        drawn = members[
            np.argsort(
                randomness.hashed(randomness.Stream.REPORT_EXAMPLE, 0, pool.doc_id[members])
            )[:each]
        ]
        in_order = drawn[np.argsort(score.values[drawn], kind="stable")]
        chosen += [(decile, int(row)) for row in in_order]
    texts = document_text.documents(corpus, pool.doc_id[[row for _, row in chosen]])
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


def _token_values(scorers: Mapping[str, Any], stages: Mapping[str, str]) -> Artifact | None:
    """Return the first score set that holds a value for every token."""
    for plan in scorers.values():
        for stage, value, _ in plan["terms"]:
            if Term(value).source == CORPUS:
                continue
            scores = load_artifact(stages[stage], "scores")
            if "token_nll" in scores.parquet(0).schema_arrow.names:
                return scores
    return None


def _sample(
    corpus: Artifact, pool: PoolDocuments, documents: int, token_values: Artifact | None
) -> Sample:
    """Draw documents to browse by their hashes, in the order of the draw."""
    draws = randomness.hashed(randomness.Stream.REPORT_SAMPLE, 0, pool.doc_id)
    rows = np.argsort(draws, kind="stable")[:documents]
    longest = min(EXAMPLE_LENGTH, max(SAMPLE_BYTES // max(len(rows), 1), 160))
    found = document_text.documents(corpus, pool.doc_id[rows])
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
    corpus: Corpus, scores: Artifact | None, doc_ids: np.ndarray
) -> dict[int, tuple[list[str], np.ndarray]]:
    """Return texts and values of the tokens, by the document's place in the sample."""
    if scores is None:
        return {}
    found = {}
    for shard in np.unique(shards_of(doc_ids)).tolist():
        places = np.flatnonzero(shards_of(doc_ids) == shard)
        rows = rows_of(doc_ids[places])
        values = scores.read(shard, ["token_nll"])["token_nll"].take(pa.array(rows)).to_pylist()
        for place, tokens, nll in zip(
            places.tolist(), corpus.tokens_of(shard, rows), values, strict=True
        ):
            if nll:
                pieces = corpus.vocabulary.pieces(tokens[: len(nll)].tolist())
                found[place] = pieces, np.asarray(nll, np.float64)  # None becomes NaN
    return found


# Kinds of stages that belong to a cell.
_CELLS = ("select", "train", "perplexity", "fine_tuning", "tasks")
_SHARED = ("vocabulary", "corpus", "split")  # that every study needs


def _cell(run: Mapping[str, Any]) -> str:
    return PlannedRun(run["sampler"], run["keep_rate"], run["seed"], run["size"]).name


def _cascade(name: str, path: str) -> Cascaded:
    """Return what a cascade promised, found and spent."""
    found = load_artifact(path, "selection")
    measured = _object(found.path / MEASURED)
    return Cascaded(name, tuple(cascade_report.lines(found.manifest.summary["cascade"], measured)))


def _costs(study: epath.Path, places: Mapping[str, Any]) -> dict[str, Cost]:
    """Return every stage's cost by name, from its result and the scheduler's note."""
    costs = {}
    for name, result in places["made"].items():
        note_file = study / "stages" / f"{name}.json"
        note = _object(note_file) if note_file.exists() else {}
        file, work = epath.Path(result), {}
        if file.name == MANIFEST and (file.parent / MEASURED).exists():
            measured = _object(file.parent / MEASURED)
            if "useful_flops" in measured:
                work = {"flops": measured["useful_flops"], "tokens": int(measured["model_tokens"])}
        elif file.exists() and file.suffix == ".json":
            trained = _object(file)
            work = {key: trained[key] for key in ("flops", "tokens") if key in trained}
        title = name.replace("/", ": ").replace("_", " ")
        costs[name] = Cost(title, note.get("cpu_seconds"), work.get("flops"), work.get("tokens"))
    return costs


def _together(stage: str, costs: Mapping[str, Cost], needs: Mapping[str, Sequence[str]]) -> Cost:
    """Return the cost of a stage and its dependencies, except stages common to all studies."""
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


def _caveats(judge: str | None) -> Iterator[str]:
    return trained_judge.caveats(judge) if judge is not None else iter(())


def _provenance(made: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield name, kind, digest and path of every artifact. Args: made: stage -> result file."""
    for name, file in made.items():
        directory, _, last = file.rpartition("/")
        if last == MANIFEST:
            manifest = load_artifact(directory).manifest
            yield {
                "name": name,
                "kind": manifest.kind,
                "digest": manifest.digest,
                "path": directory,
            }
            continue
        result = _object(epath.Path(file))
        if "config_digest" in result:
            digest = result["config_digest"]
            yield {"name": name, "kind": "training run", "digest": digest, "path": directory}
