"""Attention between tokens of packed rows: the plan of it, and the layer with its projections.

- An `AttentionPlan` owns which keys a query sees, the relative position bias, and the kernel that
  computes with them. It is built once per forward pass and shared by the layers.
- The kernel is one setting of the configuration, `attention`. "auto" chooses the best kernel that
  the platform and the shape allow (`kernels.AUTO`); any other setting is used, or an error.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import kernels
from models.errors import ModelError
from models.kernels import Dropout, Kernel, Needs, Operands
from models.kernels.plain import KERNEL as PLAIN
from models.kernels.segments import MASKED, Branches
from models.layers import ATTENTION_INIT, Initializer, Linear, RMSNorm, einsum
from models.partitioning import constrain, platform
from models.positions import Rotation, rotate
from models.relative_bias import RelativePositionBias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Visibility, relative position bias and kernel of an attention.

    Attributes:
      kernel: the kernel; it decides the form of the other two.
      visible: which keys each query sees, from `Kernel.visibility`.
      bias: from `Kernel.bias`, or None.
      lengths: numbers of queries and keys.
    """

    kernel: Kernel = dataclasses.field(metadata={"static": True})
    visible: Any
    bias: jax.Array | None
    lengths: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def with_bias(self, relative: RelativePositionBias | None) -> AttentionPlan:
        """Return the plan with a bias of its tokens on themselves; unchanged if given None."""
        if relative is None:
            return self
        return dataclasses.replace(self, bias=self.kernel.bias(relative, *self.lengths))


def plan_attention(
    setting: str,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    head_dim: int,
    dtype: str,
    causal: bool = False,
    window: int | None = None,
    softcap: bool = False,
    dropout_per_query: bool = False,
    branches: Branches | None = None,
) -> AttentionPlan:
    """Return the plan of an attention, without bias.

    Args:
      setting: the configuration's `attention`: "auto", a name in `kernels.KERNELS`, or an import
        path.
      query_segments, key_segments: ids [batch, queries] and [batch, keys], 0 for padding; tokens
        attend within their segment.
      dtype: the compute dtype.
      causal, window, branches: see `segment_mask`.
      softcap: whether scores have a soft cap.
      dropout_per_query: whether each query drops keys of its own.

    Raises:
      ValueError: the setting names a kernel that cannot compute this attention.
    """
    lengths = query_segments.shape[1], key_segments.shape[1]
    needs = Needs(
        *lengths, head_dim, dtype, causal, window is not None, softcap, dropout_per_query,
        branches is not None,
    )  # fmt: skip
    kernel = _automatic(needs) if setting == "auto" else kernels.find(setting)
    if reason := kernel.unsupported(needs):
        raise ModelError(f"attention={setting!r} {reason}; use 'auto' or 'xla'")
    further = {} if branches is None else {"branches": branches}
    visible = kernel.visibility(
        query_segments, key_segments, causal=causal, window=window, **further
    )
    return AttentionPlan(kernel, visible, None, lengths)


def _automatic(needs: Needs) -> Kernel:
    """Return the first kernel of the platform that is worth it and can compute this attention."""
    for name, least in kernels.AUTO.get(platform(), ()):
        if needs.queries * needs.keys >= least and not kernels.find(name).unsupported(needs):
            return kernels.find(name)
    return PLAIN


def masked_plan(mask: jax.Array, bias: jax.Array | None = None) -> AttentionPlan:
    """Return the plan of an attention with the plain kernel.

    Args:
      mask: bool [1 or batch, 1, 1 or queries, keys]; False hides.
      bias: float32, broadcastable to [batch, heads, queries, keys].
    """
    queries, keys = mask.shape[2:]
    return AttentionPlan(PLAIN, mask, bias, (queries, keys))


class KeyValues(NamedTuple):
    """Keys and values, [batch, length, kv_heads, head_dim] each; in a cache, of all layers:
    [layers, batch, length, kv_heads, head_dim]."""

    key: jax.Array
    value: jax.Array

    def written(self, new: KeyValues, slot: int | jax.Array) -> KeyValues:
        """Return these of one layer with `new` [batch, n, ...] from index `slot` on."""
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
        return KeyValues(*map(update, self, new))

    def written_everywhere(self, new: KeyValues, slot: int | jax.Array) -> KeyValues:
        """Return these of all layers with `new` [layers, batch, n, ...] from index `slot` on."""
        return jax.vmap(KeyValues.written, in_axes=(0, 0, None))(self, new, slot)


class Attention(nnx.Module):
    """Attention with its projections; their kernels are [d_model, heads * head_dim]."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Callable[[int, str], RMSNorm | None] | None = None,
        joint_norm: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
        dropout_rate: float = 0.0,
        dropout_broadcast: tuple[int, ...] = (),
        init: Initializer | None = None,
        cross: bool = False,
        source_size: int | None = None,
    ):
        """Declare the parameters.

        Args:
          qk_norm: makes the norm of queries and keys, given features and their logical axis.
          joint_norm: the norm is of all heads together instead of each head.
          init: initializer of the projections; None for T5's.
          cross: keys and values are projected from an encoder's states.
          source_size: their width; None for d_model.
        """
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim
        self.joint_norm = joint_norm
        self.scale = scale
        self.softcap = softcap
        self.dropout_rate = dropout_rate
        self.dropout_broadcast = dropout_broadcast
        inner, kv_inner = num_heads * head_dim, self.num_kv_heads * head_dim
        kernel_init = init or ATTENTION_INIT
        query_init = init or functools.partial(_query_init, head_dim)
        into, into_kv = ("embed", "heads"), ("embed", "kv_heads")
        if self.num_kv_heads == num_heads:
            into_kv = into
        self.query = Linear(d_model, inner, into, bias=qkv_bias, init=query_init, name="heads")
        of_source = functools.partial(
            Linear,
            source_size or d_model,
            kv_inner,
            into_kv,
            bias=qkv_bias,
            init=kernel_init,
            name="cross" if cross else "heads",
        )
        self.key, self.value = of_source(), of_source()
        self.out = Linear(inner, d_model, ("heads", "embed"), bias=out_bias, init=kernel_init)
        norm = qk_norm or (lambda features, axis: None)
        per_head = (head_dim, "head_dim")
        self.query_norm = norm(*((inner, into[1]) if joint_norm else per_head))
        self.key_norm = norm(*((kv_inner, into_kv[1]) if joint_norm else per_head))

    def __call__(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        *,
        source: jax.Array | None = None,
        rotation: Rotation | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Attend from x to `source`, or to x itself. [batch, length, d_model] -> the same shape."""
        query = self.queries(x, rotation)
        pairs = self.keys_values(x if source is None else source, rotation)
        return self.attend(query, pairs, plan, dropout_key=dropout_key)

    def step(
        self,
        x: jax.Array,
        plan: AttentionPlan,
        cache: KeyValues,
        slot: int | jax.Array,
        rotation: Rotation | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Attend from new tokens to a cache and to themselves.

        Args:
          x: [batch, n, d_model].
          plan: of n queries and as many keys as the cache has slots.
          cache: of this layer, without the new tokens.
          slot: index in the cache of the first new token.

        Returns:
          [batch, n, d_model], and the keys and values of the new tokens.
        """
        new = self.keys_values(x, rotation)
        return self.attend(self.queries(x, rotation), cache.written(new, slot), plan), new

    def queries(self, x: jax.Array, rotation: Rotation | None = None) -> jax.Array:
        """Project [batch, length, d_model] -> [batch, length, heads, head_dim]."""
        return self._heads(self.query(x), self.num_heads, self.query_norm, rotation)

    def keys_values(self, x: jax.Array, rotation: Rotation | None = None) -> KeyValues:
        """Project [batch, length, d_model] to keys and values."""
        key = self._heads(self.key(x), self.num_kv_heads, self.key_norm, rotation)
        return KeyValues(key, self._heads(self.value(x), self.num_kv_heads))

    def attend(
        self,
        query: jax.Array,
        pairs: KeyValues,
        plan: AttentionPlan,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Attend and project: [batch, queries, heads, head_dim] -> [batch, queries, d_model]."""
        drop = Dropout(self.dropout_rate, dropout_key, self.dropout_broadcast)
        operands = Operands(query, *pairs, plan.visible, plan.bias, self.scale, self.softcap, drop)
        return self.out(plan.kernel.attend(operands))

    def absorbed(self, x: jax.Array, source: jax.Array, *, mask: jax.Array) -> jax.Array:
        """Attend from x to `source` as `__call__` does, without computing keys and values.

        (query) (W_k source) = (W_k query) source, and a weighted sum of W_v source is W_v times
        that of the source: equal but for rounding, and cheaper with fewer queries than `head_dim`.
        There is no dropout.

        Raises:
          ValueError: keys or values have a bias, a norm or groups.
        """
        plain = self.key.bias is None and self.value.bias is None and self.key_norm is None
        if not plain or self.num_kv_heads != self.num_heads:
            raise ModelError("keys and values with biases, norms or groups cannot be absorbed")
        by_head = (-1, self.num_heads, self.head_dim)
        into_keys = self.key.kernel[...].reshape(by_head)  # [d_model, heads, head_dim]
        into_values = self.value.kernel[...].reshape(by_head)
        query = einsum("bqhd,mhd->bqhm", self.queries(x), into_keys)
        scores = einsum("bqhm,bkm->bhqk", query, source, jnp.float32)
        if self.scale != 1.0:
            scores = scores * self.scale
        weights = jax.nn.softmax(jnp.where(mask, scores, MASKED), axis=-1)
        mixed = einsum("bhqk,bkm->bhqm", weights.astype(source.dtype), source)
        attended = einsum("bhqm,mhd->bqhd", mixed, into_values)
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def _heads(
        self,
        x: jax.Array,
        heads: int,
        norm: RMSNorm | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        if norm is not None and self.joint_norm:
            x = norm(x)
        x = x.reshape(*x.shape[:2], heads, self.head_dim)
        x = constrain(x, ("batch", "length", "heads", None))
        if norm is not None and not self.joint_norm:
            x = norm(x)
        return x if rotation is None else rotate(x, rotation)


def _query_init(head_dim: int, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return ATTENTION_INIT(key, shape, dtype) / np.sqrt(head_dim)
