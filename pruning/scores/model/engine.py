"""The scoring engine: a corpus and a model in, a score set out.

    read -> windows -> pack -> fill    |    ask    |    unpack -> columns -> write
    a thread ahead (batches.py)          (device)         a thread behind

Choices
- Two batches are in flight while the host processes the answers of the previous one, so that the
  device always has its next batch. Reading, packing and writing run in separate threads.
- Workers divide a corpus by shards, index modulo workers, without communication. A worker that is
  killed and restarted loses only the shard that it was writing.
- The recorded configuration holds the settings that change the scores: scorer, row lengths, dtype,
  the model and its parameters. Batch size, mesh and workers may change on resume. Row length, batch
  and dtype follow the platform if they are not given (platform_defaults.py).
- Compilation happens before the first batch and is cached on disk. Its time and that of the start
  are reported separately.
- A row group holds many chunks, because each row group costs every reader of the scores.
- The process that finishes a score set prints the measured cost and records it in measured.json.
- A user-defined scorer is any object with `prepare` (scorer.py), named in gin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from models.packing import Windows
from models.terminal import say
from pruning.corpus.selection_reader import Selection, load_selection
from pruning.scores import pipeline, vectors
from pruning.scores.model.ask_llm import AskLLM
from pruning.scores.model.batches import Reader
from pruning.scores.model.chunk_scores import Ask
from pruning.scores.model.embedding import Embedding
from pruning.scores.model.likelihood import Likelihood
from pruning.scores.model.loading import (
    corpus_for,
    has_own_tokens,
    model_config,
    scorer_tokenizer,
)
from pruning.scores.model.rubric import Question, Rubric
from pruning.scores.model.scored_parts import Part, scored
from pruning.scores.model.scorer import Documents, Prepared, ScoreError, Scorer, Scores
from pruning.scores.model.scoring_meter import ScoringMeter
from pruning.scores.model.sequence_classifier import SequenceClassifier
from pruning.scores.model.served import judging
from pruning.scores.model.served.server import Server
from pruning.scores.model.student import Student
from pruning.scores.score_set import (
    FAILED,
    NOT_FINITE,
    NOT_LISTED,
    NOT_SELECTED,
    OK,
    Column,
    schema_of,
)
from pruning.scores.workers import require_worker, worker_of
from pruning.store import late, progress
from pruning.store.artifact import Artifact, measured
from pruning.store.atomic import write_text
from pruning.store.build import Build, begun_configuration
from pruning.store.heartbeat import Heartbeat
from pruning.store.manifest import MEASURED, Counts, added_setting, config_of, merge_counts

if TYPE_CHECKING:
    from pruning.corpus.reader import Corpus
    from pruning.scores.model.device import Loaded
    from pruning.scores.model.estimate import Costs, Estimate

KIND = "scores"
_BEHIND = 8  # largest number of chunks waiting to be written
# Size of a row group of the score set: it ends when it reaches either number.
_ROW_GROUP = 1 << 16  # documents
_ROW_GROUP_BYTES = 1 << 24
_MAX_UNKNOWN = 0.1


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Settings of `python -m pruning score`.

    Attributes:
      corpus: the corpus to score.
      output: directory of the score set.
      scorer: `@AskLLM()`, `@Rubric()`, `@Likelihood()`, `@Embedding()`, `@SequenceClassifier()`,
        `@Student()`, or a user-defined scorer (docs/samplers.md).
      model: a path or name that `models.weights.load` takes: a directory, a training run, a hub
        name. A dry run also takes a published shape, such as "flan_t5_xl". With `server`, the
        model's name there.
      tokenizer: tokenizer of a model whose directory has none: a tokenizer.json, a SentencePiece
        file, "bytes", a model's directory, or "corpus" for the corpus's own. With `server`, the
        tokenizer.json of the model there; without it the server tokenizes the prompts.
      tokens: a token set of the corpus (`tokenize`) to read. Without one, a corpus of another
        vocabulary than the model's is tokenized on reading.
      row_length: positions of a packed row; longer rows waste less on padding, more on attention.
        By default 1,024, on CPUs 512, or as many as the longest window needs.
      batch_rows: rows of a batch, over all of this process's devices. By default 4,096 tokens per
        device; on GPUs, 16,384; on TPUs with sharded parameters, 8,192.
      dtype: dtype of the parameters and the computation. Softmax, norms and log-probabilities are
        float32 in either case. By default bfloat16, on CPUs without instructions for it float32.
        A run that continues keeps the row length and the dtype that it began with.
      residual_dtype: dtype of the residual stream. bfloat16 is faster on TPUs, with unrolled layers
        most (docs/tpu.md), and less exact (models/config.py).
      attention: the kernel: "auto" chooses by platform and shape; see models/kernels/__init__.py.
      mlp_kernel: kernel of gated MLPs: "auto" is one kernel for both products on GPUs in bfloat16;
        "xla" turns it off.
      scan_layers: compile one layer for all; False unrolls them, which takes minutes to compile.
      fsdp, tensor: mesh axes; the remaining devices are data-parallel.
      worker, workers: this process scores the shards whose index is `worker` modulo `workers`. By
        default the processes of `jax.distributed` divide them.
      within: a selection of the same corpus; other documents get the status "not_selected".
      max_unknown: largest share of a document's tokens that may be unknown to the model's
        vocabulary; a document with more, such as a Chinese one under T5's vocabulary, has the
        status "unknown_tokens" instead of a score.
      compilation_cache: directory of compiled programs; None for no cache.
      compiler_options: options of XLA, over those of models/compiler_options.py; docs/tpu.md has
        one that helps T5 if fsdp is more than 1.
      dry_run: estimate the cost and score nothing.
      efficiency: share of peak, by executed FLOPs, that the estimate assumes.
      server: @Server() asks a judge behind an OpenAI-compatible endpoint, with @AskLLM() or
        @Rubric(); settings of the computation then have no meaning. docs/served.md.
    """

    corpus: str
    output: str
    scorer: Scorer
    model: str
    tokenizer: str | None = None
    tokens: str | None = None
    row_length: int | None = None
    batch_rows: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True
    fsdp: int = 1
    tensor: int = 1
    worker: int | None = None
    workers: int | None = None
    within: str | None = None
    max_unknown: float = _MAX_UNKNOWN
    compilation_cache: str | None = "~/.cache/winnow/compiled"
    compiler_options: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    dry_run: bool = False
    efficiency: float = 0.5
    attention: str = added_setting("auto")
    server: Server | None = added_setting(None)  # noqa: RUF009
    mlp_kernel: str = added_setting("auto")

    def __post_init__(self) -> None:
        if self.server is not None and self.tokens is not None:
            raise ValueError("Score.tokens is for local models: leave it out with Score.server.")
        require_worker(self.worker, self.workers)
        sizes = ("row_length", "batch_rows", "fsdp", "tensor")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, not {value}.")
        if not 0 <= self.max_unknown <= 1:
            raise ValueError(f"max_unknown is a share, from 0 to 1, not {self.max_unknown}.")
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"efficiency is above 0 and at most 1, not {self.efficiency}.")


NAME = "Score"
CONFIGURABLES: dict[str, type] = {
    NAME: ScoreConfig,
    "AskLLM": AskLLM,
    "Rubric": Rubric,
    "Question": Question,
    "Likelihood": Likelihood,
    "Embedding": Embedding,
    "SequenceClassifier": SequenceClassifier,
    "Student": Student,
    "Server": Server,
}


@late.stage
def run(config: ScoreConfig, may_all_fail: bool = False) -> Artifact | None:
    """Score a corpus, or resume an interrupted run.

    Args:
      may_all_fail: accept a score set without any score, where few documents are scored.

    Returns:
      The score set; None while other workers' shards are missing, and after a dry run.

    Raises:
      ArtifactError: corpus, selection and output do not belong together.
      ConfigurationChanged: the output holds work of other settings or another model.
      VocabularyError: the model has another vocabulary than the corpus.
      FloatingPointError: all of the model's answers are NaN.
      ScoreError: scorer and model are incompatible, or no document got a score.
    """
    from pruning.corpus.reader import load_corpus

    started = time.perf_counter()
    worker, workers = worker_of(config.worker, config.workers)
    corpus = load_corpus(config.corpus)
    within = None if config.within is None else load_selection(config.within, corpus.artifact)
    if config.dry_run:
        say(dry_run(config, corpus, within))
        return None
    mine = range(worker, corpus.num_shards, workers)
    if config.server is not None:
        asked = _served(config, config.server, corpus, within)
        build, summary = asked.claim(), asked.summary
        if shards := build.pending(worker, workers):
            asked.score(build, shards, mine, f"{worker} of {workers}")
    else:
        plan = _Plan.of(config, corpus, within)
        build, summary = plan.claim(), plan.summary
        if shards := build.pending(worker, workers):
            with build.beating(f"{worker} of {workers}") as beat:
                beat.on(shards[0], "compiles")
                plan.score(build, shards, mine, started)
    if not may_all_fail:
        require_some_score(build)
    scores = build.finish(summary)
    if scores is not None:
        for line in losses(scores.manifest.counts):
            say(line, error=True)
        if config.server is not None:
            say(judging.report(measured(scores.path), scores.manifest.counts))
        else:
            _report(scores, plan)
    return scores


def _served(
    config: ScoreConfig, server: Server, corpus: Corpus, within: Selection | None
) -> judging.Plan:
    return judging.Plan.of(
        server, config.scorer, config.model, config.tokenizer, config.output, corpus, within
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Inputs of a run, loaded and checked for consistency.

    Attributes:
      dtype: dtype of the parameters and the computation.
      lengths: int64, token counts of a sample of the documents.
      row_lengths: positions of a packed row, per side of the scorer's windows.
      batch_rows: rows of a batch.
    """

    config: ScoreConfig
    corpus: Corpus
    within: Selection | None
    loaded: Loaded
    prepared: Prepared
    costs: Costs
    dtype: str
    lengths: np.ndarray
    row_lengths: tuple[int, ...]
    batch_rows: int

    @classmethod
    def of(cls, config: ScoreConfig, corpus: Corpus, within: Selection | None) -> _Plan:
        """Load the model, prepare the scorer, and choose dtype, row lengths and batch."""
        import jax

        from models import runtime
        from pruning.scores.model import device, estimate, platform_defaults

        if config.compilation_cache is not None:
            runtime.cache_compilations(Path(config.compilation_cache).expanduser())
        if config.fsdp == config.tensor == 1:
            device.use_cores(config.batch_rows)
        platform = jax.local_devices()[0].platform
        begun = begun_configuration(config.output, KIND)
        dtype = platform_defaults.choose_dtype(config.dtype, begun, platform)
        loaded = device.load(
            config.model,
            dtype,
            config.fsdp,
            config.tensor,
            residual_dtype=config.residual_dtype,
            attention=config.attention,
            mlp_kernel=config.mlp_kernel,
            scan_layers=config.scan_layers,
        )
        shape = loaded.model.config
        corpus = corpus_for(config.model, shape, corpus, config.tokenizer, config.tokens)
        prepared = config.scorer.prepare(loaded.model, scorer_tokenizer(corpus))
        if not has_own_tokens(corpus) and prepared.read is None:
            prepared = _with_token_counts(prepared)
        costs = estimate.Costs.of_scorer(shape, prepared)
        lengths = estimate.sample_lengths(corpus)
        windows = estimate.windows_of(prepared, lengths)
        rows = platform_defaults.begun_row_lengths(begun, prepared.sides)
        if config.row_length is not None or rows is None:
            rows = estimate.choose_row_lengths(
                prepared, costs, windows, config.row_length, platform
            )
        batch = platform_defaults.choose_batch_rows(
            config.batch_rows, max(rows), platform, loaded.mesh.shape
        )
        loaded.require_rows(batch)
        plan = cls(config, corpus, within, loaded, prepared, costs, dtype, lengths, rows, batch)
        say(plan.described, error=True)
        return plan

    @property
    def described(self) -> str:
        """The line that says what was chosen."""
        devices = self.loaded.mesh.devices.flat
        rows = ", ".join(
            f"{length:,} {side}"
            for side, length in zip(self.prepared.sides, self.row_lengths, strict=True)
        )
        return (
            f"{self.dtype}, batches of {self.batch_rows:,} rows of {rows} tokens on "
            f"{self.loaded.mesh.size} x {devices[0].device_kind}"
        )

    def claim(self) -> Build:
        """Claim the output directory, or reopen the work of an earlier run."""
        schema = schema_of(self.prepared.columns)
        identity: dict[str, Any] = {
            "scorer": {**config_of(self.config.scorer), **self.prepared.settings},
            "dtype": self.dtype,
            "row_lengths": dict(zip(self.prepared.sides, self.row_lengths, strict=True)),
            "model": {"config": self.loaded.model.config.to_dict(), "digest": self.loaded.digest},
        }
        if not has_own_tokens(self.corpus):
            identity["tokenizer"] = self.corpus.vocabulary.digest
            if self.prepared.read is not None and self.corpus.vocabulary.kind != "json":
                identity["prompts"] = "whole"  # before 2026-12 joined from pieces
        if self.config.max_unknown != _MAX_UNKNOWN:
            identity["max_unknown"] = self.config.max_unknown
        inputs = {"corpus": self.corpus.artifact}
        if self.within is not None:
            inputs["within"] = self.within.artifact
        encoding = vectors.encoding_of(schema)
        output, shards = self.config.output, self.corpus.num_shards
        return Build(output, KIND, identity, inputs, shards, schema, encoding)

    def score(self, build: Build, pending: Sequence[int], mine: Sequence[int], started: float):
        """Compile, then score and write the pending shards.

        Args:
          mine: all shards of this worker, the finished ones included.
          started: `time.perf_counter()` at the start of the process's work.
        """
        from pruning.scores.model import device

        loaded = self.loaded
        reader = Reader(
            self.corpus,
            self.within,
            self.prepared,
            self.row_lengths,
            self.batch_rows,
            self.config.max_unknown,
        )
        step = device.Step(self.prepared, loaded, reader.batch_shapes, self.config.compiler_options)
        once = {
            "start_seconds": time.perf_counter() - started - step.compile_seconds,
            "compile_seconds": step.compile_seconds,
        }
        total = sum(map(self.corpus.documents, mine))
        done = total - sum(map(self.corpus.documents, pending))
        with progress.track("score", total, "documents", done) as task:
            meter = ScoringMeter(reader, self.costs, task, loaded.mesh.size, step.peak_flops, once)
            score(reader, pending, step, build, meter)

    @property
    def summary(self) -> dict[str, Any]:
        """The manifest's description of scorer and model."""
        columns = self.prepared.columns
        return {
            "scorer": self.prepared.name,
            "columns": {name: column.meaning for name, column in columns.items()},
            "model": {
                "path": self.config.model,
                "family": self.loaded.model.config.family,
                "parameters": self.loaded.model.parameter_count(),
            },
            **self.prepared.summary,
        }

    def estimate(self) -> Estimate:
        """Return the expected cost of the run."""
        from pruning.scores.model import estimate

        return estimate.estimate(
            self.prepared,
            self.loaded.model.config,
            self.lengths,
            _documents(self.corpus, self.within),
            max(self.row_lengths),
            self.config.efficiency,
        )


def require_some_score(build: Build) -> None:
    """Raise ScoreError if all shards are written and every document that was scored failed."""
    if build.finished:
        return
    records = [record for record in build.records() if record is not None]
    if len(records) < build.num_shards:
        return
    counts = Counter[str]()
    for record in records:
        counts.update(record["counts"].get("documents", {}))
    bad = {name: counts[name] for name in (FAILED, NOT_FINITE, NOT_LISTED) if counts[name]}
    if bad and not counts[OK]:
        said = ", ".join(f'{count:,} are "{name}"' for name, count in bad.items())
        mend = "Weights or scorer are unfit for this corpus"
        if counts[NOT_LISTED]:
            mend = "Raise Server.top, or give answers that the judge uses"
        raise ScoreError(
            f"{build.path}: no document has a score: {said}. {mend}; use a new output directory "
            "after correcting them."
        )


def losses(counts: Counts) -> Iterator[str]:
    """Yield lines on documents without a score, by status, on tokens lost by truncation, and on
    examples of a student (`Student.examples`) that the corpus does not have.
    """
    documents = counts["documents"]
    total = sum(documents.values())
    without = {name: n for name, n in documents.items() if name not in (OK, NOT_SELECTED)}
    if without:
        said = ", ".join(f"{n:,} {name}" for name, n in without.items())
        yield f"no score: {sum(without.values()):,} of {total:,} documents ({said})"
    cut = counts.get("truncated", {})
    if cut.get("documents"):
        read = counts["judge_tokens" if "judge_tokens" in counts else "tokens"]
        share = cut["tokens"] / max(read, 1)
        yield (
            f"cut: {cut['documents']:,} of {total:,} documents, which lost {cut['tokens']:,} "
            f"tokens, {share:.1%} of those of all scored documents"
        )
    if counts.get("out_of_fold") == 0:
        yield (
            "out of fold: no scored document is an example of the student. If the corpus holds its "
            "examples, their tokens have changed: look at Score.tokenizer and Score.tokens"
        )


def _with_token_counts(prepared: Prepared) -> Prepared:
    """Return the scorer with an added column: document lengths in the model's tokens."""
    name = "n_tokens"

    def finish(documents: Documents, windows: Windows, answers: np.ndarray) -> Scores:
        scores = prepared.finish(documents, windows, answers)
        counts = documents.lengths.astype(np.int32)
        return dataclasses.replace(scores, columns={**scores.columns, name: counts})

    column = Column(pa.int32(), "tokens of the document, by the model's tokenizer")
    return dataclasses.replace(prepared, columns={**prepared.columns, name: column}, finish=finish)


def _documents(corpus: Corpus, within: Selection | None) -> int:
    return corpus.artifact.manifest.rows if within is None else within.documents


def _report(scores: Artifact, plan: _Plan) -> None:
    """Print the measured cost of the score set, and add it to measured.json."""
    from pruning.scores.model.estimate import Measured

    sums = measured(scores.path)
    try:
        found = Measured.of(sums)
    except KeyError:  # some shards are of an earlier version, which measured less
        return
    lines = found.lines(plan.estimate())
    if "cost" not in sums:
        more = found.derived() | {"run": plan.described, "cost": lines}
        write_text(scores.path / MEASURED, json.dumps(sums | more, indent=1) + "\n")
    say("\n".join(lines))


def dry_run(config: ScoreConfig, corpus: Corpus, within: Selection | None) -> Estimate | str:
    """Return an estimate of the cost of `run`, without reading weights.

    The model may be the name of a published shape (`models.published.NAMED`). A judge behind a
    server is asked about a few documents.
    """
    if config.server is not None:
        return _served(config, config.server, corpus, within).estimate()
    from models.model import Model
    from models.published import NAMED
    from pruning.scores.model import estimate

    shape = model_config(config.model)
    if config.model not in NAMED or config.tokenizer is not None:
        corpus = corpus_for(config.model, shape, corpus, config.tokenizer, config.tokens)
    prepared = config.scorer.prepare(Model(shape), scorer_tokenizer(corpus))
    return estimate.estimate(
        prepared,
        shape,
        estimate.sample_lengths(corpus),
        _documents(corpus, within),
        config.row_length,
        config.efficiency,
    )


# --------------------------------------------------------------------------------------------------
# The loop


def score(
    reader: Reader, shards: Sequence[int], ask: Ask, build: Build, meter: ScoringMeter | None = None
) -> None:
    """Score and write some shards, in order.

    Args:
      ask: packed rows -> answers; a `device.Step` or any other callable.
      meter: sums of the work done.
    """
    meter = meter or ScoringMeter(reader)

    def write(parts: Iterator[Part]) -> None:
        _write(build, beat, shards, parts, meter)

    with (
        build.beating() as beat,
        pipeline.behind(write, _BEHIND) as give,
        contextlib.closing(scored(reader, shards, ask, meter)) as parts,
    ):
        for part in parts:
            give(part)


def _write(
    build: Build,
    beat: Heartbeat,
    shards: Sequence[int],
    parts: Iterator[Part],
    meter: ScoringMeter,
) -> None:
    for shard in shards:
        beat.on(shard, "scores", meter.progress)
        first = next(parts, None)
        if first is None:  # the driver failed
            return
        assert first.shard == shard
        with build.shard(shard) as writer:
            gathered: list[pa.Table] = []
            for part in itertools.chain([first], parts):
                gathered.append(part.table)
                rows = sum(table.num_rows for table in gathered)
                size = sum(table.nbytes for table in gathered)
                if part.last or rows >= _ROW_GROUP or size >= _ROW_GROUP_BYTES:
                    whole = pa.concat_tables(gathered).unify_dictionaries()
                    writer.write(whole, row_group_size=max(rows, 1))
                    gathered.clear()
                writer.counts = merge_counts(writer.counts, part.counts)
                writer.tokens = writer.counts["tokens"]
                for name, value in part.measured.items():
                    writer.measured[name] = writer.measured.get(name, 0.0) + value
                if part.last:
                    break
