"""Rounds of questions: a selection of documents, asked by the scoring engine, and its answers.

    OUTPUT/rounds/teach-1/documents    the selection
    OUTPUT/rounds/teach-1/scores       the score set

Choices
- A round is a pair of ordinary artifacts, named by its purpose. A restart finds finished rounds
  finished, so that no document is asked about twice.
- All processes go through the same rounds. The engine divides a round among them, the first one
  does everything else, and the others wait for its artifacts.
- Where a score set stands in for the judge, rounds write nothing and cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable

import numpy as np
from etils import epath

from models.terminal import say
from pruning.corpus.selection_reader import load_selection
from pruning.scores.distilled.lessons import tokens_read
from pruning.scores.model import engine
from pruning.scores.model.engine import ScoreConfig
from pruning.scores.model.estimate import Estimate
from pruning.scores.workers import worker_of
from pruning.selection.cascade.config import CascadeConfig
from pruning.selection.cascade.documents import ENCODING, Documents
from pruning.selection.select import SCHEMA
from pruning.store.artifact import Artifact, is_finished, load_artifact
from pruning.store.build import Build
from pruning.store.manifest import MEASURED, ArtifactError

_LOOK_EVERY, _SAY_EVERY = 2.0, 60.0  # seconds

SPENT = ("useful_flops", "done_flops", "device_seconds")


@dataclasses.dataclass
class Rounds:
    """The rounds of a cascade.

    Attributes:
      judged: a score set in the judge's place.
      spent: "judge" or "level_1", ... -> measurements of its score sets, summed.
      answers: the judge's score sets, in the order of the rounds.
    """

    config: CascadeConfig
    documents: Documents
    judged: Artifact | None
    spent: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    answers: list[Artifact] = dataclasses.field(default_factory=list)

    @property
    def first(self) -> bool:
        """True for the process that does what is not divided."""
        return self.worker[0] == 0

    @property
    def worker(self) -> tuple[int, int]:
        if self.config.judge is None and not self.config.levels:
            return 0, 1
        return worker_of(self.config.worker, self.config.workers)

    def at(self, *names: str) -> epath.Path:
        return epath.Path(self.config.output).joinpath("rounds", *names)

    def ask(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Return the judge's scores of some documents, float64 [rows]; NaN where it gives none."""
        config = self.config
        if config.judge is None:
            return self.known[rows]
        judge, first = config.judge, self.answers[0] if self.answers else None
        if first is not None and judge.dtype is None:  # the platform may be another one by now
            judge = dataclasses.replace(judge, dtype=first.manifest.config.get("dtype"))
        scores = self.score(name, rows, judge, "judge")
        if first is not None and scores.manifest.config["model"] != first.manifest.config["model"]:
            raise ArtifactError(
                f"{scores.path} was answered by another model than {first.path}: put the model "
                f"back, delete {scores.path}, and run the same command again."
            )
        self.answers.append(scores)
        return self.documents.read(scores, config.score)[rows]

    @functools.cached_property
    def known(self) -> np.ndarray:
        """The scores that stand in for the judge, float64 [documents]."""
        return self.documents.read(self.judged, self.config.score)

    def tokens_read(self) -> int | None:
        """Return the most tokens that the judge read of a truncated document, if it says so."""
        sets = self.answers if self.judged is None else [self.judged]
        found = [tokens_read(self.documents.corpus, scores) for scores in sets]
        return max((tokens for tokens in found if tokens), default=None)

    def everything(self) -> Estimate | None:
        """Return the estimated cost of asking the judge about every document, if it is known."""
        if self.config.judge is None or self.config.judge.server is not None:
            return None  # FLOPs of a server are unknown
        within = None
        if self.config.within is not None:
            within = load_selection(self.config.within, self.documents.corpus.artifact)
        found = engine.dry_run(self.config.judge, self.documents.corpus, within)
        assert isinstance(found, Estimate)
        return found

    def score(self, name: str, rows: np.ndarray, scorer: ScoreConfig, spender: str) -> Artifact:
        """Return a score set of some documents, int [rows]; `spender` is a key of `spent`."""
        chosen = np.zeros(len(self.documents), bool)
        chosen[rows] = True

        def select() -> None:
            inputs = {"corpus": self.documents.corpus.artifact}
            identity = {"cascade": self.config.identity, "round": name}
            shards = self.documents.corpus.num_shards
            build = Build(
                self.at(name, "documents"), "selection", identity, inputs, shards, SCHEMA, ENCODING
            )
            if not build.finished:
                self.documents.write(build, chosen, {})

        self.made(self.at(name, "documents"), select)
        self.documents.require_chosen(load_selection(self.at(name, "documents")), chosen)
        worker, workers = self.worker
        settings = dataclasses.replace(
            scorer,
            corpus=self.config.corpus,
            within=str(self.at(name, "documents")),
            output=str(self.at(name, "scores")),
            worker=worker,
            workers=workers,
            dry_run=False,
        )
        if not is_finished(settings.output):
            say(f"cascade: {name}, {len(rows):,} documents", error=True)
            engine.run(settings, may_all_fail=True)  # a round may have a single document
        self.made(self.at(name, "scores"), None)
        scores = load_artifact(settings.output, engine.KIND)
        measured = json.loads((scores.path / MEASURED).read_text())
        spent = self.spent.setdefault(spender, dict.fromkeys(SPENT, 0.0))
        for key in SPENT:
            spent[key] += measured.get(key, 0.0)
        return scores

    def made(self, path: epath.Path, make: Callable[[], object] | None) -> None:
        """Make an artifact in the first process; wait for it in the others."""
        if make is not None and self.first:
            make()
        said = time.monotonic()
        while not is_finished(path):
            if time.monotonic() - said > _SAY_EVERY:
                said = time.monotonic()
                say(f"cascade: waiting for other workers to finish {path}", error=True)
            time.sleep(_LOOK_EVERY)
