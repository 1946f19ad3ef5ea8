"""Training examples for an Ask-LLM judge: intact documents and damaged documents.

    python -m pruning judge --gin_file=configs/score/judge.gin --gin.CORPUS=... --gin.OUTPUT=...
    python train.py --gin_file=configs/pretrain/judge.gin ...

A model that is trained on these examples judges form: well-formed text of this corpus against
scrambled, repetitive, misspelled, cut, stuffed and mixed text. It is not trained to judge harm or
truth.

Choices
- The examples are the scorer's own prompts, assembled by its code.
- A document is used once, intact ("yes") or damaged ("no"), so that memorizing it does not help.
- Damage is applied to the part of a document that the judge will see, up to `max_tokens`.
- The documents, their answers and their damage are functions of (seed, doc_id).
- Shard k holds the examples from corpus shard k. Shards are made in parallel and kept on restart.
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

from pruning.corpus.reader import Corpus, load_corpus
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.corpus.tokenizers import require_sentencepiece
from pruning.corpus.vocabulary import EOS_ID, Vocabulary
from pruning.scores.distilled.damage import KINDS, damaged
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.prompt import Prompt
from pruning.scores.model.scorer import Documents
from pruning.store import late, parallel, progress, randomness
from pruning.store.artifact import Artifact, load_artifact
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError, config_of
from pruning.store.randomness import Stream

KIND = "examples"
NAME = "Judge"

INTACT, POOR = "intact", "poor"  # kinds in addition to those of damage
_AT_ONCE = 512  # documents
_PLACE = ("corpus", "within", "output", "workers")


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Settings of `judge`.

    Attributes:
      corpus: directory of the corpus.
      output: directory of the examples.
      within: directory of a selection; only its documents are used. It should exclude the documents
        to be scored.
      scorer: @AskLLM(), with the prompt, the answers and max_tokens of the later scoring.
      examples: number of examples; all documents if there are fewer.
      damaged_share: share of the examples that are damaged.
      kinds: kinds of damage, with equal probabilities.
      strengths: strengths of damage, with equal probabilities.
      poor: metadata column -> value; such documents, licenses for example, are "no" without damage.
      min_tokens: shorter documents are not used, because damage to a few words is not visible.
      seed: seed of all random choices.
      workers: number of local processes; 0 for one per CPU.
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
        parallel.require_processes(self.workers)
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise ValueError(f"no damage is called {unknown[0]!r}; there are: {', '.join(KINDS)}.")


CONFIGURABLES: dict[str, type] = {NAME: JudgeConfig, "AskLLM": AskLLM}


@late.stage
def run(config: JudgeConfig) -> Artifact:
    """Make the examples, or resume an interrupted run.

    Raises:
      ArtifactError: corpus and selection do not belong together, or no document can be used.
      VocabularyError: an answer is not a single token of the corpus's vocabulary.
      PromptError: the prompt does not fit.
    """
    pool = _Candidates.open(config)
    vocabulary = require_sentencepiece(pool.corpus.vocabulary, "a judge of T5's family")
    answers = {
        "yes": vocabulary.token(config.scorer.yes[0]),
        "no": vocabulary.token(config.scorer.no[0]),
    }
    described = {k: v for k, v in config_of(config).items() if k not in _PLACE}
    inputs = {"corpus": pool.corpus.artifact}
    if pool.within is not None:
        inputs["within"] = pool.within.artifact
    build = Build(
        config.output, KIND, described, inputs, pool.corpus.num_shards, _schema(vocabulary)
    )
    if build.finished:
        return load_artifact(build.path, KIND)
    pending = build.pending()
    work = functools.partial(judge_shard, config, build, pool.threshold())
    with progress.track(
        "judge", build.num_shards, "shards", build.num_shards - len(pending)
    ) as task:
        parallel.run_shards(work, pending, config.workers, lambda shards, _: task.advance(shards))
    examples = build.finish({"answers": answers, "vocabulary": vocabulary.describe()})
    assert examples is not None  # this process had every shard
    return examples


@dataclasses.dataclass(frozen=True)
class _Candidates:
    """Documents that are candidates for examples."""

    config: JudgeConfig
    corpus: Corpus
    within: Selection | None

    @classmethod
    def open(cls, config: JudgeConfig) -> _Candidates:
        corpus = load_corpus(config.corpus)
        if absent := sorted(set(config.poor) - set(corpus.metadata)):
            raise ArtifactError(
                f"{config.corpus} has no metadata column {absent[0]!r}; it has: "
                f"{', '.join(corpus.metadata)}. Change Judge.poor."
            )
        within = config.within and load_selection(config.within, corpus.artifact)
        return cls(config, corpus, within or None)

    def draws(self, shard: int) -> np.ndarray:
        """Return draws, float64 [documents]; the smallest are taken, and 1 is no example."""
        table = self.corpus.columns(shard, ["doc_id", "n_tokens"])
        draws = randomness.uniform(
            Stream.JUDGE_CHOICE, self.config.seed, table["doc_id"].to_numpy()
        )
        usable = table["n_tokens"].to_numpy() >= self.config.min_tokens
        if self.within is not None:
            usable &= self.within.mask(shard, len(draws))
        return np.where(usable, draws, 1.0)

    def threshold(self) -> float:
        """Return the smallest draw that is not taken."""
        smallest = np.empty(0)
        for shard in range(self.corpus.num_shards):
            draws = self.draws(shard)
            smallest = np.concatenate([smallest, draws[draws < 1.0]])
            if len(smallest) > self.config.examples:
                smallest = np.partition(smallest, self.config.examples)[: self.config.examples + 1]
        if not len(smallest):
            raise ArtifactError(
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
    """Write the examples from one shard of the corpus."""
    pool = _Candidates.open(config)
    vocabulary = require_sentencepiece(pool.corpus.vocabulary, "a judge of T5's family")
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
            # Sentences mixed into a document are taken from the next one.
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
    """Decide by (seed, doc_id) whether a document is damaged, and how."""
    text, n_tokens, doc_id = row["text"], row["n_tokens"], row["doc_id"]
    if any(row[column] == value for column, value in config.poor.items()):
        return _Lesson(text, "no", POOR, 0.0)
    label, kind, strength = (
        float(randomness.uniform(stream, config.seed, np.asarray([doc_id]))[0])
        for stream in (Stream.JUDGE_LABEL, Stream.JUDGE_KIND, Stream.JUDGE_STRENGTH)
    )
    if label < config.damaged_share:
        kind_name = config.kinds[int(kind * len(config.kinds))]
        level = config.strengths[int(strength * len(config.strengths))]
        seen = text[: -(-len(text) * room // n_tokens)] if n_tokens > room else text
        spoilt = damaged(seen, kind_name, level, config.seed, doc_id, donor)
        if spoilt != seen:  # a text of one sentence cannot be repeated
            return _Lesson(spoilt, "no", kind_name, level)
    return _Lesson(text, "yes", INTACT, 0.0)
