"""Attention: masks from segment ids, T5's relative position bias, rotary positions, the softmax.

- `dot_product_attention` is the plain reference that every faster kernel is compared with. Scores
  and softmax are float32 whatever the compute dtype.
- Which kernel runs is one setting of the configuration, `attention`, read by `attention_mask`: it
  returns the mask itself for the plain form, and for a kernel the `Segments` that the mask follows
  from. Whoever gets `Segments` never sees [batch, heads, queries, keys] in memory. "auto" takes the
  best that the platform and the shape allow; anything else runs as told, or raises.
- Scores are not scaled by default: T5 folds 1/sqrt(d) into the query's initialisation. Whoever
  wants it says so (`scale`).
- Rows are packed: tokens attend within their own segment only, and segment 0 is padding. A row of
  padding queries attends uniformly, to no harm: nobody reads it.
- Grouped-query attention never repeats a key or value: the queries are viewed in groups.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.config import RopeScaling
from models.kernels import relative
from models.kernels.looped import looped_attention, strip
from models.layers import (
    ATTENTION_INIT,
    RELPOS_INIT,
    Initializer,
    Linear,
    RMSNorm,
    dropout,
    einsum,
    parameter,
)
from models.partitioning import constrain, parts, per_shard, platform

# NOTE: finite, so that a row without any visible key gives a uniform softmax and not NaN.
MASKED = -1e10

# What "auto" runs, and from how many queries x keys of a row on. Fewer scores are no faster in a
# loop, because they fit the cache; nor in the kernel, whose programs have a fixed cost.
_AUTO = {"cpu": ("looped", 256 * 256), "tpu": ("pallas", 128 * 256)}


# --------------------------------------------------------------------------------------------------
# Masks and positions


def segment_mask(
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
) -> jax.Array:
    """Who sees whom: same segment, not padding, with `causal` not the future.

    Takes ids [batch, queries] and [batch, keys], 0 where padding; returns bool
    [batch, 1, queries, keys]. `window` also hides all but so many latest tokens. Both compare
    array indices, so queries and keys must be the same tokens.

        segments 1 1 2 0, causal:  1 . . .
                                   1 1 . .
                                   . . 1 .
                                   . . . .
    """
    queries, keys = query_segments[:, :, None], key_segments[:, None, :]
    mask = (queries == keys) & (keys > 0)
    length = query_segments.shape[1]
    if causal:
        mask &= jnp.tri(length, dtype=bool)
    if window is not None:
        mask &= ~jnp.tri(length, k=-window, dtype=bool)
    return mask[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """What `segment_mask` spells out, for a kernel that works it out block by block.

    Attributes:
      queries, keys: int32 [batch, queries] and [batch, keys], 0 where padding.
      causal: a query sees no key of a higher index.
      kernel: the one that attention runs with.
    """

    queries: jax.Array
    keys: jax.Array
    causal: bool = dataclasses.field(metadata={"static": True})
    kernel: str = dataclasses.field(metadata={"static": True})


def attention_mask(
    setting: str,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    causal: bool = False,
    head_dim: int,
    dtype: str,
    only_plain: str | None = None,
) -> jax.Array | Segments:
    """Who sees whom, in the form that the kernel to be used wants: see `segment_mask`.

    Args:
      setting: the configuration's `attention`. "xla": batched and plain. "looped": one row and head
        at a time. "pallas": the TPU kernel; "pallas_interpret": its steps run in XLA, for tests.
        "cudnn": cuDNN's fused kernel, see `Attention._fused`. "auto": on a CPU "looped" for long
        rows, on a TPU "pallas", where they can do it; else "xla".
      dtype: the compute dtype.
      only_plain: what this attention needs that no kernel has, or None.

    Raises:
      ValueError: the setting names a kernel that cannot do it.
    """
    kernel = setting
    if setting == "auto":
        kernel, least = _AUTO.get(platform(), ("xla", 0))
        scores = query_segments.shape[1] * key_segments.shape[1]
        fits = kernel != "pallas" or relative.unsupported(head_dim) is None
        if scores < least or only_plain is not None or not fits:
            kernel = "xla"
    if kernel == "xla":
        return segment_mask(query_segments, key_segments, causal=causal)
    if only_plain is not None:
        raise ValueError(f"attention={setting!r} has no {only_plain}; use 'auto' or 'xla'")
    if kernel.startswith("pallas") and (error := relative.unsupported(head_dim)):
        raise ValueError(error)
    if kernel == "cudnn" and dtype != "bfloat16":
        raise ValueError(f"attention='cudnn' computes in bfloat16 only, not in {dtype}; use 'xla'")
    return Segments(query_segments, key_segments, causal, kernel)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Position of every token within its segment: 1 1 1 2 2 0 -> 0 1 2 0 1 0. [batch, length]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    start = jax.lax.cummax(jnp.where(segment_ids != previous, index, 0), axis=1)
    return index - start


# --------------------------------------------------------------------------------------------------
# Relative position bias


@functools.cache
def _buckets(bidirectional: bool, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every relative position -max_distance..max_distance, int32 [2 * max_distance + 1].

    Half of a direction's buckets hold one distance each, the rest are spaced by the logarithm;
    whatever is max_distance away or more falls into the last.
    """
    relative = np.arange(-max_distance, max_distance + 1)  # key - query
    if bidirectional:
        buckets //= 2
        offset, distance = np.where(relative > 0, buckets, 0), np.abs(relative)
    else:
        offset, distance = 0, np.maximum(-relative, 0)
    exact = buckets // 2
    # NOTE: T5X's epsilon keeps the distances at which the logarithm is a whole number (16, 32, 64)
    # from falling one bucket short by rounding.
    ratio = np.maximum(distance, 1).astype(np.float32) / exact + np.finfo(np.float32).eps
    spaced = exact + np.log(ratio) / np.log(max_distance / exact) * (buckets - exact)
    spaced = np.minimum(spaced.astype(np.int32), buckets - 1)
    return (offset + np.where(distance < exact, distance, spaced)).astype(np.int32)


class RelativePositionBias(nnx.Module):
    """T5's learned bias on attention scores, one number per head and bucket of key - query."""

    def __init__(self, num_heads: int, buckets: int, max_distance: int, *, bidirectional: bool):
        self.rel_embedding = parameter(
            (num_heads, buckets), ("relpos_heads", "relpos_buckets"), RELPOS_INIT
        )
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def beside(self, mask: jax.Array | Segments, length: int) -> jax.Array:
        """The bias of `length` tokens on themselves, in the form wanted by the kernel of `mask`.

        float32 [1, heads, length, length]; for the loop the `strip` that it describes; for the TPU
        kernel [heads, 2 * max_distance + 1], one value for each key - query.
        """
        kernel = mask.kernel if isinstance(mask, Segments) else "xla"
        if kernel.startswith("pallas"):
            return self._by_distance()
        return self(*strip(length, length)) if kernel == "looped" else self(length, length)

    def _by_distance(self) -> jax.Array:
        table = self.rel_embedding[...]
        buckets = _buckets(self.bidirectional, table.shape[1], self.max_distance)
        return table.astype(jnp.float32)[:, jnp.asarray(buckets)]

    def __call__(self, queries: int, keys: int, offset: int | jax.Array = 0) -> jax.Array:
        """The bias of queries at indices offset, offset + 1, ... on keys at 0, 1, ...

        Array indices serve packed rows too: the bias depends on key - query alone, and other
        segments are masked. Returns float32 [1, heads, queries, keys].
        """
        by_distance = self._by_distance()
        heads = by_distance.shape[0]
        # One value per diagonal, then a Toeplitz matrix of them by reshaping: of a tiling with rows
        # of n, read as rows of n - 1, each row is the last one shifted right by one. The gradient
        # of that is a sum over rows, where gathering [queries, keys] numbers would scatter.
        n = queries + keys
        diagonal = jnp.arange(n)
        relative = jnp.where(diagonal < keys, diagonal, diagonal - n) - offset
        relative = jnp.clip(relative, -self.max_distance, self.max_distance)
        values = by_distance[:, relative + self.max_distance]  # [heads, n]
        tiled = jnp.broadcast_to(values[:, None], (heads, queries, n))
        skewed = tiled.reshape(heads, queries * n)[:, : queries * (n - 1)]
        return skewed.reshape(1, heads, queries, n - 1)[..., :keys]


# --------------------------------------------------------------------------------------------------
# Rotary positions


def rotary(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `rotate`, float32 [batch, length, 1, head_dim // 2] each."""
    # In NumPy and float64: an error in the last place would grow with the position.
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None:
        frequency = _scaled_frequencies(frequency, scaling)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency.astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def _scaled_frequencies(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    slow = frequency / scaling.factor
    if scaling.kind == "linear":
        return slow
    wavelengths = scaling.original_length * frequency / (2 * np.pi)  # within the original length
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = np.clip((wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - share) * slow + share * frequency


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [batch, length, heads, head_dim]; dimension i pairs with i + head_dim // 2."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


# --------------------------------------------------------------------------------------------------
# Attention


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_broadcast: tuple[int, ...] = (),
) -> jax.Array:
    """softmax(scale * query key + bias) value, plainly.

    Args:
      query: [batch, queries, heads, head_dim].
      key, value: [batch, keys, kv_heads, head_dim]; kv_heads divides heads, and query head h reads
        key head h // (heads / kv_heads).
      bias: float32, broadcastable to [batch, heads, queries, keys].
      mask: bool, broadcastable to [batch, 1, queries, keys]; False hides.
      softcap: scores are squashed into (-softcap, softcap) by tanh (Gemma 2).
      dropout_broadcast: axes of [batch, heads, queries, keys] that share one draw of dropout.

    Returns:
      [batch, queries, heads, head_dim] in query's dtype.
    """
    batch, queries, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = einsum("bqgrd,bkgd->bgrqk", grouped, key, jnp.float32)
    scores = scores.reshape(batch, heads, queries, keys)
    if scale != 1.0:
        scores = scores * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1)
    weights = dropout(weights, dropout_rate, dropout_key, broadcast=dropout_broadcast)
    weights = weights.astype(query.dtype).reshape(batch, kv_heads, -1, queries, keys)
    attended = einsum("bgrqk,bkgd->bqgrd", weights, value)
    return attended.reshape(batch, queries, heads, value.shape[-1])


class Attention(nnx.Module):
    """Projections around `dot_product_attention`; kernels are 2-D, [d_model, heads * head_dim]."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: Any = None,
        scale: float = 1.0,
        softcap: float | None = None,
        dropout_rate: float = 0.0,
        dropout_broadcast: tuple[int, ...] = (),
        init: Initializer | None = None,
        cross: bool = False,
    ):
        """`qk_norm`: None, or a function that makes the norm of a head; `init`: None for T5's.

        `cross`: it attends to an encoder.
        """
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim
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
        name = "cross" if cross else "heads"
        of_source = functools.partial(
            Linear, d_model, kv_inner, into_kv, bias=qkv_bias, init=kernel_init, name=name
        )
        self.key, self.value = of_source(), of_source()
        self.out = Linear(inner, d_model, ("heads", "embed"), bias=out_bias, init=kernel_init)
        self.query_norm: RMSNorm | None = qk_norm() if qk_norm else None
        self.key_norm: RMSNorm | None = qk_norm() if qk_norm else None

    def queries(self, x: jax.Array, rotation=None) -> jax.Array:
        """[batch, length, d_model] -> [batch, length, heads, head_dim]."""
        return self._heads(self.query(x), self.num_heads, self.query_norm, rotation)

    def keys_values(self, x: jax.Array, rotation=None) -> tuple[jax.Array, jax.Array]:
        """[batch, length, d_model] -> keys and values, [batch, length, kv_heads, head_dim] each."""
        key = self._heads(self.key(x), self.num_kv_heads, self.key_norm, rotation)
        return key, self._heads(self.value(x), self.num_kv_heads)

    def attend(
        self, query, key, value, *, bias=None, mask=None, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Attention and output projection, [batch, queries, d_model]; `mask` may be `Segments`."""
        if isinstance(mask, Segments):
            kept = self._kept(query.shape[0], key.shape[1], dropout_key)
            if mask.kernel == "looped":
                attended = self._loop(query, key, value, bias, kept, mask)
            elif mask.kernel == "cudnn":
                attended = self._fused(query, key, _scaled(value, kept), bias, mask)
            else:
                return self.out(self._tiled(query, key, _scaled(value, kept), bias, mask))
        else:
            attended = dot_product_attention(
                query,
                key,
                value,
                bias=bias,
                mask=mask,
                scale=self.scale,
                softcap=self.softcap,
                dropout_rate=self.dropout_rate,
                dropout_key=dropout_key,
                dropout_broadcast=self.dropout_broadcast,
            )
        attended = checkpoint_name(attended, "attention")
        return self.out(attended.reshape(*attended.shape[:2], -1))

    def _kept(self, batch, keys, dropout_key):
        """Dropout of the weights, one draw for all queries: [batch, heads, keys], or None."""
        if dropout_key is None or self.dropout_rate == 0.0:
            return None
        ones = jnp.ones((batch, self.num_heads, 1, keys), jnp.float32)
        return dropout(ones, self.dropout_rate, dropout_key)[:, :, 0]

    def _loop(self, query, key, value, bias, kept, segments: Segments):
        # Row by row and head by head, no device needs another's.
        split = "heads" if self.num_kv_heads % parts("heads") == 0 else None
        wide = ("batch", None, split, None)
        given = {
            "query": (query, wide),
            "key": (key, wide),
            "value": (value, wide),
            "query_segments": (segments.queries, ("batch", None)),
            "key_segments": (segments.keys, ("batch", None)),
            "bias": (bias, (None, split, None, None)),
            "kept": (kept, ("batch", split, None)),
        }
        run = functools.partial(looped_attention, causal=segments.causal, scale=self.scale)
        return per_shard(run, given, wide, query.shape)

    def _fused(self, query, key, value, bias, segments: Segments):
        """cuDNN's kernel keeps scores and weights on the chip.

        But it takes one additive bias: a relative bias and the mask are spelled out together,
        [batch, heads, queries, keys] in bfloat16, and so is the gradient. Without a bias it is the
        mask alone, [batch, 1, queries, keys].
        """
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=None if bias is None else bias.astype(query.dtype),
            mask=segment_mask(segments.queries, segments.keys, causal=segments.causal),
            scale=self.scale,
            implementation="cudnn",
        )

    def _tiled(self, query, key, value, bias, segments: Segments):
        """[batch, queries, heads * head_dim]: heads stay side by side, as the projections do."""
        if (group := self.num_heads // self.num_kv_heads) > 1:
            key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
        query, key, value = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        split = "heads" if self.num_heads % parts("heads") == 0 else None
        joined = ("batch", None, split)
        given = {
            "query": (query, joined),
            "key": (key, joined),
            "value": (value, joined),
            "query_segments": (segments.queries, ("batch", None)),
            "key_segments": (segments.keys, ("batch", None)),
            "by_distance": (bias, (split, None)),
        }
        run = functools.partial(
            relative.relative_attention,
            head_dim=self.head_dim,
            causal=segments.causal,
            scale=self.scale,
            interpret=segments.kernel == "pallas_interpret",
        )
        return per_shard(run, given, joined, query.shape)

    def __call__(
        self, x, source=None, *, bias=None, mask=None, rotation=None, dropout_key=None
    ) -> jax.Array:
        """x attends to source, or to itself. [batch, length, d_model] -> the same shape."""
        query = self.queries(x, rotation)
        key, value = self.keys_values(x if source is None else source, rotation)
        return self.attend(query, key, value, bias=bias, mask=mask, dropout_key=dropout_key)

    def absorbed(self, x, source, *, mask: jax.Array) -> jax.Array:
        """As `__call__`, without making keys and values of a source that has few queries.

        (query) (W_k source) = (W_k query) source, and a weighted sum of W_v source is W_v times
        that of the source: exact, and cheaper where there are fewer queries than `head_dim`. Not
        with keys or values that have a bias, a norm or groups; no dropout.
        """
        plain = self.key.bias is None and self.value.bias is None and self.key_norm is None
        if not plain or self.num_kv_heads != self.num_heads:
            raise ValueError("keys and values with biases, norms or groups cannot be absorbed")
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

    def _heads(self, x, heads, norm=None, rotation=None):
        x = x.reshape(*x.shape[:2], heads, self.head_dim)
        x = constrain(x, ("batch", "length", "heads", None))
        if norm is not None:
            x = norm(x)
        return x if rotation is None else rotate(x, rotation)


def _scaled(value, kept):
    """What multiplies a key's weight for every query may as well multiply its value."""
    return value if kept is None else (value * kept.swapaxes(1, 2)[..., None]).astype(value.dtype)


def _query_init(head_dim, key, shape, dtype):
    return ATTENTION_INIT(key, shape, dtype) / np.sqrt(head_dim)
