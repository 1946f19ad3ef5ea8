"""`Model`: a configuration, and pure functions of its parameters.

- Parameters are a plain nested dictionary of float32 arrays with T5X's names. Optimizers,
  checkpoints and weight files use this form. NNX modules exist only inside a traced function, for
  the duration of a call (`bind`).
- A Model holds no arrays and is hashable: it can be a static argument, or a closure, of `jax.jit`.
- `init` draws every parameter from its own key, derived from its name: stacked and unrolled models
  start from the same numbers under any sharding.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig, EncoderConfig, ModelConfig, T5Config, T5GemmaConfig
from models.decoder import DecoderLM
from models.encoder import EncoderLM
from models.errors import ModelError
from models.language_model import LanguageModel
from models.t5 import T5
from models.t5gemma import T5Gemma

Params = dict[str, Any]

# The module of each family; a new family is one entry here and one class in models/config.py.
_MODULES: dict[type[ModelConfig], Callable[[Any], LanguageModel]] = {
    T5Config: T5,
    T5GemmaConfig: T5Gemma,
    DecoderConfig: DecoderLM,
    EncoderConfig: EncoderLM,
}


@dataclass(frozen=True)
class Model:
    """A model without its parameters.

    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    logits = jax.jit(lambda params, batch: model.bind(params)(batch))(params, batch)
    """

    config: ModelConfig

    def init(self, key: jax.Array) -> Params:
        """Draw the parameters, float32. Run it under `jax.jit` with out_shardings to shard them."""
        if not self.config.scan_layers:
            stacked = dataclasses.replace(self.config, scan_layers=True)
            return unstack_layers(Model(stacked).init(key))
        # NOTE: lax.map, here and below, because a vectorized generator takes XLA four times as long
        # to compile, and a separate fold_in per name longer than all the drawing.
        layers = {
            path: param.get_value().shape[0] if "layers" in path else 1
            for path, param in self._parameters.items()
        }
        names = [f"{'/'.join(path)}/{i}" for path, count in layers.items() for i in range(count)]
        hashes = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
        folded = jax.lax.map(functools.partial(jax.random.fold_in, key), hashes)
        parts = jnp.split(folded, np.cumsum(list(layers.values()))[:-1])
        keys = dict(zip(layers, parts, strict=True))

        def draw(path: tuple[str, ...], param: nnx.Param) -> jax.Array:
            shape = param.get_value()
            if "layers" not in path:
                return param.initializer(keys[path][0], shape.shape, shape.dtype)
            layer = shape.shape[1:]
            return jax.lax.map(lambda k: param.initializer(k, layer, shape.dtype), keys[path])

        return self._tree(draw)

    def shapes(self) -> Params:
        """Return the parameters' shapes and dtypes: a tree of jax.ShapeDtypeStruct."""
        return self._tree(lambda _, param: param.get_value())

    def logical_axes(self) -> Params:
        """Return the parameters' logical axes: a tree of tuples, one name a dimension."""
        return self._tree(lambda _, param: param.axes)

    def parameter_count(self) -> int:
        """Return the total size of the parameters."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.shapes()))

    def bind(self, params: Params) -> LanguageModel:
        """Return the module with these parameters. Cheap; call it inside the traced function.

        Raises:
          ValueError: `params` is not this model's tree; the keys are named.
        """
        graph, state = _module(self.config)
        expected = {"/".join(path) for path in state}
        given = {"/".join(key.key for key in path) for path, _ in _flatten(params)}
        if given != expected:
            missing, surplus = sorted(expected - given), sorted(given - expected)
            raise ModelError(
                f"parameters do not fit the model: missing {_some(missing)}; "
                f"not of the model {_some(surplus)}"
            )
        return nnx.merge(graph, params)

    @property
    def _parameters(self) -> dict[tuple[str, ...], nnx.Param]:
        return _module(self.config)[1]

    def _tree(self, leaf: Callable[[tuple[str, ...], nnx.Param], Any]) -> Params:
        tree: Params = {}
        for path, param in self._parameters.items():
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = leaf(path, param)
        return tree


def stack_layers(params: Params) -> Params:
    """Join `layers_0`, `layers_1`, ... to `layers` with a leading dimension, at any depth."""
    tree: Params = {}
    layers: dict[int, Params] = {}
    for name, value in params.items():
        if name.startswith("layers_"):
            layers[int(name.removeprefix("layers_"))] = value
        else:
            tree[name] = stack_layers(value) if isinstance(value, dict) else value
    if layers:
        ordered = [layers[i] for i in range(len(layers))]
        tree["layers"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return tree


def unstack_layers(params: Params) -> Params:
    """Invert `stack_layers`."""
    tree: Params = {}
    for name, value in params.items():
        if name == "layers":
            count = len(jax.tree.leaves(value)[0])
            for i in range(count):
                tree[f"layers_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        else:
            tree[name] = unstack_layers(value) if isinstance(value, dict) else value
    return tree


@functools.cache
def _module(config: ModelConfig) -> tuple[nnx.GraphDef, dict[tuple[str, ...], nnx.Param]]:
    """Return the structure of the empty module, and its parameters' declarations by path."""
    graph, state = nnx.split(_MODULES[type(config)](config))
    flat: Any = nnx.to_flat_state(state)
    return graph, dict(flat)


def _flatten(params: Params) -> list[Any]:
    return jax.tree_util.tree_flatten_with_path(params)[0]


def _some(names: list[str], limit: int = 5) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")
