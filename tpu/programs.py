"""Programs of train.py and of the scoring engine, lowered for a mesh without devices.

- Nothing is reimplemented: the training step and its jit come from train.py, the scoring steps from
  the scorers, traced by the code that the scoring engine uses.
- Arrays are represented by shapes with shardings on the devices of a topology.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from tpu import targets

PROGRAMS = ("train", "ask_llm", "likelihood")
# Default positions of a row: encoder, decoder. Training: span corruption of 512 tokens, as in T5.
# Ask-LLM: one document per row and its answer position. Likelihood: one window of the estimator
# "prefix".
LENGTHS = {"train": (512, 114), "ask_llm": (512, 1), "likelihood": (128, 384)}
OPTIMIZERS = ("Adafactor", "AdamW", "Muon")


class ProgramError(ValueError):
    """Settings for which there is no program."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A variant of a program: a model, batch, mesh and settings on a topology.

    Attributes:
      topology: topology of the slice, such as "v5e:16x16", or GPUs of a machine, "h100:8".
      model: name of a published size (models/published.py).
      program: "train", "ask_llm" or "likelihood".
      batch: rows of the global batch.
      input_length, target_length: encoder and decoder positions of a row; 0 selects the default of
        the program. A decoder-only model uses target_length alone.
      fsdp, tensor: sizes of these mesh axes; the remaining chips are data-parallel.
      settings: changes to the model's configuration, as (name, value).
      train: settings of train.py's TrainConfig, as (name, value); an optimizer by its name.
      options: compiler options, as (name, value).
      kernels: cycles of Pallas kernels whose schedule cannot be counted, as (name, cycles).
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
        chips = targets.parse(self.topology).chips
        if chips % (self.fsdp * self.tensor):
            raise ProgramError(
                f"fsdp={self.fsdp} x tensor={self.tensor} does not divide {chips} chips"
            )
        rows = chips // self.tensor
        if self.batch % rows:
            raise ProgramError(
                f"batch={self.batch} is not a multiple of {rows}, the number of chips / tensor"
            )

    @property
    def lengths(self) -> tuple[int, int]:
        given, usual = (self.input_length, self.target_length), LENGTHS[self.program]
        return given[0] or usual[0], given[1] or usual[1]

    @property
    def mesh_axes(self) -> dict[str, int]:
        chips = targets.parse(self.topology).chips
        data = chips // (self.fsdp * self.tensor)
        return {"data": data, "fsdp": self.fsdp, "tensor": self.tensor}


def model_of(variant: Variant) -> Any:
    """Return the `models.model.Model` of a variant; computes in bfloat16 by default."""
    from models.model import Model
    from models.published import NAMED

    if variant.model not in NAMED:
        raise ProgramError(f"no model {variant.model!r}; known: {', '.join(sorted(NAMED))}")
    changes = {"dtype": "bfloat16"} | dict(variant.settings)
    if variant.program == "train":
        changes = {"dropout_rate": 0.0, "remat": "projections"} | changes  # as in pretraining
    shape = NAMED[variant.model]
    if unknown := sorted(changes.keys() - {field.name for field in dataclasses.fields(shape)}):
        raise ProgramError(f"{variant.model} has no settings {', '.join(unknown)}")
    return Model(dataclasses.replace(shape, **changes))


def batch_shapes(variant: Variant, has_encoder: bool) -> dict[str, tuple[int, int]]:
    """Return the shape of each feature of the global batch."""
    inputs, targets = ((variant.batch, length) for length in variant.lengths)
    decoder = ["decoder_input_tokens"]
    if variant.program == "train":
        encoder = ["encoder_input_tokens"]
        decoder += ["decoder_target_tokens", "decoder_loss_weights"]
        if not has_encoder:
            decoder += ["decoder_segment_ids"]
    else:
        encoder = ["encoder_input_tokens", "encoder_segment_ids"]
        decoder += ["decoder_segment_ids"]
        if variant.program == "likelihood":
            decoder += ["decoder_target_tokens"]
    if not has_encoder:
        if variant.program == "ask_llm":
            shapes = dict.fromkeys(decoder, inputs)
            return shapes | {"answer_segment_ids": targets}
        return dict.fromkeys(decoder, targets)
    return dict.fromkeys(encoder, inputs) | dict.fromkeys(decoder, targets)


def trace(variant: Variant, mesh: Any) -> Any:
    """Return the program traced for a mesh (`jax.stages.Traced`), to be lowered and compiled."""
    return (_trace_train if variant.program == "train" else _trace_score)(variant, mesh)


def model_flops(variant: Variant) -> float:
    """Return the FLOPs of a step by the plain model (models/flops.py)."""
    from models import flops

    config = model_of(variant).config
    shapes: Any = batch_shapes(variant, config.has_encoder)
    count = flops.training_flops if variant.program == "train" else flops.forward_flops
    return count(config, shapes)


def attention_trips(variant: Variant) -> float | None:
    """Return the mean trips of the loops of the attention kernel for TPUs; None if they differ.

    Rows are single documents, so the figure is the most that packed rows need. With an encoder, the
    loops of attentions of several kinds differ.
    """
    from models.kernels import relative

    if model_of(variant).config.has_encoder:
        return None
    shapes = batch_shapes(variant, has_encoder=False)
    return relative.mean_blocks(shapes["decoder_input_tokens"][1])


def _trace_train(variant: Variant, mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    import train
    from models import partitioning

    model = model_of(variant)
    settings: dict[str, Any] = {"output": "", "data": None, "steps": 1, "model": model.config}
    settings |= dict(variant.train)
    if (name := settings.pop("optimizer", None)) is not None:
        if name not in OPTIMIZERS:
            raise ProgramError(f"no optimizer {name!r}: give one of {', '.join(OPTIMIZERS)}")
        settings["optimizer"] = train.CONFIGURABLES[name]()
    config = train.TrainConfig(**settings)
    optimizer = train.make_optimizer(config, model)
    rules = partitioning.override(partitioning.RULES, config.rules)
    state = train.abstract_state(model, optimizer, mesh, rules)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    rows = partitioning.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name.endswith("weights") else jnp.int32, sharding=rows
        )
        for name, shape in batch_shapes(variant, model.config.has_encoder).items()
    }
    with partitioning.use(mesh, rules):
        step = train.make_train_step(config, model, optimizer)
        return train.compiled(config, step, shardings, mesh).trace(state, batch)


def _trace_score(variant: Variant, mesh: Any) -> Any:
    import jax
    import jax.numpy as jnp

    from models import partitioning
    from pruning.scores.model import device
    from pruning.scores.model.ask_llm import answer_log_probabilities
    from pruning.scores.model.likelihood import token_nll

    model = model_of(variant)
    params = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(
            shape.shape, jnp.dtype(model.config.dtype), sharding=sharding
        ),
        model.shapes(),
        partitioning.param_shardings(model, mesh),
    )
    if variant.program == "ask_llm":
        # T5's ids of "yes" and "no"; the cost of the program does not depend on them.
        yes_and_no = ((4273,), (150,))
        step = functools.partial(answer_log_probabilities, model, answers=yes_and_no)
    else:
        step = functools.partial(token_nll, model)
    return device.traced(step, params, mesh, batch_shapes(variant, model.config.has_encoder))
