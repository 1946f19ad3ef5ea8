"""Head of a model that maps a text to one vector: pooling, then a few linear layers.

One module implements the classifiers of transformers (BERT's pooler and classifier, RoBERTa's two
layers, ModernBERT's dense layer with its norm, a decoder's single layer at the last token) and the
modules of sentence-transformers. `models.config.Head` is its configuration.
"""

from __future__ import annotations

import jax
from flax import nnx

from models.config import Head, HeadLayer
from models.layers import ACTIVATIONS, Initializer, LayerNorm, Linear
from models.pooling import pooled


class SequenceHead(nnx.Module):
    """The layers `dense_0`, `dense_1`, ... of a head, each with `linear` and possibly `norm`.

    It computes in float32, regardless of the model's dtype, because its cost is that of one token.
    """

    def __init__(self, config: Head, d_model: int, init: Initializer):
        self.config = config
        inputs = d_model
        for index, layer in enumerate(config.layers):
            setattr(self, f"dense_{index}", _Dense(layer, inputs, init))
            inputs = layer.size

    def __call__(self, states: jax.Array, segment_ids: jax.Array, segments: int) -> jax.Array:
        """Return the vectors of segments 1 .. `segments`, float32 [rows, segments, size].

        Takes states [rows, length, d_model] and ids [rows, length].
        """
        x = pooled(self.config.pooling, states, segment_ids, segments)
        for index in range(len(self.config.layers)):
            x = getattr(self, f"dense_{index}")(x)
        return x


class _Dense(nnx.Module):
    """A linear layer, its activation and its norm."""

    def __init__(self, config: HeadLayer, inputs: int, init: Initializer):
        self.activation = config.activation
        self.linear = Linear(
            inputs, config.size, ("embed", "sentence"), bias=config.bias, init=init
        )
        self.has_norm = config.norm_epsilon is not None
        if config.norm_epsilon is not None:
            self.norm = LayerNorm(
                config.size,
                epsilon=config.norm_epsilon,
                dtype="float32",
                bias=config.norm_bias,
                axis="sentence",
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = ACTIVATIONS[self.activation](self.linear(x))
        return self.norm(x) if self.has_norm else x
