"""Passes of `dedup`, in order; each writes files that the next one reads.

    hashes     unit -> bucket    the hash of every document's text
    exact      bucket -> unit    pairs of documents with the same text
    bands      unit -> bucket    the band keys of every document that is the first with its text
    candidates bucket -> unit    pairs of documents with a band in common
    pairs      unit -> unit      with `min_jaccard`: each pair of candidates once
    sets       unit -> unit      the n-grams of the pairs' first documents
    verified   unit              the pairs that are similar enough

A unit is a run of shards, a bucket a range of hashes.

Choices
- Copies of a text are left out of MinHash: a web page with a thousand copies would fill its buckets
  with a thousand documents and cost as much as distinct ones.
- A document is paired with preceding documents of its bucket: with the last one, which suffices for
  connected components, or with up to `_BEFORE` where pairs are compared, so that one dissimilar
  document does not separate two similar ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pruning.scores.regroup import Regrouped
from pruning.scores.text.dedup import minhash
from pruning.scores.text.dedup.library import Library
from pruning.scores.text.dedup.minhash import MinHash
from pruning.scores.text.dedup.pairs import GRAM, Sets, jaccard, read_sets, unique_pairs
from pruning.scores.text.dedup.share import Share
from pruning.scores.text.hashing import Features
from pruning.store import parallel
from pruning.store.build import Build
from pruning.store.intermediate import Parts

_BEFORE = 8  # largest number of preceding documents compared
PAIR = np.dtype((np.uint64, (2,)))  # two nodes, or a key and a node
_SORTED = 6  # memory of a bucket, as a multiple of its records' size


@dataclasses.dataclass(frozen=True)
class Phases:
    """Passes of `dedup` and their common inputs.

    Attributes:
      minhash: None compares equal texts alone.
      buckets: number of buckets, a power of 2.
      min_jaccard: least Jaccard similarity of compared pairs; None accepts all candidates.
    """

    build: Build
    library: Library
    minhash: MinHash | None
    buckets: int
    min_jaccard: float | None

    def _regrouped(
        self,
        name: str,
        parts: int,
        buckets: int,
        dtype: np.dtype = PAIR,
        beside: tuple[Parts, ...] = (),
    ) -> Regrouped:
        # The file names depend on the number of buckets, and so on the memory.
        files = Parts(self.build, f"{name}-{self.buckets}", parts, beside)
        return Regrouped(files, dtype, buckets)

    @property
    def units(self) -> int:
        return len(self.library.units)

    @property
    def _settings(self) -> MinHash:
        assert self.minhash is not None
        return self.minhash

    @functools.cached_property
    def hashes(self) -> Regrouped:
        return self._regrouped("hashes", self.units, self.buckets)

    @functools.cached_property
    def exact(self) -> Regrouped:
        return self._regrouped("exact", self.buckets, self.units)

    @functools.cached_property
    def bands(self) -> Regrouped:
        """Band keys. One more bucket holds two counts: documents, and those without n-grams."""
        return self._regrouped("bands", self.units, self.buckets + 1)

    @functools.cached_property
    def candidates(self) -> Regrouped:
        return self._regrouped("candidates", self.buckets, self.units)

    @functools.cached_property
    def sets(self) -> Regrouped:
        return self._regrouped("sets", self.units, self.units, GRAM, (self.pairs.parts,))

    @functools.cached_property
    def pairs(self) -> Regrouped:
        return self._regrouped("pairs", self.units, self.units)

    @functools.cached_property
    def verified(self) -> Regrouped:
        """Verified pairs. The second bucket holds two counts: pairs compared, and pairs kept."""
        return self._regrouped("verified", self.units, 2)

    def run(self, share: Share) -> None:
        """Run this host's share of all passes."""
        sizes = self.library.sizes
        ones = [1] * self.buckets
        passes: list[tuple[str, parallel.Work, Regrouped, Sequence[int], str]] = [
            ("hash texts", self.hash_unit, self.hashes, sizes, "documents"),
            ("equal texts", self.find_equal, self.exact, ones, "buckets"),
        ]
        if self.minhash is not None:
            passes += [
                ("MinHash", self.sign_unit, self.bands, sizes, "documents"),
                ("candidates", self.find_candidates, self.candidates, ones, "buckets"),
            ]
        if self.minhash is not None and self.min_jaccard is not None:
            passes += [
                ("n-grams of candidates", self.send_sets, self.sets, sizes, "documents"),
                ("compare candidates", self.verify, self.verified, sizes, "documents"),
            ]
        for name, work, files, amounts, unit in passes:
            share.run(name, work, files.parts, amounts, unit)

    # ----------------------------------------------------------------------------------------------

    def hash_unit(self, unit: int, report: parallel.Report) -> None:
        self.hashes.write(unit, self._by_key(self._hashes(unit)))
        report(self.library.sizes[unit], 0)

    def _hashes(self, unit: int) -> Iterator[np.ndarray]:
        """Yield text hashes and nodes, shard by shard."""
        for place in self.library.units[unit]:
            texts = self.library.texts(place)
            rows = texts.rows(place.shard)
            hashes = texts.corpus.columns(place.shard, ["text_hash"])["text_hash"].to_numpy()
            yield np.stack([hashes[rows], self.library.nodes(place, rows)], axis=1)

    def find_equal(self, bucket: int, report: parallel.Report) -> None:
        nodes, first = _groups(self.hashes.read(bucket))
        heads = nodes[np.flatnonzero(first)][np.cumsum(first) - 1]
        pairs = np.stack([heads, nodes], axis=1)[~first]
        self.exact.write(bucket, [(pairs, self.library.unit_of(pairs[:, 1]))])
        report(1, 0)

    def sign_unit(self, unit: int, report: parallel.Report) -> None:
        counts = np.zeros(2, np.uint64)

        def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            yield from self._by_key(self._band_keys(unit, counts, report))
            yield counts[None], np.array([self.buckets])

        self.bands.write(unit, batches())

    def _band_keys(
        self, unit: int, counts: np.ndarray, report: parallel.Report
    ) -> Iterator[np.ndarray]:
        """Yield band keys and nodes by batch; count documents and those without n-grams."""
        copies = np.sort(self.exact.read(unit)[:, 1])
        for place in self.library.units[unit]:
            texts = self.library.texts(place)
            rows = texts.rows(place.shard)
            rows = rows[~np.isin(self.library.nodes(place, rows), copies, assume_unique=True)]
            nodes = self.library.nodes(place, rows)
            first = 0
            for batch in texts.read(place.shard, rows, Features()):
                keys, some = _band_keys(batch, self._settings)
                of_batch = nodes[first : first + len(batch)][some]
                first += len(batch)
                counts += np.array([len(batch), len(batch) - len(of_batch)], np.uint64)
                yield np.stack([keys.ravel(), np.tile(of_batch, len(keys))], axis=1)
            report(texts.corpus.documents(place.shard), len(rows))

    def find_candidates(self, bucket: int, report: parallel.Report) -> None:
        nodes, first = _groups(self.bands.read(bucket))
        group = np.cumsum(first)
        found = [np.zeros((0, 2), np.uint64)]
        for step in range(1, 2 if self.min_jaccard is None else _BEFORE + 1):
            same = group[step:] == group[:-step]
            found.append(np.stack([nodes[:-step], nodes[step:]], axis=1)[same])
        pairs = unique_pairs(np.concatenate(found))
        self.candidates.write(bucket, [(pairs, self.library.unit_of(pairs[:, 0]))])
        report(1, 0)

    def send_sets(self, unit: int, report: parallel.Report) -> None:
        pairs = unique_pairs(self.candidates.read(unit))
        target = self.library.unit_of(pairs[:, 1])
        self.pairs.write(unit, [(pairs, target)])
        sets = read_sets(self.library, unit, np.unique(pairs[:, 0]), self._settings.n)
        targets = np.unique(target).tolist()
        sent = ((to, sets.some(np.unique(pairs[target == to, 0])).records()) for to in targets)
        self.sets.write(unit, ((records, np.full(len(records), to)) for to, records in sent))
        report(self.library.sizes[unit], 0)

    def verify(self, unit: int, report: parallel.Report) -> None:
        assert self.min_jaccard is not None
        wanted = np.unique(self.pairs.read(unit)[:, 1])
        second = read_sets(self.library, unit, wanted, self._settings.n)
        kept = [np.zeros((0, 2), np.uint64)]
        compared = 0
        for pairs, grams in zip(self.pairs.read_each(unit), self.sets.read_each(unit), strict=True):
            if len(pairs):
                similarity = jaccard(Sets.of(grams), second, pairs)
                kept.append(pairs[similarity >= self.min_jaccard])
                compared += len(pairs)
        found = np.concatenate(kept)
        counts = np.array([[compared, len(found)]], np.uint64)
        zeros = np.zeros(len(found), np.int64)
        self.verified.write(unit, [(found, zeros), (counts, np.array([1]))])
        report(self.library.sizes[unit], 0)

    # ----------------------------------------------------------------------------------------------

    def equal(self) -> Iterator[np.ndarray]:
        """Yield pairs of documents with equal texts, uint64 [., 2]."""
        return (self.exact.read(unit) for unit in range(self.units))

    def similar(self) -> Iterator[np.ndarray]:
        """Yield pairs of documents with similar texts, uint64 [., 2]."""
        if self.minhash is not None and self.min_jaccard is None:
            yield from (self.candidates.read(unit) for unit in range(self.units))
        elif self.minhash is not None:
            yield from self.verified.read_each(0)

    def counts(self) -> dict[str, int]:
        """Return the counts of all passes, over all corpora."""
        if self.minhash is None:
            return {}
        texts, short = self.bands.read(self.buckets).sum(axis=0).tolist()
        counts = {"different_texts": texts, "texts_without_ngram": short}
        if self.min_jaccard is not None:
            pairs, similar = self.verified.read(1).sum(axis=0).tolist()
            counts |= {"compared_pairs": pairs, "similar_pairs": similar}
        return counts

    def _by_key(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield records of keys and nodes, and their buckets: the keys' high bits."""
        shift = np.uint64(64 - (self.buckets.bit_length() - 1))
        for records in batches:
            yield records, (records[:, 0] >> shift).astype(np.int64)


def buckets_for(records: int, memory_gb: float, workers: int) -> int:
    """Return the least power of 2 of buckets that fit into memory and keep all workers busy.

    Args:
      records: number of records of all bands of all documents.
      memory_gb: memory of one process.
      workers: number of processes.
    """
    fit = records * PAIR.itemsize * _SORTED / (memory_gb * 1e9)
    return 1 << max(int(np.ceil(np.log2(max(fit, 1)))), (4 * workers - 1).bit_length(), 4)


def _band_keys(batch, settings: MinHash) -> tuple[np.ndarray, np.ndarray]:
    """Return band keys, uint64 [bands, some], and a mask of documents with n-grams, bool [n]."""
    grams, offsets = minhash.shingles(batch, settings.n)
    some = offsets[1:] > offsets[:-1]
    least = minhash.signatures(grams, np.append(offsets[:-1][some], offsets[-1]), settings)
    return minhash.band_keys(least, settings), some


def _groups(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes with a shared key, ascending by key and node, and a mask of group starts.

    Args:
      records: uint64 [n, 2], keys and nodes.

    Returns:
      uint64 [m], bool [m].
    """
    order = np.argsort(records[:, 0])  # not stable, which takes a third of the time
    keys = records[order, 0]
    same = keys[1:] == keys[:-1]
    several = np.zeros(len(keys), bool)
    several[1:] = same
    several[:-1] |= same
    records = records[order[several]]
    records = records[np.lexsort((records[:, 1], records[:, 0]))]
    first = np.ones(len(records), bool)
    first[1:] = records[1:, 0] != records[:-1, 0]
    return records[:, 1], first
