"""Examples that teach a model to answer Ask-LLM: documents as they are, and documents spoilt.

    python -m pruning judge --gin_file=configs/score/judge.gin --gin.CORPUS=... --gin.OUTPUT=...
    python train.py --gin_file=configs/pretrain/judge.gin ...

What comes out is a judge of form: well-formed text of this corpus against scrambled, repetitive,
misspelt, cut, stuffed and mixed-up text. It knows nothing of harm or truth, as Flan-T5 may.

Choices
- The examples are the very prompts that the scorer will ask, assembled by its own code.
- A document is used once, intact ("yes") or damaged ("no"): the judge cannot learn documents.
- Damage is dealt to what the judge will see of a document; what `max_tokens` cuts off is left out.
- Which documents, which answer and which damage are functions of (seed, doc_id).
- Shard k holds the examples from corpus shard k: shards are made in parallel, and kept on restart.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pruning import artefact, parallel, progress, randomness
from pruning.artefact import Artefact, ArtefactError, Build, config_of
from pruning.corpus import Corpus, load_corpus
from pruning.damage import KINDS, damaged
from pruning.scorers import Documents
from pruning.scorers.ask_llm import AskLLM
from pruning.scorers.prompt import Prompt
from pruning.selection import Selection, load_selection
from pruning.vocabulary import EOS_ID, Vocabulary

KIND = "examples"
NAME = "Judge"

INTACT, POOR = "intact", "poor"  # kinds beside those of damage
_CHOICE, _LABEL, _DAMAGE, _STRENGTH = range(4)  # streams of random numbers
_AT_ONCE = 512  # documents
_PLACE = ("corpus", "within", "output", "workers")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Settings of `judge`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the examples.
      within: directory of a selection; only its documents are used. Keep the documents that will be
        scored out of it.
      scorer: @AskLLM(), with the prompt, the answers and max_tokens that the scoring will have.
      examples: how many; all documents when there are not so many.
      damaged_share: share of them that is damaged.
      kinds: of damage, each as likely as the others.
      strengths: of damage, likewise.
      poor: metadata column -> value; such documents are "no" as they are, like licences.
      min_tokens: shorter documents are not used: a few words cannot be told from damaged ones.
      seed: of all choices.
      workers: local processes; 0 for one per CPU.
    """

    corpus: str
    output: str
    within: str | None = None
    scorer: AskLLM = AskLLM()  # noqa: RUF009  frozen
    examples: int = 20_000
    damaged_share: float = 0.5
    kinds: tuple[str, ...] = tuple(KINDS)
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    poor: Mapping[str, str] = dataclasses.field(default_factory=dict)
    min_tokens: int = 24
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"no damage is called {unknown[0]!r}; there are: {', '.join(KINDS)}.")


CONFIGURABLES: dict[str, type] = {NAME: JudgeConfig, "AskLLM": AskLLM}


def run(config: JudgeConfig) -> Artefact:
    """Makes the examples, or finishes them.

    Raises:
      ArtefactError: corpus and selection do not belong together, or no document can be used.
      VocabularyError: an answer is no single token of the corpus's vocabulary.
      PromptError: the prompt does not fit.
    """
    pool = _Pool.open(config)
    vocabulary = pool.corpus.vocabulary
    answers = {
        "yes": vocabulary.token(config.scorer.yes[0]),
        "no": vocabulary.token(config.scorer.no[0]),
    }
    described = {k: v for k, v in config_of(config).items() if k not in _PLACE}
    inputs = {"corpus": pool.corpus.artefact}
    if pool.within is not None:
        inputs["within"] = pool.within.artefact
    build = Build(
        config.output, KIND, described, inputs, pool.corpus.num_shards, _schema(vocabulary)
    )
    if build.finished:
        return artefact.load(build.path, KIND)
    pending = build.pending()
    work = functools.partial(judge_shard, config, build, pool.threshold())
    with progress.track(
        "judge", build.num_shards, "shards", build.num_shards - len(pending)
    ) as task:
        parallel.run_shards(work, pending, config.workers, lambda shards, _: task.advance(shards))
    examples = build.finish({"answers": answers, "vocabulary": vocabulary.describe()})
    assert examples is not None  # every shard was ours
    return examples


@dataclasses.dataclass(frozen=True)
class _Pool:
    """The documents that may become examples."""

    config: JudgeConfig
    corpus: Corpus
    within: Selection | None

    @classmethod
    def open(cls, config: JudgeConfig) -> _Pool:
        corpus = load_corpus(config.corpus)
        if absent := sorted(set(config.poor) - set(corpus.metadata)):
            raise ArtefactError(
                f"{config.corpus} has no metadata column {absent[0]!r}; it has: "
                f"{', '.join(corpus.metadata)}. Change Judge.poor."
            )
        within = config.within and load_selection(config.within, corpus.artefact)
        return cls(config, corpus, within or None)

    def draws(self, shard: int) -> np.ndarray:
        """float64 [documents]: the smallest are taken; 1 where a document cannot be an example."""
        table = self.corpus.columns(shard, ["doc_id", "n_tokens"])
        draws = randomness.uniform(self.config.seed, table["doc_id"].to_numpy(), _CHOICE)
        usable = table["n_tokens"].to_numpy() >= self.config.min_tokens
        if self.within is not None:
            usable &= self.within.mask(shard, len(draws))
        return np.where(usable, draws, 1.0)

    def threshold(self) -> float:
        """The draw of the first document that is not taken any more."""
        smallest = np.empty(0)
        for shard in range(self.corpus.num_shards):
            draws = self.draws(shard)
            smallest = np.concatenate([smallest, draws[draws < 1.0]])
            if len(smallest) > self.config.examples:
                smallest = np.partition(smallest, self.config.examples)[: self.config.examples + 1]
        if not len(smallest):
            raise ArtefactError(
                f"no document of {self.config.corpus} can be an example: set Judge.min_tokens "
                "lower, or give another selection."
            )
        return float(smallest.max()) if len(smallest) > self.config.examples else 1.0


def _schema(vocabulary: Vocabulary) -> pa.Schema:
    ids = pa.list_(pa.uint16() if vocabulary.size <= np.iinfo(np.uint16).max else pa.uint32())
    return pa.schema(
        [
            ("inputs", ids),
            ("targets", ids),
            ("label", pa.string()),  # yes, no
            ("kind", pa.string()),  # of damage; "intact", "poor"
            ("strength", pa.float32()),  # of damage; 0 for none
            ("doc_id", pa.int64()),
        ]
    )


def judge_shard(
    config: JudgeConfig, build: Build, threshold: float, shard: int, report: parallel.Report
) -> None:
    """Writes the examples from one shard of the corpus."""
    pool = _Pool.open(config)
    vocabulary = pool.corpus.vocabulary
    prompt = Prompt.of(config.scorer.prompt, vocabulary, end=(EOS_ID,))
    targets = {
        "yes": [vocabulary.token(config.scorer.yes[0]), EOS_ID],
        "no": [vocabulary.token(config.scorer.no[0]), EOS_ID],
    }
    chosen = pool.draws(shard) < threshold
    labels: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    columns = ["doc_id", "text", "n_tokens", *config.poor]
    first = 0
    with build.shard(shard) as writer:
        for batch in pool.corpus.iter_batches(shard, columns, _AT_ONCE):
            rows = batch.filter(pa.array(chosen[first : first + len(batch)])).to_pylist()
            first += len(batch)
            if not rows:
                continue
            room = config.scorer.max_tokens - len(prompt)
            # What is mixed into a document comes from the next one.
            lessons = [
                _lesson(row, donor["text"], config, room)
                for row, donor in zip(rows, [*rows[1:], rows[0]], strict=True)
            ]
            documents = Documents.of(vocabulary.encode_batch([lesson.text for lesson in lessons]))
            inputs, _ = prompt.around(documents, config.scorer.max_tokens)
            writer.write(
                {
                    "inputs": [inputs.tokens[a:b] for a, b in itertools.pairwise(inputs.offsets)],
                    "targets": [targets[lesson.label] for lesson in lessons],
                    "label": [lesson.label for lesson in lessons],
                    "kind": [lesson.kind for lesson in lessons],
                    "strength": np.asarray([lesson.strength for lesson in lessons], np.float32),
                    "doc_id": [row["doc_id"] for row in rows],
                }
            )
            writer.tokens += int(inputs.offsets[-1])
            labels.update(lesson.label for lesson in lessons)
            kinds.update(lesson.kind for lesson in lessons)
        writer.counts = {"labels": dict(labels), "kinds": dict(kinds)}
    report(1, labels.total())


class _Lesson(NamedTuple):
    text: str
    label: str
    kind: str
    strength: float


def _lesson(row: Mapping[str, Any], donor: str, config: JudgeConfig, room: int) -> _Lesson:
    """Intact or damaged: decided by (seed, doc_id)."""
    text, n_tokens, doc_id = row["text"], row["n_tokens"], row["doc_id"]
    if any(row[column] == value for column, value in config.poor.items()):
        return _Lesson(text, "no", POOR, 0.0)
    label, kind, strength = (
        float(randomness.uniform(config.seed, np.asarray([doc_id]), stream)[0])
        for stream in (_LABEL, _DAMAGE, _STRENGTH)
    )
    if label < config.damaged_share:
        kind_name = config.kinds[int(kind * len(config.kinds))]
        level = config.strengths[int(strength * len(config.strengths))]
        seen = text[: -(-len(text) * room // n_tokens)] if n_tokens > room else text
        spoilt = damaged(seen, kind_name, level, config.seed, doc_id, donor)
        if spoilt != seen:  # a text of one sentence cannot be repeated
            return _Lesson(spoilt, "no", kind_name, level)
    return _Lesson(text, "yes", INTACT, 0.0)
