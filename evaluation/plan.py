"""Writes a study out as stages: who makes what, from what, by which command line.

Choices
- Stages are told everything on their command line, so that each can be run by hand.
- What a study decides it says in the macros that the files in configs/ share: OUTPUT, and as the
  command has them SIZE, VOCABULARY, CORPUS, WITHIN, LOW, HIGH, SCORES, KEEP, SELECTION, MODEL,
  EXAMPLES, SEED, COMPILATION_CACHE. A recipe of one's own needs these names.
- A stage needs the makers of the directories that it reads; what nobody in the study makes was
  there before it.
- Costs are a first guess, corrected while the study runs (scheduler.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evaluation.recipes import Literal, Recipe, command
from evaluation.stages import Stage
from pruning.artefact import MANIFEST, config_of
from pruning.corpus import load_vocabulary

if TYPE_CHECKING:
    from evaluation.study import EvaluationPlan, ScorerPlan, StudyConfig

PLAN = "plan.json"
FULL = "full"  # the run on the whole pool
SENTINELS = 100  # of a vocabulary that is trained here

# What stages take, in seconds, by their sort.
_COSTS = {"vocabulary": 15, "corpus": 30, "split": 3, "examples": 10, "model": 60, "score": 40}
_COSTS |= {"select": 3, "train": 40, "perplexity": 12, "report": 15}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A selection, the model trained on it, and where both are."""

    sampler: str
    keep_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.sampler}-{100 * self.keep_rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Stages, and what the report must know to read what they leave."""

    stages: tuple[Stage, ...]
    places: Mapping[str, Any]


def plan(config: StudyConfig) -> Plan:
    """Writes a study out as stages.

    Raises:
      ValueError: the parts of the study do not fit together.
    """
    return _Planner(config).plan()


class _Planner:
    """Collects stages. Each method adds the stages of one thing, and says where it will be."""

    def __init__(self, config: StudyConfig):
        _validate(config)
        self.config = config
        self.stages: list[Stage] = []
        self.vocabulary_size = _padded(config.vocabulary_size + SENTINELS)  # of the models

    def plan(self) -> Plan:
        config = self.config
        vocabulary = self._vocabulary()
        corpus = self._corpus("corpus", "corpus", config.corpus, vocabulary, config.workers)
        pool = self._split("pool", corpus, config.pool_split)
        evaluations = {
            name: self._evaluation(name, item, corpus, vocabulary)
            for name, item in config.evaluations.items()
        }
        models = self._models(corpus, evaluations)
        scores = {
            name: self._scores(name, item, corpus, pool, models)
            for name, item in config.scorers.items()
        }
        runs = [
            self._run(cell, corpus, pool, scores, evaluations)
            for seed in config.seeds
            for cell in [
                Cell(FULL, 1.0, seed),
                *(Cell(name, rate, seed) for rate in config.keep_rates for name in config.samplers),
            ]
        ]
        places = {
            "corpus": corpus,
            "pool": pool,
            "evaluations": evaluations,
            "models": {name: path for name, path in models.items() if "/" in path},
            "scores": scores,
            "runs": runs,
            "made": {stage.name: stage.result for stage in self.stages},
            "commands": [stage.command for stage in self.stages],
            "study": config_of(config),
        }
        self._add(
            "report",
            ("python", "-m", "evaluation", "report", f"--gin.Report.study={config.output}"),
            self._at("report", "index.html"),
            [stage.name for stage in self.stages],
        )
        return Plan(tuple(self.stages), places)

    def _at(self, *parts: str) -> str:
        return os.path.join(self.config.output, *parts)  # noqa: PTH118  may be an object store

    def _add(
        self,
        name: str,
        argv: Sequence[str],
        result: str,
        needs: Sequence[str],
        cost: float = 1.0,
        slots: int = 1,
    ) -> None:
        seconds = cost * _COSTS[name.partition("/")[0]]
        self.stages.append(Stage(name, tuple(argv), result, tuple(needs), seconds, slots))

    def _maker(self, path: str) -> list[str]:
        """The stage that makes what is at `path`; none where it was there before the study."""
        made_by = {stage.result.rpartition("/")[0]: stage.name for stage in self.stages}
        return [made_by[path]] if path in made_by else []

    def _needs(self, *paths: str | None) -> list[str]:
        return [name for path in paths if path for name in self._maker(path)]

    # ---- what everything is made from ------------------------------------------------------------

    def _vocabulary(self) -> str:
        config = self.config
        given = config.vocabulary
        if isinstance(config.judge, str):
            given = _vocabulary_of(config.judge)
        if isinstance(given, str):
            self.vocabulary_size = _padded(load_vocabulary(given).size)
            return given
        output = self._at("vocabulary")
        settings = {"OUTPUT": output, "SIZE": config.vocabulary_size}
        argv = command("pruning vocabulary", given, settings)
        self._add("vocabulary", argv, f"{output}/{MANIFEST}", [], slots=config.workers)
        return output

    def _corpus(
        self, name: str, place: str, recipe: Recipe, vocabulary: str, workers: int = 1
    ) -> str:
        output = self._at(place)
        settings = {"OUTPUT": output, "VOCABULARY": vocabulary, "Ingest.workers": workers}
        argv = command("pruning ingest", recipe, settings)
        needs = self._needs(vocabulary)
        self._add(name, argv, f"{output}/{MANIFEST}", needs, slots=workers)
        return output

    def _split(self, name: str, corpus: str, part: tuple[float, float]) -> str:
        output = self._at("splits", name)
        settings = {"CORPUS": corpus, "OUTPUT": output, "LOW": part[0], "HIGH": part[1]}
        argv = command("pruning select", self.config.split, settings)
        self._add(f"split/{name}", argv, f"{output}/{MANIFEST}", self._needs(corpus))
        return output

    def _evaluation(
        self, name: str, item: EvaluationPlan, corpus: str, vocabulary: str
    ) -> dict[str, Any]:
        if item.recipe is not None:
            corpus = self._corpus(f"corpus/{name}", f"corpora/{name}", item.recipe, vocabulary)
        within = self._split(name, corpus, item.split) if item.split else None
        return {"corpus": corpus, "within": within}

    # ---- models that score -----------------------------------------------------------------------

    def _models(self, corpus: str, evaluations: Mapping[str, Any]) -> dict[str, str]:
        config = self.config
        models: dict[str, str] = {}
        training = None
        if isinstance(config.scoring_model, Recipe):
            training = self._split("scoring", corpus, config.scoring_split)
            models["scoring"] = self._at("models", "scoring")
            self._train("model/scoring", config.scoring_model, models["scoring"], corpus, training)
        else:
            models["scoring"] = config.scoring_model
        if isinstance(config.judge, str):
            models["judge"] = config.judge
        elif config.judge is not None and config.judge_examples is not None:
            if training is None:
                training = self._split("scoring", corpus, config.scoring_split)
            examples = self._at("judge_examples")
            settings = {"CORPUS": corpus, "WITHIN": training, "OUTPUT": examples}
            argv = command("pruning judge", config.judge_examples, settings)
            needs = self._needs(corpus, training)
            self._add("examples", argv, f"{examples}/{MANIFEST}", needs)
            models["judge"] = self._at("models", "judge")
            settings = {
                "OUTPUT": models["judge"],
                "MODEL": models["scoring"],
                "EXAMPLES": examples,
                "COMPILATION_CACHE": self._at("compiled"),
            }
            argv = command("train", config.judge, settings)
            needs = self._needs(examples, models["scoring"])
            self._add("model/judge", argv, f"{models['judge']}/result.json", needs)
        return models

    def _scores(
        self, name: str, item: ScorerPlan, corpus: str, pool: str, models: Mapping[str, str]
    ) -> dict[str, Any]:
        output = self._at("scores", name)
        model = models.get(item.model, item.model)
        settings = {
            "CORPUS": corpus,
            "MODEL": model,
            "OUTPUT": output,
            "Score.within": pool,
            "Score.compilation_cache": self._at("compiled"),
        }
        argv = command("pruning score", item.recipe, settings)
        needs = self._needs(corpus, pool, model)
        self._add(f"score/{name}", argv, f"{output}/{MANIFEST}", needs)
        return {"path": output, "model": model}

    # ---- cells -----------------------------------------------------------------------------------

    def _run(
        self,
        cell: Cell,
        corpus: str,
        pool: str,
        scores: Mapping[str, Any],
        evaluations: Mapping[str, Any],
    ) -> dict[str, Any]:
        if cell.sampler == FULL:
            selection = pool
        else:
            selection = self._selection(cell, corpus, pool, scores)
        trained = self._at("runs", cell.name, "train")
        self._train(
            f"train/{cell.name}",
            self.config.train,
            trained,
            corpus,
            selection,
            cell.seed,
            evaluations,
        )
        judged = self._at("runs", cell.name, "perplexity")
        corpora = {name: item["corpus"] for name, item in evaluations.items()}
        within = {name: item["within"] for name, item in evaluations.items() if item["within"]}
        settings = {
            "MODEL": trained,
            "OUTPUT": judged,
            "Perplexity.corpora": corpora,
            "Perplexity.within": within,
            "Perplexity.compilation_cache": self._at("compiled"),
        }
        argv = command("evaluation perplexity", self.config.perplexity, settings)
        needs = self._needs(trained, *corpora.values(), *within.values())
        self._add(f"perplexity/{cell.name}", argv, f"{judged}/result.json", needs)
        places = {"selection": selection, "train": trained, "perplexity": judged}
        return dataclasses.asdict(cell) | places

    def _selection(self, cell: Cell, corpus: str, pool: str, scores: Mapping[str, Any]) -> str:
        sampler = self.config.samplers[cell.sampler]
        output = self._at("runs", cell.name, "selection")
        settings: dict[str, Any] = {
            "CORPUS": corpus,
            "WITHIN": pool,
            "OUTPUT": output,
            "KEEP": cell.keep_rate,
            "SEED": cell.seed,
        }
        scored = None
        if sampler.scorer is not None:
            scored = settings["SCORES"] = scores[sampler.scorer]["path"]
        argv = command("pruning select", sampler.recipe, settings)
        needs = self._needs(corpus, pool, scored)
        self._add(f"select/{cell.name}", argv, f"{output}/{MANIFEST}", needs)
        return output

    def _train(
        self,
        name: str,
        recipe: Recipe,
        output: str,
        corpus: str,
        selection: str,
        seed: int = 0,
        evaluations: Mapping[str, Any] | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "CORPUS": corpus,
            "SELECTION": selection,
            "OUTPUT": output,
            "SEED": seed,
            "COMPILATION_CACHE": self._at("compiled"),
            "T5Config.vocab_size": self.vocabulary_size,
        }
        evaluations = evaluations or {}
        streams = {name: Literal(f"@{name}/Stream()") for name in evaluations}
        settings["Train.eval_data"] = streams
        for evaluation, item in evaluations.items():
            settings[f"{evaluation}/Stream.corpus"] = item["corpus"]
            settings[f"{evaluation}/Stream.selection"] = item["within"]
            settings[f"{evaluation}/Stream.seed"] = 0  # the same examples for every seed
        argv = command("train", recipe, settings)
        wanted = [path for item in evaluations.values() for path in item.values()]
        needs = self._needs(corpus, selection, *wanted)
        self._add(name, argv, f"{output}/result.json", dict.fromkeys(needs))


def _validate(config: StudyConfig) -> None:
    """Raises ValueError, saying what to change."""
    for name, sampler in config.samplers.items():
        if sampler.scorer is not None and sampler.scorer not in config.scorers:
            raise ValueError(
                f"the sampler {name!r} looks at the scorer {sampler.scorer!r}, which is not among "
                f"Study.scorers: {', '.join(config.scorers)}."
            )
    if FULL in config.samplers:
        raise ValueError(f"{FULL!r} is the run on the whole pool; call the sampler something else.")
    for name, scorer in config.scorers.items():
        if scorer.model == "judge" and config.judge is None:
            raise ValueError(f"the scorer {name!r} wants a judge: set Study.judge.")
    if isinstance(config.judge, Recipe) and config.judge_examples is None:
        raise ValueError("a judge that is trained wants examples: set Study.judge_examples.")
    if any(not 0 < rate < 1 for rate in config.keep_rates):
        raise ValueError(f"keep-rates are shares between 0 and 1: {config.keep_rates}.")
    parts = {"scoring_split": config.scoring_split, "pool_split": config.pool_split}
    own = {name: item.split for name, item in config.evaluations.items() if not item.recipe}
    parts |= {name: split for name, split in own.items() if split}
    by_start = sorted(parts.items(), key=lambda part: part[1])
    for (one, (_, end)), (other, (start, _)) in itertools.pairwise(by_start):
        if start < end:
            raise ValueError(f"the parts {one} and {other} of the corpus overlap: {parts}.")


def _padded(size: int) -> int:
    """A vocabulary's size as models have it, T5's 32,100 as 32,128."""
    return -(-size // 128) * 128


def _vocabulary_of(weights_path: str) -> str:
    """The SentencePiece file that lies beside weights."""
    from models import weights

    directory, _ = weights.locate(weights_path)
    for name in ("vocabulary.model", "spiece.model", "sentencepiece.model"):
        if (directory / name).exists():
            return os.fspath(directory / name)
    raise ValueError(
        f"{directory} has no SentencePiece file beside its weights: put its spiece.model there."
    )
