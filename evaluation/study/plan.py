"""Plan of a study: its configuration as stages with inputs, outputs and command lines.

Choices
- Every setting of a stage is on its command line, so that each stage can be run by hand.
- The plan sets macros that the files in configs/ share: OUTPUT, and depending on the command SIZE,
  VOCABULARY, CORPUS, WITHIN, LOW, HIGH, KEEP, SELECTION, MODEL, EXAMPLES, EXAM, SEED,
  COMPILATION_CACHE. A user's own recipe needs these names.
- Intermediate artifacts (scores, embeddings, clusters, chained selections) are named stages, each a
  command with its recipe and inputs by name. The planner knows no sampler.
- A stage depends on the stages that make the directories it reads. Directories that no stage makes
  are expected to exist.
- Costs are initial guesses, corrected while the study runs (scheduler.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.errors import EvaluationError
from evaluation.study.completion import completed
from evaluation.study.config import CompleteStudy, EvaluationPlan, StudyConfig, TasksPlan
from evaluation.study.recipes import Literal, Recipe, command
from evaluation.study.stages import Stage
from pruning.corpus.tokenizers import holds_tokenizer
from pruning.corpus.vocabulary import load_vocabulary
from pruning.scores.terms import CORPUS, Term
from pruning.store.manifest import MANIFEST, config_of

PLAN = "plan.json"
FULL = "full"  # the run on the whole pool
RANDOM = "random"  # the sampler that others are compared with
SENTINELS = 100  # of a vocabulary trained by the study

# Expected seconds of a stage, by sort.
_COSTS = {"vocabulary": 15, "corpus": 30, "split": 3, "examples": 10, "model": 60, "score": 40}
_COSTS |= {"select": 3, "train": 40, "perplexity": 12, "fine_tuning": 60, "tasks": 30, "report": 15}
_COST = 10  # seconds, of any other sort
_WITHOUT_CORPUS = ("vocabulary", "ingest")  # commands that read none
_GIVEN = ("vocabulary", "corpus", "pool", "training", "scoring", "judge")  # names of inputs


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A selection and the model trained on it."""

    sampler: str
    keep_rate: float
    seed: int
    size: str = ""  # of the model, where it is not the study's own

    @property
    def name(self) -> str:
        return f"{self.selection}-{self.size}" if self.size else self.selection

    @property
    def selection(self) -> str:
        """Name of the selection, shared by runs of all model sizes."""
        return f"{self.sampler}-{100 * self.keep_rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan of a study.

    Attributes:
      stages: in an order in which they can run.
      places: paths of their results, for the report.
      unused_settings: names in `StudyConfig.settings` of stages and samplers that the study lacks.
    """

    stages: tuple[Stage, ...]
    places: Mapping[str, Any]
    unused_settings: tuple[str, ...] = ()


def plan(config: StudyConfig) -> Plan:
    """Return the stages of a study.

    Raises:
      ValueError: the parts of the study do not fit together.
    """
    return _Planner(completed(config)).plan()


class _Planner:
    """Collector of stages. A method adds the stages of one artifact and returns its path."""

    def __init__(self, config: CompleteStudy):
        _validate(config)
        self.config = config
        self.stages: list[Stage] = []
        self.inputs: dict[str, str] = {}  # name -> path, see StagePlan.inputs
        self._asked: list[str] = []  # stages whose inputs are being resolved
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
        models = self._models(corpus, pool)
        self.inputs |= {"vocabulary": vocabulary, "corpus": corpus, "pool": pool, **models}
        self.inputs |= {name: item["corpus"] for name, item in evaluations.items()}
        for name in config.stages:
            self._made(name)
        selections = {
            run.selection: self._selection(run, corpus) for run in _runs(config) if not run.size
        }
        examples = {
            name: self._task_examples(name, item.examples, corpus)
            for name, item in config.tasks.items()
            if item.examples is not None
        }
        runs = []
        for run in _runs(config):
            places = self._run(run, corpus, selections[run.selection], evaluations)
            places["tasks"] = {
                name: self._tasks(run, name, item, places["train"], corpus, examples.get(name))
                for name, item in config.tasks.items()
            }
            runs.append(places)
        places = {
            "corpus": corpus,
            "pool": pool,
            "evaluations": evaluations,
            "models": {name: models[name] for name in ("scoring", "judge") if name in models},
            "stages": {name: self.inputs[name] for name in config.stages},
            "runs": runs,
            "made": {stage.name: stage.result for stage in self.stages},
            "needs": {stage.name: stage.needs for stage in self.stages},
            "commands": [stage.command for stage in self.stages],
            "study": config_of(config) | {"class": "StudyConfig"},
        }
        self._add(
            "report",
            ("python", "-m", "evaluation", "report", f"--gin.Report.study={config.output}"),
            self._at("report", "index.html"),
            [stage.name for stage in self.stages],
        )
        unused = config.settings.keys() - config.stages.keys() - config.samplers.keys()
        return Plan(tuple(self.stages), places, tuple(sorted(unused)))

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
        seconds = cost * _COSTS.get(name.partition("/")[0], _COST)
        self.stages.append(
            Stage(name, tuple(argv), result, tuple(dict.fromkeys(needs)), seconds, slots)
        )

    def _maker(self, path: str) -> list[str]:
        """Return the stage that makes what is at `path`; none if the study does not make it."""
        made_by = {stage.result.rpartition("/")[0]: stage.name for stage in self.stages}
        return [made_by[path]] if path in made_by else []

    def _needs(self, *paths: str | None) -> list[str]:
        return [name for path in paths if path for name in self._maker(path)]

    # ---- inputs of everything else ---------------------------------------------------------------

    def _vocabulary(self) -> str:
        config = self.config
        given = config.vocabulary
        if isinstance(config.judge, str):
            given = _vocabulary_of(config.judge) or given
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

    # ---- scoring models --------------------------------------------------------------------------

    def _models(self, corpus: str, pool: str) -> dict[str, str]:
        """Return the paths of the scoring model, the judge, and their training split."""
        config = self.config
        training = self._split("scoring", corpus, config.scoring_split)
        models = {"training": training}
        if isinstance(config.scoring_model, Recipe):
            models["scoring"] = self._at("models", "scoring")
            self._train("model/scoring", config.scoring_model, models["scoring"], corpus, training)
        elif config.scoring_model is not None:
            models["scoring"] = config.scoring_model
        if isinstance(config.judge, str):
            models["judge"] = config.judge
        elif config.judge is not None:
            models["judge"] = self._at("models", "judge")
            settings = {
                "OUTPUT": models["judge"],
                "MODEL": models["scoring"],
                "EXAMPLES": self._examples("judge_examples", corpus, training),
                "EXAM": self._examples("judge_exam", corpus, pool, EXAMPLES=config.judge_exam),
                "COMPILATION_CACHE": self._at("compiled"),
            }
            argv = command("train", config.judge, settings)
            needs = self._needs(settings["EXAMPLES"], settings["EXAM"], models["scoring"])
            self._add("model/judge", argv, f"{models['judge']}/result.json", needs)
        return models

    def _examples(self, place: str, corpus: str, within: str, **settings: Any) -> str:
        assert self.config.judge_examples is not None
        output = self._at(place)
        settings |= {"CORPUS": corpus, "WITHIN": within, "OUTPUT": output}
        argv = command("pruning judge", self.config.judge_examples, settings)
        self._add(f"examples/{place}", argv, f"{output}/{MANIFEST}", self._needs(corpus, within))
        return output

    # ---- intermediate artifacts ------------------------------------------------------------------

    def _made(self, name: str) -> str:
        """Return an input's path; add the stage that makes it, and its dependencies."""
        if name in self.inputs:
            return self.inputs[name]
        if name in self._asked:
            raise EvaluationError(f"stages need each other: {' -> '.join([*self._asked, name])}.")
        if name not in self.config.stages:
            known = ", ".join([*self.config.stages, *self.inputs])
            raise EvaluationError(
                f"{(self._asked or ['a sampler'])[-1]} needs {name!r}, which is neither one of "
                f"Study.stages nor given; there are: {known}."
            )
        self._asked.append(name)
        item = self.config.stages[name]
        output = self._at("made", name)
        given = {} if item.command in _WITHOUT_CORPUS else {"CORPUS": self.inputs["corpus"]}
        given |= {setting: self._made(source) for setting, source in item.inputs.items()}
        settings: dict[str, Any] = given | {"OUTPUT": output}
        if item.command == "score":
            settings["Score.compilation_cache"] = self._at("compiled")
        argv = command(f"pruning {item.command}", item.recipe, settings)
        needs = self._needs(*given.values())
        self._add(f"{item.command}/{name}", argv, f"{output}/{MANIFEST}", needs)
        self._asked.pop()
        self.inputs[name] = output
        return output

    # ---- runs ------------------------------------------------------------------------------------

    def _run(
        self, run: PlannedRun, corpus: str, selection: str, evaluations: Mapping[str, Any]
    ) -> dict[str, Any]:
        sizes = self.config.sizes
        recipe = sizes[run.size].recipe if run.size else self.config.train
        trained = self._at("runs", run.name, "train")
        name = f"train/{run.name}"
        self._train(name, recipe, trained, corpus, selection, run.seed, evaluations)
        judged = self._at("runs", run.name, "perplexity")
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
        self._add(f"perplexity/{run.name}", argv, f"{judged}/result.json", needs)
        places = {"selection": selection, "train": trained, "perplexity": judged}
        return dataclasses.asdict(run) | places

    def _task_examples(self, name: str, recipe: Recipe, corpus: str) -> str:
        output = self._at("made", f"{name}_examples")
        argv = command("evaluation examples", recipe, {"VOCABULARY": corpus, "OUTPUT": output})
        self._add(f"examples/{name}", argv, f"{output}/{MANIFEST}", self._needs(corpus))
        return output

    def _tasks(
        self,
        run: PlannedRun,
        name: str,
        item: TasksPlan,
        model: str,
        corpus: str,
        examples: str | None,
    ) -> str:
        """Return the path of the results of a set of tasks."""
        root = self._at("runs", run.name, "tasks", name)
        if item.fine_tuning is not None:
            tuning: dict[str, Any] = {
                "MODEL": model,
                "EXAMPLES": examples,
                "OUTPUT": f"{root}/fine_tuned",
                "SEED": run.seed,
                "COMPILATION_CACHE": self._at("compiled"),
            }
            argv = command("train", item.fine_tuning, tuning)
            needs = self._needs(model, examples)
            model = tuning["OUTPUT"]
            self._add(f"fine_tuning/{run.name}-{name}", argv, f"{model}/result.json", needs)
        settings = {"MODEL": model, "VOCABULARY": corpus, "OUTPUT": f"{root}/judged"}
        argv = command("evaluation tasks", item.recipe, settings)
        result, needs = f"{root}/judged/result.json", self._needs(model, corpus)
        self._add(f"tasks/{run.name}-{name}", argv, result, needs)
        return f"{root}/judged"

    def _selection(self, run: PlannedRun, corpus: str) -> str:
        if run.sampler == FULL:
            return self.inputs["pool"]
        sampler = self.config.samplers[run.sampler]
        output = self._at("runs", run.name, "selection")
        given = {"CORPUS": corpus, "WITHIN": self.inputs["pool"]}
        given |= {setting: self._made(source) for setting, source in sampler.inputs.items()}
        settings: dict[str, Any] = {
            **given,
            "OUTPUT": output,
            "KEEP": run.keep_rate / sampler.within_share,
            "SEED": run.seed,
        }
        argv = command("pruning select", sampler.recipe, settings)
        self._add(f"select/{run.name}", argv, f"{output}/{MANIFEST}", self._needs(*given.values()))
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
        self._add(name, argv, f"{output}/result.json", self._needs(corpus, selection, *wanted))


def _runs(config: CompleteStudy) -> list[PlannedRun]:
    """Return the runs of the study, its own model size first."""
    rates = [(name, rate) for rate in config.keep_rates for name in config.samplers]
    runs = [
        PlannedRun(name, rate, seed)
        for seed in config.seeds
        for name, rate in [(FULL, 1.0), *rates]
    ]
    repeated = [(FULL, 1.0), *(pair for pair in rates if pair[0] == RANDOM)]
    runs += [PlannedRun(name, rate, seed) for seed in config.noise_seeds for name, rate in repeated]
    for size, item in config.sizes.items():
        seeds = config.seeds if item.seeds is None else item.seeds
        chosen = [(FULL, 1.0), *(pair for pair in rates if pair[0] in item.samplers)]
        runs += [PlannedRun(name, rate, seed, size) for seed in seeds for name, rate in chosen]
    return runs


def _validate(config: CompleteStudy) -> None:
    """Raise ValueError, with what to change, for a study that does not fit together."""
    if any(not 0 < rate < 1 for rate in config.keep_rates):
        raise EvaluationError(f"keep-rates are shares between 0 and 1: {config.keep_rates}.")
    for name, sampler in config.samplers.items():
        if sampler.scorer is not None and sampler.scorer not in config.scorers:
            raise EvaluationError(
                f"the sampler {name!r} uses the scorer {sampler.scorer!r}, which is not among "
                f"Study.scorers: {', '.join(config.scorers)}."
            )
        if any(rate > sampler.within_share for rate in config.keep_rates):
            raise EvaluationError(
                f"the sampler {name!r} is to keep {max(config.keep_rates):.0%} of the pool, of "
                f"which its WITHIN leaves {sampler.within_share:.0%}."
            )
    for name, scorer in config.scorers.items():
        for stage, value, _ in scorer.terms:
            if stage not in config.stages and Term(value).source != CORPUS:
                raise EvaluationError(
                    f"the scorer {name!r} reads the stage {stage!r}, which is not among "
                    f"Study.stages: {', '.join(config.stages)}."
                )
    taken = set(_GIVEN) | set(config.evaluations)
    if both := sorted(taken & set(config.stages)):
        raise EvaluationError(f"the stage {both[0]!r} has the name of something else: rename it.")
    for name, size in config.sizes.items():
        if unknown := sorted(set(size.samplers) - set(config.samplers)):
            raise EvaluationError(f"the size {name!r} names {unknown[0]!r}, which is no sampler.")
        if unseen := sorted(set(size.seeds or ()) - set(config.seeds)):
            raise EvaluationError(
                f"the size {name!r} has the seed {unseen[0]}, which the study does not have."
            )
    if config.noise_seeds and RANDOM not in config.samplers:
        raise EvaluationError(f"noise_seeds repeat the sampler {RANDOM!r}: add one of that name.")
    if repeated := sorted(set(config.noise_seeds) & set(config.seeds)):
        raise EvaluationError(
            f"the seed {repeated[0]} is in both Study.seeds and Study.noise_seeds."
        )
    if FULL in config.samplers:
        raise EvaluationError(
            f"{FULL!r} is the run on the whole pool; call the sampler something else."
        )
    parts = {"scoring_split": config.scoring_split, "pool_split": config.pool_split}
    own = {name: item.split for name, item in config.evaluations.items() if not item.recipe}
    parts |= {name: split for name, split in own.items() if split}
    by_start = sorted(parts.items(), key=lambda part: part[1])
    for (one, (_, end)), (other, (start, _)) in itertools.pairwise(by_start):
        if start < end:
            raise EvaluationError(f"the parts {one} and {other} of the corpus overlap: {parts}.")


def _padded(size: int) -> int:
    """Return a vocabulary's size rounded up to a multiple of 128, T5's 32,100 to 32,128."""
    return -(-size // 128) * 128


def _vocabulary_of(weights_path: str) -> str | None:
    """Return the SentencePiece file beside weights of T5's family.

    None where the model has another tokenizer, by which it reads the text of any corpus.

    Raises:
      EvaluationError: there is no tokenizer beside the weights.
    """
    from models import weights
    from models.weights import tokenizer_files

    directory, _ = weights.locate(weights_path)
    names = tokenizer_files.T5_SENTENCEPIECE
    if (file := tokenizer_files.find_sentencepiece(directory, names)) is not None:
        return os.fspath(file)
    if holds_tokenizer(directory):
        return None
    raise EvaluationError(
        f"{directory} has no tokenizer beside its weights: put its spiece.model or tokenizer.json "
        "there."
    )
