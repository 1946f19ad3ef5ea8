"""RACE sketch: density of the neighborhood of a vector, from counts in hashed buckets.

    count     S[r, h_r(x)] += 1              for every x and every row r
    density   mean over r of S[r, h_r(x)] / N

estimates the mean over all documents y of K(x, y) = P[h(x) = h(y)], a kernel that falls with the
distance (Coleman and Shrivastava 2020; the sampler is Sachdeva et al., arXiv 2402.09668, section
3.3). `collision_probability` is that kernel in closed form.

Choices
- Two families: p-stable projections, h = floor((a.x + b) / w), whose kernel falls with the
  Euclidean distance, and signs of projections, whose kernel falls with the angle.
- `hashes_per_row` hashes that must all agree raise the kernel to that power. With one, the weights
  of the published scores are within 8% of each other, which is nearly uniform sampling.
- Counts are integers (a float32 stops counting at 2**24). Projections are float32 at the highest
  precision: with less, a document may be hashed to different buckets in the two passes.
- A tile of `TILE` rows is the unit of computation on any number of devices, so the hashes and the
  counts are bitwise equal on every mesh.
- Sketches with the same hashes can be added, over devices (psum), files and hosts. The hashes are
  stored with the counts. Every row's sum must be the number of documents, which is checked.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from scipy import special

from pruning.scores.space.embeddings import AXIS
from pruning.store import randomness
from pruning.store.randomness import Stream

_SPREAD = 16  # a unit vector's projections stay within 8 deviations on either side


class SketchError(ValueError):
    """Error for a sketch that is damaged, or does not match another one."""


@dataclasses.dataclass(frozen=True)
class Race:
    """Size and kernel of a sketch.

    Attributes:
      family: "p_stable" (Euclidean distance) or "sign" (angle).
      rows: repetitions R; the relative error falls like 1 / sqrt(R). The paper has 1,000.
      buckets: buckets B of a row. The paper has 20,000.
      hashes_per_row: hashes that must agree; the kernel is raised to this power. The paper does not
        give it; its published scores are consistent with 1.
      bandwidth: w of the p-stable family, in units of a vector's length (vectors have length 1).
        The paper does not give it.
      seed: seed of the hashes.
    """

    family: Literal["p_stable", "sign"] = "p_stable"
    rows: int = 1000
    buckets: int = 20_000
    hashes_per_row: int = 1
    bandwidth: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.hashes_per_row) < 1 or self.buckets < 2 or self.bandwidth <= 0:
            raise ValueError(f"{self}: every size must be positive, with 2 buckets at least.")

    @property
    def mixed(self) -> bool:
        """True if hash values are mixed into buckets; False if they fit without mixing."""
        if self.family == "sign":
            return self.hashes_per_row > 30 or 1 << self.hashes_per_row > self.buckets
        return self.hashes_per_row > 1 or self.buckets * self.bandwidth < _SPREAD

    @property
    def chance(self) -> float:
        """Probability that different hash values share a bucket."""
        return 1.0 / self.buckets if self.mixed else 0.0


def collision_probability(race: Race, cosine: np.ndarray) -> np.ndarray:
    """Return the kernel: the probability that two unit vectors share a row's hash values.

    Args:
      cosine: [...], cosine of the two vectors.

    Returns:
      float64 [...]. p-stable: Datar et al. 2004, section 3.2; sign: Charikar 2002.
    """
    cosine = np.clip(np.asarray(cosine, np.float64), -1.0, 1.0)
    if race.family == "sign":
        return (1.0 - np.arccos(cosine) / np.pi) ** race.hashes_per_row
    distance = np.sqrt(np.maximum(2.0 - 2.0 * cosine, 1e-300))
    t = race.bandwidth / distance
    inside = special.erf(t / np.sqrt(2.0)) + np.sqrt(2.0 / np.pi) / t * np.expm1(-t * t / 2.0)
    return inside**race.hashes_per_row


@dataclasses.dataclass
class Sketch:
    """Hashes and counts. `draw` makes an empty sketch.

    Attributes:
      race: size and kernel.
      projections: float32 [width, rows * hashes_per_row].
      offsets: float32 [rows * hashes_per_row], in units of the bandwidth; zeros for signs.
      counts: int64 [rows, buckets].
    """

    race: Race
    projections: np.ndarray
    offsets: np.ndarray
    counts: np.ndarray

    @classmethod
    def draw(cls, race: Race, width: int) -> Sketch:
        """Return an empty sketch for vectors of `width` components."""
        columns = race.rows * race.hashes_per_row
        random = randomness.generator(Stream.RACE_PROJECTIONS, race.seed, width, columns)
        projections = random.standard_normal((width, columns)).astype(np.float32)
        offsets = random.random(columns).astype(np.float32)
        if race.family == "sign":
            offsets[:] = 0.0
        return cls(race, projections, offsets, np.zeros((race.rows, race.buckets), np.int64))

    @property
    def documents(self) -> int:
        """Number of counted vectors.

        Raises:
          SketchError: the rows disagree, so the counts are damaged or of different sketches.
        """
        sums = self.counts.sum(axis=1)
        if (sums != sums[0]).any():
            bad = int(np.flatnonzero(sums != sums[0])[0])
            raise SketchError(
                f"row 0 of the sketch counts {sums[0]} documents, row {bad} counts {sums[bad]}: "
                "it is damaged. Delete it and count again."
            )
        return int(sums[0])

    def __add__(self, other: Sketch) -> Sketch:
        """Return the sketch of both sets of vectors.

        Raises:
          SketchError: the hashes differ.
        """
        if self.race != other.race or not np.array_equal(self.projections, other.projections):
            raise SketchError(
                f"sketches with different hashes do not add up: {self.race} of width "
                f"{len(self.projections)}, and {other.race} of width {len(other.projections)}."
            )
        return dataclasses.replace(self, counts=self.counts + other.counts)

    def to_bytes(self) -> bytes:
        """Return the sketch as a compressed .npz file."""
        sink = io.BytesIO()
        about = json.dumps(dataclasses.asdict(self.race), sort_keys=True)
        np.savez_compressed(
            sink,
            race=np.array(about),
            projections=self.projections,
            offsets=self.offsets,
            counts=self.counts,
        )
        return sink.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Sketch:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            race = Race(**json.loads(str(file["race"])))
            return cls(race, file["projections"], file["offsets"], file["counts"])


# --------------------------------------------------------------------------------------------------
# On the devices. Tiles come as float32 [tiles, TILE, width], sharded over the first axis.


def buckets_of(race: Race, projections: jax.Array, offsets: jax.Array, x: jax.Array) -> jax.Array:
    """Return the bucket of every vector in every row.

    Args:
      projections, offsets: those of a sketch.
      x: float32 [n, width], of unit length.

    Returns:
      int32 [n, rows], in [0, buckets).
    """
    projected = jnp.matmul(x, projections, precision=jax.lax.Precision.HIGHEST)
    if race.family == "sign":
        values = (projected >= 0).astype(jnp.int32)
    else:
        values = jnp.floor(projected / race.bandwidth + offsets).astype(jnp.int32)
    values = values.reshape(x.shape[0], race.rows, race.hashes_per_row)
    if not race.mixed and race.family == "sign":
        return values @ (1 << jnp.arange(race.hashes_per_row, dtype=jnp.int32))
    if not race.mixed:
        return jnp.mod(values[..., 0], race.buckets)  # floor-mod: hash values may be negative
    mixed = jnp.zeros((), jnp.uint32)
    for i in range(race.hashes_per_row):
        mixed = _mix(mixed * np.uint32(0x9E3779B1) + values[..., i].astype(jnp.uint32))
    return (mixed % np.uint32(race.buckets)).astype(jnp.int32)


def _mix(z: jax.Array) -> jax.Array:
    """Apply MurmurHash3's finalizer, a bijection of 32-bit integers."""
    z = (z ^ (z >> 16)) * np.uint32(0x85EBCA6B)
    z = (z ^ (z >> 13)) * np.uint32(0xC2B2AE35)
    return z ^ (z >> 16)


@functools.partial(jax.jit, static_argnames=("race", "mesh"))
def count_tiles(race, projections, offsets, tiles, valid, mesh) -> jax.Array:
    """Return the counts of one load of tiles.

    Args:
      tiles: float32 [tiles, TILE, width].
      valid: bool [tiles, TILE]; false for padding.
      mesh: devices that share the tiles.

    Returns:
      int32 [rows, buckets], summed over the devices. Accumulate it in int64.
    """
    start = jnp.arange(race.rows, dtype=jnp.int32) * race.buckets

    def on_device(projections, offsets, tiles, valid):
        def add(counts, tile):
            x, real = tile
            place = buckets_of(race, projections, offsets, x) + start  # [TILE, rows]
            return counts.at[place].add(real[:, None].astype(jnp.int32)), None

        empty = jnp.zeros(race.rows * race.buckets, jnp.int32)
        empty = jax.lax.pcast(empty, AXIS, to="varying")
        counts, _ = jax.lax.scan(add, empty, (tiles, valid))
        return jax.lax.psum(counts, AXIS)

    shared = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(), P(AXIS), P(AXIS)), out_specs=P()
    )
    return shared(projections, offsets, tiles, valid).reshape(race.rows, race.buckets)


@functools.partial(jax.jit, static_argnames=("race", "mesh"))
def density_tiles(race, projections, offsets, shares, tiles, mesh) -> jax.Array:
    """Return the density at every vector of one load of tiles.

    Args:
      shares: float32 [rows, buckets], counts / documents.
      tiles: float32 [tiles, TILE, width].

    Returns:
      float32 [tiles, TILE]: the mean share of the documents in the vector's buckets.
    """
    start = jnp.arange(race.rows, dtype=jnp.int32) * race.buckets

    def on_device(projections, offsets, shares, tiles):
        def look_up(x):
            place = buckets_of(race, projections, offsets, x) + start  # [TILE, rows]
            return shares.reshape(-1)[place].mean(axis=1)

        return jax.lax.map(look_up, tiles)

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(), P(), P(AXIS)), out_specs=P(AXIS)
    )(projections, offsets, shares, tiles)


def without_chance(race: Race, share: np.ndarray, documents: int) -> np.ndarray:
    """Return the kernel mean K for a mean share of a bucket: E[share] = K + (1 - K) chance.

    Args:
      share: [n], in (0, 1].
      documents: N; a document is its own neighbor, so that no density is below 1 / N.

    Returns:
      float64 [n], in [1 / N, 1].
    """
    kernel = (np.asarray(share, np.float64) - race.chance) / (1.0 - race.chance)
    return np.maximum(kernel, 1.0 / documents)


def weight_diagnostics(weights: np.ndarray) -> dict[str, float]:
    """Return diagnostics of a sample drawn with these weights.

    Args:
      weights: [n], positive.

    Returns:
      `ess_share`, the effective sample size over N: (sum w)^2 / (N sum w^2), and `max_over_min`.
    """
    w = np.asarray(weights, np.float64)
    w = w / w.max()
    return {
        "ess_share": float(w.sum() ** 2 / (len(w) * (w * w).sum())),
        "max_over_min": float(1.0 / w.min()),
    }
