"""Records grouped on disk: every record comes back from its bucket, once; damage is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath

from pruning.store import shuffle
from pruning.store.atomic import atomic_file
from pruning.store.manifest import ArtifactError

RECORD = np.dtype([("key", "<u8"), ("value", "<f8")])


def written(path, monkeypatch, run: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Write 1,000 records in several runs and return them with their buckets."""
    monkeypatch.setattr(shuffle, "RUN", run)
    rng = np.random.default_rng(0)
    records = np.zeros(1000, RECORD)
    records["key"], records["value"] = np.arange(1000), rng.normal(size=1000)
    bucket = rng.integers(0, 7, 1000)
    bucket[bucket == 3] = 4  # one is empty
    with atomic_file(path) as sink:
        grouped = shuffle.Grouped(sink, RECORD, 7)
        for start in range(0, 1000, 170):
            grouped.add(records[start : start + 170], bucket[start : start + 170])
        grouped.finish()
    return records, bucket


def test_buckets_hold_their_records_in_order(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "part")
    records, bucket = written(path, monkeypatch)
    for number in range(7):
        np.testing.assert_array_equal(shuffle.read(path, RECORD, number), records[bucket == number])


def test_damage_is_noticed(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "part")
    written(path, monkeypatch)
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ArtifactError, match="damaged"):
        for number in range(7):
            shuffle.read(path, RECORD, number)
    for cut in (10, len(whole) - 8):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match="damaged"):
            shuffle.read(path, RECORD, 0)


def test_no_flipped_bit_empties_a_bucket(tmp_path, monkeypatch):
    """A bit flipped anywhere, offsets and counts included: each bucket is whole or refused."""
    path = epath.Path(tmp_path / "part")
    records, bucket = written(path, monkeypatch, run=RECORD.itemsize * 400)
    whole = path.read_bytes()
    footer = len(whole) - 1000 * RECORD.itemsize
    places = [*range(0, len(whole) - footer, 997), *range(len(whole) - footer, len(whole))]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        refused = 0
        for number in range(7):
            try:
                found = shuffle.read(path, RECORD, number)
            except ArtifactError:
                refused += 1
            else:
                np.testing.assert_array_equal(found, records[bucket == number])
        assert refused, place


def test_a_file_under_the_name_of_another_is_refused(tmp_path, monkeypatch):
    path = epath.Path(tmp_path / "part")
    written(path, monkeypatch)
    path.rename(tmp_path / "other")
    with pytest.raises(ArtifactError, match="damaged"):
        shuffle.read(epath.Path(tmp_path / "other"), RECORD, 0)
