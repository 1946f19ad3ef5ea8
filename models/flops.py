"""FLOPs of a step and peak FLOP/s of devices: the two sides of a share of peak.

- Counted are matrix products, attention scores included, with two operations per multiply-add, over
  all positions of a batch, padding included. Not counted are norms, softmax and embedding look-ups.
- Attention is counted in full, causal or not, as in published shares of peak.
- *Plain* FLOPs are those of the model's definition, whatever the program does: shares of peak by
  them compare as times do, and with published figures. *Executed* FLOPs are those that a program
  computes: without the key and value projections that absorbed cross-attention avoids, with what
  rematerialization computes again. Shares by them say how busy the hardware is.
  `forward_flops(..., absorb=True)` gives the executed FLOPs of absorbed cross-attention in closed
  form, `traced_flops` those of any traced program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from models.config import Experts, ModelConfig

# Dense bf16 FLOP/s per JAX device, from the vendors' data sheets, by the prefix of
# `device.device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # Trillium
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device: Any) -> float | None:
    """Return the bf16 peak of one device in FLOP/s; None if the table lacks it (CPUs)."""
    matching = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def forward_flops(
    config: ModelConfig, shapes: Mapping[str, Sequence[int]], absorb: bool = False
) -> float:
    """Return the FLOPs of one forward pass, logits included.

    Args:
        shapes: shapes of the batch's features: of the sides that the model has,
            `encoder_input_tokens` and `decoder_input_tokens`, [rows, length]; and if present
            `answer_segment_ids`, [rows, answers]: logits are then computed at the answers alone.
        absorb: count cross-attention as `Attention.absorbed` computes it.
    """
    width, projection, kv_projection, layer = _layer(config)
    total = 0
    encoder_length = 0
    if config.has_encoder:
        rows, encoder_length = shapes["encoder_input_tokens"]
        wide, _, _, of_encoder = _layer(config.encoder_shape)
        scores = 4 * encoder_length + 2 * config.position_columns  # by the width of all heads
        per_position = config.encoder_layers * (of_encoder + scores * wide)
        if config.has_decoder and not absorb:  # keys and values of cross-attention
            projected = 2 * config.encoder_shape.d_model * config.kv_heads * config.head_size
            per_position += config.decoder_layers * 2 * projected
        total += rows * encoder_length * per_position
    if not config.has_decoder:
        return float(total)
    rows, length = shapes["decoder_input_tokens"]
    layer += 4 * length * width
    if config.has_encoder:
        layer += 2 * projection
        if absorb:  # the projections of keys and values are applied to queries and mixed sources
            layer += 2 * kv_projection + 4 * encoder_length * config.num_heads * config.d_model
        else:
            layer += 4 * encoder_length * width
    logits = shapes.get("answer_segment_ids", shapes["decoder_input_tokens"])[1]
    # Per position that has logits. Heads for whole texts, of one vector each, are not counted.
    head = 0 if config.head else 2 * config.d_model * config.vocab_size
    return float(total + rows * (length * config.decoder_layers * layer + logits * head))


def _layer(config: ModelConfig) -> tuple[int, int, int, int]:
    """Return the width of all heads and FLOPs per position.

    They are those of the projection of queries, or of attention's output; of keys, or of values;
    and of a layer with self-attention but for its scores.
    """
    width = config.num_heads * config.head_size
    projection = 2 * config.d_model * width
    kv_projection = 2 * config.d_model * config.kv_heads * config.head_size
    return width, projection, kv_projection, 2 * projection + 2 * kv_projection + _mlp(config)


def absorbs_cross_attention(config: ModelConfig, queries: int) -> bool:
    """Return True if cross-attention of this many queries a row is cheaper when absorbed."""
    return config.absorbs and queries < config.head_size


def training_flops(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> float:
    """Return the plain FLOPs of a training step: the backward pass costs two forward passes."""
    return 3.0 * forward_flops(config, shapes)


def traced_flops(jaxpr: Any) -> float:
    """Return the FLOPs of the matrix products that a traced program executes.

    Counts `dot_general` and grouped products in all nested programs: bodies of scans times their
    lengths, those of `shard_map` times the devices, and the more expensive branch of a conditional.
    A Pallas kernel counts as its `CostEstimate` says, or else with its body times the size of its
    grid.

    Args:
        jaxpr: such as `jax.jit(f).trace(...).jaxpr`.

    Raises:
        ValueError: a `while` loop, whose trip count is not in the program, has matrix products.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[dimension] for dimension in contracted)
            total += 2.0 * equation.outvars[0].aval.size * depth
            continue
        if equation.primitive.name == "ragged_dot_general":  # each row, or product of two, once
            rows, inputs = equation.invars[0].aval.shape
            total += 2.0 * rows * inputs * equation.outvars[0].aval.shape[-1]
            continue
        if (estimate := equation.params.get("cost_estimate")) is not None:
            total += estimate.flops
            continue
        inner = [traced_flops(program) for program in _inner_programs(equation.params)]
        if not any(inner):
            continue
        if equation.primitive.name == "shard_map":
            total += equation.params["mesh"].size * sum(inner)
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(inner)
        elif equation.primitive.name == "pallas_call":
            total += math.prod(equation.params["grid_mapping"].grid) * sum(inner)
        elif equation.primitive.name == "cond":
            total += max(inner)
        elif equation.primitive.name == "while":
            raise ValueError("a while loop with matrix products has no known FLOPs: use a scan")
        else:
            total += sum(inner)
    return total


def _inner_programs(parameters: Mapping[str, Any]) -> list[Any]:
    """Return the jaxprs among the parameters of an equation."""
    values = [
        item
        for value in parameters.values()
        for item in (value if isinstance(value, tuple | list) else (value,))
    ]
    return [value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


def _mlp(config: ModelConfig) -> int:
    """Return the FLOPs of the MLP per position; of a mixture of experts, of those chosen."""
    experts: Experts | None = getattr(config, "experts", None)
    if experts is None:
        return 2 * config.d_model * config.d_ff * (3 if config.gated else 2)
    routing = experts.count + (1 if experts.shared_d_ff else 0)
    width = experts.chosen * experts.d_ff + experts.shared_d_ff
    return 2 * config.d_model * (routing + 3 * width)
