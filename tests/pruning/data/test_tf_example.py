"""Messages that TensorFlow reads back as they were."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.data.tf_example import ExampleError, example

tf = pytest.importorskip("tensorflow", reason="reads the messages back: install [seqio]")

INTEGERS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(width=32)
VALUES = st.one_of(
    INTEGERS, FLOATS, st.text(), st.binary(), st.booleans(), st.none(),
    st.lists(INTEGERS), st.lists(FLOATS, min_size=1), st.lists(st.text(), min_size=1),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=200), VALUES, max_size=6))
def test_tensorflow_reads_what_was_written(row):
    read = tf.train.Example.FromString(example(row)).features.feature
    assert set(read) == {name for name, value in row.items() if value is not None}
    for name, feature in read.items():
        values = row[name] if isinstance(row[name], list) else [row[name]]
        kind = feature.WhichOneof("kind")
        found = list(getattr(feature, kind).value)
        if kind == "bytes_list":
            assert found == [v.encode() if isinstance(v, str) else v for v in values]
        else:
            assert len(found) == len(values)
            assert all(
                a == b or (math.isnan(a) and math.isnan(b))
                for a, b in zip(found, values, strict=True)
            )


def test_a_hash_keeps_its_bits():
    read = tf.train.Example.FromString(example({"hash": 2**64 - 3})).features.feature
    assert read["hash"].int64_list.value[0] % 2**64 == 2**64 - 3


def test_what_has_no_place_is_refused():
    for value in ({"a": 1}, [1, "b"], [[1]]):
        with pytest.raises(ExampleError, match="column"):
            example({"column": value})
