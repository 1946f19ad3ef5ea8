"""Supervised examples: a pure function of (seed, step), each once an epoch, and nothing cut."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.data.examples import ExamplesConfig
from pruning.store.build import Build
from pruning.store.manifest import ArtifactError

COUNT = 37


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Example i has inputs [100 + i] * (1 + i % 5) and the targets [200 + i]."""
    path = tmp_path_factory.mktemp("examples")
    inputs = [[100 + i] * (1 + i % 5) for i in range(COUNT)]
    targets = [[200 + i] for i in range(COUNT)]
    for name, part in (("part-0", slice(20)), ("part-1", slice(20, None))):
        table = pa.table({"inputs": inputs[part], "targets": targets[part]})
        pq.write_table(table, path / f"{name}.parquet")
    return path


@pytest.fixture
def config(directory):
    return ExamplesConfig(str(directory), batch_size=8, inputs_length=6, targets_length=2, seed=3)


def served(batches, steps) -> list[int]:
    """Which examples the steps hold."""
    rows = [row for k in steps for row in batches.batch(k)["decoder_target_tokens"]]
    return [int(row[0]) - 200 for row in rows if row[0] != 0]


def test_features_are_t5s(config):
    batch = dataclasses.replace(config, shuffle=False).open().batch(0)
    assert batch["encoder_input_tokens"][2].tolist() == [102, 102, 102, 1, 0, 0]
    assert batch["decoder_target_tokens"][2].tolist() == [202, 1]
    assert batch["decoder_input_tokens"][2].tolist() == [0, 202]
    assert batch["decoder_loss_weights"][2].tolist() == [1.0, 1.0]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "encoder_input_tokens": "int32",
        "decoder_input_tokens": "int32",
        "decoder_target_tokens": "int32",
        "decoder_loss_weights": "float32",
    }


def test_in_one_row_the_loss_is_on_the_targets(config):
    config = dataclasses.replace(config, shuffle=False, layout="decoder_only")
    batch = config.open().batch(0)
    assert batch["decoder_target_tokens"][2].tolist() == [102, 102, 102, 202, 1, 0, 0, 0]
    assert batch["decoder_input_tokens"][2].tolist() == [0, 102, 102, 102, 202, 1, 0, 0]
    assert batch["decoder_loss_weights"][2].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_every_epoch_has_every_example_once_in_an_order_of_its_own(config):
    batches = config.open()
    order = served(batches, range(COUNT))  # 8 x 37 rows: eight epochs
    epochs = [order[k * COUNT : (k + 1) * COUNT] for k in range(8)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    other = served(dataclasses.replace(config, seed=4).open(), range(COUNT))
    assert other != order


@given(step=st.integers(0, 10_000), processes=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=25, deadline=None)
def test_a_batch_depends_on_the_step_alone(directory, step, processes):
    config = ExamplesConfig(str(directory), batch_size=8, inputs_length=6, targets_length=2)
    whole = config.open().batch(step)
    parts = [config.open(index, processes).batch(step) for index in range(processes)]
    for name, array in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_one_pass_serves_each_once_and_pads_the_rest(config):
    batches = dataclasses.replace(config, repeat=False).open()
    assert batches.num_batches == 5
    assert sorted(served(batches, range(5))) == list(range(COUNT))
    last = batches.batch(4)
    assert last["decoder_loss_weights"].sum() == 2 * (COUNT - 32)
    assert not last["encoder_input_tokens"][COUNT - 32 :].any()


def test_what_does_not_fit_is_an_error_or_cut_as_asked(config):
    short = dataclasses.replace(config, inputs_length=4, shuffle=False)
    with pytest.raises(ArtifactError, match=r"part-0.parquet, row 3: inputs has 5 tokens"):
        short.open()
    batch = dataclasses.replace(short, truncate=True).open().batch(0)
    assert batch["encoder_input_tokens"][4].tolist() == [104, 104, 104, 1]


def test_an_end_of_sequence_that_is_there_is_not_doubled(tmp_path, config):
    pq.write_table(pa.table({"inputs": [[7, 1]], "targets": [[8, 1]]}), tmp_path / "a.parquet")
    batch = dataclasses.replace(config, path=str(tmp_path)).open().batch(0)
    assert batch["encoder_input_tokens"][0].tolist() == [7, 1, 0, 0, 0, 0]
    assert batch["decoder_target_tokens"][0].tolist() == [8, 1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "holds no Parquet files"),
        ({"inputs": [[1, 2]]}, "no column 'targets'; it has: inputs"),
        ({"inputs": [[1]], "targets": ["yes"]}, "targets is string, not a list of token ids"),
        ({"inputs": [[3], []], "targets": [[4], [5]]}, "row 1: inputs is empty"),
    ],
)
def test_bad_files_are_named(tmp_path, config, table, message):
    if table is not None:
        pq.write_table(pa.table(table), tmp_path / "bad.parquet")
    with pytest.raises(ArtifactError, match=message):
        dataclasses.replace(config, path=str(tmp_path)).open()


def test_a_cut_off_file_is_named(tmp_path, config, directory):
    whole = (directory / "part-0.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"cut\.parquet is not a whole Parquet file"):
        dataclasses.replace(config, path=str(tmp_path)).open()


def test_examples_of_a_stage_are_compared_with_their_digests(tmp_path):
    table = pa.table({"inputs": [[5, 6], [7]], "targets": [[8], [9, 9]]})
    build = Build(tmp_path / "made", "examples", {}, {}, 1, table.schema)
    with build.shard(0) as writer:
        writer.write(table)
    made = build.finish({"vocabulary": {"digest": "0"}})
    config = ExamplesConfig(str(tmp_path / "made"), 2, 4, 4)
    assert config.open().vocabulary == {"digest": "0"}
    file = tmp_path / "made" / made.manifest.shards[0].file
    content = bytearray(file.read_bytes())
    content[30] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        config.open()
