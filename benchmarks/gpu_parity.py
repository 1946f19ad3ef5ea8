"""The GPU attention kernel beside the plain form in float32: outputs and gradients.

    python benchmarks/gpu_parity.py                       # every length, head size, dtype, packing
    python benchmarks/gpu_parity.py --lengths 64,512

On a GPU the compiled kernel runs, elsewhere its steps in XLA. Prints the largest difference of the
output and of each gradient by the largest value of that array, and exits with 1 if one is above its
bound: 2e-6 and 1e-5 in float32, 1e-2 in bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.plain import dot_product_attention
from models.kernels.segments import segment_mask
from models.kernels.triton import TUNING, Tuning, fused_attention, generation

BOUNDS = {"float32": (2e-6, 1e-5), "bfloat16": (1e-2, 1e-2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """An attention with random inputs; packed rows of four segments, padding at a row's end.

    `interpret` runs the kernel's steps in XLA; False needs a GPU.
    """

    length: int
    head_dim: int = 64
    keys: int | None = None  # of another sequence
    heads: int = 2
    group: int = 1
    packed: bool = True
    causal: bool = False
    biased: bool = True
    scale: float = 1.0
    reach: int = 40
    dtype: str = "float32"
    tuning: Tuning = TUNING["hopper"][64]
    interpret: bool = True

    def inputs(self) -> tuple[jax.Array, ...]:
        """Return query, key, value, the output's gradient, and the table of the bias."""
        random = np.random.default_rng(self.length + self.head_dim)
        keys, heads = self.keys or self.length, self.heads
        query, gradient = random.normal(size=(2, 2, self.length, heads, self.head_dim))
        key, value = random.normal(size=(2, 2, keys, heads // self.group, self.head_dim))
        table = jnp.asarray(random.normal(size=(heads, 2 * self.reach + 1)), jnp.float32)
        arrays = (query / self.head_dim**0.5, key, value, gradient)
        return (*(jnp.asarray(x, self.dtype) for x in arrays), table)

    def segments(self) -> list[np.ndarray]:
        """Return the segment ids of queries and of keys."""
        found = []
        for length in (self.length, self.keys or self.length):
            ids = np.ones((2, length), np.int32)
            if self.packed:
                ids = (1 + np.arange(length) * np.array([[4], [2]]) // length).astype(np.int32)
                ids[0, -length // 8 :] = 0
            found.append(ids)
        return found

    def differences(self) -> list[float]:
        """Return the largest differences of output and gradients, by the largest value of each."""
        inputs, segments = self.inputs(), [jnp.asarray(ids) for ids in self.segments()]
        length, keys = (ids.shape[1] for ids in segments)
        distance = np.clip(
            np.arange(keys) - np.arange(length)[:, None], -self.reach, self.reach
        )  # [queries, keys]

        def ours(query, key, value, table, segments, key_segments):
            return fused_attention(
                query, key, value, query_segments=segments, key_segments=key_segments,
                by_distance=table if self.biased else None, causal=self.causal, scale=self.scale,
                tuning=self.tuning, interpret=self.interpret,
            )  # fmt: skip

        def theirs(query, key, value, bias, segments, key_segments):
            exact = (x.astype(jnp.float32) for x in (query, key, value))
            bias = bias if self.biased else None
            mask = segment_mask(segments, key_segments, causal=self.causal)
            out = dot_product_attention(*exact, bias=bias, mask=mask, scale=self.scale)
            return jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0.0)

        # Everything is an argument: XLA would compute with constants while it compiles.
        @functools.partial(jax.jit, static_argnums=0)
        def both(attend, query, key, value, gradient, table, *segments):
            out, pull = jax.vjp(lambda *given: attend(*given, *segments), query, key, value, table)
            return out, *pull(gradient.astype(out.dtype))

        *given, table = inputs
        bias = table[None][:, :, distance + self.reach]
        reference = [np.asarray(x, np.float32) for x in both(theirs, *given, bias, *segments)]
        # Summed in float64: float32 would be further off than the kernel in long rows.
        index, count = (distance + self.reach).reshape(-1), table.shape[1]
        reference[-1] = np.stack(
            [np.bincount(index, head.reshape(-1), count) for head in reference[-1][0]]
        )
        found = []
        for a, b in zip(both(ours, *inputs, *segments), reference, strict=True):
            a = np.asarray(a, np.float32)
            assert np.isfinite(a).all()
            found.append(float(np.abs(a - b).max() / (np.abs(b).max() or 1.0)))
        return found


def passes(case: Case) -> bool:
    """Print a case's differences; return True if they are within the bounds."""
    out, *gradients = case.differences()
    bound, gradient_bound = BOUNDS[case.dtype]
    good = out <= bound and max(gradients) <= gradient_bound
    kind = "causal" if case.causal else "both ways"
    told = " ".join(f"{value:.1e}" for value in (out, *gradients))
    print(
        f"{case.length:5} x {case.head_dim:<4} {case.dtype:8} {kind:9} "
        f"{'packed' if case.packed else 'whole':6} {told}{'' if good else '   ABOVE ITS BOUND'}",
        flush=True,
    )
    return good


def cases(lengths: list[int], dtypes: list[str]) -> list[Case]:
    """Return every combination; blocks are those of this GPU, elsewhere of both generations."""
    on_gpu = jax.default_backend() == "gpu"
    kinds = [generation(jax.devices()[0].device_kind)] if on_gpu else list(TUNING)
    return [
        Case(
            length, head_dim, packed=packed, causal=causal, dtype=dtype, reach=128,
            tuning=TUNING[kind][head_dim], interpret=not on_gpu,
        )
        for length, head_dim, dtype, packed, causal, kind in itertools.product(
            lengths, (64, 128), dtypes, (True, False), (False, True), kinds
        )
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="64,114,128,200,256,512,1000,1024,2048")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    given = parser.parse_args()
    chosen = cases(list(map(int, given.lengths.split(","))), given.dtypes.split(","))
    print("length x head size; largest difference of output, query, key, value, table")
    failed = sum(not passes(case) for case in chosen)
    print(f"{len(chosen) - failed} of {len(chosen)} cases within their bounds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
