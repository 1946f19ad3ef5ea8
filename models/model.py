"""`Model`: a configuration, and pure functions of its parameters.

- Parameters are a plain nested dictionary of float32 arrays, named as T5X names them: what
  optimisers, checkpoints and weight files see. NNX modules exist only inside a traced function, for
  the length of a call (`bind`).
- A Model holds no arrays and is hashable: a static argument, or a closure, of `jax.jit`.
- `init` draws every parameter from a key of its own, derived from its name: stacked and unrolled
  models, and any sharding, start from the same numbers.
"""

import dataclasses
import functools
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import DecoderConfig, ModelConfig, T5Config
from models.decoder import DecoderLM
from models.t5 import T5

Params = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model without its parameters.

    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(0))
    logits = jax.jit(lambda params, batch: model.bind(params)(batch))(params, batch)
    """

    config: ModelConfig

    def init(self, key: jax.Array) -> Params:
        """Draws the parameters, float32. Run it under `jax.jit` with out_shardings to shard it."""

        if not self.config.scan_layers:
            stacked = dataclasses.replace(self.config, scan_layers=True)
            return unstack_layers(Model(stacked).init(key))
        # NOTE: lax.map, here and below, because a vectorised generator takes XLA four times as long
        # to compile, and a fold_in per name by itself longer than all the drawing.
        layers = {
            path: param.get_value().shape[0] if "layers" in path else 1
            for path, param in self._parameters.items()
        }
        names = [f"{'/'.join(path)}/{i}" for path, count in layers.items() for i in range(count)]
        hashes = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
        keys = jax.lax.map(functools.partial(jax.random.fold_in, key), hashes)
        keys = jnp.split(keys, np.cumsum(list(layers.values()))[:-1])
        keys = dict(zip(layers, keys, strict=True))

        def draw(path, param):
            shape = param.get_value()
            if "layers" not in path:
                return param.initializer(keys[path][0], shape.shape, shape.dtype)
            layer = shape.shape[1:]
            return jax.lax.map(lambda k: param.initializer(k, layer, shape.dtype), keys[path])

        return self._tree(draw)

    def shapes(self) -> Params:
        """The parameters' shapes and dtypes: a tree of jax.ShapeDtypeStruct."""
        return self._tree(lambda _, param: param.get_value())

    def logical_axes(self) -> Params:
        """The parameters' logical axes: a tree whose leaves are tuples, one name a dimension."""
        return self._tree(lambda _, param: param.axes)

    def parameter_count(self) -> int:
        """How many numbers the parameters are."""
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.shapes()))

    def bind(self, params: Params) -> T5 | DecoderLM:
        """The module with these parameters in it. Cheap; call it inside the traced function.

        Raises ValueError naming the keys, when `params` is not this model's tree.
        """
        graph, state = _module(self.config)
        expected = {"/".join(path) for path in state}
        given = {"/".join(key.key for key in path) for path, _ in _flatten(params)}
        if given != expected:
            missing, surplus = sorted(expected - given), sorted(given - expected)
            raise ValueError(
                f"parameters do not fit the model: missing {_some(missing)}; "
                f"not of the model {_some(surplus)}"
            )
        return nnx.merge(graph, params)

    @property
    def _parameters(self) -> dict[tuple[str, ...], nnx.Param]:
        return _module(self.config)[1]

    def _tree(self, leaf) -> Params:
        tree: Params = {}
        for path, param in self._parameters.items():
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = leaf(path, param)
        return tree


def stack_layers(params: Params) -> Params:
    """`layers_0`, `layers_1`, ... -> `layers` with a leading [layers] dimension, at any depth."""
    tree = {}
    layers = {}
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
    """The inverse of `stack_layers`."""
    tree = {}
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
    """The empty module: its structure, and its parameters' declarations by path."""
    module = {T5Config: T5, DecoderConfig: DecoderLM}[type(config)](config)
    graph, state = nnx.split(module)
    return graph, dict(nnx.to_flat_state(state))


def _flatten(params: Params):
    return jax.tree_util.tree_flatten_with_path(params)[0]


def _some(names: list[str], limit: int = 5) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if names[limit:] else "")
