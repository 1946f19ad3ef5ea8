"""The scoring engine: a corpus and a model in, a score set out.

    read -> windows -> pack -> fill    |    ask    |    unpack -> columns -> write
    a thread ahead (batches.py)          (device)         a thread behind

Choices
- The device always has its next batch: two are in flight while the host takes the answers of the
  one before. Reading, packing and writing go on in their own threads.
- Workers share a corpus by shards, index modulo workers, and know nothing of each other. Any of
  them may be killed at any moment and started again: what is lost is the shard in its hands.
- The configuration on record is what changes the numbers: scorer, row lengths, dtype, the model and
  its parameters. Batch size, mesh and workers may change between one start and the next.
- Compilation happens before the first batch and is kept on disk; its time is reported apart, like
  that of the start.
- Row groups hold many chunks: whoever reads two columns of a billion scores pays for each of them.
- Who finishes a score set prints what it took, and leaves it in measured.json.
- The progress line's tokens and share of peak count real tokens, not padding.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from pruning import artefact, progress
from pruning.artefact import Artefact, Build, Counts, config_of
from pruning.heartbeat import Heartbeat
from pruning.scorers.ask_llm import AskLLM
from pruning.scorers.embedding import Embedding
from pruning.scorers.likelihood import Likelihood
from pruning.scorers.student import Student
from pruning.scoring import pipeline
from pruning.scoring.batches import Ask, Batch, Chunk, Reader, schema_of
from pruning.vocabulary import Vocabulary, VocabularyError, require_same

if TYPE_CHECKING:
    from models.config import ModelConfig
    from pruning.corpus import Corpus
    from pruning.scoring.estimate import Costs, Estimate

KIND = "scores"
_AHEAD = 4  # batches ready for the device
_IN_FLIGHT = 2  # batches on the device
_BEHIND = 8  # chunks ready to be written
# A row group of the score set: as many chunks as it takes to have one or the other.
_ROW_GROUP = 1 << 16  # documents
_ROW_GROUP_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Settings of `python -m pruning score`.

    Attributes:
      corpus: the corpus to score.
      output: the score set's directory.
      scorer: what is asked: `@AskLLM()`, `@Likelihood()`, `@Embedding()` or `@Student()`.
      model: whatever `models.weights.load` takes: a directory, a training run, a hub name. For a
        dry run a published shape will do, such as "flan_t5_xl".
      row_length: positions of a packed row; longer rows waste less on padding, more on attention.
      batch_rows: rows of a batch, over all of this process's devices.
      dtype: of the parameters and the computation. Softmax, norms and log-probabilities are float32
        in either case.
      residual_dtype: of the residual stream. bfloat16 is faster on TPUs, with unrolled layers most
        (docs/tpu.md), and less exact (models/config.py).
      scan_layers: one compiled layer; False unrolls them, which takes minutes to compile.
      fsdp, tensor: mesh axes; the devices that remain are data-parallel.
      worker, workers: this process scores the shards whose index is `worker` modulo `workers`. By
        default the processes that `jax.distributed` knows share them.
      within: a selection of the same corpus; other documents get the status "not_selected".
      compilation_cache: where compiled programs are kept; None keeps none.
      compiler_options: of XLA's; docs/tpu.md has one that helps where fsdp is more than 1.
      dry_run: estimate the cost and score nothing.
      efficiency: the share of peak that the estimate reckons with.
    """

    corpus: str
    output: str
    scorer: AskLLM | Likelihood | Embedding | Student
    model: str
    row_length: int = 1024
    batch_rows: int = 16
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = True
    fsdp: int = 1
    tensor: int = 1
    worker: int | None = None
    workers: int | None = None
    within: str | None = None
    compilation_cache: str | None = "~/.cache/winnow/compiled"
    compiler_options: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    dry_run: bool = False
    efficiency: float = 0.5


NAME = "Score"
CONFIGURABLES: dict[str, type] = {
    NAME: ScoreConfig,
    "AskLLM": AskLLM,
    "Likelihood": Likelihood,
    "Embedding": Embedding,
    "Student": Student,
}


def run(config: ScoreConfig) -> Artefact | None:
    """Scores a corpus, or goes on where an earlier run stopped.

    Returns:
      The score set; None while other workers' shards are missing, and after a dry run.

    Raises:
      ArtefactError: corpus, selection and output do not belong together.
      ConfigurationChanged: the output was begun with other settings or another model.
      VocabularyError: the model was not made for the corpus's vocabulary.
      FloatingPointError: the model answers nothing but NaN.
    """
    import jax

    from models import runtime
    from pruning.corpus import load_corpus
    from pruning.scoring import device, estimate

    started = time.perf_counter()
    corpus = load_corpus(config.corpus)
    within = _load_selection(config.within, corpus)
    if config.dry_run:
        print(dry_run(config, corpus, within))
        return None

    if config.compilation_cache is not None:
        runtime.cache_compilations(Path(config.compilation_cache).expanduser())
    if config.fsdp == config.tensor == 1:
        device.use_cores(config.batch_rows)
    loaded = device.load(
        config.model,
        config.dtype,
        config.fsdp,
        config.tensor,
        residual_dtype=config.residual_dtype,
        scan_layers=config.scan_layers,
    )
    model_config = loaded.model.config
    require_vocabulary(config.model, model_config, corpus.vocabulary)
    prepared = config.scorer.prepare(loaded.model, corpus.vocabulary)
    costs = estimate.Costs(model_config, prepared.sides)
    lengths = estimate.sample_lengths(corpus)
    windows = estimate.windows_of(prepared, lengths)
    row_lengths = estimate.choose_row_lengths(prepared, costs, windows, config.row_length)

    schema = schema_of(prepared.columns)
    build = Build(
        config.output,
        KIND,
        {
            "scorer": config_of(config.scorer),
            "dtype": config.dtype,
            "row_lengths": dict(zip(prepared.sides, row_lengths, strict=True)),
            "model": {"config": model_config.to_dict(), "digest": loaded.digest},
        },
        {"corpus": corpus.artefact} | ({} if within is None else {"within": within}),
        corpus.num_shards,
        schema,
        artefact.numbers(schema),
    )
    worker = jax.process_index() if config.worker is None else config.worker
    workers = jax.process_count() if config.workers is None else config.workers
    mine = [corpus.documents(shard) for shard in range(worker, corpus.num_shards, workers)]
    if shards := build.pending(worker, workers):
        with build.beating(f"{worker} of {workers}") as beat:
            beat.on(shards[0], "compiles")
            reader = Reader(corpus, within, prepared, row_lengths, config.batch_rows)
            step = device.Step(prepared, loaded, reader.batch_shapes, config.compiler_options)
            start_seconds = time.perf_counter() - started - step.compile_seconds
            done = _done(mine, shards, corpus)
            with progress.track("score", sum(mine), "documents", done) as task:
                meter = Meter(
                    reader, costs, task, loaded.mesh.size, step.peak_flops,
                    {"start_seconds": start_seconds, "compile_seconds": step.compile_seconds},
                )  # fmt: skip
                score(reader, shards, step, build, meter)
    scores = build.finish(
        {
            "scorer": prepared.name,
            "columns": {name: column.meaning for name, column in prepared.columns.items()},
            "model": {
                "path": config.model,
                "family": model_config.family,
                "parameters": loaded.model.parameter_count(),
            },
            **prepared.summary,
        }
    )
    if scores is not None:
        _report(
            scores,
            estimate.estimate(
                prepared,
                model_config,
                lengths,
                corpus.artefact.manifest.rows if within is None else within.manifest.rows,
                config.row_length,
                config.efficiency,
            ),
        )
    return scores


def _report(scores: Artefact, estimated: Estimate) -> None:
    """Prints what the score set took, and adds it to measured.json."""
    from pruning.scoring.estimate import Measured

    file = scores.path / artefact.MEASURED
    sums = json.loads(file.read_text())
    try:
        measured = Measured.of(sums)
    except KeyError:  # some shards were scored by an earlier version, which measured less
        return
    lines = measured.lines(estimated)
    if "cost" not in sums:
        artefact.write_text(
            file, json.dumps(sums | measured.derived() | {"cost": lines}, indent=1) + "\n"
        )
    print("\n".join(lines))


def dry_run(config: ScoreConfig, corpus: Corpus, within: Artefact | None) -> Any:
    """An `estimate.Estimate` of what `run` would take; reads no weights.

    Instead of a model its published shape will do (`models.config.NAMED`).
    """
    from models.model import Model
    from pruning.scoring import estimate

    model_config = _model_config(config.model)
    prepared = config.scorer.prepare(Model(model_config), corpus.vocabulary)
    documents = corpus.artefact.manifest.rows if within is None else within.manifest.rows
    return estimate.estimate(
        prepared,
        model_config,
        estimate.sample_lengths(corpus),
        documents,
        config.row_length,
        config.efficiency,
    )


# --------------------------------------------------------------------------------------------------
# The loop


@dataclasses.dataclass(frozen=True)
class _Part:
    """A chunk's rows, on their way to the file."""

    shard: int
    last: bool
    table: pa.Table
    counts: Counts
    measured: Mapping[str, float]


def score(
    reader: Reader, shards: Sequence[int], ask: Ask, build: Build, meter: Meter | None = None
) -> None:
    """Scores and writes some shards, in order.

    Args:
      ask: packed rows -> answers; a `device.Step`, or anything that answers.
      meter: is told of everything that is done.
    """
    meter = meter or Meter(reader)

    def land(batch: Batch, answers: Any) -> None:
        started = time.perf_counter()
        values = None if answers is None else np.asarray(answers)  # waits for the device
        meter.waited(time.perf_counter() - started)
        meter.batch(batch)
        first = 0
        for chunk, count in batch.parts:
            if count:
                chunk.answers.append(values[first : first + count])
                first += count
            if chunk.complete:
                table, counts = reader.finish(chunk, ask)
                give(_Part(chunk.shard, chunk.last, table, counts, meter.chunk(chunk)))

    flying: collections.deque[tuple[Batch, Any]] = collections.deque()
    with (
        build.beating() as beat,
        pipeline.behind(lambda parts: _write(build, beat, shards, parts, meter), _BEHIND) as give,
        pipeline.ahead(reader.batches(shards), _AHEAD) as batches,
    ):
        for batch in batches:
            flying.append((batch, None if batch.rows is None else ask(batch.rows)))
            if len(flying) > _IN_FLIGHT:
                land(*flying.popleft())
        while flying:
            land(*flying.popleft())


def _write(
    build: Build, beat: Heartbeat, shards: Sequence[int], parts: Iterator[_Part], meter: Meter
) -> None:
    for shard in shards:
        beat.on(shard, "scores", meter.progress)
        first = next(parts, None)
        if first is None:  # the driver gave up
            return
        assert first.shard == shard
        with build.shard(shard) as writer:
            gathered: list[pa.Table] = []
            for part in itertools.chain([first], parts):
                gathered.append(part.table)
                rows = sum(table.num_rows for table in gathered)
                size = sum(table.nbytes for table in gathered)
                if part.last or rows >= _ROW_GROUP or size >= _ROW_GROUP_BYTES:
                    writer.write(pa.concat_tables(gathered), row_group_size=max(rows, 1))
                    gathered.clear()
                writer.counts = artefact.merge_counts(writer.counts, part.counts)
                writer.tokens = writer.counts["tokens"]
                for name, value in part.measured.items():
                    writer.measured[name] = writer.measured.get(name, 0.0) + value
                if part.last:
                    break


class Meter:
    """Adds up what was done, for the progress line and for measured.json.

    Args:
      reader: whose batches and chunks these are.
      costs: FLOPs by length; None counts none.
      task: the progress line.
      devices: how many work on a batch.
      peak_flops: of all devices together, FLOP/s, where it is known.
      once: seconds by name, to be written down with the first chunk.
    """

    def __init__(
        self,
        reader: Reader,
        costs: Costs | None = None,
        task: progress.Task | None = None,
        devices: int = 1,
        peak_flops: float | None = None,
        once: Mapping[str, float] | None = None,
    ):
        self._row_lengths = np.array([reader.row_lengths])
        self._batch_rows = reader.batch_rows
        self._costs = costs
        self._task = task
        self._devices = devices
        self._peak = peak_flops
        self._started = self._last = time.perf_counter()
        self._since: dict[str, float] = {}  # what was measured since the last chunk
        self._add(**{"start_seconds": 0.0, "compile_seconds": 0.0} | dict(once or {}))
        self._tokens = 0
        self._flops = 0.0

    def _add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self._since[name] = self._since.get(name, 0.0) + amount

    def progress(self) -> dict[str, Any]:
        """How far this process is, for those who look on."""
        if self._task is None:
            return {}
        names = ("done", "total", "unit", "rate", "seconds_left")
        return {name: getattr(self._task, name) for name in names}

    def waited(self, seconds: float) -> None:
        """The device was waited for."""
        self._add(device_wait_seconds=seconds)

    def batch(self, batch: Batch) -> None:
        """A batch came back."""
        if batch.rows is not None:
            segments = (v for name, v in batch.rows.items() if name.endswith("_segment_ids"))
            self._tokens += sum(int(np.count_nonzero(values)) for values in segments)
            self._add(
                positions=float(self._batch_rows * self._row_lengths.sum()),
                done_flops=self._batch_rows * self._cost(self._row_lengths),
            )
        if self._task is None:
            return
        seconds = time.perf_counter() - self._started
        fields: dict[str, Any] = {"tokens_per_second": self._tokens / seconds}
        if self._peak is not None:
            fields["share_of_peak"] = self._flops / seconds / self._peak
        self._task.advance(batch.documents, **fields)

    def chunk(self, chunk: Chunk) -> dict[str, float]:
        """A chunk is done. What it took, by name."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        lengths = chunk.windows.lengths
        useful = self._cost(lengths)
        self._flops += useful
        # NOTE: names that stay at zero are there all the same: sums over workers need them all.
        self._add(
            seconds=seconds,
            device_seconds=seconds * self._devices,
            device_wait_seconds=0.0,
            potential_flops=seconds * (self._peak or 0.0),
            unknown_peak_seconds=0.0 if self._peak else seconds,
            documents=float(len(chunk.documents)),
            windows=float(len(lengths)),
            model_tokens=float(lengths.sum()),
            rows=float(chunk.packing.num_rows),
            useful_flops=useful,
            positions=0.0,
            done_flops=0.0,
        )
        measured, self._since = self._since, {}
        return measured

    def _cost(self, lengths: np.ndarray) -> float:
        return 0.0 if self._costs is None else self._costs.of(lengths)


# --------------------------------------------------------------------------------------------------
# What belongs together


def require_vocabulary(path: str, config: ModelConfig, vocabulary: Vocabulary) -> None:
    """Raises VocabularyError unless the model can read this vocabulary's ids.

    Where a vocabulary file lies beside the weights it must be the corpus's; a model that came
    without one is only checked for its size.
    """
    from models import weights

    if config.vocab_size < vocabulary.size:
        raise VocabularyError(
            f"the model {path} knows {config.vocab_size} ids, the corpus's vocabulary has "
            f"{vocabulary.size}: it was made for another vocabulary. Give a model of the corpus's "
            "vocabulary, or ingest the corpus again with the model's."
        )
    directory = weights.locate(path)[0]
    for name in ("vocabulary.model", "spiece.model", "sentencepiece.model"):
        if vocabulary.kind == "sentencepiece" and (directory / name).exists():
            own = Vocabulary.from_file(directory / name, vocabulary.extra_ids)
            require_same(own, vocabulary.digest, f"the model {path}")


def _model_config(path: str) -> ModelConfig:
    """A model's configuration, without its weights."""
    from models import checkpoints, weights
    from models import config as model_configs

    if path in model_configs.NAMED:
        return model_configs.NAMED[path]
    directory, kind = weights.locate(path)
    if kind == "run":
        return model_configs.from_dict(checkpoints.read_config(directory))
    return weights.look(directory, kind).config


def _load_selection(path: str | None, corpus: Corpus) -> Artefact | None:
    if path is None:
        return None
    selection = artefact.load(path, "selection")
    artefact.require_input(selection, "corpus", corpus.artefact)
    return selection


def _done(mine: Sequence[int], pending: Sequence[int], corpus: Corpus) -> int:
    """How many of a worker's documents were found scored."""
    return sum(mine) - sum(corpus.documents(shard) for shard in pending)
