"""The programs that are compiled: those that train.py and the scoring engine run, for a mesh alone.

- Nothing is rebuilt here: the training step and its jit are train.py's, the scoring steps those of
  pruning/scorers, traced as pruning/scoring/device.py traces them.
- Arrays are shapes with shardings on the topology's devices; no number exists.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tpu.chips import Topology

PROGRAMS = ("train", "ask_llm", "likelihood")
# Positions of a row where none are given: encoder, decoder. Training: T5's span corruption of 512
# tokens. Ask-LLM: one document a row, and the one position that answers. Likelihood: one window of
# the estimator "prefix".
LENGTHS = {"train": (512, 114), "ask_llm": (512, 1), "likelihood": (128, 384)}


class ProgramError(ValueError):
    """These settings make no program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One program for one machine: what a cell of the table is.

    Attributes:
      topology: such as "v5e:16x16".
      model: a published size (models/config.py).
      program: "train", "ask_llm" or "likelihood".
      batch: rows of the global batch.
      input_length, target_length: positions of a row, encoder and decoder; 0: the program's usual.
        A decoder-only model has the latter alone.
      fsdp, tensor: mesh axes; the remaining chips are data-parallel.
      settings: fields of the model's configuration to change, as (name, value).
      train: settings of train.py's TrainConfig, likewise.
      options: of the compiler, likewise.
      kernels: cycles of Pallas kernels that are not to be counted, likewise.
    """

    topology: str
    model: str
    program: str
    batch: int
    input_length: int = 0
    target_length: int = 0
    fsdp: int = 1
    tensor: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    kernels: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        if self.program not in PROGRAMS:
            raise ProgramError(f"no program {self.program!r}: give one of {', '.join(PROGRAMS)}")
        chips = Topology.parse(self.topology).chips
        if chips % (self.fsdp * self.tensor):
            raise ProgramError(
                f"fsdp={self.fsdp} x tensor={self.tensor} does not divide {chips} chips"
            )
        rows = chips // self.tensor
        if self.batch % rows:
            raise ProgramError(f"batch={self.batch} is no multiple of {rows}, the chips / tensor")

    @property
    def lengths(self) -> tuple[int, int]:
        given, usual = (self.input_length, self.target_length), LENGTHS[self.program]
        return given[0] or usual[0], given[1] or usual[1]

    @property
    def mesh_axes(self) -> dict[str, int]:
        chips = Topology.parse(self.topology).chips
        data = chips // (self.fsdp * self.tensor)
        return {"data": data, "fsdp": self.fsdp, "tensor": self.tensor}


def model_of(cell: Cell) -> Any:
    """The `models.model.Model`: bfloat16 unless the cell says otherwise."""
    from models.config import NAMED
    from models.model import Model

    if cell.model not in NAMED:
        raise ProgramError(f"no model {cell.model!r}; known: {', '.join(sorted(NAMED))}")
    changes = {"dtype": "bfloat16"} | dict(cell.settings)
    if cell.program == "train":
        changes = {"dropout_rate": 0.0, "remat": "projections"} | changes  # pretraining's
    shape = NAMED[cell.model]
    if unknown := sorted(changes.keys() - {field.name for field in dataclasses.fields(shape)}):
        raise ProgramError(f"{cell.model} has no settings {', '.join(unknown)}")
    return Model(dataclasses.replace(shape, **changes))


def batch_shapes(cell: Cell, family: str) -> dict[str, tuple[int, int]]:
    """Feature -> shape of the global batch."""
    inputs, targets = ((cell.batch, length) for length in cell.lengths)
    decoder = ["decoder_input_tokens"]
    if cell.program == "train":
        encoder = ["encoder_input_tokens"]
        decoder += ["decoder_target_tokens", "decoder_loss_weights"]
        if family == "decoder":
            decoder += ["decoder_segment_ids"]
    else:
        encoder = ["encoder_input_tokens", "encoder_segment_ids"]
        decoder += ["decoder_segment_ids"]
        if cell.program == "likelihood":
            decoder += ["decoder_target_tokens"]
    if family == "decoder":
        if cell.program == "ask_llm":
            shapes = dict.fromkeys(decoder, inputs)
            return shapes | {"answer_segment_ids": targets}
        return dict.fromkeys(decoder, targets)
    return dict.fromkeys(encoder, inputs) | dict.fromkeys(decoder, targets)


def lower(cell: Cell, mesh: Any) -> Any:
    """The traced program (`jax.stages.Lowered`) on a mesh; `.compile()` is what remains."""
    return (_lower_train if cell.program == "train" else _lower_score)(cell, mesh)


def model_flops(cell: Cell) -> float:
    """FLOPs of a step by models/flops.py: of the plain model, however the program computes it."""
    from models import flops

    config = model_of(cell).config
    shapes: Any = batch_shapes(cell, config.family)
    count = flops.training_flops if cell.program == "train" else flops.forward_flops
    total = count(config, shapes)
    if "answer_segment_ids" in shapes:  # logits at the answers only
        head = 2 * config.d_model * config.vocab_size
        total -= head * cell.batch * (cell.lengths[0] - cell.lengths[1])
    return total


def _lower_train(cell: Cell, mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    import train
    from models import partitioning

    model = model_of(cell)
    settings: dict[str, Any] = {"output": "", "data": None, "steps": 1, "model": model.config}
    config = train.TrainConfig(**settings, **dict(cell.train))
    optimizer = train.make_optimizer(config, model)
    rules = partitioning.override(partitioning.RULES, config.rules)
    state = train.abstract_state(model, optimizer, mesh, rules)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    rows = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name.endswith("weights") else jnp.int32, sharding=rows
        )
        for name, shape in batch_shapes(cell, model.config.family).items()
    }
    with partitioning.use(mesh, rules):
        step = train.make_train_step(config, model, optimizer)
        return train.compiled(config, step, shardings, mesh).lower(state, batch)


def _lower_score(cell: Cell, mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from models import partitioning
    from pruning.scorers.ask_llm import answer_log_probabilities
    from pruning.scorers.likelihood import token_nll
    from pruning.scoring import device

    model = model_of(cell)
    params = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(
            shape.shape, jnp.dtype(model.config.dtype), sharding=sharding
        ),
        model.shapes(),
        partitioning.param_shardings(model, mesh),
    )
    if cell.program == "ask_llm":
        yes_and_no = ((4273,), (150,))  # T5's ids; which they are changes nothing
        step = functools.partial(answer_log_probabilities, model, answers=yes_and_no)
    else:
        step = functools.partial(token_nll, model)
    return device.lowered(step, params, mesh, batch_shapes(cell, model.config.family))
