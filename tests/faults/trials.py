"""Trials: a fault, a command, and what became of it.

    workshop = Workshop(directory)
    for number, (make, case) in enumerate(dealt(workshop, TRIALS, 300, random.Random(0))):
        fault, stage, outcome, words = trial(workshop, random.Random(number), make, case)

A trial starts from whole artifacts, damages something, and runs a command. Where that is refused,
the advice of its message is followed as a user would. At the end all artifacts must be, byte by
byte, those of a run without faults. A kind of trial lists its cases, such as every stage with every
damage: `dealt` gives each its share; the rest is drawn at random.
"""

from __future__ import annotations

import contextlib
import enum
import io
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import damage
import pipeline
from pipeline import content

from pruning.cli.command import exit_status
from pruning.selection.strategies import Threshold
from pruning.store import digests
from pruning.store.artifact import load_artifact
from pruning.store.manifest import MANIFEST, code_revision

_LONGEST = 300.0  # seconds that processes may take
_ROUNDS = 8  # of advice that is followed
code_revision()  # is cached, and inherited by the processes: a commit meanwhile is no difference

_ADVICE = re.compile(r"([Dd]elete|remove) (this file|it|this one|/\S+?)[.,:;]?(?=\s|$)")


class Outcome(enum.Enum):
    """Result of a trial."""

    IDENTICAL = "identical"
    REPAIRED = "refused in one line, repaired by its advice"
    UNREPAIRED = "refused in one line, its advice is no help"
    WRONG = "silently wrong"
    TRACEBACK = "traceback"


class Failed(NamedTuple):
    """Exit status of a command, 0 or 1; None is a traceback."""

    status: int | None
    words: str
    result: str | None = None


class Workshop:
    """A directory with the artifacts of the pipeline, and a copy of them.

    Attributes:
      root: the directory in which things are broken.
      stages: by name.
      makers: names of stages that make an artifact.
      consumers: of every maker, the stages that read its artifact.
      events: of every stage, how often it changes a directory: the moments at which it is killed.
      seconds: of every stage, its duration in a process of its own.
      models: share of trials with stages of model_stages.py, where a kind of trial has such cases.
    """

    def __init__(self, directory: Path, models: float = 0.0):
        """Make all artifacts.

        Args:
          models: share of trials with stages of model_stages.py; 0 makes none of these.
        """
        self.models = models
        self.root = directory / "run"
        self.stages = {**pipeline.STAGES, **(_model_stages() if models else {})}
        self.makers = [name for name, stage in self.stages.items() if stage.makes]
        self.consumers = {
            name: [stage.name for stage in self.stages.values() if name in stage.reads]
            for name in self.makers
        }
        self._golden = directory / "golden"
        self.events: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        here = str(Path(__file__).parent)
        # The server of processes starts with this environment.
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *sys.path])
        self._context = multiprocessing.get_context("forkserver")
        preload = ["trials", "warm"]
        if models:
            preload += ["model_stages", "checkpoint_trials", "training_trials"]
        self._context.set_forkserver_preload(preload)
        pipeline.write_inputs(self.root)
        self._read: dict[str, str | None] = {}
        for name, stage in self.stages.items():
            if stage.makes:
                self._make(name)
            else:
                self._read[name] = stage.run(self.root)
        shutil.copytree(self.root, self._golden)
        self._whole = {name: content(self._golden / name) for name in self.makers}

    def _make(self, name: str) -> None:
        log = self.root / "count"
        started = time.monotonic()
        process = self.start(name, log=log)
        process.join()
        self.seconds[name] = time.monotonic() - started
        said, _, count = log.read_text().rpartition("events: ")
        assert process.exitcode == 0, said
        self.events[name] = int(count)
        log.unlink()

    def has_model(self, case: Sequence[Any]) -> bool:
        """Return whether a case begins with a stage that runs a model or reads its answers."""
        return bool(case) and case[0] in self.stages and case[0] not in pipeline.STAGES

    def start(
        self,
        name: str,
        delay: float = 0.0,
        kill_at: int | None = None,
        log: Path = Path(os.devnull),
        jumps: int | None = None,
    ) -> Any:
        """Start a stage in a process of its own.

        Args:
          delay: seconds before it begins.
          kill_at: after how many changes of directories it is killed.
          log: gets its output, and the number of changes.
          jumps: seed of the jumps of its clock; None for a true clock.
        """
        return self.process(_work, name, self.root, delay, kill_at, log, jumps)

    def process(self, work: Callable[..., None], *given: Any) -> Any:
        """Start a function in a process of its own."""
        process = self._context.Process(target=work, args=given, daemon=True)
        process.start()
        return process

    def run(self, name: str) -> Failed:
        """Run a stage in this process, as the command line does."""
        return run_here(lambda: self.stages[name].run(self.root))

    def run_killed(self, name: str, rng: random.Random) -> None:
        """Run a stage from the beginning, and kill it at a random moment."""
        shutil.rmtree(self.root / name)
        self.start(name, kill_at=1 + rng.randrange(self.events[name])).join()

    def is_whole(self, name: str) -> bool:
        """Return whether an artifact is as without faults."""
        return content(self.root / name) == self._whole[name]

    def differences(self, name: str) -> dict[str, bytes | None]:
        """Return the files of an artifact that are not as without faults; None for lost ones."""
        found, whole = content(self.root / name), self._whole[name]
        return {
            file: found.get(file) for file in {*found, *whole} if found.get(file) != whole.get(file)
        }

    def read(self, name: str, result: str | None) -> bool:
        """Return whether a reader has read what it reads without faults."""
        return result == self._read[name]

    def copied_again(self, words: str) -> bool:
        """Copy the weights again if a message says so; return whether it did."""
        if (
            "weights" not in self.makers
            or "opy" not in words
            or f"{self.root}/weights" not in words
        ):
            return False
        shutil.rmtree(self.root / "weights", ignore_errors=True)
        shutil.copytree(self._golden / "weights", self.root / "weights")
        return True

    def restore(self) -> None:
        """Make all artifacts whole again."""
        for name in self.makers:
            if not self.is_whole(name):
                shutil.rmtree(self.root / name, ignore_errors=True)
                shutil.copytree(self._golden / name, self.root / name)
        for file in self._golden.iterdir():
            if file.is_file():
                shutil.copy(file, self.root)
        for file in (self.root / "documents").iterdir():
            if not (self._golden / "documents" / file.name).exists():
                file.unlink()
        digests._load.cache_clear()  # commands are processes of their own


def _model_stages() -> dict[str, pipeline.Stage]:
    """Return the stages that need JAX, which is slow to import."""
    import model_stages

    return model_stages.STAGES


def _work(
    name: str, root: Path, delay: float, kill_at: int | None, log: Path, jumps: int | None
) -> None:
    """Run a stage in a process started for it."""
    if jumps is not None:
        time.time = jumping(jumps)
    count = 0

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[1], str) and args[1][0] in "wx"
        ):
            count += str(args[0]).startswith(str(root / name))
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def done() -> int:
        stages = pipeline.STAGES if name in pipeline.STAGES else _model_stages()
        stages[name].run(root)
        return 0

    time.sleep(delay)
    sys.addaudithook(on_event)
    with (
        log.open("w") as stream,
        contextlib.redirect_stderr(stream),
        contextlib.redirect_stdout(stream),
    ):
        try:
            status = exit_status(done)
        except Exception:
            status = 2
            traceback.print_exc()
        print(f"events: {count}")
    sys.exit(status)


def jumping(seed: int) -> Callable[[], float]:
    """Return a clock that jumps by up to two years, forth and back, at every tenth look."""
    rng, true = random.Random(seed), time.time
    away = 0.0

    def now() -> float:
        nonlocal away
        if rng.random() < 0.1:
            away = rng.choice((0.0, 3600.0, 6.3e7)) * rng.uniform(-1, 1)
        return true() + away

    return now


def run_here(work: Callable[[], str | None]) -> Failed:
    said = io.StringIO()
    found: list[str | None] = []

    def done() -> int:
        found.append(work())
        return 0

    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            status: int | None = exit_status(done)
        except Exception:
            return Failed(None, traceback.format_exc())
    words = said.getvalue().partition("error: ")[2].rstrip("\n")
    return Failed(status, words, found[0] if found else None)


# --------------------------------------------------------------------------------------------------
# What becomes of it


def ends(
    workshop: Workshop, name: str, repair: str | None = None, repairs: bool = False
) -> tuple[Outcome, str]:
    """Run a command, follow the advice of its messages, and return what became of it.

    Args:
      repair: the artifact that was damaged: it must be whole after a message was followed.
      repairs: the command is run to repair one file. Others may still be damaged: they are found
        when they are read.
    """
    words: list[str] = []
    for _ in range(_ROUNDS):
        ended = workshop.run(name)
        digests._load.cache_clear()
        if ended.status is None or "Traceback" in ended.words:
            return Outcome.TRACEBACK, ended.words
        if ended.status == 0:
            whole = [repair] if repair and words else []
            if workshop.stages[name].makes:
                whole.append(name)
                same = True
            else:
                same = workshop.read(name, ended.result)
            if not same or not (repairs or all(map(workshop.is_whole, whole))):
                differ = [f"{which}: {file}" for which in whole
                          for file in workshop.differences(which)]  # fmt: skip
                return Outcome.WRONG, "\n".join([*words, *differ])
            return (Outcome.REPAIRED if words else Outcome.IDENTICAL), "\n".join(words)
        many = ended.words.count("\n") and "another configuration" not in ended.words
        if many or not ended.words:
            return Outcome.TRACEBACK, ended.words
        if ended.words in words:
            return Outcome.UNREPAIRED, "\n".join(words)
        words.append(ended.words)
        if workshop.copied_again(ended.words):
            continue
        if (maker := _follow(workshop.root, ended.words)) and maker != name:
            again, more = ends(workshop, maker, repairs=True)
            words.append(more)
            if again not in (Outcome.IDENTICAL, Outcome.REPAIRED):
                return again, "\n".join(words)
    return Outcome.UNREPAIRED, "\n".join(words)


def _follow(root: Path, words: str) -> str | None:
    """Delete what a message says; return the artifact whose command is to be run again."""
    places = re.findall(rf"{re.escape(str(root))}/[^\s,:;()]+", words)
    if not places:
        return None
    first = Path(places[0].rstrip("."))
    if found := _ADVICE.search(words):
        target = Path(found[2]) if found[2].startswith("/") else first
        if root not in target.parents:
            return None
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
        first = target
    return first.relative_to(root).parts[0]


# --------------------------------------------------------------------------------------------------
# Trials

Result = tuple[str, str, Outcome, str]  # fault, stage, outcome, what was said


def files_of(directory: Path) -> list[Path]:
    return [file for file in sorted(directory.rglob("*")) if file.is_file()]


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def damaged_artifact(
    workshop: Workshop, rng: random.Random, stage: str, name: str, kind: str
) -> Result:
    """Damage a finished artifact, and run a command that reads it, or the one that made it."""
    again = stage == name
    if not again and workshop.stages[stage].makes:
        shutil.rmtree(workshop.root / stage)
    files = files_of(workshop.root / name)
    if again:  # the manifest says what is lost
        files = [file for file in files if file.name != MANIFEST]
    touched = damage.KINDS[kind](files, rng)
    outcome, words = ends(workshop, stage, repair=name)
    what = f"{', '.join(str(f.relative_to(workshop.root)) for f in touched)}: {words}"
    return f"{kind}, then {'the same' if again else 'the next'} command", stage, outcome, what


def damaged_work(workshop: Workshop, rng: random.Random, name: str, kind: str) -> Result:
    """Kill a command, damage what it has left, and run it again."""
    workshop.run_killed(name, rng)
    files = files_of(workshop.root / name)
    touched = damage.KINDS[kind](files, rng) if files else []
    before = {str(file.relative_to(workshop.root / name)): _read(file) for file in touched}
    outcome, words = ends(workshop, name)
    if outcome is Outcome.WRONG and before.items() >= workshop.differences(name).items():
        # A finished shard is not read again by the command that has made it, but by the next one.
        if readers := workshop.consumers[name]:
            stage = rng.choice(readers)
            if workshop.stages[stage].makes:
                shutil.rmtree(workshop.root / stage)
            outcome, words = ends(workshop, stage, repair=name)
        else:
            outcome, words = _verified(workshop, name)
    what = f"{', '.join(str(f.relative_to(workshop.root)) for f in touched)}: {words}"
    return f"{kind} in unfinished work", name, outcome, what


def _verified(workshop: Workshop, name: str) -> tuple[Outcome, str]:
    """Verify an artifact that no stage reads, and repair it by the advice of each message."""
    words: list[str] = []
    while not workshop.is_whole(name):
        found = run_here(lambda: load_artifact(workshop.root / name).verify())
        if found.status is None or found.words.count("\n"):
            return Outcome.TRACEBACK, found.words
        if not found.status:
            return Outcome.WRONG, "\n".join(words)
        if found.words in words or not _follow(workshop.root, found.words):
            return Outcome.UNREPAIRED, "\n".join([*words, found.words])
        words.append(found.words)
        outcome, more = ends(workshop, name, repairs=True)
        if outcome not in (Outcome.IDENTICAL, Outcome.REPAIRED):
            return outcome, "\n".join([*words, more])
    return Outcome.REPAIRED, "\n".join(words)


def killed(workshop: Workshop, rng: random.Random, name: str) -> Result:
    """Kill a command once or twice, and run it again."""
    workshop.run_killed(name, rng)
    if rng.random() < 0.3:
        workshop.start(name, kill_at=1 + rng.randrange(workshop.events[name])).join()
    outcome, words = ends(workshop, name)
    return "killed", name, outcome, words


def at_once(
    workshop: Workshop, rng: random.Random, name: str, number: int, kills: bool, repairs: bool
) -> Result:
    """Run a command in two or three processes, of new or of lost files; perhaps kill one."""
    if repairs:
        shards = [f for f in files_of(workshop.root / name) if f.name.startswith("data-")]
        for file in rng.sample(shards, min(2, len(shards))):
            file.unlink()
    else:
        shutil.rmtree(workshop.root / name)
    logs = [workshop.root / f"log-{k}" for k in range(number)]
    fault = f"{number} processes at once"
    fault += f"{', one killed' if kills else ''}{', lost files' if repairs else ''}"
    processes = [
        workshop.start(
            name,
            rng.uniform(0, 0.5) * workshop.seconds[name],
            1 + rng.randrange(workshop.events[name]) if kills and not k else None,
            log,
        )
        for k, log in enumerate(logs)
    ]
    latest = time.monotonic() + _LONGEST
    for process in processes:
        process.join(max(latest - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            process.join()
            logs[processes.index(process)].write_text("it waits without end")
            kills = False
    said = "\n".join(log.read_text() for log in logs)
    for log in logs:
        log.unlink()
    ended = [0] + [-signal.SIGKILL] * kills
    if any(process.exitcode not in ended for process in processes):
        refused = "Traceback" not in said
        return fault, name, Outcome.UNREPAIRED if refused else Outcome.TRACEBACK, said
    if kills:
        outcome, words = ends(workshop, name)
        return fault, name, outcome, words
    if differ := list(workshop.differences(name)):
        return fault, name, Outcome.WRONG, f"{said}\n{differ}"
    return fault, name, Outcome.IDENTICAL, said


def refused(workshop: Workshop, rng: random.Random, name: str) -> Result:
    """Run a command that is refused, and then the corrected one, with the same output."""
    root, wrong = workshop.root, _MISTAKES[name]
    stage = name.partition(",")[0]
    shutil.rmtree(root / stage)
    with wrong(root, rng) as work:
        ended = run_here(work)
    if ended.status != 1 or ended.words.count("\n"):
        return "refused, then corrected", name, Outcome.TRACEBACK, ended.words
    corrected = workshop.run(stage)
    if corrected.status is None:
        return "refused, then corrected", name, Outcome.TRACEBACK, corrected.words
    if corrected.status:
        return "refused, then corrected", name, Outcome.UNREPAIRED, corrected.words
    whole = workshop.is_whole(stage)
    return (
        "refused, then corrected",
        name,
        Outcome.REPAIRED if whole else Outcome.WRONG,
        ended.words,
    )


@contextlib.contextmanager
def _bad_file(root: Path, rng: random.Random) -> Iterator[Callable[[], None]]:
    file = root / "documents" / f"{rng.choice('09')}0.jsonl"
    file.write_text("not JSON\n" * rng.choice((5, 500)))
    yield lambda: pipeline.ingest.run(pipeline.ingested(root)) and None
    file.unlink()


@contextlib.contextmanager
def _wrong_vocabulary(root: Path, rng: random.Random) -> Iterator[Callable[[], None]]:
    wrong = rng.choice((f"{root}/nothing", f"{root}/documents", f"{root}/likes-0.parquet"))
    yield lambda: pipeline.ingest.run(pipeline.ingested(root, vocabulary=wrong)) and None


@contextlib.contextmanager
def _wrong_column(root: Path, rng: random.Random) -> Iterator[Callable[[], None]]:
    yield lambda: pipeline.select.run(pipeline.selected(root, score="column:nothing")) and None


@contextlib.contextmanager
def _wrong_scores(root: Path, rng: random.Random) -> Iterator[Callable[[], None]]:
    wrong = rng.choice((f"{root}/nothing", f"{root}/corpus", f"{root}/imported"))
    yield lambda: pipeline.select.run(pipeline.selected(root, scores=wrong)) and None


@contextlib.contextmanager
def _nothing_kept(root: Path, rng: random.Random) -> Iterator[Callable[[], None]]:
    settings = {"strategy": Threshold(low=1e9), "keep_documents": None}
    yield lambda: pipeline.select.run(pipeline.selected(root, **settings)) and None


_MISTAKES = {
    "corpus, a bad file": _bad_file,
    "corpus, a wrong vocabulary": _wrong_vocabulary,
    "selection, a wrong column": _wrong_column,
    "selection, other scores": _wrong_scores,
    "selection, nothing kept": _nothing_kept,
}

Case = tuple[Any, ...]


class Kind(NamedTuple):
    """A kind of trials.

    Attributes:
      share: of all trials, relative to the other kinds.
      cases: further arguments of the trial, the stage first.
    """

    share: float
    cases: Callable[[Workshop], list[Case]]


def of_makers(*others: Iterable[Any]) -> Callable[[Workshop], list[Case]]:
    """Return cases: each stage that makes an artifact, with each combination of the others."""
    return lambda workshop: list(itertools.product(workshop.makers, *others))


def _of_damaged_artifacts(workshop: Workshop) -> list[Case]:
    read = [(reader, name) for name in workshop.makers for reader in workshop.consumers[name]]
    cases = [(*pair, kind) for pair in read for kind in damage.KINDS]
    again = ("file lost", "file truncated")
    return cases + [(name, name, kind) for name in workshop.makers for kind in again] * 4


def _at_once(workshop: Workshop) -> list[Case]:
    # A directory of weights is refused if it is complete.
    names = [name for name in workshop.makers if name != "weights"]
    return list(itertools.product(names, (2, 3), (False, True), (False, True)))


TRIALS: dict[Callable[..., Result], Kind] = {
    damaged_artifact: Kind(0.38, _of_damaged_artifacts),
    damaged_work: Kind(0.16, of_makers(damage.KINDS)),
    killed: Kind(0.09, of_makers()),
    at_once: Kind(0.09, _at_once),
    refused: Kind(0.03, lambda _: [(name,) for name in _MISTAKES]),
}


def dealt(
    workshop: Workshop,
    kinds: Mapping[Callable[..., Result], Kind],
    number: int,
    rng: random.Random,
) -> list[tuple[Callable[..., Result], Case]]:
    """Return trials with their cases, in random order.

    Every kind has its share, within one trial. The cases of a kind have equal shares, those of
    stages with models `workshop.models` of the kind.
    """
    of_kinds = _shares([kind.share for kind in kinds.values()], number)
    trials: list[tuple[Callable[..., Result], Case]] = []
    for (make, kind), count in zip(kinds.items(), of_kinds, strict=True):
        cases = kind.cases(workshop)
        text = [case for case in cases if not workshop.has_model(case)]
        model = [case for case in cases if workshop.has_model(case)]
        share = workshop.models if text and model else float(not text)
        for group, part in zip((text, model), _shares([1 - share, share], count), strict=True):
            rng.shuffle(group)
            trials += [(make, case) for case in itertools.islice(itertools.cycle(group), part)]
    rng.shuffle(trials)
    return trials


def _shares(weights: Sequence[float], number: int) -> list[int]:
    """Return whole numbers with this sum, in proportion to the weights."""
    total = sum(weights)
    ends = [round(number * end / total) for end in itertools.accumulate(weights)]
    return [end - begin for begin, end in itertools.pairwise([0, *ends])]


def trial(
    workshop: Workshop, rng: random.Random, make: Callable[..., Result], case: Case
) -> Result:
    """Make one trial, and restore what it has broken."""
    try:
        return make(workshop, rng, *case)
    except Exception:
        stage = str(case[0]) if case else "corpus"
        return make.__name__, stage, Outcome.TRACEBACK, traceback.format_exc()
    finally:
        workshop.restore()
