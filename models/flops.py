"""How much arithmetic a step is and how much a device can do: the two sides of a share of peak.

- Counted: matrix products, attention scores included, two operations per multiply-add, over every
  position of the batch, padding too (packing is what keeps that honest). Not counted: norms,
  softmax, embedding look-ups, what rematerialisation computes twice.
- Attention is counted in full, causal or not, as the published shares of peak do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.config import DecoderConfig, ModelConfig

# Dense bf16 FLOP/s per device as JAX counts devices, from the vendors' data sheets; the names are
# what `device.device_kind` begins with.
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
    """The bf16 peak of one device, FLOP/s; None where the table does not have it (CPUs)."""
    matching = [name for name in PEAK_FLOPS if device.device_kind.startswith(name)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None


def forward_flops(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> float:
    """FLOPs of one forward pass, logits included.

    Args:
        shapes: of a batch, by feature name; read are `encoder_input_tokens` and
            `decoder_input_tokens`, [rows, length].
    """
    rows, length = shapes["decoder_input_tokens"]
    head = 2 * config.d_model * config.vocab_size  # per position
    if isinstance(config, DecoderConfig):
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        layer = 2 * config.d_model * (2 * width + 2 * kv_width) + _mlp(config) + 4 * length * width
        return float(rows * length * (config.num_layers * layer + head))
    encoder_rows, encoder_length = shapes["encoder_input_tokens"]
    width = config.num_heads * config.d_kv
    projection = 2 * config.d_model * width  # one of query, key, value, out
    encoder_layer = 4 * projection + _mlp(config) + 4 * encoder_length * width
    decoder_layer = 6 * projection + _mlp(config) + 4 * (length + encoder_length) * width
    cross_keys_and_values = config.num_decoder_layers * 2 * projection  # per encoder position
    encoder_position = config.num_encoder_layers * encoder_layer + cross_keys_and_values
    decoder_position = config.num_decoder_layers * decoder_layer + head
    return float(
        encoder_rows * encoder_length * encoder_position + rows * length * decoder_position
    )


def training_flops(config: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> float:
    """FLOPs of one training step: the backward pass costs two forward ones."""
    return 3.0 * forward_flops(config, shapes)


def _mlp(config: ModelConfig) -> int:
    """Per position."""
    return 2 * config.d_model * config.d_ff * (3 if config.gated else 2)
