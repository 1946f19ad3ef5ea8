"""The trainer: pretraining and fine-tuning in one program, to be read from top to bottom.

    python train.py --gin_file=configs/pretrain/t5_tiny.gin --gin.OUTPUT=runs/tiny

A run that was killed resumes from its last checkpoint when the same command is started again, with
bit-identical results. On SIGTERM it saves a checkpoint and exits with code 75.

Files of a run, in its output directory:

    config.json           the configuration and the digests of the data
    winnow_model.json     the configuration of the model: the directory can be loaded as a model
    checkpoints/          see models/checkpoints.py
    metrics.jsonl         a line per logged step, evaluation and event; no step twice
    result.json           written last; the run is then finished

Choices
- The state is one tree (step, parameters, optimizer state), donated to each step. Random numbers
  are functions of (seed, step), and data are addressed by step, so the step is the only position
  that a checkpoint stores.
- Losses are sums over the global batch divided by its number of target tokens, so they do not
  depend on the mesh or on the numbers of processes and microbatches.
- Metrics are read two steps late, so that devices do not wait for the host.
- A run claims its output directory when everything before the first step has succeeded, and
  releases it if the first step fails: the corrected command can then use the directory.
"""

# --------------------------------------------------------------------------------------------------
# Command line: parsed before the slow imports below, so that --help answers at once.

import argparse
import sys

from models import runtime
from pruning.cli import command, configuration
from pruning.store import progress

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n\n".join(
            [*command.flags_of("train", None, "train", sys.argv[1:]), *command.settings_of("train")]
        )
        if {"-h", "--help"} & set(sys.argv)
        else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    configuration.add_arguments(parser)
    runtime.add_arguments(parser)
    ARGUMENTS, UNKNOWN = parser.parse_known_args()
    IMPORTS = progress.Phase("train: importing its modules")

import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from models import host_memory, json_file, losses, partitioning, terminal, weights
from models.checkpoints import DIRECTORY, MODEL_FILE, Checkpoints, Retention, write_config
from models.compiler_options import compiler_options
from models.config import DecoderConfig, T5Config
from models.errors import reading
from models.flops import peak_flops, training_flops
from models.model import Model
from models.optimizers import (
    Adafactor,
    AdamW,
    Constant,
    InverseSquareRoot,
    Muon,
    WarmupCosine,
    WarmupLinear,
    state_axes,
)
from models.published import NAMED
from models.weights import winnow
from pruning.data import stream
from pruning.data.examples import ExamplesConfig
from pruning.data.seqio_data import SeqioConfig
from pruning.scores.model import loading
from pruning.store.atomic import write_text
from pruning.store.manifest import added_setting, config_of, digest_of, require_same_configuration

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
      output: directory of the run.
      data: @Stream(), @Examples() or @Seqio(). In code: an object with `open(index, count)`, which
        returns an object whose pure function `batch(step)` gives NumPy arrays by feature: the rows
        of this process in global batch `step`. Optional attributes of the opened object: `inputs`
        (name -> {"path", "digest"}), part of the run's identity; `num_batches`, the length of an
        evaluation; `token_bytes` (integers [ids], bytes of text per id), for bits per byte.
      steps: number of updates.
      model: a published size (models/published.py), @T5Config() or @DecoderConfig().
      initial_weights: path or hub name of the weights to start from, as models.weights.load reads
        them; the model is theirs unless `model` is given too.
      fresh: regular expressions of parameters ("decoder/.*") that are initialized instead of taken
        from `initial_weights`; if `model` is given too, the two may differ in these alone.
      eval_data: name -> data as above; every evaluation uses the same batches.
      eval_every, checkpoint_every: steps between evaluations and between checkpoints; both also
        happen after the last step.
      eval_batches: maximal number of batches of an evaluation, for each of `eval_data`.
      keep: @Retention(), the checkpoints to keep; metrics are named "<eval name>/loss" and
        "<eval name>/bits_per_byte".
      optimizer: @Adafactor(), @AdamW() or @Muon().
      clip_norm: global norm to which gradients are clipped; None for no clipping.
      microbatches: number of parts of a batch that are processed one after another.
      z_loss: weight of log(normalizer)^2 in the objective.
      label_smoothing: label smoothing in training.
      dropout: overrides the model's dropout rate; T5 pretrains with 0 and fine-tunes with 0.1.
      dtype: overrides the model's compute dtype; parameters are always float32.
      gradient_dtype: dtype of the gradient all-reduce of kernels. "bfloat16", which requires this
        compute dtype, halves the communication and rounds the sum of each device once.
      remat, scan_layers, attention: override those of the model.
      loss_chunk: number of target tokens whose logits are in memory at a time; None for all.
      seed: seed of the initial parameters and of dropout.
      mesh: sizes of data, fsdp and tensor; -1 takes the remaining devices.
      rules: changes to partitioning.RULES; {"length": ("tensor",)} shards activations between
        matrix products along the sequence.
      log_every: steps between lines of metrics.
      profile: (first, last): record the steps between them for the profiler, in <output>/profile.
        SIGUSR1 records the next five steps.
      tensorboard: also write <output>/tensorboard; requires the extra "tensorboard".
      compilation_cache: directory of compiled programs, shared by runs.
      compiler_options: XLA options of the training step; docs/tpu.md lists useful ones.
      tokenizer: that of `initial_weights`, where none lies beside them: a SentencePiece file, a
        tokenizer.json, a model's directory, "bytes", or "corpus" for that of the data.
    """

    output: str
    data: Any
    steps: int
    model: str | T5Config | DecoderConfig | None = None
    initial_weights: str | None = None
    fresh: tuple[str, ...] = ()
    eval_data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    eval_every: int = 1000
    eval_batches: int = 16
    checkpoint_every: int = 1000
    keep: Retention = dataclasses.field(default_factory=Retention)
    optimizer: Any = dataclasses.field(default_factory=Adafactor)
    clip_norm: float | None = None
    microbatches: int = 1
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    dropout: float | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str | None = None
    scan_layers: bool | None = None
    loss_chunk: int | None = None
    seed: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    log_every: int = 10
    profile: tuple[int, int] | None = None
    tensorboard: bool = False
    compilation_cache: str | None = None
    compiler_options: Mapping[str, str | int | bool] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = added_setting(None)
    attention: str | None = added_setting(None)

    def __post_init__(self):
        if self.model is None and self.initial_weights is None:
            raise ValueError("set Train.model, or Train.initial_weights, or both")
        if self.fresh and self.initial_weights is None:
            raise ValueError("Train.fresh requires Train.initial_weights")
        if isinstance(self.model, str) and self.model not in NAMED:
            raise ValueError(f"unknown model {self.model!r}; known: {', '.join(sorted(NAMED))}")
        for name in ("steps", "eval_every", "eval_batches", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Train.{name} must be at least 1")
        if self.keep.metric is not None:
            name, _, metric = self.keep.metric.rpartition("/")
            if name not in self.eval_data or metric not in ("loss", "bits_per_byte"):
                known = ", ".join(f"{name}/loss" for name in self.eval_data) or "none"
                raise ValueError(
                    f"Retention.metric {self.keep.metric!r} is not measured; known: {known}"
                )
            if self.checkpoint_every % self.eval_every:
                raise ValueError(
                    "Retention.best requires an evaluation with each checkpoint: make "
                    "Train.checkpoint_every a multiple of Train.eval_every"
                )


# Settings that may change when a run is resumed: they do not change its results.
FREE = {
    "output",
    "steps",  # may only grow
    "checkpoint_every",
    "keep",
    "mesh",
    "rules",
    "remat",
    "attention",
    "log_every",
    "profile",
    "tensorboard",
    "compilation_cache",
    "compiler_options",
}

# Names in configuration files.
NAME = "Train"
CONFIGURABLES = {
    "Train": TrainConfig,
    "Retention": Retention,
    "T5Config": T5Config,
    "DecoderConfig": DecoderConfig,
    "Adafactor": Adafactor,
    "AdamW": AdamW,
    "Muon": Muon,
    "InverseSquareRoot": InverseSquareRoot,
    "Constant": Constant,
    "WarmupLinear": WarmupLinear,
    "WarmupCosine": WarmupCosine,
    **stream.CONFIGURABLES,
    "Examples": ExamplesConfig,
    "Seqio": SeqioConfig,
}


class RunError(RuntimeError):
    """A run that cannot start or continue; the message gives the reason and a remedy."""


# --------------------------------------------------------------------------------------------------
# State and steps


class State(NamedTuple):
    """State of training; also trees of the same structure, of shapes, axes or shardings."""

    step: Any  # int32 scalar: number of updates so far
    params: Any
    opt_state: Any


Step = Callable[[State, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]


def make_optimizer(config: TrainConfig, model: Model) -> optax.GradientTransformation:
    """Return the optimizer, with gradient clipping if configured."""
    optimizer = config.optimizer.build(model.logical_axes())
    if config.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    rules: partitioning.Rules = partitioning.RULES,
) -> State:
    """Return shapes, dtypes and shardings of the state, for compilation and for restoring."""
    params, param_axes = model.shapes(), model.logical_axes()
    opt_state = jax.eval_shape(optimizer.init, params)
    shapes = State(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state)
    axes = State((), param_axes, state_axes(opt_state, params, param_axes))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        partitioning.shardings(shapes, axes, mesh, rules),
    )


def taken_over(config: TrainConfig, shapes: Any, given: Any) -> Any:
    """Return the leaves of `given` that a model of these `shapes` starts with; None elsewhere.

    Raises:
        RunError: weights and model differ in parameters that Train.fresh does not name.
    """
    fresh = re.compile("|".join(f"(?:{pattern})" for pattern in config.fresh) or r"(?!)")
    wanted, held = (_by_path(tree) for tree in (shapes, given))
    unlike = [
        f"{path}: {_shape(held, path)} in the weights, {_shape(wanted, path)} in the model"
        for path in sorted(wanted.keys() | held.keys())
        if not fresh.fullmatch(path) and _shape(held, path) != _shape(wanted, path)
    ]
    if unlike:
        raise RunError(
            f"{config.initial_weights} does not fit the model:"
            + "".join(f"\n  {line}" for line in unlike[:10])
            + (f"\n  and {len(unlike) - 10} more" if unlike[10:] else "")
            + "\nName the parameters to initialize in Train.fresh."
        )
    drawn = [path for path in wanted if fresh.fullmatch(path)]
    if config.fresh and not drawn:
        raise RunError(f"Train.fresh {list(config.fresh)} names no parameter of the model")
    if drawn:
        _say(f"initialized: {', '.join(drawn[:5])}{', ...' if drawn[5:] else ''} ({len(drawn)})")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: None if fresh.fullmatch(_path(path)) else held[_path(path)], shapes
    )


def _filled(given: Any, drawn: Any) -> Any:
    return jax.tree.map(lambda new, old: new if old is None else old, drawn, given)


def _by_path(tree: Any) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _path(path: Any) -> str:
    return "/".join(entry.key for entry in path)


def _shape(leaves: Mapping[str, Any], path: str) -> str:
    return str(leaves[path].shape) if path in leaves else "nothing"


def token_sums(config: TrainConfig, model: Model, params: Any, batch: dict, key: Any) -> tuple:
    """Return the loss of a batch, summed over its target tokens, and sums for metrics."""
    module = model.bind(params)
    hidden = module.forward(batch, dropout_key=key)  # [batch, length, d_model]
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    terms = (targets, weights, config.z_loss, config.label_smoothing)
    if config.loss_chunk is None:
        loss, count, sums = losses.cross_entropy(module.logits(hidden), *terms)
    else:
        loss, count, sums = losses.chunked_cross_entropy(
            hidden, module.output_head(), *terms, chunk=config.loss_chunk
        )
    return loss, sums | {"objective": loss, "target_tokens": count}


def make_train_step(
    config: TrainConfig, model: Model, optimizer: optax.GradientTransformation
) -> Step:
    """Return the function of one update: (state, batch) -> (state, metrics), float32 scalars.

    Raises:
        RunError: Train.gradient_dtype does not fit the compute dtype.
    """
    if config.gradient_dtype not in ("float32", model.config.dtype):
        raise RunError(
            f"Train.gradient_dtype {config.gradient_dtype!r} requires the same Train.dtype, not "
            f"{model.config.dtype!r}"
        )

    def in_gradient_dtype(path, parameter):
        # Gradients have the dtypes of parameters. Tables stay float32, because the gradient of a
        # look-up adds many rows into few.
        kernel = path[-1].key == "kernel"
        return parameter.astype(config.gradient_dtype) if kernel else parameter

    def gradients_of(params, batch, key):
        dropout_key = key if model.config.dropout_rate else None
        gradients, sums = jax.grad(
            lambda p: token_sums(config, model, p, batch, dropout_key), has_aux=True
        )(jax.tree_util.tree_map_with_path(in_gradient_dtype, params))
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradients), sums

    def accumulated(params, batch, key):
        """Return gradients and sums, accumulated over microbatches."""

        # Microbatch m has the rows m, m + microbatches, ..., so that rows stay on their devices.
        def split(x):
            rows = x.reshape(-1, config.microbatches, *x.shape[1:])
            return jnp.moveaxis(rows, 1, 0)  # [microbatches, rows, ...]

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients_of(params, *part)), None

        parts = (jax.tree.map(split, batch), jax.random.split(key, config.microbatches))
        first = jax.eval_shape(gradients_of, params, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        return jax.lax.scan(add, zeros, parts)[0]

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        compute = gradients_of if config.microbatches == 1 else accumulated
        gradients, sums = compute(state.params, batch, key)
        # NOTE: target tokens of the whole global batch. Without this division Adafactor would
        # train as well, but AdamW would not.
        count = jnp.maximum(sums["target_tokens"], 1.0)
        gradients = jax.tree.map(lambda g: g / count, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        metrics = {
            "loss": sums["nll"] / count,
            "objective": sums["objective"] / count,
            "accuracy": sums["correct"] / count,
            "gradient_norm": optax.global_norm(gradients),
            "learning_rate": config.optimizer.schedule(state.step),
            "target_tokens": sums["target_tokens"],
            "tokens": sums["target_tokens"] + _given_tokens(batch, model),
        }
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, opt_state), metrics

    return train_step


def _given_tokens(batch: dict[str, jax.Array], model: Model) -> jax.Array | float:
    """Return the number of tokens that an encoder reads, padding excluded."""
    if "encoder_input_tokens" not in batch:
        return 0.0
    return jnp.sum(batch["encoder_input_tokens"] != model.config.pad_id, dtype=jnp.float32)


def compiled(
    config: TrainConfig, train_step: Step, shardings: State, mesh: jax.sharding.Mesh
) -> Any:
    """Return `train_step` under jit with a donated state; tpu/compile.py compiles the same."""
    return jax.jit(
        train_step,
        out_shardings=(shardings, partitioning.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, config.compiler_options) or None,
    )


def make_eval_step(config: TrainConfig, model: Model) -> Callable:
    """Return (params, batch, token_bytes) -> sums over the batch's target tokens, no dropout.

    `token_bytes` is int32 [ids] or None; with it the sums include "bytes".
    """

    def eval_step(params: Any, batch: dict[str, jax.Array], token_bytes: Any) -> dict:
        sums = token_sums(config, model, params, batch, None)[1]
        if token_bytes is not None:
            counted = batch["decoder_loss_weights"] > 0
            sizes = jnp.take(token_bytes, batch["decoder_target_tokens"], mode="fill", fill_value=0)
            sums["bytes"] = jnp.sum(sizes * counted, dtype=jnp.float32)
        return sums

    return eval_step


def summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation set from sums over its target tokens."""
    count = max(sums["target_tokens"], 1.0)
    loss = sums["nll"] / count
    found = {
        "loss": loss,  # nats per target token
        "perplexity": math.exp(min(loss, 700.0)),
        "accuracy": sums["correct"] / count,
        "target_tokens": int(count),
    }
    if sums.get("bytes"):
        # The loss of all targets, sentinels and EOS included, over the bytes of their text.
        found["bits_per_byte"] = sums["nll"] / math.log(2) / sums["bytes"]
    return found


# --------------------------------------------------------------------------------------------------
# The output directory: configuration, metrics


class Claim:
    """The claim of a run on its output directory: config.json.

    Attributes:
      digest: digest of the configuration and of the data.
      finished: content of result.json if the run is finished, else None.
    """

    def __init__(self, config: TrainConfig, data: Mapping[str, Any]):
        """Check the directory; write nothing.

        Args:
            data: the opened data by name.

        Raises:
            ConfigurationChanged: the directory belongs to a run with another configuration.
        """
        self._run = epath.Path(config.output)
        self._file = self._run / "config.json"
        operative = config_of(config)
        inputs = {name: getattr(opened, "inputs", {}) for name, opened in data.items()}
        identity = {name: value for name, value in operative.items() if name not in FREE}
        identity["inputs"] = {
            name: {key: value["digest"] for key, value in given.items()}
            for name, given in inputs.items()
        }
        self._content = {"train": operative, "inputs": inputs, "identity": identity}
        self.digest = digest_of(identity)
        self._new = not self._file.exists()
        if not self._new:
            self._check(_read_config(self._file), identity, config.steps)
        result_file = self._run / "result.json"
        result = _read_result(result_file) if result_file.exists() else None
        done = result is not None and result["steps"] == config.steps
        self.finished = result if done else None

    def _check(self, begun: dict[str, Any], identity: dict[str, Any], steps: int) -> None:
        fewer = f"steps: {begun['train']['steps']} -> {steps} (may only grow)"
        further = [fewer] if begun["train"]["steps"] > steps else []
        require_same_configuration(self._run, begun["identity"], identity, further=further)

    def take(self, model: Mapping[str, Any]) -> None:
        """Write config.json, and the configuration of the model if there is none."""
        if jax.process_index() == 0:
            self._run.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(self._content, indent=1, sort_keys=True) + "\n")
            if self._new or not (self._run / MODEL_FILE).exists():
                write_config(self._run, model)

    def keep(self) -> None:
        """Keep the directory even if the run fails from here on."""
        self._new = False

    def release(self) -> None:
        """Give up a directory that this process claimed and has not kept."""
        if self._new and jax.process_index() == 0:
            for name in ("config.json", MODEL_FILE, "metrics.jsonl"):
                (self._run / name).unlink(missing_ok=True)


_REMEDY = "delete it or give another output"


def _read_config(file: epath.Path) -> dict[str, Any]:
    found = json_file.read_object(file, keys=("train", "identity"), mend=_REMEDY)
    steps = found["train"].get("steps") if isinstance(found["train"], dict) else None
    if not isinstance(steps, int) or not isinstance(found["identity"], dict):
        raise RunError(f"{file} was not written by train.py: {_REMEDY}")
    return found


def _read_result(file: epath.Path) -> dict[str, Any]:
    found = json_file.read_object(file, keys=("steps", "loss"), mend=_REMEDY)
    if not isinstance(found["steps"], int):
        raise RunError(f"{file} was not written by train.py: {_REMEDY}")
    return found


class Metrics:
    """The file metrics.jsonl of a run restored at `step`; lines of later steps are dropped.

    Attributes:
      lines: all lines kept or written, as dictionaries.
    """

    def __init__(self, config: TrainConfig, step: int):
        self._path = epath.Path(config.output) / "metrics.jsonl"
        self._writes = jax.process_index() == 0
        self.lines = [line for line in _json_lines(self._path) if line["step"] <= step]
        if step and self.last("train").get("step") != step:
            raise RunError(
                f"{self._path} has no line of step {step}, from which the run continues: copy the "
                f"file again, or remove {self._path.parent / DIRECTORY / str(step)} to continue "
                "from an earlier step"
            )
        self._file: Any = None
        self._tensorboard: Any = None
        if self._writes:
            self.save()
            # Object stores cannot append: there the file is rewritten at each checkpoint.
            remote = "://" in os.fspath(self._path)
            self._file = None if remote else self._path.open("a")
            if config.tensorboard:
                self._tensorboard = _tensorboard(epath.Path(config.output), step)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Append a line; `kind` is "train", "eval" or "event"."""
        line = {"step": step, "kind": kind, **values}
        self.lines.append(line)
        if not self._writes:
            return
        if self._file is not None:
            try:
                self._file.write(json.dumps(line) + "\n")
                self._file.flush()
            except OSError as error:
                raise RunError(f"cannot write {self._path}: {error.strerror or error}") from error
        if self._tensorboard is not None:
            prefix = "/".join(filter(None, (kind, values.get("name"))))
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)

    def save(self) -> None:
        """Replace the file by all lines, atomically."""
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def checkpointed(self) -> None:
        """Make the lines so far as durable as the checkpoint."""
        if self._writes and self._file is None:
            self.save()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        for writer in filter(None, (self._file, self._tensorboard)):
            writer.close()

    def last(self, kind: str, name: str | None = None) -> dict[str, Any]:
        """Return the last line of a kind, and of an evaluation set; {} if there is none."""
        for line in reversed(self.lines):
            if line["kind"] == kind and (name is None or line["name"] == name):
                return line
        return {}


def _json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file; a killed process may have left a partial last one."""
    if not path.exists():
        return []
    with reading(path):
        content = path.read_bytes()
    lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        place = f"{path}, line {number},"
        lines.append(json_file.parse_object(line, place, "copy the file again"))
        if not _is_line(lines[-1]):
            raise RunError(f"{place} was not written by train.py: copy the file again")
    return lines


def _is_line(line: dict[str, Any]) -> bool:
    """Return whether a line of metrics has what a run reads when it continues."""
    if not isinstance(line.get("step"), int) or not isinstance(line.get("kind"), str):
        return False
    if line["kind"] == "eval":
        return isinstance(line.get("name"), str)
    if line["kind"] != "train":
        return True
    totals = [line.get(name) for name in ("loss", "tokens", "target_tokens", "flops", "seconds")]
    # NOTE: math.isfinite raises OverflowError for an integer that no float can hold.
    largest = sys.float_info.max
    return all(isinstance(value, int | float) and abs(value) <= largest for value in totals)


def _tensorboard(run: epath.Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise RunError(
            "Train.tensorboard requires tensorboardX: pip install 'winnow-lm[tensorboard]'"
        ) from error
    return SummaryWriter(os.fspath(run / "tensorboard"), purge_step=step + 1)


def prefetch(
    batch_of: Callable[[int], Any], steps: range, depth: int = 2
) -> Iterator[tuple[int, Any]]:
    """Yield (step, batch_of(step)) in order, computed by a thread up to `depth` steps ahead."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as reader:
        pending: collections.deque = collections.deque()
        for step in steps:
            pending.append((step, reader.submit(batch_of, step)))
            if len(pending) > depth:
                ready, batch = pending.popleft()
                yield ready, batch.result()
        while pending:
            ready, batch = pending.popleft()
            yield ready, batch.result()


class Meter:
    """Reader of the metrics of steps, which checks, accumulates, displays and logs them."""

    def __init__(self, metrics: Metrics, claim: Claim, task: progress.Task | None, started: float):
        self._metrics, self._claim, self._task = metrics, claim, task
        before = metrics.last("train")  # from before a restart
        self._totals = {name: before.get(name, 0) for name in ("tokens", "target_tokens", "flops")}
        self._clock = started - before.get("seconds", 0.0)  # start, as if without interruption
        self._peak = peak_flops(jax.devices()[0])
        self._unread: collections.deque = collections.deque()
        self._recent: collections.deque = collections.deque(maxlen=128)  # losses
        # Since the end of the first step, which includes compilation, and since the last line.
        self._whole: _Interval | None = None
        self._logged: _Interval | None = None

    def add(self, step: int, values: dict[str, jax.Array], flops: float, logged: bool) -> None:
        self._unread.append((step, values, flops, logged))

    def read(self, all_but: int = 0) -> None:
        """Read all but the newest steps.

        Raises:
            RunError: a loss or a gradient is not finite.
        """
        while len(self._unread) > all_but:
            self._read(*self._unread.popleft())
            self._claim.keep()  # a step has succeeded

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time of a block from the rates."""
        began = time.monotonic()
        yield
        for interval in filter(None, (self._whole, self._logged)):
            interval.since += time.monotonic() - began

    def _read(self, step: int, values: dict, flops: float, logged: bool) -> None:
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        loss = values["loss"]
        if not (math.isfinite(loss) and math.isfinite(values["gradient_norm"])):
            raise RunError(
                f"step {step}: loss {loss}, gradient norm {values['gradient_norm']}. Lower the "
                "learning rate or clip the gradients. The checkpoints are from earlier steps."
            )
        if len(self._recent) >= 32:
            mean, deviation = statistics.fmean(self._recent), statistics.pstdev(self._recent)
            if loss > mean + 6 * deviation:
                _say(f"step {step}: loss {loss:.4g}, a spike above {mean:.4g} +- {deviation:.2g}")
                self._metrics.write(step, "event", event="loss spike", loss=loss)
        self._recent.append(loss)

        tokens, target_tokens = int(values.pop("tokens")), int(values.pop("target_tokens"))
        for name, amount in (
            ("tokens", tokens),
            ("target_tokens", target_tokens),
            ("flops", flops),
        ):
            self._totals[name] += amount
        now = time.monotonic()
        rates: dict[str, float] = {}  # of the steps since the last line
        shown: dict[str, Any] = {"loss": loss}
        if self._whole is None or self._logged is None:
            self._whole, self._logged = _Interval(now), _Interval(now)
        else:
            self._whole.add(tokens, flops)
            self._logged.add(tokens, flops)
            rates = self._logged.rates(now, self._peak)
            shown |= self._whole.rates(now, self._peak)
            if "share_of_peak" in shown:
                shown["share_of_peak"] = f"{shown['share_of_peak']:.0%}"
        if self._task is not None:
            self._task.advance(1, **shown)
        if logged:
            seconds = round(now - self._clock, 3)
            self._metrics.write(step, "train", **values, **self._totals, **rates, seconds=seconds)
            self._logged = _Interval(now)


@dataclasses.dataclass
class _Interval:
    """Tokens and FLOPs of the steps since a point in time."""

    since: float
    tokens: int = 0
    flops: float = 0.0

    def add(self, tokens: int, flops: float) -> None:
        self.tokens += tokens
        self.flops += flops

    def rates(self, now: float, peak: float | None) -> dict[str, float]:
        seconds = max(now - self.since, 1e-9)
        rates = {"tokens_per_second": round(self.tokens / seconds, 1)}
        if peak is not None:
            share = self.flops / seconds / jax.device_count() / peak
            rates["share_of_peak"] = round(share, 4)
        return rates


def _compiling() -> progress.Phase:
    return progress.Phase("train: compiling the training step")


def _say(message: str) -> None:
    if jax.process_index() == 0:
        terminal.say(message, error=True)


# --------------------------------------------------------------------------------------------------
# The run


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Run or resume a training run; return the content of result.json, or None if stopped.

    Raises:
        RunError: the run cannot start or continue.
        CheckpointError: a checkpoint cannot be written.
    """
    started = time.monotonic()
    runtime.cache_compilations(config.compilation_cache)
    run = epath.Path(config.output)
    chief = jax.process_index() == 0

    # ---- mesh ------------------------------------------------------------------------------------
    mesh = partitioning.make_mesh(config.mesh)
    rules = partitioning.override(partitioning.RULES, config.rules)
    reader = partitioning.batch_reader(mesh)

    # ---- data ------------------------------------------------------------------------------------
    with progress.Phase("train: opening the data"):
        data = config.data.open(*reader)
        eval_data = {name: value.open(*reader) for name, value in config.eval_data.items()}
    claim = Claim(config, {"train": data, **eval_data})
    if claim.finished is not None:
        _say(f"{run} is finished: nothing to do")
        return claim.finished

    def from_(opened: Any) -> Callable[[int], dict[str, jax.Array]]:
        return lambda step: partitioning.global_batch(opened.batch(step), mesh)

    checkpoints = Checkpoints(run, config.keep)
    profiler = runtime.Profiler(run / "profile", config.profile)
    with (
        checkpoints,
        partitioning.use(mesh, rules),
        profiler,
        runtime.StopSignal() as stop,
        contextlib.ExitStack() as left_open,
    ):
        # ---- model -------------------------------------------------------------------------------
        params = None
        shape: Any = NAMED[config.model] if isinstance(config.model, str) else config.model
        if checkpoints.steps() and (run / MODEL_FILE).exists():
            shape = winnow.read_config(run)
        elif config.initial_weights is not None:
            stacked = shape is None or shape.scan_layers
            if config.scan_layers is not None:
                stacked = config.scan_layers
            for name, opened in {"data": data, **eval_data}.items():
                if (made_by := getattr(opened, "vocabulary", None)) is not None:
                    loading.require_ids(config.initial_weights, made_by, name, config.tokenizer)
            with progress.Phase(f"train: loading {config.initial_weights}"):
                loaded, params = weights.load(
                    config.initial_weights, mesh=mesh, rules=rules, scan_layers=stacked
                )
            shape = shape or loaded.config
        overrides: dict[str, Any] = {
            "dropout_rate": config.dropout,
            "dtype": config.dtype,
            "remat": config.remat,
            "scan_layers": config.scan_layers,
            "attention": config.attention,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        model = Model(dataclasses.replace(shape, **given))
        for name, opened in {"data": data, **eval_data}.items():
            sizes = getattr(opened, "token_bytes", None)
            if sizes is not None and len(sizes) > model.config.vocab_size:
                raise RunError(
                    f"{name} has a vocabulary of {len(sizes)} ids, the model one of "
                    f"{model.config.vocab_size}: give another model or another corpus"
                )
        if params is not None:
            params = taken_over(config, model.shapes(), params)

        # ---- state -------------------------------------------------------------------------------
        optimizer = make_optimizer(config, model)
        abstract = abstract_state(model, optimizer, mesh, rules)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)

        def initial_state(params: Any) -> State:
            if params is None or config.fresh:
                drawn = model.init(jax.random.key(config.seed))
                params = drawn if params is None else _filled(params, drawn)
            return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

        # ---- restore -----------------------------------------------------------------------------
        restored = checkpoints.restore(abstract.params, abstract.opt_state)
        if restored is not None:
            first, params, opt_state = restored
            step = jax.device_put(np.int32(first), shardings.step)
            state = State(step, params, opt_state)
            _say(f"{run}: continuing from step {first}")
        else:
            first = 0
            with progress.Phase("train: initializing the parameters"):
                state = jax.jit(initial_state, out_shardings=shardings, donate_argnums=0)(params)
        del params, restored

        # ---- step --------------------------------------------------------------------------------
        train_step = make_train_step(config, model, optimizer)
        train_step = compiled(config, train_step, shardings, mesh)
        eval_step = jax.jit(make_eval_step(config, model))

        def evaluate(params: Any, step: int) -> dict[str, float]:
            """Log the metrics of each evaluation set; return those that rank checkpoints."""
            measured = {}
            for name, opened in eval_data.items():
                batches = min(config.eval_batches, getattr(opened, "num_batches", None) or math.inf)
                sizes = getattr(opened, "token_bytes", None)
                sums: collections.Counter = collections.Counter()
                for _, batch in prefetch(from_(opened), range(int(batches))):
                    sums.update(jax.device_get(eval_step(params, batch, sizes)))
                found = summary({key: float(value) for key, value in sums.items()})
                metrics.write(step, "eval", name=name, **found)
                for metric in ("loss", "bits_per_byte"):
                    if metric in found:
                        measured[f"{name}/{metric}"] = found[metric]
            return measured

        # ---- claim -------------------------------------------------------------------------------
        left_open.callback(claim.release)
        claim.take(model.config.to_dict())
        metrics = left_open.enter_context(contextlib.closing(Metrics(config, first)))

        # ---- loop --------------------------------------------------------------------------------
        stopped = False
        shown = progress.track("train", config.steps, "steps", initial=first)
        with shown if chief else contextlib.nullcontext() as task:
            meter = Meter(metrics, claim, task, started)
            for step, batch in prefetch(from_(data), range(first, config.steps)):
                profiler.before(step)
                with _compiling() if step == first else contextlib.nullcontext():
                    state, values = train_step(state, batch)
                flops = training_flops(model.config, jax.tree.map(jnp.shape, batch))
                step += 1  # from here on the number of updates
                profiler.after(step, values)

                last = step == config.steps
                stopped = stop.requested(step) and not last
                evaluates = last or step % config.eval_every == 0
                saves = last or stopped or step % config.checkpoint_every == 0
                logs = evaluates or saves or step % config.log_every == 0
                meter.add(step, values, flops, logs)
                meter.read(all_but=0 if evaluates or saves else 2)
                with meter.pause():
                    found = evaluate(state.params, step) if evaluates else None
                    if saves:
                        metrics.checkpointed()  # first: a restart needs both
                        checkpoints.save(step, state.params, state.opt_state, found)
                if stopped:
                    break
        checkpoints.wait()
        if stopped:
            _say(f"{run}: stopped at step {step}; the same command continues from there")
            return None

        # ---- result ------------------------------------------------------------------------------
        final = metrics.last("train")
        result = {
            "steps": config.steps,
            "config_digest": claim.digest,
            "parameters": model.parameter_count(),
            "loss": final["loss"],
            "eval": {
                name: {
                    metric: value
                    for metric, value in metrics.last("eval", name).items()
                    if metric not in ("step", "kind", "name")
                }
                for name in eval_data
            },
            **{name: final[name] for name in ("tokens", "target_tokens", "flops", "seconds")},
        }
        if chief:
            write_text(run / "result.json", json.dumps(result, indent=1, sort_keys=True) + "\n")
        return result


def main() -> int:
    """Run the command line; return the exit status."""
    IMPORTS.end()
    runtime.join(ARGUMENTS)
    host_memory.keep_freed()
    files, bindings = configuration.read_arguments(
        "train", None, *command.main_settings("train"), ARGUMENTS, UNKNOWN
    )
    config = configuration.build(NAME, CONFIGURABLES, files, bindings)
    try:
        return runtime.RESTART if train(config) is None else 0
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0][:300]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise RunError(
                f"out of device memory ({reason}). Shard the model (Train.mesh), recompute more "
                "(Train.remat) or use smaller batches (Train.microbatches)"
            ) from error
        if "compile option" in reason:
            raise RunError(f"Train.compiler_options: {reason}") from error
        raise


if __name__ == "__main__":
    sys.exit(command.exit_status(main))
